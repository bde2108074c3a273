"""Everything around the model: data, training, evaluation, search, captioning, and the command line.

Nothing in this package is needed to load or run a checkpoint, and nothing in it travels to the Hub. Import what you
need from its file, for example `from mmgem.training.search.index import SearchIndex`; importing the package
itself costs nothing.
"""
