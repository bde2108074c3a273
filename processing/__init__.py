"""From images, texts and boxes to tensors, and the sentence-transformers form of a checkpoint.

Names are imported when they are first used: `sentence_transformers` alone takes seconds to import.
"""

from importlib import import_module

_HOMES = {
    "MMGEMProcessor": "processing_mmgem",
    "MMGEMTransformer": "sentence_transformers_mmgem",
    "load_image": "image_loading",
    "save_sentence_transformer": "sentence_transformers_export",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
