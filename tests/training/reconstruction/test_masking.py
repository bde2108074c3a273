import pytest
import torch
from PIL import Image
from tiny_models import build_model
from transformers import Siglip2ImageProcessorPil

from mmgem.processing.processing_mmgem import MMGEMProcessor
from mmgem.training.data.collator import MMGEMCollator
from mmgem.training.reconstruction.masking import MaskingCollator, Reconstruction, maskable_tokens

LONG = "a red star at the top left and a large blue circle in the center and a green moon on the right"


@pytest.fixture
def config():
    return build_model(text_attention="bidirectional").config


@pytest.fixture
def image():
    return Image.new("RGB", (32, 32), "navy")


def row(image, seed, **columns):
    return {"image": image, "captions": [LONG, LONG[::-1]], "draw_seed": seed} | columns


def masking(processor, config, collator=None, **options):
    return MaskingCollator(collator or MMGEMCollator(processor), config, Reconstruction(**options))


def test_shares_of_tokens_and_patches_are_masked(tiny_processor, config, image):
    rows = [row(image, seed) for seed in range(32)]
    batch = masking(tiny_processor, config, text_mask_ratio=0.25, patch_mask_ratio=0.75)(rows)
    assert batch["patch_mask"].flatten(1).sum(1).tolist() == [12] * 32
    lengths = batch["attention_mask"].sum(1)
    assert batch["text_mask"].sum(1).tolist() == [round(0.25 * length) for length in lengths.tolist()]
    assert not (batch["text_mask"] & (batch["attention_mask"] == 0)).any()
    # Every place comes, and not the same ones for all.
    assert batch["patch_mask"].any(0).all() and not batch["patch_mask"].all(0).any()
    assert len({tuple(mask.flatten().tolist()) for mask in batch["patch_mask"]}) == 32


def test_what_is_masked_depends_on_the_seed_of_the_row_alone(tiny_processor, config, image):
    collate = masking(tiny_processor, config)
    rows = [
        row(image, 5),
        {"text": LONG, "draw_seed": 6},
        row(image, 7, qa=[{"question": "a star?", "answer": "yes"}]),
    ]
    torch.manual_seed(0)
    whole = collate(rows)
    torch.manual_seed(1)
    parts = [collate(rows[:1]), collate(rows[1:])]
    texts = [
        mask[is_token.bool()]
        for batch in parts
        for mask, is_token in zip(batch["text_mask"], batch["attention_mask"], strict=True)
    ]
    for mask, is_token, expected in zip(whole["text_mask"], whole["attention_mask"], texts, strict=True):
        assert torch.equal(mask[is_token.bool()], expected)
    assert torch.equal(whole["patch_mask"], torch.cat([part["patch_mask"] for part in parts]))
    other = collate([row(image, 8), *rows[1:]])
    assert not torch.equal(other["patch_mask"][0], whole["patch_mask"][0])


def test_without_a_seed_masks_are_drawn_anew(tiny_processor, config, image):
    collate, rows = masking(tiny_processor, config), [{"image": image, "caption": LONG}]
    torch.manual_seed(0)
    first, second = collate(rows), collate(rows)
    torch.manual_seed(0)
    again = collate(rows)
    assert not torch.equal(first["patch_mask"], second["patch_mask"])
    for name in ("patch_mask", "text_mask"):
        assert torch.equal(first[name], again[name])


def test_short_texts_have_one_masked_token_and_special_ones_none(tiny_processor, config):
    tokenizer = tiny_processor.tokenizer
    rows = [{"text": "red star", "draw_seed": seed} for seed in range(20)]
    rows += [{"text": f"star {tokenizer.eos_token * 30}", "draw_seed": seed} for seed in range(5)]
    batch = masking(tiny_processor, config, text_mask_ratio=0.01)(rows)
    assert batch["text_mask"].sum(1).tolist() == [1] * 25
    assert not batch["text_mask"][:, 0].any()  # before it stands nothing
    assert not (batch["input_ids"][batch["text_mask"]] == tokenizer.eos_token_id).any()
    assert "patch_mask" not in batch


