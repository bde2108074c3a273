"""One HTML page that shows what a checkpoint does."""
