"""LoRA on the towers, through peft; the modules beside them train in full and are saved with the adapter."""

import re
import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from mmgem.modeling_mmgem import MMGEMModel
from mmgem.training.argument_checks import check_keys
from mmgem.training.trainer.parameter_selection import is_bare, own_name, set_trainable

TOWERS = ("vision_tower", "language_model")
# The others are set here, or would have `MMGEMPeftModel` save less than it trains.
_OWN_FIELDS = {"auto_mapping", "bias", "inference_mode", "modules_to_save", "peft_type", "target_modules", "task_type"}
LORA_FIELDS = tuple(field.name for field in fields(LoraConfig) if field.name not in _OWN_FIELDS)


class MMGEMPeftModel(PeftModel):
    """A PEFT model whose adapter also holds `embedding_tokens` and `logit_scale`.

    These are parameters of the model itself, which peft neither trains nor saves: it knows modules only. They are
    written into the adapter's file, where plain `PeftModel.from_pretrained(base_model, folder)` finds them. They have
    no second copy: `disable_adapter` leaves them as trained.

    To go on training a saved adapter, `MMGEMPeftModel.from_pretrained(base_model, folder, is_trainable=True)`.
    """

    def __init__(self, model: MMGEMModel, peft_config: LoraConfig, *args, **kwargs):
        super().__init__(model, peft_config, *args, **kwargs)
        for name, parameter in self.named_parameters():
            if is_bare(name):
                parameter.requires_grad_(not peft_config.inference_mode)

    def save_pretrained(self, save_directory: str, *args: Any, **kwargs: Any) -> None:
        """Save as [`peft.PeftModel.save_pretrained`], with the model's own parameters; always as safetensors."""
        state_dict = kwargs.pop("state_dict", None) or self.state_dict()
        # Embeddings are not adapted; to find that out, peft would ask the Hub about the base model.
        kwargs |= {"state_dict": state_dict, "save_embedding_layers": False}
        super().save_pretrained(str(save_directory), *args, **kwargs)
        if kwargs.get("is_main_process", True):
            file = Path(save_directory) / SAFETENSORS_WEIGHTS_NAME
            bare = {name: tensor.detach().cpu() for name, tensor in state_dict.items() if is_bare(name)}
            save_file(load_file(file) | bare, file, metadata={"format": "pt"})


def add_lora(
    model: MMGEMModel,
    towers: Sequence[str] = ("language_model",),
    target_modules: Sequence[str] | None = None,
    **lora_config,
) -> MMGEMPeftModel:
    """Add low-rank adapters to the blocks of the towers (LoRA, https://arxiv.org/abs/2106.09685).

    The towers freeze, also one without LoRA; everything beside them goes on training, unless it was frozen before. Of
    modules of which nothing trains, the adapter holds no copy.
    The model becomes part of the one that is returned, which trains, embeds and generates as it does, and whose
    `save_pretrained` writes the adapter alone. [`merge_lora`] makes it an `MMGEMModel` again.

    Args:
        model: The model, adapted in place.
        towers: `vision_tower`, `language_model` or both.
        target_modules: Last names of linear layers in the towers' blocks (`["q_proj", "v_proj"]`); by default all of
            them, which are those of the attention and the MLP. Embeddings, pooling heads and the vocabulary head are
            none of them.
        lora_config: Further fields of `peft.LoraConfig`, such as `r`, `lora_alpha`, `lora_dropout`, `use_dora`.

    Raises:
        TypeError: If `model` is no `MMGEMModel`, or `towers` or `target_modules` no list.
        ValueError: If a tower, a layer or a field is unknown.
    """
    if not isinstance(model, MMGEMModel):
        raise TypeError(f"`model` is {type(model).__name__}; expected an MMGEMModel without adapters.")
    _check_names("towers", towers, TOWERS)
    check_keys(lora_config, LORA_FIELDS, "LoRA")
    layers = [name for tower in towers for name in _block_layers(model, tower)]
    if target_modules is not None:
        _check_names("target_modules", target_modules, sorted({name.rpartition(".")[2] for name in layers}))
        layers = [name for name in layers if name.rpartition(".")[2] in target_modules]

    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    beside = {name: module for name, module in model.named_children() if name not in TOWERS}
    config = LoraConfig(
        target_modules=_as_pattern(layers),
        modules_to_save=[name for name, module in beside.items() if any(p.requires_grad for p in module.parameters())],
        **lora_config,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out")  # a GPT-2 stores its weights transposed, which peft sees
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # by peft's own use of it
        peft_model = MMGEMPeftModel(model, config)
    for name, parameter in peft_model.named_parameters():
        if own_name(name) in frozen:
            parameter.requires_grad_(False)
    return peft_model


def merge_lora(model: PeftModel) -> MMGEMModel:
    """Add the adapter of a model to its weights: the result is an `MMGEMModel` as any other, all of it trainable.

    Args:
        model: The model with LoRA, which is used up.

    Raises:
        TypeError: If `model` has no adapter.
        ValueError: If the adapter is not finite.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(f"`model` is {type(model).__name__}; expected a model with LoRA.")
    merged = model.merge_and_unload(safe_merge=True)
    set_trainable(merged)
    return merged


def load_lora(model: MMGEMModel, folder: str | Path) -> MMGEMModel:
    """Add a saved adapter to the weights of a model, as [`merge_lora`] does.

    Args:
        model: The model that the adapter was trained on, which is used up.
        folder: The folder that `save_pretrained` wrote.

    Raises:
        ValueError: If the folder holds no whole LoRA for this model.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # by peft's own use of it
        try:
            adapted = PeftModel(model, PeftConfig.from_pretrained(str(folder)))
            found = adapted.load_adapter(str(folder), adapted.active_adapter, torch_device=str(model.device))
            if wrong := [*found.missing_keys, *found.unexpected_keys]:
                raise ValueError(f"{wrong[0]} is missing or unknown")
            merged = merge_lora(adapted)
        except Exception as error:  # of peft, of any kind
            reason = " ".join(line.strip() for line in str(error).strip().split("\n")[:2]).rstrip(".")
            raise ValueError(
                f"`model` is {str(folder)!r}, an adapter that cannot be added to {model.name_or_path!r} ({reason}); "
                "expected a whole LoRA that was trained on it."
            ) from error
    merged.name_or_path = str(folder)  # by which an index finds its model again
    return merged


def _block_layers(model: MMGEMModel, tower: str) -> list[str]:
    """Names of the linear layers in a tower's numbered blocks, whatever its architecture calls them."""
    return [
        f"{tower}.{name}"
        for name, module in model.get_submodule(tower).named_modules()
        if isinstance(module, nn.Linear | Conv1D) and any(piece.isdigit() for piece in name.split("."))
    ]


def _as_pattern(names: list[str]) -> str:
    """A regular expression for exactly these names, with one alternative for the same layer of all blocks."""
    alternatives = (
        r"\.".join(r"\d+" if piece.isdigit() else re.escape(piece) for piece in name.split(".")) for name in names
    )
    return "|".join(dict.fromkeys(alternatives))


def _check_names(argument: str, names: Sequence[str], known: Sequence[str]) -> None:
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"`{argument}` is {names!r}; expected a list of names.")
    if not names:
        raise ValueError(f"`{argument}` is empty; expected some of {', '.join(known)}.")
    check_keys(dict.fromkeys(names), known, f"`{argument}`")
