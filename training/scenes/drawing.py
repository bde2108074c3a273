"""Small drawn scenes with ground truth: what is in them, how they are drawn, and where.

A scene is 1 to 5 objects on a 3x3 grid of places, at most one object to a place. Exactly one object is large, the
scene's subject. Everything follows from `(seed, index)`: the same pair gives the same objects and the same pixels in
every process, so nothing needs to be stored and any scene can be drawn at any time.
"""

import colorsys
import math
import random
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import NamedTuple

from PIL import Image, ImageChops, ImageDraw

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "diamond", "moon")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
FILLS = ("solid", "striped", "outlined")
SIZES = ("large", "small")
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
LABELS = tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES)
BACKGROUNDS = ("plain", "gradient", "checkers", "dots", "noise")
MAX_OBJECTS = 5
MIN_IMAGE_SIZE, MAX_IMAGE_SIZE = 48, 2048  # pixels; eight times as many while they are drawn

_RGB = {
    "red": (222, 32, 38),
    "orange": (248, 136, 16),
    "yellow": (250, 228, 44),
    "green": (38, 172, 66),
    "blue": (40, 98, 238),
    "purple": (142, 52, 198),
    "pink": (252, 138, 194),
    "white": (242, 242, 242),
}
_COLOR_JITTER = 10
_GAP_BRIGHTNESS = 0.42  # of what lies between the stripes of a striped object, relative to its color

# Lengths are fractions of the side of a place's cell, which is 32 px in an image of 96 px.
_RADIUS = {"large": 13 / 32, "small": 8 / 32}
_MAX_SHIFT = 4 / 32
_STRIPE_WIDTH = {"large": 2.5 / 32, "small": 2 / 32}
_LINE_WIDTH = {"large": 2.0 / 32, "small": 1.5 / 32}
_SUPERSAMPLING = 8


class Look(NamedTuple):
    """How an object looks, wherever it is: what a region caption tells."""

    shape: str
    color: str
    fill: str
    size: str


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One object of a scene: a value of `SHAPES`, `COLORS`, `FILLS`, `SIZES` and `PLACES` each."""

    shape: str
    color: str
    fill: str
    size: str
    place: str

    @property
    def look(self) -> Look:
        """The object without its place."""
        return Look(self.shape, self.color, self.fill, self.size)


@dataclass(frozen=True, slots=True)
class Scene:
    """The objects of a scene in reading order. `(seed, index)` also decides the background and the fine positions.

    Replacing `objects` therefore gives a twin picture, equal but for the objects that were replaced.
    """

    seed: int
    index: int
    objects: tuple[SceneObject, ...]

    @property
    def scene_id(self) -> str:
        """A stable name, unique over all seeds and indices."""
        return f"{self.seed}-{self.index}"

    @property
    def subject(self) -> SceneObject:
        """The large object."""
        return next(item for item in self.objects if item.size == "large")

    @property
    def label(self) -> str:
        """The scene's class, one of `LABELS`: color and shape of the subject."""
        return f"{self.subject.color} {self.subject.shape}"

    @property
    def background(self) -> str:
        """The kind of background, one of `BACKGROUNDS`."""
        return self.random("background").choice(BACKGROUNDS)

    def random(self, purpose: str) -> random.Random:
        """A random stream of this scene's own; different purposes give independent streams."""
        return random.Random(f"{self.seed}-{self.index}-{purpose}")


def make_scene(seed: int, index: int) -> Scene:
    """Chooses the objects of scene `index` of the world `seed`.

    Args:
        seed: Which sequence of scenes; training and evaluation take different ones.
        index: Position in the sequence, 0 or more.

    Raises:
        ValueError: If `index` is negative.
    """
    if index < 0:
        raise ValueError(f"`index` is {index}; expected 0 or more.")
    rng = random.Random(f"{seed}-{index}-objects")
    places = sorted(rng.sample(range(len(PLACES)), rng.randint(1, MAX_OBJECTS)))
    subject = rng.choice(places)
    return Scene(
        seed,
        index,
        tuple(
            SceneObject(
                shape=rng.choice(SHAPES),
                color=rng.choice(COLORS),
                fill=rng.choice(FILLS),
                size="large" if place == subject else "small",
                place=PLACES[place],
            )
            for place in places
        ),
    )


