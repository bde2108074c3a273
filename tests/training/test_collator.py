import pytest
import torch
from PIL import Image

from mmgem.training.collator import MMGEMCollator

ROW = {
    "captions": ["a red star", "one star, red"],
    "long_caption": "a long text about a red star",
    "boxes": [[0, 0, 16, 16], [8, 8, 32, 32], [4, 4, 12, 30]],
    "region_captions": ["first region", "second region", "third region"],
    "label": "star",
    "qa": [{"question": "what color?", "answer": "red"}],
}


@pytest.fixture
def image():
    return Image.new("RGB", (32, 32), "navy")


def texts_of(batch, processor):
    return [
        processor.tokenizer.decode(ids[mask.bool()]).strip()
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


def labelled_text(batch, row, processor):
    return processor.tokenizer.decode(batch["labels"][row][batch["labels"][row] != -100]).strip()


def test_every_column_becomes_the_texts_it_promises(tiny_processor, image):
    collator = MMGEMCollator(
        tiny_processor, regions_per_image=3, long_caption_probability=1.0, label_template="a picture of a {label}"
    )
    batch = collator([{"image": image} | ROW, {"image": image, "caption": "just blue"}])
    texts = texts_of(batch, tiny_processor)
    assert texts[0] in ROW["captions"]
    assert texts[1:4] == [ROW["long_caption"], "a picture of a star", "what color? red"]
    assert texts[7] == "just blue"
    assert batch["image_index"].tolist() == [0] * 7 + [1]
    assert batch["box_index"].tolist() == [-1, -1, -1, -1, 0, 1, 2, -1]
    assert batch["contrastive_mask"].tolist() == [True, True, True, False, True, True, True, True]
    generated = [labelled_text(batch, row, tiny_processor) for row in range(8)]
    assert generated == [texts[0], "", "", "red", *texts[4:]]
    for text, box in zip(texts[4:7], batch["boxes"][0], strict=True):
        expected = ROW["boxes"][ROW["region_captions"].index(text)]
        torch.testing.assert_close(box * 32, torch.tensor(expected, dtype=torch.float32))


def test_batch_trains_the_model(tiny_model, tiny_processor, image):
    outputs = tiny_model(**MMGEMCollator(tiny_processor)([{"image": image} | ROW, {"image": image, "text": "blue"}]))
    assert outputs.loss.isfinite()


def test_draws_repeat_with_the_seed_and_vary_without(tiny_processor, image):
    row = {"image": image, "captions": [f"caption {i}" for i in range(50)]}
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(texts_of(MMGEMCollator(tiny_processor)([row] * 3), tiny_processor))
    assert draws[0] == draws[1] != draws[2]
    assert len(set(draws[0])) > 1


def test_rows_of_one_image_share_its_id(tiny_processor, image):
    rows = [{"image": image, "caption": text, "image_id": i} for i, text in [("a", "x"), ("b", "y"), ("a", "z")]]
    ids = MMGEMCollator(tiny_processor)(rows)["image_ids"].tolist()
    assert ids[0] == ids[2] != ids[1]
    assert "image_ids" not in MMGEMCollator(tiny_processor)([*rows, {"image": image, "caption": "w"}])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label": "star"}, "expected `image` and one of"),
        ({"captions": []}, "expected `image` and one of"),
        ({"caption": "a star", "boxes": [[0, 0, 4, 4]]}, "1 `boxes` and 0 `region_captions`"),
    ],
)
def test_rows_that_cannot_be_trained_are_named(tiny_processor, image, row, message):
    with pytest.raises(ValueError, match=message):
        MMGEMCollator(tiny_processor)([{"image": image} | row])
