"""One folder that everything loads."""

from pathlib import Path


def save_sentence_transformer(model, processor, folder: str | Path):
    """Save a model and its processor, each by its own `save_pretrained`, so that everything loads from one folder.

    `AutoModel`, `AutoProcessor`, the pipelines, `SentenceTransformer` and `MultiVectorEncoder`, each with
    `trust_remote_code=True`, need nothing but this folder: it holds the code as well.

    `SentenceTransformer` gives one vector for an input: of a model that keeps several, the first. `MultiVectorEncoder`
    gives all of them, or as many as asked for, see `NestedVectors`; it scores by `meanmaxsim`, as the model does.

    Args:
        model: `MMGEMModel`.
        processor: `MMGEMProcessor`.
        folder: Where to; made if it is not there.
    """
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
