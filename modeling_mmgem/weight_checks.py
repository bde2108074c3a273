"""The weights of a checkpoint as they were read: all there, none left over, each in its shape, all finite."""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from json import JSONDecodeError
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME, is_accelerate_available

SHOWN = 3  # names in an error message
OFFLOADING_ACCELERATE = "1.15.0"  # older versions take all tied weights on the disk for one
# What libraries raise while they build a model by a configuration of impossible values, or read damaged files.
DAMAGES = (SafetensorError, LookupError, AttributeError, AssertionError, ArithmeticError)


@contextmanager
def loading(argument: str, name: str) -> Iterator[None]:
    """Says which checkpoint it is that is cut short or damaged.

    Args:
        argument: The argument that names the checkpoint.
        name: The checkpoint.

    Raises:
        ValueError: If what is within finds a file that is, or a configuration that no model can be built by.
    """
    try:
        yield
    except (*DAMAGES, JSONDecodeError) as error:
        raise ValueError(
            f"`{argument}` is {name!r}, which cannot be read ({type(error).__name__}: {error}); expected a whole and "
            "undamaged checkpoint."
        ) from error
    except ValueError as error:
        name, is_offloaded, _ = str(error).partition(" is on the meta device")  # in the words of accelerate
        if not is_offloaded:
            raise
        raise ValueError(f"`device_map` puts `{name}` on the disk; expected it on a device, or 'cpu'.") from error


def check_weights(argument: str, name: str, model: PreTrainedModel, report: dict, missing: Iterable[str]):
    """Refuses a checkpoint of a tower that lacks weights, has them in another shape, or has those of further layers.

    Args:
        argument: The argument that names the checkpoint.
        name: The checkpoint.
        model: The model that was loaded.
        report: The loading info of transformers.
        missing: The weights that are needed and missing.

    Raises:
        ValueError: If there are such weights, or weights that are not finite; the error names them.
    """
    # Weights of other parts, such as the text half of CLIP or a classifier, have names like none of the model's.
    known = {_numberless(key) for key in model.state_dict()}
    left_over = [key for key in report["unexpected_keys"] if _numberless(key) in known]
    _refuse(argument, name, model, {"lacks": missing, **_misshapen(report), "has beyond it": left_over})


def check_whole(name: str, model: PreTrainedModel, report: dict, ignore_mismatched_sizes: bool):
    """Refuses a checkpoint whose weights are not exactly those of its model.

    Args:
        name: The checkpoint.
        model: The model that was loaded.
        report: The loading info of transformers.
        ignore_mismatched_sizes: Whether weights of another shape may stay at random.

    Raises:
        ValueError: If there are such weights, or weights that are not finite; the error names them.
    """
    misshapen = {} if ignore_mismatched_sizes else _misshapen(report)
    found = {"lacks": report["missing_keys"], **misshapen, "has beyond it": report["unexpected_keys"]}
    _refuse("model", name, model, found)


def check_generation_file(name: str, subfolder: str):
    """Refuses settings of `generate` that cannot be read, which transformers would replace by its own.

    Args:
        name: The checkpoint; of one on the Hub nothing is read.
        subfolder: Where it lies in its folder.

    Raises:
        ValueError: If there is such a file.
    """
    file = Path(name, subfolder, GENERATION_CONFIG_NAME)
    try:
        if file.is_file():
            json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"`model` is {name!r}, whose {GENERATION_CONFIG_NAME} cannot be read ({error}); expected it whole, or "
            "deleted."
        ) from error


def check_room(model: PreTrainedModel, missing: set[str]):
    """Refuses to make more room for weights that a checkpoint lacks, or has in another shape, than for those it has.

    Args:
        model: The model, with the weights that were read; the others are on the meta device.
        missing: The names of the others.

    Raises:
        ValueError: If they are the larger part; the error names some.
    """
    tied = model.all_tied_weights_keys
    sizes = {name: tensor.numel() for name, tensor in model.state_dict().items() if name not in tied}
    lacking = sum(sizes.get(name, 0) for name in missing)
    if 2 * lacking > sum(sizes.values()):
        raise ValueError(
            f"`config` asks for {lacking:,} numbers that the checkpoint does not have, among them "
            f"{', '.join(sorted(missing)[:SHOWN])}; expected the configuration of this checkpoint."
        )


def check_offloaded(model: PreTrainedModel):
    """Refuses weights that accelerate keeps on the disk, or beside a GPU, and would not bring back, or as others.

    Args:
        model: The model that was loaded.

    Raises:
        ValueError: If all of the model is on the disk, or an attention whose weights are read without being called,
            or tied weights, and accelerate is too old for them.
    """
    places = set(getattr(model, "hf_device_map", {}).values())
    if places == {"disk"}:  # which accelerate dispatches nowhere
        raise ValueError(
            "`device_map` puts the whole model on the disk; expected room for a part of it, such as more `max_memory`."
        )
    if not places & {"disk", "cpu"}:
        return
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) and module.out_proj.weight.is_meta:
            raise ValueError(
                f"`device_map` offloads `{name}`, whose weights accelerate does not bring back; expected it on the "
                "device that computes."
            )
    tied = [name for name in model.all_tied_weights_keys if "disk" in places and model.get_parameter(name).is_meta]
    if tied and not is_accelerate_available(OFFLOADING_ACCELERATE):
        raise ValueError(
            f"`device_map` puts {tied[0]} on the disk, which is tied to another weight; expected accelerate "
            f">= {OFFLOADING_ACCELERATE}, as older versions read other weights in its place."
        )


def _misshapen(report: dict) -> dict[str, list[str]]:
    names = [str(key[0] if isinstance(key, tuple) else key) for key in report["mismatched_keys"]]
    return {"has, in another shape,": names}


def _not_finite(model: PreTrainedModel) -> list[str]:
    """The parameters with NaN or infinite values; of quantized and sharded ones nothing is known."""
    plain = {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if type(parameter.data) is torch.Tensor and parameter.is_floating_point() and not parameter.is_meta
    }
    # The extremes are found without a copy, and are NaN where any value is.
    return [name for name, values in plain.items() if values.numel() and not _extremes(values).isfinite().all()]


def _extremes(values: torch.Tensor) -> torch.Tensor:
    return torch.stack(torch.aminmax(values.float() if values.itemsize == 1 else values))  # float8 has no order


def _refuse(argument: str, name: str, model: PreTrainedModel, found: dict[str, Iterable[str]]):
    for kind, names in {**found, "has, not finite,": _not_finite(model)}.items():
        if keys := sorted(names):
            more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
            raise ValueError(
                f"`{argument}` is {name!r}, which {kind} the weights {', '.join(keys[:SHOWN])}{more} of a "
                f"`{model.config.model_type}`; expected a complete checkpoint."
            )


def _numberless(key: str) -> str:
    return re.sub(r"\d+", "*", key)
