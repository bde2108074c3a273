"""Boxes: from pixels of the image a person sees to fractions of the view the model gets.

An image processor resizes and may then crop or pad, so the model's view is a rectangle in the original image, larger
or smaller than it. A box in pixels becomes a box relative to that rectangle.
"""

from numbers import Real

import numpy as np
import torch
from PIL import Image


def check_boxes(boxes, image_sizes: list[tuple[int, int]]) -> list[np.ndarray]:
    """Checks boxes given in pixels and clips them to their images.

    Args:
        boxes: For each image its boxes, absolute `(x0, y0, x1, y1)` with `x0 < x1` and `y0 < y1`: a list of lists, or
            of `(R_i, 4)` arrays, or an array of shape `(B, R, 4)`. For a single image its `(R, 4)` boxes will do.
        image_sizes: `(width, height)` of each image, in pixels.

    Returns:
        One float64 array `(R_i, 4)` for each image; an image may have none, but not all of them.

    Raises:
        ValueError: A wrong number or shape, NaN, corners in the wrong order, no area, or a box outside its image.
    """
    try:
        # `np.asarray` on each image's part, since numbers of boxes may differ from image to image.
        rows = [_to_array(row) for row in boxes]
        if len(image_sizes) == 1 and rows and all(row.shape == (4,) for row in rows):
            rows = [np.stack(rows)]
    except (TypeError, ValueError, OverflowError, NotImplementedError) as error:  # the last of a tensor on meta
        raise ValueError(f"`boxes` is {boxes!r:.200}; expected for each image a list of [x0, y0, x1, y1].") from error
    if len(rows) != len(image_sizes):
        raise ValueError(
            f"`boxes` holds the boxes of {len(rows)} images, but there are {len(image_sizes)} images; expected one "
            "list of [x0, y0, x1, y1] for each image."
        )
    rows = [row.reshape(0, 4) if row.size == 0 else row for row in rows]
    if any(row.ndim == 0 for row in rows):
        raise ValueError(f"`boxes` is {boxes!r:.200}; expected for each image a list of [x0, y0, x1, y1].")
    if not any(len(row) for row in rows):
        raise ValueError(f"`boxes` is {boxes!r:.200}, without any box; expected at least one, or None.")
    return [_check_row(row, f"boxes[{i}]", size) for i, (row, size) in enumerate(zip(rows, image_sizes))]


def _to_array(row) -> np.ndarray:
    """The boxes of one image as float64.

    Raises:
        TypeError: If there are words, truth values or dates among them, or numbers that are masked.
    """
    parts = list(row) if isinstance(row, (list, tuple)) else [row]
    if any(np.ma.is_masked(part) for part in parts):
        raise TypeError
    parts = [part.tolist() if isinstance(part, (torch.Tensor, np.ndarray)) else part for part in parts]
    edges = parts if isinstance(row, (list, tuple)) else parts[0]
    if not all(map(_may_be_edge, np.asarray(edges, dtype=object).flat)):
        raise TypeError
    return np.asarray(edges, dtype=np.float64)


def _may_be_edge(edge) -> bool:
    """Whether it is a number, or missing, which is said of the box."""
    edge = edge.item() if isinstance(edge, (torch.Tensor, np.generic)) else edge
    return edge is None or isinstance(edge, Real) and not isinstance(edge, bool)


def _check_row(row: np.ndarray, name: str, image_size: tuple[int, int]) -> np.ndarray:
    """The boxes of one image, `(R, 4)`, checked and clipped."""
    if row.ndim != 2 or row.shape[1] != 4:
        raise ValueError(f"`{name}` has shape {row.shape}; expected (number of boxes, 4) as [x0, y0, x1, y1].")
    width, height = image_size
    clipped = np.clip(row, 0, [width, height, width, height])
    for j, box in enumerate(row):
        if not np.isfinite(box).all():
            raise ValueError(f"`{name}[{j}]` is {box.tolist()}; expected finite pixel coordinates.")
        if not (box[:2] < box[2:]).all():
            raise ValueError(f"`{name}[{j}]` is {box.tolist()}; expected [x0, y0, x1, y1] with x0 < x1 and y0 < y1.")
        if not (clipped[j, :2] < clipped[j, 2:]).all():
            raise ValueError(
                f"`{name}[{j}]` is {box.tolist()}, which lies outside its image; expected a box that overlaps the "
                f"{width} x {height} pixels of it."
            )
    return clipped


