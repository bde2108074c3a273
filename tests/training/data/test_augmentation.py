import numpy as np
import pytest
from PIL import Image

from mmgem.training.data.augmentation import Augmentation, View, names_a_side
from mmgem.training.data.collator import MMGEMCollator

WHITE = [6, 4, 14, 12]  # of the image below


@pytest.fixture
def image():
    image = Image.new("RGB", (40, 20), "navy")
    image.paste("white", WHITE)
    return image


def rectangle_of(image):
    """The white pixels of an image, as the box around them."""
    rows, columns = np.nonzero(np.asarray(image.convert("L")) > 200)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_views_follow_from_the_seed_alone():
    augmentation = Augmentation()
    views = [augmentation.draw({}, (64, 48), seed) for seed in (1, 1, 2)]
    assert views[0] == views[1] != views[2]


@pytest.mark.parametrize("size", [(64, 48), (3, 200), (1, 1)])
def test_crops_lie_in_the_image_and_are_as_large_as_asked_for(size):
    for seed in range(200):
        x0, y0, x1, y1 = Augmentation(min_crop=0.4).draw({}, size, seed).crop
        assert 0 <= x0 < x1 <= size[0] and 0 <= y0 < y1 <= size[1]
        if min(size) > 10:
            assert (x1 - x0) * (y1 - y0) >= 0.36 * size[0] * size[1]  # the aspect ratio may be capped


def test_boxes_stay_on_what_they_show(image):
    row = {"boxes": [WHITE], "region_captions": ["a white box"]}
    augmentation, moved = Augmentation(color_jitter=0.0), set()
    for seed in range(60):
        view = augmentation.draw(row, image.size, seed)
        carried, shown = view.carry(row, min_box=1.0), view.apply(image)
        assert shown.size == view.size
        if carried["boxes"]:
            assert carried["boxes"] == [rectangle_of(shown)]
            moved.add(tuple(carried["boxes"][0]))
    assert len(moved) > 10


def test_boxes_that_are_cut_away_go_with_their_captions_and_instructions():
    row = {
        "boxes": [[0, 0, 10, 10], [10, 0, 30, 10], [30, 0, 40, 10]],
        "region_captions": ["gone", "most of it", "whole"],
        "instructions": [{"text": "find nothing", "box": 0}, {"text": "find it", "box": 2}],
    }
    carried = View((14, 0, 40, 20)).carry(row, min_box=0.5)
    assert carried["boxes"] == [[0, 0, 16, 10], [16, 0, 26, 10]]
    assert carried["region_captions"] == ["most of it", "whole"]
    assert carried["instructions"] == [{"text": "find it", "box": 1}]
    assert View((26, 0, 40, 20)).carry(row, min_box=0.5)["region_captions"] == ["whole"]


@pytest.mark.parametrize(
    "text",
    [
        "a man on the left",
        "His right-hand neighbour",
        "links steht ein Baum",
        "der rechte Hund",
        "à gauche",
        "du côté droit",
        "pes vpravo",
        "levá ruka",
        "左边的狗",
    ],
)
@pytest.mark.parametrize("column", ["captions", "queries", "region_captions", "qa"])
def test_an_image_is_not_mirrored_where_a_text_names_a_side(text, column):
    row = {column: [{"question": text, "answer": "yes"}] if column == "qa" else ["a dog", text]}
    augmentation = Augmentation(flip_probability=1.0)
    assert names_a_side(row) and not augmentation.draw(row, (8, 8), 0).flipped


@pytest.mark.parametrize(
    "text", ["two brights dogs in a cleft", "ein rechteckiger Tisch", "zwei Hunde", "le chien", "pravda", "两只狗"]
)
def test_other_texts_let_it_be_mirrored(text):
    edit = {"instruction": "add a moon", "file_name": "left.jpg"}
    assert not names_a_side({"captions": [text], "file_name": "left.jpg", "image_id": "right", "edit": edit})
    assert names_a_side({"captions": [text], "edit": edit | {"instruction": "add a moon on the left"}})
    assert Augmentation(flip_probability=1.0).draw({"captions": [text]}, (8, 8), 0).flipped


def test_colours_change_but_by_no_more_than_asked_for(image):
    for seed in range(20):
        assert all(0.8 <= factor <= 1.2 for factor in Augmentation(color_jitter=0.2).draw({}, (9, 9), seed).colors)
    still = View.whole(image.size)
    assert still.apply(image) is image
    assert View(still.crop, colors=(0.5, 1.0, 1.0)).apply(image).getpixel((8, 8)) == (127, 127, 127)
    assert View(still.crop, colors=(1.0, 1.0, 0.0)).apply(image).getpixel((0, 0)) == (15, 15, 15)  # of navy


@pytest.mark.parametrize(
    ("options", "name"),
    [({"min_crop": 0}, "min_crop"), ({"flip_probability": 2}, "flip"), ({"color_jitter": 1}, "jitter")],
)
def test_numbers_out_of_range_are_refused(options, name):
    with pytest.raises(ValueError, match=name):
        Augmentation(**options)


def test_a_batch_shows_views_with_their_boxes_that_a_resumed_run_would_see_again(tiny_processor, image):
    row = {"image": image, "caption": "a box", "boxes": [WHITE], "region_captions": ["white"], "draw_seed": 5}
    collator = MMGEMCollator(tiny_processor, augmentation={"color_jitter": 0.0, "min_crop": 0.9})
    batches = [collator([{**row, "draw_seed": seed}]) for seed in (5, 5, 6)]
    assert (batches[0]["pixel_values"] == batches[1]["pixel_values"]).all()
    assert (batches[0]["pixel_values"] != batches[2]["pixel_values"]).any()
    for batch in batches:
        bright = (batch["pixel_values"][0].mean(0) > 0.5).nonzero()  # (N, 2) rows and columns of 32
        x0, y0, x1, y1 = (batch["boxes"][0, 0] * 32).tolist()
        rows, columns = bright.unbind(1)
        edges = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        assert edges == pytest.approx((x0, y0, x1, y1), abs=1.5)


def test_an_edit_is_shown_as_it_was_made(tiny_processor, image):
    row = {"image": image, "caption": "a", "edit": {"instruction": "move it"}, "edited_image": image, "image_id": "a"}
    collator = MMGEMCollator(tiny_processor, edits_per_image=1, augmentation={"min_crop": 0.2})
    expected = tiny_processor(images=[image], return_tensors="pt")["pixel_values"]
    assert all((view == expected[0]).all() for view in collator([row])["pixel_values"])
