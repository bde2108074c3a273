"""The training loop and its parts: losses, GradCache, averages, LoRA, the choice of what trains, checkpoints.

The two names that users need are imported when they are first used.
"""

from importlib import import_module

_HOMES = {"MMGEMTrainer": "trainer", "MMGEMTrainingArguments": "arguments"}

__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
