"""A batch as the model gets it, for people to look at: texts with the tokens that are learned, images with boxes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from PIL import Image, ImageDraw

from mmgem.text_rows import IGNORED_LABEL, TEXT_COLUMNS, Role, pointers
from mmgem.training.data.rows import COLUMNS, ID_COLUMNS, IMAGE_COLUMNS, images_of

_NOT_TOLD = (*IMAGE_COLUMNS, "edited_image", *ID_COLUMNS)
_TILE = 224  # pixels of the shorter side of an image on the sheet, at least
_COLORS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080")


@dataclass
class Preview:
    """A batch as people look at it.

    Args:
        batch: A batch for the joint loss; its `labels` (T, L) say which tokens are learned.
        use: A word for the use of a text with such tokens, as "generated".
        legend: Words for the tokens between `[[ ]]`, which are these.
        hidden_patches: (I, rows, columns) bool, the patches of its images that the model does not see.
    """

    batch: Mapping[str, Any]
    use: str
    legend: str
    hidden_patches: torch.Tensor | None = None


def describe_row(row: Mapping[str, Any]) -> str:
    """Say in a line what a row holds, column by column."""
    images = [("image", image) for image in images_of(row)]
    if row.get("edited_image") is not None:
        images.append(("edited image", row["edited_image"]))
    parts = [f"{name} of {image.width} x {image.height}" for name, image in images]
    for column in COLUMNS:
        value = row.get(column)
        if column in _NOT_TOLD or value is None or value == []:
            continue
        count, first = (f" ({len(value)})", value[0]) if isinstance(value, list) else ("", value)
        first = [round(corner) for corner in first] if column == "boxes" else first
        parts.append(f"{column}{count} {first!r:.60}")
    return f"{row['row_key']}: {', '.join(parts)}"


def describe_texts(preview: Preview, processor) -> list[str]:
    """Say in a line for each text of a batch which image or box it goes with, what it is for, and what its tokens are,
    with `[[ ]]` around those that are learned.

    A text that is to find an image or box by another image is "embedded with" that one. An image that the language
    model embeds has a line without text; texts may be written from this "memory", or be to find it as a "document".

    Args:
        preview: The batch.
        processor: The `MMGEMProcessor` that made it.
    """
    batch, lines = preview.batch, []
    for row in range(len(batch["input_ids"])):
        is_token = batch["attention_mask"][row].bool()
        ids, labels = batch["input_ids"][row][is_token], batch["labels"][row][is_token]
        pieces = []
        is_learned = labels != IGNORED_LABEL
        for learned, positions in groupby(range(len(ids)), key=lambda position: bool(is_learned[position])):
            text = processor.tokenizer.decode(ids[list(positions)])
            pieces.append(f"[[{text}]]" if learned else text)
        uses = _uses(batch, row)
        uses += [preview.use] if is_learned.any() else []
        lines.append(f"{_target(batch, row):22}{' + '.join(uses):24}{''.join(pieces).strip()}")
    return lines


def contact_sheet(preview: Preview, processor) -> Image.Image | None:
    """Draw the images of a batch as the model sees them, side by side, with the boxes that are trained. Hidden patches
    are gray.

    Args:
        preview: The batch.
        processor: The `MMGEMProcessor` that made it.

    Returns:
        The sheet, or None if the batch has no images.
    """
    if "pixel_values" not in preview.batch:
        return None
    count = len(preview.batch["pixel_values"])
    tiles = [_tile(preview, number, processor.image_processor) for number in range(count)]
    columns = math.ceil(math.sqrt(len(tiles)))
    width, height = (max(sides) for sides in zip(*(tile.size for tile in tiles), strict=True))
    sheet = Image.new("RGB", (columns * (width + 4), math.ceil(len(tiles) / columns) * (height + 4)), "white")
    for number, tile in enumerate(tiles):
        sheet.paste(tile, (number % columns * (width + 4), number // columns * (height + 4)))
    return sheet


def _target(batch: Mapping[str, Any], row: int) -> str:
    """What a text describes, is to find or is written from."""
    image, box = int(batch["image_index"][row]), int(batch["box_index"][row])
    if image < 0:
        return "no image"
    texts = pointers(batch, Role.TEXT)
    role = next((f"{TEXT_COLUMNS[name].pointed_to_as} of " for name, rows in texts.items() if rows[row] >= 0), "")
    return f"{role}image {image}" if box < 0 else f"{role}image {image}, box {box}"


def _uses(batch: Mapping[str, Any], row: int) -> list[str]:
    """What a text is embedded for."""
    texts = pointers(batch, Role.TEXT)
    uses = [TEXT_COLUMNS[name].pointed_to_as for name, rows in texts.items() if (rows == row).any()]
    if not batch["contrastive_mask"][row]:
        return uses
    if "hard_negative_mask" in batch and batch["hard_negative_mask"][row]:
        return [*uses, "hard negative"]
    fused = [int(image) for image in batch["fused_index"][row] if image >= 0] if "fused_index" in batch else []
    if not fused:
        return [*uses, "embedded"]
    return [*uses, f"embedded with image{'s' * (len(fused) > 1)} {', '.join(map(str, fused))}"]


def image_pixels(batch: Mapping[str, Any], number: int) -> torch.Tensor:
    """(3, H, W) pixel values of an image of a batch, which may hold them as patches (SigLIP 2 NaFlex)."""
    pixels = batch["pixel_values"][number].float()
    if "spatial_shapes" not in batch:
        return pixels
    rows, columns = batch["spatial_shapes"][number].tolist()
    side = math.isqrt(pixels.shape[-1] // 3)
    patches = pixels[: rows * columns].unflatten(0, (rows, columns)).unflatten(-1, (side, side, 3))
    return patches.permute(4, 0, 2, 1, 3).reshape(3, rows * side, columns * side)


def _tile(preview: Preview, number: int, image_processor) -> Image.Image:
    batch, hidden = preview.batch, preview.hidden_patches
    pixels = image_pixels(batch, number)  # (3, H, W)
    if image_processor.do_normalize:
        mean, std = (torch.tensor(getattr(image_processor, name)) for name in ("image_mean", "image_std"))
        pixels = pixels * std[:, None, None] + mean[:, None, None]
    if image_processor.do_rescale:
        pixels = pixels / image_processor.rescale_factor
    if hidden is not None:
        mask = hidden[number, None, None].float()  # (1, 1, rows, columns)
        is_hidden = torch.nn.functional.interpolate(mask, pixels.shape[1:]).bool()[0, 0]  # (H, W)
        pixels = pixels.masked_fill(is_hidden, 128)
    view = Image.fromarray(pixels.round().clamp(0, 255).byte().permute(1, 2, 0).numpy())
    scale = max(1, math.ceil(_TILE / min(view.size)))
    view = view.resize((view.width * scale, view.height * scale), Image.Resampling.NEAREST)
    tile = Image.new("RGB", (view.width, view.height + 14), "white")
    tile.paste(view, (0, 14))
    draw = ImageDraw.Draw(tile)
    draw.text((2, 1), f"image {number}", fill="black")
    for box, corners in enumerate(batch["boxes"][number].tolist() if "boxes" in batch else []):
        if any(corners):  # rows of zeros are padding
            x0, x1 = (corner * (view.width - 1) for corner in corners[::2])
            y0, y1 = (corner * (view.height - 1) + 14 for corner in corners[1::2])
            color = _COLORS[box % len(_COLORS)]
            draw.rectangle((x0, y0, x1, y1), outline=color, width=2)
            draw.text((x0 + 4, y0 + 2), f"box {box}", fill=color)
    return tile
