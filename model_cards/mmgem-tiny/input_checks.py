"""Errors at the door: tensors that come into the model are checked where they enter."""

import torch


def is_box(boxes: torch.Tensor) -> torch.Tensor:
    """(B, R, 4) -> (B, R), False for the rows of zeros that pad a batch."""
    return (boxes != 0).any(-1)


def check_boxes(boxes: torch.Tensor | None, num_images: int):
    if boxes is not None and (boxes.ndim != 3 or boxes.shape[0] != num_images or boxes.shape[2] != 4):
        raise ValueError(f"`boxes` has shape {tuple(boxes.shape)}; expected ({num_images}, R, 4).")
    if boxes is not None and not torch.compiler.is_compiling():
        real = boxes[is_box(boxes)]  # (N, 4)
        fits = ((real >= 0) & (real <= 1)).all(-1) & (real[:, :2] < real[:, 2:]).all(-1)  # (N,), not NaN either
        if not fits.all():
            raise ValueError(
                f"`boxes` has {real[~fits][0].tolist()}; expected [x0, y0, x1, y1] in [0, 1] of the model's view, "
                "with x0 < x1 and y0 < y1, as the processor gives them, or zeros for padding."
            )


def check_pixels(pixel_values: torch.Tensor):
    if not pixel_values.is_floating_point():
        raise ValueError(
            f"`pixel_values` is {pixel_values.dtype}; expected floating point, normalised as the processor does it."
        )
    if not torch.compiler.is_compiling() and not pixel_values.isfinite().all():
        raise ValueError("`pixel_values` has values that are NaN or infinite; expected finite ones.")


def check_ids(input_ids: torch.Tensor, vocabulary_size: int, image_token_id: int):
    """Tokens that there are; some VLMs have no row in their vocabulary for the placeholder."""
    if input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool:
        raise ValueError(f"`input_ids` is {input_ids.dtype}; expected whole numbers.")
    if not torch.compiler.is_compiling():
        unknown = input_ids[((input_ids < 0) | (input_ids >= vocabulary_size)) & (input_ids != image_token_id)]  # (N,)
        if len(unknown):
            raise ValueError(f"`input_ids` has {int(unknown[0])}; expected 0 to {vocabulary_size - 1}.")


def checked_mask(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, allow_empty: bool = False
) -> torch.Tensor:
    if input_ids.ndim != 2 or (input_ids.shape[0] == 0 and not allow_empty):
        raise ValueError(f"`input_ids` has shape {tuple(input_ids.shape)}; expected (B, L) with B at least 1.")
    if attention_mask is None:
        return torch.ones_like(input_ids)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"`attention_mask` has shape {tuple(attention_mask.shape)}; expected that of `input_ids`, "
            f"{tuple(input_ids.shape)}."
        )
    return attention_mask