def is_in_view(box, view: np.ndarray) -> bool:
    """Whether the model sees more of a box than rounding leaves; both as `boxes_in_view` takes them."""
    x0, y0, x1, y1 = (float(edge) for edge in box)
    margin = 1e-6 * (view[2:] - view[:2]).max()
    overlap = min(x1, view[2]) - max(x0, view[0]), min(y1, view[3]) - max(y0, view[1])
    return min(overlap) > margin


def boxes_in_view(boxes: list[np.ndarray], views: list[np.ndarray]) -> np.ndarray:
    """Boxes in pixels as fractions of the model's view.

    Args:
        boxes: For each image `(R_i, 4)`, as `check_boxes` returns them.
        views: For each image the rectangle that the model sees, `(x0, y0, x1, y1)` in the same pixels.

    Returns:
        `(B, R, 4)` float32 in [0, 1], R the largest R_i; missing boxes are all zeros.

    Raises:
        ValueError: A box lies wholly in what the image processor crops away.
    """
    result = np.zeros((len(boxes), max(map(len, boxes)), 4), dtype=np.float32)
    for i, (row, view) in enumerate(zip(boxes, views)):
        origin, extent = np.tile(view[:2], 2), np.tile(view[2:] - view[:2], 2)
        seen = np.clip((row - origin) / extent, 0, 1).astype(np.float32)
        for j, box in enumerate(seen):
            if not (box[:2] < box[2:]).all():
                raise ValueError(
                    f"`boxes[{i}][{j}]` is {row[j].tolist()}, which the model does not see: the image processor crops "
                    f"the image to {np.round(view, 1).tolist()}; expected a box that overlaps this part."
                )
        result[i, : len(seen)] = seen
    return result


def model_views(image_processor, image_sizes, view_sizes, **kwargs) -> list[np.ndarray]:
    """The rectangle of each original image that the model sees.

    Holds for image processors that resize, then crop the center or pad on the right and at the bottom, as those of
    CLIP, SigLIP, ViT, DeiT, DINOv2 and DINOv3 do.

    Args:
        image_processor: The one that made the pixel values.
        image_sizes: `(width, height)` of each image before it.
        view_sizes: `(width, height)` of each image's pixel values.
        kwargs: The arguments it was called with, beside the images.

    Returns:
        For each image `(x0, y0, x1, y1)` in its original pixels; beyond the image where it was padded.

    Raises:
        ValueError: The image processor crops in a way that cannot be followed.
    """
    if "spatial_shapes" in image_processor.model_input_names:  # the whole image, in its own aspect ratio
        return [np.array([0, 0, *size], dtype=np.float64) for size in image_sizes]
    if getattr(image_processor, "crop_pct", None):
        raise ValueError(
            f"`boxes` cannot be used with {type(image_processor).__name__}, which crops while resizing (`crop_pct`); "
            "expected an image processor that resizes and then crops the center."
        )
    crops = kwargs.get("do_center_crop")
    if crops is None:
        crops = getattr(image_processor, "do_center_crop", False)
    resized = {size: _resized_size(image_processor, size, **kwargs) for size in set(image_sizes)}
    views = []
    for size, view_size in zip(image_sizes, view_sizes):
        scale = np.array(size) / resized[size]
        # Whole pixels, rounded down, as the image processors do; negative where a small image is padded on all sides.
        corner = (np.array(resized[size]) - view_size) // 2 if crops else np.zeros(2)
        views.append(np.concatenate([corner * scale, (corner + view_size) * scale]))
    return views


def _resized_size(image_processor, size: tuple[int, int], **kwargs) -> tuple[int, int]:
    """`(width, height)` after the resize step alone: the processor is asked, on a blank image, not second-guessed."""
    only_resize = {"do_center_crop": False, "do_pad": False, "do_rescale": False, "do_normalize": False}
    nearest = {"resample": Image.Resampling.NEAREST, "return_tensors": "pt"}
    pixels = image_processor([Image.new("RGB", size)], **{**kwargs, **only_resize, **nearest})["pixel_values"]
    return pixels.shape[-1], pixels.shape[-2]