def draw_scene(scene: Scene, image_size: int = 96) -> Image.Image:
    """Draws a scene.

    Args:
        scene: The scene to draw.
        image_size: Side of the square picture in pixels, `MIN_IMAGE_SIZE` to `MAX_IMAGE_SIZE`; everything scales with
            it.

    Returns:
        An RGB image, `image_size` x `image_size`.

    Raises:
        ValueError: If `image_size` is too small for the objects to be told apart.
    """
    _check_image_size(image_size)
    image = _draw_background(scene, image_size)
    for item in scene.objects:
        stencil = _stencil(item.shape, item.fill, item.size, image_size)
        corner, rgb = _place(scene, item, image_size)
        if item.fill == "striped":
            image.paste(tuple(round(_GAP_BRIGHTNESS * value) for value in rgb), corner, stencil.silhouette)
        image.paste(rgb, corner, stencil.paint)
    return image


def scene_boxes(scene: Scene, image_size: int = 96) -> list[list[float]]:
    """The tight box `[x0, y0, x1, y1]` of every object, in pixels of the picture `draw_scene` gives, in its order.

    Raises:
        ValueError: If `image_size` is out of its range.
    """
    _check_image_size(image_size)
    boxes = []
    for item in scene.objects:
        (left, top), _ = _place(scene, item, image_size)
        x0, y0, x1, y1 = _stencil(item.shape, item.fill, item.size, image_size).box
        boxes.append([left + x0, top + y0, left + x1, top + y1])
    return boxes


def _check_image_size(image_size: int) -> None:
    if not MIN_IMAGE_SIZE <= image_size <= MAX_IMAGE_SIZE:
        raise ValueError(f"`image_size` is {image_size}; expected {MIN_IMAGE_SIZE} to {MAX_IMAGE_SIZE} pixels.")


def _place(scene: Scene, item: SceneObject, image_size: int) -> tuple[tuple[int, int], tuple[int, ...]]:
    """Upper left corner of the object's stencil (pixels) and its color (RGB), both slightly varied by place."""
    rng = scene.random(item.place)
    cell = image_size / 3
    # Half a pixel is kept back because the corner is rounded: the object stays inside its cell.
    shift = max(0.0, min(_MAX_SHIFT * cell, (0.5 - _RADIUS[item.size]) * cell - 0.5))
    row, column = divmod(PLACES.index(item.place), 3)
    side = _stencil(item.shape, item.fill, item.size, image_size).paint.width
    left = round((column + 0.5) * cell + rng.uniform(-shift, shift) - side / 2)
    top = round((row + 0.5) * cell + rng.uniform(-shift, shift) - side / 2)
    rgb = tuple(min(255, value + rng.randint(-_COLOR_JITTER, _COLOR_JITTER)) for value in _RGB[item.color])
    return (left, top), rgb


class _Stencil(NamedTuple):
    """How to paint one kind of object: where it is at all, where its color goes, and its box in the stencil."""

    silhouette: Image.Image
    paint: Image.Image
    box: tuple[float, float, float, float]


@lru_cache(maxsize=1024)
def _stencil(shape: str, fill: str, size: str, image_size: int) -> _Stencil:
    cell = image_size / 3
    radius = _RADIUS[size] * cell
    side = 2 * math.ceil(radius + 1)  # even, so that the middle falls on a pixel border
    fine = side * _SUPERSAMPLING
    points = [(side / 2 + x * radius, side / 2 + y * radius) for x, y in _outline(shape)]
    fine_points = [(x * _SUPERSAMPLING, y * _SUPERSAMPLING) for x, y in points]

    silhouette = Image.new("L", (fine, fine))
    ImageDraw.Draw(silhouette).polygon(fine_points, fill=255)
    paint = silhouette
    if fill != "solid":
        pattern = Image.new("L", (fine, fine))
        draw = ImageDraw.Draw(pattern)
        if fill == "outlined":
            # Half of the line lies outside the silhouette and is cut off below.
            width = 2 * _LINE_WIDTH[size] * cell * _SUPERSAMPLING
            draw.line([*fine_points, *fine_points[:2]], fill=255, width=round(width), joint="curve")
        else:
            width = _STRIPE_WIDTH[size] * cell * _SUPERSAMPLING
            for number in range(math.ceil(fine / (2 * width))):
                draw.rectangle([0, 2 * number * width, fine, (2 * number + 1) * width - 1], fill=255)
        paint = ImageChops.multiply(silhouette, pattern)
    x, y = zip(*points, strict=True)
    return _Stencil(silhouette.reduce(_SUPERSAMPLING), paint.reduce(_SUPERSAMPLING), (min(x), min(y), max(x), max(y)))


