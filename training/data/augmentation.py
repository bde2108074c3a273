"""Augmented views of photographs: a random crop that carries boxes along, a flip that knows "left" and "right", and
jittered colours. The image processor then resizes a view as it does any image."""

import math
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageEnhance, ImageOps

from mmgem.training.data.rows import edit_of, images_of, texts_of

# Words for the two sides in English, German, French and Czech, and characters in Chinese.
_SIDES = re.compile(
    r"\b(left|right)(-?(hand|most|wards?|side))?\b"
    r"|\b(links|rechts)\w*|\b(linke|rechte)[nmrs]?\b"
    r"|\b(gauches?|droite?s?)\b"
    r"|\b(v|na|do|z)?(lev|prav)(o|a|ou|ý|á|é|ém|ým|ého|ému)\b"
    r"|[左右]",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class View:
    """One view of an image.

    Args:
        crop: `(x0, y0, x1, y1)` in whole pixels of the image.
        flipped: Whether it is mirrored, after the crop.
        colors: Factors of brightness, contrast and saturation; 1 changes nothing.
    """

    crop: tuple[int, int, int, int]
    flipped: bool = False
    colors: tuple[float, float, float] = (1.0, 1.0, 1.0)

    @classmethod
    def whole(cls, size: tuple[int, int]) -> "View":
        """Return the view that is the image itself, of `(width, height)` pixels."""
        return cls((0, 0, *size))

    @property
    def size(self) -> tuple[int, int]:
        """`(width, height)` in pixels."""
        x0, y0, x1, y1 = self.crop
        return x1 - x0, y1 - y0

    def apply(self, image: Image.Image) -> Image.Image:
        """Return what the view shows of an RGB image."""
        if self.crop != (0, 0, *image.size):
            image = image.crop(self.crop)
        if self.flipped:
            image = ImageOps.mirror(image)
        enhancers = ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color
        for enhancer, factor in zip(enhancers, self.colors, strict=True):
            if factor != 1:
                image = enhancer(image).enhance(factor)
        return image

    def carry(self, row: Mapping[str, Any], min_box: float) -> dict[str, Any]:
        """Return a row with its boxes where they are in the view, and without those that are cut away.

        Args:
            row: Its columns; the image is left as it is.
            min_box: The least share of the area of a box that has to be in the view, in (0, 1].
        """
        if not row.get("boxes"):
            return dict(row)
        kept: dict[int, list[float]] = {}  # by their numbers
        for number, box in enumerate(row["boxes"]):
            if (moved := self._moved(box, min_box)) is not None:
                kept[number] = moved
        numbers = {old: new for new, old in enumerate(kept)}
        instructions = [one for one in row.get("instructions") or [] if one["box"] in numbers]
        return dict(row) | {
            "boxes": list(kept.values()),
            "region_captions": [row["region_captions"][number] for number in kept],
            "instructions": [{**one, "box": numbers[one["box"]]} for one in instructions],
        }

    def _moved(self, box, min_box: float) -> list[float] | None:
        x0, y0, x1, y1 = map(float, box)
        left, top, right, bottom = self.crop
        inside = max(x0, left), max(y0, top), min(x1, right), min(y1, bottom)
        width, height = inside[2] - inside[0], inside[3] - inside[1]
        if width <= 0 or height <= 0 or width * height < min_box * (x1 - x0) * (y1 - y0):
            return None
        first, last = (right - inside[2], right - inside[0]) if self.flipped else (inside[0] - left, inside[2] - left)
        return [first, inside[1] - top, last, inside[3] - top]


@dataclass(frozen=True)
class Augmentation:
    """How views are drawn. All is decided by a seed, so that a resumed run sees what it would have seen.

    Args:
        min_crop: The least share of the image that a crop has, in (0, 1]. The aspect ratio differs by a third at most.
        flip_probability: How often an image is mirrored. One whose row says "left" or "right" (in English, German,
            French, Czech or Chinese, in whatever sense) never is.
        color_jitter: How much brightness, contrast and saturation differ at most, in [0, 1).
        min_box: The least share of a box that has to be in the view, in (0, 1]; others are dropped.

    Raises:
        ValueError: If a number is out of its range.
    """

    min_crop: float = 0.5
    flip_probability: float = 0.5
    color_jitter: float = 0.3
    min_box: float = 0.5

    def __post_init__(self):
        for name in ("min_crop", "min_box"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; expected a share above 0, up to 1.")
        if not 0 <= self.flip_probability <= 1:
            raise ValueError(f"`flip_probability` is {self.flip_probability}; expected a number from 0 to 1.")
        if not 0 <= self.color_jitter < 1:
            raise ValueError(f"`color_jitter` is {self.color_jitter}; expected a number from 0 to below 1.")

    @property
    def least_side(self) -> float:
        """The least share of a side of the image that a crop has."""
        return math.sqrt(self.min_crop * 3 / 4)

    def draw(self, row: Mapping[str, Any], size: tuple[int, int], seed: int) -> View:
        """Draw a view of the image of a row.

        Args:
            row: Its columns, whose texts decide whether the view may be mirrored.
            size: `(width, height)` of the image.
            seed: Decides all.
        """
        draw = random.Random(seed)
        area, ratio = draw.uniform(self.min_crop, 1), math.exp(draw.uniform(-1, 1) * math.log(4 / 3))
        shares = min(1.0, math.sqrt(area * ratio)), min(1.0, math.sqrt(area / ratio))
        edges = []
        for side, share in zip(size, shares, strict=True):
            length = max(1, round(side * share))
            first = draw.randint(0, side - length)
            edges.append((first, first + length))
        (x0, x1), (y0, y1) = edges
        flipped = draw.random() < self.flip_probability and not names_a_side(row)
        brightness, contrast, saturation = (1 + draw.uniform(-1, 1) * self.color_jitter for _ in range(3))
        return View((x0, y0, x1, y1), flipped, (brightness, contrast, saturation))


def may_be_augmented(row: Mapping[str, Any]) -> bool:
    """Tell whether a row has one image, and no edit of it, which would have to be made to the view."""
    return len(images_of(row)) == 1 and edit_of(row) is None


def names_a_side(row: Mapping[str, Any]) -> bool:
    """Tell whether any text of a row says "left" or "right", in one of the languages of [`Augmentation`]."""
    return any(map(_SIDES.search, texts_of(row)))
