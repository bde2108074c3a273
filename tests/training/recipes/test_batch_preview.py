import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import build_model
from transformers import Siglip2ImageProcessorPil

from mmgem.processing.processing_mmgem import MMGEMProcessor
from mmgem.training.data.collator import MMGEMCollator
from mmgem.training.recipes.batch_preview import contact_sheet, describe_row, describe_texts, image_pixels
from mmgem.training.recipes.recipe import Stage
from mmgem.training.recipes.stage_kinds import stage_kind
from mmgem.training.reconstruction.masking import MaskingCollator, Reconstruction

SIDE = 40


def preview_of(batch, kind="objective"):
    return stage_kind(Stage(name="first", train_data=[], training={}, kind=kind)).preview(batch)


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
    lines = [
        tuple(line.split(maxsplit=0)[0].split("  ")) for line in describe_texts(preview_of(batch), tiny_processor)
    ]
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


def test_what_is_masked_is_marked_and_gray(rows, tiny_processor):
    config = build_model(text_attention="bidirectional").config
    options = Reconstruction(text_mask_ratio=0.9, patch_mask_ratio=0.25)
    batch = MaskingCollator(MMGEMCollator(tiny_processor, regions_per_image=0), config, options)(rows)
    preview = preview_of(batch, "reconstruction")
    lines = [line.split(maxsplit=2) for line in describe_texts(preview, tiny_processor)]
    assert [line[:2] for line in lines] == [["image", "0"], ["image", "0"], ["no", "image"]]
    for line, mask in zip(lines, batch["text_mask"], strict=True):
        assert (
            line[2].startswith("put back")
            and line[2].count("[[") == int(mask.diff(prepend=mask[:1] & False).sum() + 1) // 2
        )
    sheet = contact_sheet(preview, tiny_processor)
    count = sum(count for count, color in sheet.getcolors(2**16) if color == (128, 128, 128))
    assert count == 2 * 4 * 56 * 56  # of two images of 224, 4 of 16 patches


def test_rows_are_told_in_a_line(rows):
    assert describe_row(rows[0]) == (
        "photos:1: image of 40 x 40, captions (1) 'a red star', long_caption 'a long red star', "
        "boxes (1) [0, 0, 20, 20], region_captions (1) 'a corner', "
        "qa (1) {'question': 'which color?', 'answer': 'red'}, hard_negatives (1) 'a blue star'"
    )
    assert describe_row(rows[2]) == "texts:1: captions (1) 'a blue moon'"


def test_each_text_says_by_which_image_it_finds_another_and_what_is_written_from_memory(rows, tiny_processor):
    row = rows[0] | {
        "edit": {"instruction": "make the star blue"},
        "edited_image": Image.new("RGB", (SIDE, SIDE + 2)),
        "instructions": [{"text": "the corner", "box": 0}],
    }
    assert describe_row(row).startswith("photos:1: image of 40 x 40, edited image of 40 x 42, captions (1)")
    assert "edit {'instruction': 'make the star blue'}, instructions (1) {'text': 'the corner'" in describe_row(row)
    options = {name: 0 for name in ("captions_per_image", "questions_per_image", "long_caption_probability")}
    options |= {name: 1 for name in ("edits_per_image", "instructed_regions_per_image", "memory_captions_per_image")}
    collator = MMGEMCollator(
        tiny_processor, regions_per_image=0, match_captions_per_image=1, prompts={"edit": "edit: "}, **options
    )
    lines = [
        tuple(filter(None, map(str.strip, line.split("  "))))
        for line in describe_texts(preview_of(collator([row])), tiny_processor)
    ]
    assert lines == [
        ("image 0, box 0", "embedded with image 0", "the corner"),
        ("image 1", "embedded with image 0", "edit: make the star blue"),
        ("image 0", "document + memory"),
        ("memory of image 0", "generated", "[[ a red star]]"),
        ("document of image 0", "embedded", "a red star"),
    ]


def test_the_sheet_shows_the_images_as_they_were_and_their_boxes(batch, tiny_processor):
    sheet = contact_sheet(preview_of(batch), tiny_processor)
    tile = (sheet.width - 8) // 2  # two images side by side
    assert sheet.getpixel((tile * 3 // 4, tile * 3 // 4)) == (255, 0, 0)
    assert sheet.getpixel((tile + 4 + tile // 2, tile // 2)) == (0, 0, 255)
    # The lower edge of the box is half-way down, below the line with the image's number.
    middle = [sheet.getpixel((tile // 4, y)) for y in range(14 + tile // 2 - 4, 14 + tile // 2 + 5)]
    assert any(pixel != (255, 0, 0) for pixel in middle)
    assert all(sheet.getpixel((tile * 3 // 4, y)) == (255, 0, 0) for y in range(20, tile))


def test_texts_alone_have_no_sheet(tiny_processor):
    batch = MMGEMCollator(tiny_processor)([{"captions": ["a red star"]}])
    preview = preview_of(batch)
    assert contact_sheet(preview, tiny_processor) is None
    assert "pixel_values" not in batch and len(describe_texts(preview, tiny_processor)) == 1
    assert torch.equal(batch["image_index"], torch.tensor([-1]))


def test_patches_are_shown_as_the_images_they_are_of(tiny_processor):
    images = [Image.effect_noise(size, 80).convert("RGB") for size in ((48, 24), (24, 48))]
    image_processor = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=18)
    processor = MMGEMProcessor(image_processor, tiny_processor.tokenizer, num_visual_tokens=4)
    batch = MMGEMCollator(processor)([{"image": image, "caption": "noise"} for image in images])
    assert [tuple(image_pixels(batch, number).shape) for number in range(2)] == [(3, 24, 48), (3, 48, 24)]
    for number, image in enumerate(images):
        pixels = image_pixels(batch, number)[:, :8, 8:16]  # the second patch of the first row
        torch.testing.assert_close(pixels.permute(1, 2, 0).flatten(), batch["pixel_values"][number, 1])
        shown = (image_pixels(batch, number) * 0.5 + 0.5).permute(1, 2, 0) * 255
        torch.testing.assert_close(shown.round().byte().numpy(), np.array(image), check_dtype=False)
    assert contact_sheet(preview_of(batch), processor).width > 2 * 224