@cache
def _outline(shape: str) -> list[tuple[float, float]]:
    """A shape as a polygon centered on the origin that just fits the unit circle (y points down)."""
    if shape == "circle":
        points = _arc(0, 360)
    elif shape == "square":
        points = [(-1, -1), (1, -1), (1, 1), (-1, 1)]
    elif shape == "triangle":
        points = [(0, -1), (1, 0.8), (-1, 0.8)]
    elif shape == "star":
        tips, dents = _arc(-90, 270, 5), _arc(-54, 306, 5, radius=0.5)
        points = [point for pair in zip(tips, dents, strict=True) for point in pair]
    elif shape == "heart":
        angles = [2 * math.pi * step / 64 for step in range(64)]
        points = [
            (
                16 * math.sin(t) ** 3,
                -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)),
            )
            for t in angles
        ]
    elif shape == "cross":
        arm = 0.36
        quarter = [(arm, -1), (arm, -arm), (1, -arm)]
        points = quarter + [(-y, x) for x, y in quarter] + [(-x, -y) for x, y in quarter]
        points += [(y, -x) for x, y in quarter]
    elif shape == "diamond":
        points = [(0, -1), (0.64, 0), (0, 1), (-0.64, 0)]
    else:  # moon: a disc out of which a smaller disc, shifted to the right, is cut
        points = _arc(40, 320) + [(x + 0.5, y) for x, y in _arc(292, 68, radius=0.7)]
    x, y = zip(*points, strict=True)
    middle_x, middle_y = (min(x) + max(x)) / 2, (min(y) + max(y)) / 2
    points = [(x - middle_x, y - middle_y) for x, y in points]
    reach = max(math.hypot(x, y) for x, y in points)
    return [(x / reach, y / reach) for x, y in points]


def _arc(start: float, stop: float, steps: int = 64, radius: float = 1.0) -> list[tuple[float, float]]:
    """`steps` points on a circle from `start` up to, not including, `stop` (degrees)."""
    angles = [math.radians(start + (stop - start) * step / steps) for step in range(steps)]
    return [(radius * math.cos(angle), radius * math.sin(angle)) for angle in angles]


def _draw_background(scene: Scene, image_size: int) -> Image.Image:
    """Two dark, muted tones, mixed by a pattern: never as bright as an object, never looking like one."""
    rng = scene.random("background")
    kind = rng.choice(BACKGROUNDS)
    hue, saturation, value = rng.random(), rng.uniform(0.0, 0.4), rng.uniform(0.1, 0.26)
    tones = [
        tuple(round(255 * channel) for channel in colorsys.hsv_to_rgb(hue, saturation, brightness))
        for brightness in (value, value + rng.uniform(0.06, 0.12))
    ]
    plain, other = (Image.new("RGB", (image_size, image_size), tone) for tone in tones)
    if kind == "plain":
        return plain
    plain.paste(other, mask=_pattern(kind, rng.randrange(4), image_size))
    return plain


@lru_cache(maxsize=64)
def _pattern(kind: str, variant: int, image_size: int) -> Image.Image:
    """The mask of the second tone of a background: mode L, 0 to 255; `variant` is 0 to 3."""
    square = (image_size, image_size)
    if kind == "gradient":
        return Image.linear_gradient("L").resize(square).rotate(90 * variant)
    if kind == "noise":
        grains = 16 * (variant + 1)
        noise = random.Random(variant).randbytes(grains * grains)
        return Image.frombytes("L", (grains, grains), noise).resize(square, Image.Resampling.BILINEAR)
    step = image_size / (16 - 2 * variant)
    pattern = Image.new("L", square)
    draw = ImageDraw.Draw(pattern)
    for row in range(16):
        for column in range(16):
            if kind == "checkers" and (row + column) % 2:
                box = [column * step, row * step, (column + 1) * step - 1, (row + 1) * step - 1]
                draw.rectangle(box, fill=255)
            elif kind == "dots":
                x, y = (column + 0.5) * step, (row + 0.5) * step
                draw.ellipse([x - step / 6, y - step / 6, x + step / 6, y + step / 6], fill=255)
    return pattern
