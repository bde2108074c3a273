"""The weights of a checkpoint as they were read: all there, none left over, each in its shape, all finite."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from json import JSONDecodeError

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils import is_accelerate_available

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
    """Refuses tied weights that accelerate keeps on the disk and would confuse with others.

    Args:
        model: The model that was loaded.

    Raises:
        ValueError: If there are such weights, and accelerate is too old for them.
    """
    on_disk = "disk" in getattr(model, "hf_device_map", {}).values()
    tied = [name for name in model.all_tied_weights_keys if model.get_parameter(name).is_meta] if on_disk else []
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
