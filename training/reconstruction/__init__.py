"""MoCa's first stage: a model learns to look both ways by putting back masked words and masked patches of images."""
