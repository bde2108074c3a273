"""MoCa's first stage: a model learns to attend both ways by putting back masked tokens and masked image patches."""
