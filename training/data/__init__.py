"""Where training rows come from and how they become batches: scenes, sources, mixtures, the collator."""
