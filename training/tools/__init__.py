"""What is done with a trained model: search, captions of folders, averages, the demo."""
