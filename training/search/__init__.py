"""A search index of images: its files, how it is built, and how it is searched and asked."""
