"""mmgem: one open model that embeds images and text for search and writes about them."""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .configuration_mmgem import MMGEMConfig
    from .modeling_mmgem import MMGEMModel, MMGEMOutput
    from .pool_aggregator import PoolAggregator
    from .processing import MMGEMProcessor

_HOME = {
    "MMGEMConfig": ".configuration_mmgem",
    "MMGEMModel": ".modeling_mmgem",
    "MMGEMOutput": ".modeling_mmgem",
    "PoolAggregator": ".pool_aggregator",
    "MMGEMProcessor": ".processing",
}
__all__ = ["MMGEMConfig", "MMGEMModel", "MMGEMOutput", "MMGEMProcessor", "PoolAggregator"]


def __getattr__(name: str):
    # Importing transformers' model classes takes seconds; `mmgem --help` should not.
    if name not in _HOME:
        raise AttributeError(f"module 'mmgem' has no attribute '{name}'")
    from importlib import import_module

    _register()
    return getattr(import_module(_HOME[name], __name__), name)


def _register():
    """Where the package is installed, a checkpoint loads with its code, and nobody is asked to trust another copy."""
    import transformers

    from .configuration_mmgem import AUTO_MAP, MODEL_CLASS, MMGEMConfig
    from .modeling_mmgem import MMGEMModel
    from .processing.processing_mmgem import MMGEMProcessor

    transformers.AutoConfig.register(MMGEMConfig.model_type, MMGEMConfig, exist_ok=True)
    transformers.AutoProcessor.register(MMGEMConfig, MMGEMProcessor, exist_ok=True)
    for auto_class, class_name in AUTO_MAP.items():
        if class_name == MODEL_CLASS:
            getattr(transformers, auto_class).register(MMGEMConfig, MMGEMModel, exist_ok=True)
