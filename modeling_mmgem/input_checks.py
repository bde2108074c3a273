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
