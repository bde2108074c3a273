"""How good a model is: what it makes of rows, metrics of that, and the calibration of embeddings."""
