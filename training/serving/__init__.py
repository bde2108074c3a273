"""A server of one checkpoint: embeddings, chat and search over HTTP, in the shapes of the clients that people have."""