@pytest.mark.parametrize("idle", ["text", "patch"])
def test_a_ratio_of_0_masks_nothing(tiny_processor, config, image, idle):
    batch = masking(tiny_processor, config, **{f"{idle}_mask_ratio": 0.0})([row(image, 1)])
    other = "patch" if idle == "text" else "text"
    assert not batch[f"{idle}_mask"].any() and batch[f"{other}_mask"].any()


def test_texts_stand_behind_what_they_are_about(tiny_processor, config, image):
    collator = MMGEMCollator(tiny_processor, hard_negatives_per_image=1)
    columns = {"boxes": [[0, 0, 16, 16]], "region_captions": ["a corner"], "hard_negatives": ["a yellow moon"]}
    batch = masking(tiny_processor, config, collator)([row(image, 1), row(image, 2, **columns)])
    assert batch["image_index"].tolist() == [0, 1, 1, -1] and batch["box_index"].tolist() == [-1, -1, 0, -1]
    assert batch.keys() == {
        *("input_ids", "attention_mask", "image_index", "box_index", "text_mask"),
        *("pixel_values", "patch_mask", "boxes"),
    }


def test_a_text_embedded_with_an_image_stands_behind_that_one(tiny_processor, config, image):
    class Composing(MMGEMCollator):
        def collate(self, rows):
            batch, row_of_text = super().collate(rows)
            columns = {"fused_index": torch.tensor([[-1], [0]]), "box_index": torch.tensor([-1, 0])}
            return batch | columns, row_of_text

    batch = masking(tiny_processor, config, Composing(tiny_processor))([row(image, 1), row(image, 2)])
    assert batch["image_index"].tolist() == [0, 0] and batch["box_index"].tolist() == [-1, -1]


def test_edited_images_are_masked_too(tiny_processor, config, image):
    edited = {"edit": {"instruction": "paint it red"}, "edited_image": image}
    collate = masking(tiny_processor, config, MMGEMCollator(tiny_processor, edits_per_image=1))
    batch = collate([row(image, 1, **edited), row(image, 2)])
    assert batch["image_index"].tolist() == [0, 0, 2]
    assert len(batch["patch_mask"]) == len(batch["pixel_values"]) == 3 and batch["patch_mask"].flatten(1).any(-1).all()


@pytest.mark.parametrize("bos", [None, 5])
def test_a_token_can_be_put_back_only_from_one_before_it(bos):
    input_ids = torch.tensor([[5, 6, 7, 0], [0, 5, 6, 7], [6, 7, 8, 9]])
    attention_mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [1, 1, 1, 1]])
    text_config = build_model().config.text_config
    text_config.bos_token_id = bos
    places = maskable_tokens(input_ids, attention_mask, torch.tensor([0, -1, -1]), text_config).int().tolist()
    assert places == [[int(bos is None), 1, 1, 0], [0, 0, 1, 1], [0, 1, 1, 1]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_mask_ratio": 1.0}, "`text_mask_ratio` is 1.0; expected a number from 0 to below 1"),
        ({"patch_mask_ratio": -0.1}, "`patch_mask_ratio` is -0.1"),
        ({"patch_mask_ratio": float("nan")}, "`patch_mask_ratio` is nan"),
        ({"text_mask_ratio": 0, "patch_mask_ratio": 0}, "are both 0"),
        ({"patch_loss_weight": 0}, "`patch_loss_weight` is 0; expected a number above 0"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Reconstruction(**options)


def test_images_of_many_shapes_are_refused(tiny_processor, config, image):
    image_processor = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16)
    processor = MMGEMProcessor(image_processor, tiny_processor.tokenizer, num_visual_tokens=4)
    with pytest.raises(ValueError, match="`processor` makes patches of images of many shapes"):
        masking(processor, config)([row(image, 1)])
