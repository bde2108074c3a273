"""Errors at the door: tensors that come into the model, and arguments of `generate`, are checked where they enter."""

import math
import warnings
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import torch

from .configuration_mmgem import SPECIAL_TOKENS

# Of the arguments of `generate` those that transformers takes whatever they are. Whole numbers, with the least:
COUNTS = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "max_new_tokens": 1,
    "max_length": 1,
    "min_new_tokens": 0,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
}
SHARES = ("top_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
FINITE = ("length_penalty", "guidance_scale", "max_time")
SWITCHES = ("do_sample", "use_cache", "return_dict_in_generate", "output_scores")
# Of the arguments of features, what callers of any model give, and what changes no embedding of this one.
WITHOUT_EFFECT = frozenset(
    "interpolate_pos_encoding output_attentions output_hidden_states pixel_attention_mask return_dict token_type_ids "
    "use_cache".split()
)
TOKEN_IDS = (
    *(*SPECIAL_TOKENS, "forced_bos_token_id", "forced_eos_token_id"),
    *("suppress_tokens", "begin_suppress_tokens"),
)


def check_tensor(name: str, value: object):
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided or value.is_nested:
        is_tensor = isinstance(value, torch.Tensor) and value.layout is not torch.strided
        kind = value.layout if is_tensor else f"a {type(value).__name__}"  # type: ignore[attr-defined]
        raise TypeError(f"`{name}` is {kind}; expected a dense tensor.")


def check_no_other(arguments: Mapping[str, Any], method: str):
    """Refuses arguments that nobody would read, such as a name that is mistyped; None asks for nothing."""
    given = {name for name, value in arguments.items() if value is not None}
    if others := sorted(given - WITHOUT_EFFECT):
        raise TypeError(f"`{others[0]}` is no argument of `{method}`; expected those that it documents.")


def check_labels(labels: torch.Tensor, shape: tuple[int, ...], vocabulary_size: int, image_token_id: int):
    """Ids of tokens to be written, and -100."""
    check_tensor("labels", labels)
    if labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"`labels` is {labels.dtype}; expected whole numbers, of 64 or 32 bits.")
    if tuple(labels.shape) != shape:
        raise ValueError(f"`labels` has shape {tuple(labels.shape)}; expected that of `input_ids`, {shape}.")
    if not torch.compiler.is_compiling():
        known = ((labels >= 0) & (labels < vocabulary_size)) | (labels == -100) | (labels == image_token_id)
        if not known.all():
            raise ValueError(f"`labels` has {int(labels[~known][0])}; expected 0 to {vocabulary_size - 1}, or -100.")


def is_box(boxes: torch.Tensor) -> torch.Tensor:
    """(B, R, 4) -> (B, R), False for the rows of zeros that pad a batch."""
    return (boxes != 0).any(-1)


def check_boxes(boxes: torch.Tensor | None, num_images: int):
    if boxes is None:
        return
    check_tensor("boxes", boxes)
    if boxes.is_complex():
        raise ValueError(f"`boxes` is {boxes.dtype}; expected floating point.")
    if boxes.ndim != 3 or boxes.shape[0] != num_images or boxes.shape[2] != 4:
        raise ValueError(f"`boxes` has shape {tuple(boxes.shape)}; expected ({num_images}, R, 4).")
    if not torch.compiler.is_compiling():
        real = boxes[is_box(boxes)]  # (N, 4)
        fits = ((real >= 0) & (real <= 1)).all(-1) & (real[:, :2] < real[:, 2:]).all(-1)  # (N,), not NaN either
        if not fits.all():
            raise ValueError(
                f"`boxes` has {real[~fits][0].tolist()}; expected [x0, y0, x1, y1] in [0, 1] of the model's view, "
                "with x0 < x1 and y0 < y1, as the processor gives them, or zeros for padding."
            )


def check_pixels(pixel_values: torch.Tensor):
    check_tensor("pixel_values", pixel_values)
    if not pixel_values.is_floating_point() or pixel_values.itemsize == 1:
        raise ValueError(
            f"`pixel_values` is {pixel_values.dtype}; expected floating point of 16 bits or more, normalised as the "
            "processor does it."
        )
    if not torch.compiler.is_compiling() and not pixel_values.isfinite().all():
        raise ValueError("`pixel_values` has values that are NaN or infinite; expected finite ones.")


def check_ids(input_ids: torch.Tensor, vocabulary_size: int, image_token_id: int):
    """Tokens that there are; some VLMs have no row in their vocabulary for the placeholder."""
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"`input_ids` is {input_ids.dtype}; expected whole numbers, of 64 or 32 bits.")
    if not torch.compiler.is_compiling():
        unknown = input_ids[((input_ids < 0) | (input_ids >= vocabulary_size)) & (input_ids != image_token_id)]  # (N,)
        if len(unknown):
            raise ValueError(f"`input_ids` has {int(unknown[0])}; expected 0 to {vocabulary_size - 1}.")


