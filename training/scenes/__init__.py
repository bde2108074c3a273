"""A world with ground truth: drawn scenes, captions of them, a parser that reads captions back, and a dataset."""
