import pytest
import torch
from PIL import Image

from mmgem.training.data.collator import MMGEMCollator
from mmgem.training.recipes.model_view import contact_sheet, describe_row, describe_texts

SIDE = 40


@pytest.fixture
def rows():
    red = Image.new("RGB", (SIDE, SIDE), (255, 0, 0))
    return [
        {
            "row_key": "photos:1",
            "image": red,
            "captions": ["a red star"],
            "long_caption": "a long red star",
            "boxes": [[0.2, 0.0, 20.0, 20.4]],
            "region_captions": ["a corner"],
            "qa": [{"question": "which color?", "answer": "red"}],
            "hard_negatives": ["a blue star"],
        },
        {"row_key": "photos:2", "image": Image.new("RGB", (SIDE, SIDE), (0, 0, 255))},
        {"row_key": "texts:1", "captions": ["a blue moon"]},
    ]


@pytest.fixture
def batch(rows, tiny_processor):
    return MMGEMCollator(tiny_processor, long_caption_probability=1.0, hard_negatives_per_image=1)(rows)


def test_each_text_says_where_it_belongs_and_what_is_learned(batch, tiny_processor):
    lines = [tuple(line.split(maxsplit=0)[0].split("  ")) for line in describe_texts(batch, tiny_processor)]
    lines = [tuple(part.strip() for part in line if part.strip()) for line in lines]
    assert sorted(lines) == sorted(
        [
            ("image 0", "embedded + generated", "[[ a red star]]"),
            ("image 0", "embedded", "a long red star"),
            ("image 0", "generated", "which color?[[ red]]"),
            ("image 0", "hard negative", "a blue star"),
            ("image 0, box 0", "embedded + generated", "[[ a corner]]"),
            ("no image", "generated", "[[ a blue moon]]"),
        ]
    )


def test_rows_are_told_in_a_line(rows):
    assert describe_row(rows[0]) == (
        "photos:1: image of 40 x 40, captions (1) 'a red star', long_caption 'a long red star', "
        "boxes (1) [0, 0, 20, 20], region_captions (1) 'a corner', "
        "qa (1) {'question': 'which color?', 'answer': 'red'}, hard_negatives (1) 'a blue star'"
    )
    assert describe_row(rows[2]) == "texts:1: captions (1) 'a blue moon'"


def test_the_sheet_shows_the_images_as_they_were_and_their_boxes(batch, tiny_processor):
    sheet = contact_sheet(batch, tiny_processor)
    tile = (sheet.width - 8) // 2  # two images side by side
    assert sheet.getpixel((tile * 3 // 4, tile * 3 // 4)) == (255, 0, 0)
    assert sheet.getpixel((tile + 4 + tile // 2, tile // 2)) == (0, 0, 255)
    # The lower edge of the box is half-way down, below the line with the image's number.
    middle = [sheet.getpixel((tile // 4, y)) for y in range(14 + tile // 2 - 4, 14 + tile // 2 + 5)]
    assert any(pixel != (255, 0, 0) for pixel in middle)
    assert all(sheet.getpixel((tile * 3 // 4, y)) == (255, 0, 0) for y in range(20, tile))


def test_texts_alone_have_no_sheet(tiny_processor):
    batch = MMGEMCollator(tiny_processor)([{"captions": ["a red star"]}])
    assert contact_sheet(batch, tiny_processor) is None
    assert "pixel_values" not in batch and len(describe_texts(batch, tiny_processor)) == 1
    assert torch.equal(batch["image_index"], torch.tensor([-1]))
