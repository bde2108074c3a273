"""Loading a checkpoint by name, with an answer a person can use when it is not one."""

from pathlib import Path

import torch

from mmgem import MMGEMConfig, MMGEMModel, MMGEMProcessor  # from the package itself, which registers them
from mmgem.training.data.paths import no_checkpoint
from mmgem.training.printable import is_utf8


def load_checkpoint(name: str | Path, device: str | torch.device | None = None) -> tuple[MMGEMModel, MMGEMProcessor]:
    """Loads model and processor, in evaluation mode.

    Args:
        name: A folder that holds a checkpoint, or a name on the Hub.
        device: Where to; by default the GPU where there is one.

    Raises:
        FileNotFoundError: If it is neither.
        ValueError: If it is a checkpoint of another kind of model, or a damaged one.
    """
    load_config(name)
    name = str(name)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        # The code in the folder is what is installed here; without saying so, the parts of the processor ask about it.
        processor = MMGEMProcessor.from_pretrained(name, trust_remote_code=False)
        model = MMGEMModel.from_pretrained(name)
    except (OSError, TypeError, ValueError) as error:
        if "; expected" in str(error):
            raise
        reason = str(error).partition(". ")[0].rstrip(".")  # the rest of a library's error is about the Hub
        raise ValueError(
            f"`model` is {name!r}, which cannot be read ({reason}); expected a whole and undamaged checkpoint."
        ) from error
    for part in ("num_visual_tokens", "image_token_id"):
        there, expected = getattr(processor, part), getattr(model.config, part)
        if there != expected:
            raise ValueError(
                f"`model` is {name!r}, whose processor has {there} as `{part}`; expected {expected}, as the model has."
            )
    return model.to(device).eval(), processor


def load_config(name: str | Path) -> MMGEMConfig:
    """Loads the configuration of a checkpoint; arguments and errors are those of `load_checkpoint`."""
    if not is_utf8(str(name)):
        raise ValueError(f"`model` is {str(name)!r}, a name that is not UTF-8; expected one that is.")
    try:
        return MMGEMConfig.from_pretrained(name)
    except OSError as error:
        name, file = str(name), Path(name, "config.json")
        if file.is_file():
            reason = str(error).rstrip(".")
            raise ValueError(
                f"`model` is {name!r}, which cannot be read ({reason}); expected a checkpoint."
            ) from error
        raise no_checkpoint(name) from error
