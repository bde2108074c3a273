"""Training by what a metric says of the captions that a model writes."""