def check_vectors(
    inputs_embeds: torch.Tensor,
    width: int,
    input_ids: torch.Tensor | None,
    pixel_values: torch.Tensor | None,
):
    """What takes the place of ids and pictures: vectors of the language model's width."""
    check_tensor("inputs_embeds", inputs_embeds)
    for name, value in (("input_ids", input_ids), ("pixel_values", pixel_values)):
        if value is not None:
            raise ValueError(f"`inputs_embeds` and `{name}` came together; expected one of them.")
    if inputs_embeds.ndim != 3 or inputs_embeds.shape[-1] != width:
        raise ValueError(f"`inputs_embeds` has shape {tuple(inputs_embeds.shape)}; expected (B, L, {width}).")


def checked_mask(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, allow_empty: bool = False
) -> torch.Tensor:
    check_tensor("input_ids", input_ids)
    if input_ids.ndim != 2 or (input_ids.shape[0] == 0 and not allow_empty):
        raise ValueError(f"`input_ids` has shape {tuple(input_ids.shape)}; expected (B, L) with B at least 1.")
    if attention_mask is None:
        return torch.ones_like(input_ids)
    check_tensor("attention_mask", attention_mask)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"`attention_mask` has shape {tuple(attention_mask.shape)}; expected that of `input_ids`, "
            f"{tuple(input_ids.shape)}."
        )
    if not torch.compiler.is_compiling():
        others = attention_mask[(attention_mask != 0) & (attention_mask != 1)]  # (N,), of a mask that is added
        if len(others):
            raise ValueError(f"`attention_mask` has {others[0].item()}; expected 1 for tokens and 0 for padding.")
    return attention_mask


def check_generation(arguments: Mapping[str, Any], vocabulary_size: int):
    """Refuses what would end in an error that names nothing, or in other text than was asked for."""
    for name, value in arguments.items():
        is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
        fits, expected = True, ""
        if name in COUNTS:
            fits = is_number and isinstance(value, Integral) and int(value) >= COUNTS[name]
            expected = f"a whole number of at least {COUNTS[name]}"
        elif name in SHARES:
            fits, expected = is_number and 0 <= value <= 1, "a number from 0 to 1"
        elif name in FINITE:
            fits, expected = is_number, "a finite number"
        elif name == "image_similarity_weight":
            fits, expected = is_number and 0 <= value, "a number of at least 0"
        elif name == "temperature" and is_number:  # the rest is checked by transformers
            fits, expected = value <= 0 or value >= 1e-6, "a number from 1e-6 on, by which no logit becomes infinite"
        elif name in SWITCHES:
            fits, expected = isinstance(value, bool), "True or False"
        elif name in TOKEN_IDS:
            ids = value.flatten().tolist() if isinstance(value, torch.Tensor) else value
            ids = ids if isinstance(ids, list | tuple) else [ids]
            fits = all(isinstance(one, Integral) and 0 <= int(one) < vocabulary_size for one in ids)
            expected = f"token ids from 0 to {vocabulary_size - 1}"
        if value is not None and not fits:
            raise ValueError(f"`{name}` is {value!r}; expected {expected}.")


def fit_length(
    arguments: Mapping[str, Any], default: int | None, prompt_length: int, max_length: int | None
) -> dict[str, int | None]:
    """End writing where the positions of a language model do.

    Args:
        arguments: Of `generate`.
        default: `max_new_tokens` where `arguments` have none, or None.
        prompt_length: Tokens before the first that is written.
        max_length: Tokens of the longest sequence that the language model takes, None for any number.

    Returns:
        Arguments instead of those that ask for more than there is room for; a warning says so.

    Raises:
        ValueError: If the prompt leaves no room, or at least more is to be written than there is room for.
    """
    if max_length is None:
        return {}
    room = max_length - prompt_length
    if room < 1:
        raise ValueError(
            f"`input_ids` is {prompt_length} tokens long with its images; expected at most {max_length - 1}, so that "
            f"the language model, which takes {max_length}, can write."
        )
    for name, most in (("min_new_tokens", room), ("min_length", max_length)):
        if (arguments.get(name) or 0) > most:
            raise ValueError(f"`{name}` is {arguments[name]} after {prompt_length} tokens; expected at most {most}.")
    for name, most in (("max_new_tokens", room), ("max_length", max_length)):
        if arguments.get(name) is not None:
            if arguments[name] <= most:
                return {}
            warnings.warn(
                f"`{name}` is {arguments[name]}; writing ends before, where the language model does, which takes "
                f"{max_length} tokens with the prompt.",
                stacklevel=3,
            )
            return {"max_length": None, "max_new_tokens": room}
    return {} if default is None or default <= room else {"max_new_tokens": room}
