"""The drawn scenes: the same everywhere, true to their description, and distinguishable."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageChops

from mmgem.training.scenes import drawing
from mmgem.training.scenes.drawing import (
    BACKGROUNDS,
    COLORS,
    FILLS,
    LABELS,
    MAX_OBJECTS,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    draw_scene,
    make_scene,
    scene_boxes,
)

MANY = [make_scene(11, index) for index in range(2000)]
FEW = MANY[:30]


def test_scene_is_fixed_by_seed_and_index():
    # Spelled out, so that a change that would silently make other data of old seeds is seen.
    assert make_scene(0, 0).objects == (
        SceneObject("triangle", "yellow", "striped", "small", "left"),
        SceneObject("cross", "orange", "solid", "large", "right"),
    )
    assert make_scene(0, 1) != make_scene(1, 1) != make_scene(1, 0)


def test_drawing_repeats():
    first = [draw_scene(scene).tobytes() for scene in FEW]
    for cached in (drawing._stencil, drawing._pattern, drawing._outline):
        cached.cache_clear()
    assert [draw_scene(scene).tobytes() for scene in reversed(FEW)] == first[::-1]


def test_scenes_are_well_formed():
    for scene in MANY:
        places = [PLACES.index(item.place) for item in scene.objects]
        assert places == sorted(set(places)) and 1 <= len(places) <= MAX_OBJECTS
        assert [item.size for item in scene.objects].count("large") == 1
        assert scene.label == f"{scene.subject.color} {scene.subject.shape}"
    assert len({scene.scene_id for scene in MANY}) == len(MANY)


@pytest.mark.parametrize(
    ("attribute", "values"), [("shape", SHAPES), ("color", COLORS), ("fill", FILLS), ("place", PLACES)]
)
def test_every_value_occurs_about_as_often(attribute, values):
    seen = [getattr(item, attribute) for scene in MANY for item in scene.objects]
    expected = len(seen) / len(values)
    assert all(0.85 * expected < seen.count(value) < 1.15 * expected for value in values)


def test_every_label_and_background_occurs():
    assert {scene.label for scene in MANY} == set(LABELS)
    assert {scene.background for scene in MANY} == set(BACKGROUNDS)


@pytest.mark.parametrize("image_size", [48, 96, 100, 224])
def test_boxes_are_tight_and_inside_their_cells(image_size):
    for scene in FEW:
        boxes = scene_boxes(scene, image_size)
        assert len(boxes) == len(scene.objects)
        whole = draw_scene(scene, image_size)
        for item, box in zip(scene.objects, boxes, strict=True):
            others = tuple(other for other in scene.objects if other != item)
            without = draw_scene(replace(scene, objects=others), image_size)
            changed = ImageChops.difference(whole, without).getbbox()
            assert np.abs(np.subtract(changed, box)).max() <= 1.0
            row, column = divmod(PLACES.index(item.place), 3)
            cell = np.array([column, row, column + 1, row + 1]) * image_size / 3
            assert (np.array(box[:2]) >= cell[:2]).all() and (np.array(box[2:]) <= cell[2:]).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_large_is_much_larger_than_small(shape):
    sides = {}
    for size in SIZES:
        x0, y0, x1, y1 = scene_boxes(Scene(0, 0, (SceneObject(shape, "red", "solid", size, "center"),)), 96)[0]
        sides[size] = max(x1 - x0, y1 - y0)
    assert sides["large"] > 1.5 * sides["small"]


def test_objects_are_painted_in_their_color():
    for color in COLORS:
        scene = Scene(3, 5, (SceneObject("square", color, "solid", "large", "center"),))
        x0, y0, x1, y1 = scene_boxes(scene, 96)[0]
        painted = np.array(draw_scene(scene).getpixel(((x0 + x1) // 2, (y0 + y1) // 2)))
        assert min(COLORS, key=lambda name: np.abs(painted - drawing._RGB[name]).sum()) == color


def test_backgrounds_are_darker_than_every_object():
    brightest = max(np.asarray(draw_scene(replace(scene, objects=()))).max() for scene in MANY[:200])
    assert brightest < min(max(rgb) for rgb in drawing._RGB.values()) - 50


@pytest.mark.parametrize("size", SIZES)
def test_looks_differ_at_every_size(size):
    """Any two shapes or fills, drawn at the same place, differ in a good part of the object's pixels."""
    masks = {
        (shape, fill): np.asarray(
            draw_scene(Scene(0, 4, (SceneObject(shape, "white", fill, size, "center"),))).convert("L"), dtype=float
        )
        for shape in SHAPES
        for fill in FILLS
    }
    area = (2 * drawing._RADIUS[size] * 32) ** 2
    for first in masks:
        for second in masks:
            if first != second:
                assert np.abs(masks[first] - masks[second]).sum() / 255 > 0.05 * area, (first, second)


def test_image_size_scales_everything():
    scene = MANY[0]
    assert draw_scene(scene, 192).size == (192, 192) and draw_scene(scene).mode == "RGB"
    small = draw_scene(scene, 192).resize((96, 96), Image.Resampling.BOX)
    difference = np.abs(np.asarray(small, dtype=float) - np.asarray(draw_scene(scene), dtype=float))
    assert difference.mean() < 4


def test_twin_differs_only_where_its_object_does():
    scene = next(scene for scene in MANY if len(scene.objects) == 3)
    item, *others = scene.objects
    twin = replace(scene, objects=(replace(item, color="white" if item.color != "white" else "red"), *others))
    changed = ImageChops.difference(draw_scene(scene), draw_scene(twin)).getbbox()
    x0, y0, x1, y1 = scene_boxes(scene, 96)[0]
    assert changed[0] >= x0 - 1 and changed[1] >= y0 - 1 and changed[2] <= x1 + 1 and changed[3] <= y1 + 1


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="`index` is -1; expected 0 or more"):
        make_scene(0, -1)
    with pytest.raises(ValueError, match="`image_size` is 32; expected 48 to 2048 pixels"):
        draw_scene(MANY[0], 32)
    with pytest.raises(ValueError, match="`image_size` is 32; expected 48 to 2048 pixels"):
        scene_boxes(MANY[0], 32)
