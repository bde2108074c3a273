"""Loading a checkpoint by name, with an answer a person can use when it is not one."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from mmgem import MMGEMConfig, MMGEMModel, MMGEMProcessor  # from the package itself, which registers them
from mmgem.training.data.paths import no_checkpoint
from mmgem.training.printable import is_utf8

# Weights so small are read, and not mapped: who cuts a file that is mapped ends the process by a signal (SIGBUS).
_READ_WHOLE = 1 << 30  # bytes
_SUFFIXES = (".jinja", ".json", ".model", ".safetensors", ".txt")  # of what a model is loaded from


def load_checkpoint(name: str | Path, device: str | torch.device | None = None) -> tuple[MMGEMModel, MMGEMProcessor]:
    """Loads model and processor, in evaluation mode. What becomes of their files later does not change them.

    Args:
        name: A folder that holds a checkpoint, or LoRA that peft saved, which is merged into the model that it names;
            or a name on the Hub.
        device: Where to; by default the GPU where there is one.

    Raises:
        FileNotFoundError: If it is none of them.
        ValueError: If it is a checkpoint of another kind of model, a damaged one, or one that is written meanwhile.
    """
    with unchanged(name, "model"):
        base = _base_of_adapter(name)
        if base is None:
            return _load(name, device)
        from mmgem.training.trainer.lora import load_lora

        model, processor = load_checkpoint(base, device)
        return load_lora(model, name).eval(), processor


def _base_of_adapter(folder: str | Path) -> str | None:
    """The model that LoRA in a folder is for, a folder where there is one of the name; None without LoRA."""
    folder = Path(folder)
    file = folder / "adapter_config.json"
    if not os.path.isfile(file) or os.path.isfile(folder / "config.json"):  # of names of any length, unlike Path's
        return None
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`model` is {str(folder)!r}, whose {file.name} cannot be read ({error}); expected a file of peft."
        ) from error
    base = settings.get("base_model_name_or_path") if isinstance(settings, dict) else None
    if not isinstance(base, str) or not base:
        raise ValueError(
            f"`model` is {str(folder)!r}, whose {file.name} has {base!r} as `base_model_name_or_path`; expected the "
            "model that it is for."
        )
    starts = (Path(), *folder.resolve().parents)  # LoRA may lie in the folder of its model, which may have moved
    base = next((str(start / base) for start in starts if (start / base / "config.json").is_file()), base)
    if os.path.isfile(os.path.join(base, file.name)) and not os.path.isfile(os.path.join(base, "config.json")):
        raise ValueError(
            f"`model` is {str(folder)!r}, LoRA for {base!r}, which is LoRA too; expected LoRA for a model."
        )
    return base


def _load(name: str | Path, device: str | torch.device | None) -> tuple[MMGEMModel, MMGEMProcessor]:
    load_config(name)
    name = str(name)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        # The code in the folder is what is installed here; without saying so, the parts of the processor ask about it.
        processor = MMGEMProcessor.from_pretrained(name, trust_remote_code=False)
        sizes = [file.stat().st_size for file in Path(name).glob("*.safetensors")]
        model = MMGEMModel.from_pretrained(name, disable_mmap=True if 0 < sum(sizes) <= _READ_WHOLE else None)
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
    model.to(device)
    for tensor in (*model.parameters(), *model.buffers()):
        if type(tensor.data) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()  # it may be the file itself, mapped: who wrote into that would change it
    return model.eval(), processor


@contextmanager
def unchanged(folder: str | Path, name: str) -> Iterator[None]:
    """Reads files of a checkpoint that belong together.

    Args:
        folder: The folder; of a name on the Hub nothing is compared.
        name: The argument that names it, for errors.

    Raises:
        ValueError: If another job wrote it meanwhile, so that some may be older than others.
    """
    before, failure = _state(folder), None
    try:
        yield
    except (OSError, ValueError) as error:
        failure = error
    if _state(folder) != before:
        raise ValueError(
            f"`{name}` is {str(folder)!r}, which was written while it was read; expected one that no other job "
            "writes. Try again when that has ended."
        ) from failure
    if failure is not None:
        raise failure


def _state(folder: str | Path) -> dict[str, tuple[int, int, int]]:
    """What changes when a file of a checkpoint does."""
    try:
        files = {path.name: path.stat() for path in Path(folder).glob("*") if path.suffix in _SUFFIXES}
    except OSError:  # it goes at this moment, or cannot be read, which whoever reads it says better
        return {}
    return {name: (status.st_ino, status.st_size, status.st_mtime_ns) for name, status in files.items()}


def load_config(name: str | Path) -> MMGEMConfig:
    """Loads the configuration of a checkpoint; arguments and errors are those of `load_checkpoint`."""
    if not is_utf8(str(name)):
        raise ValueError(f"`model` is {str(name)!r}, a name that is not UTF-8; expected one that is.")
    name = _base_of_adapter(name) or name
    try:
        return MMGEMConfig.from_pretrained(name)
    except OSError as error:
        name = str(name)
        if os.path.isfile(Path(name, "config.json")):
            reason = str(error).rstrip(".")
            raise ValueError(
                f"`model` is {name!r}, which cannot be read ({reason}); expected a checkpoint."
            ) from error
        raise no_checkpoint(name) from error
