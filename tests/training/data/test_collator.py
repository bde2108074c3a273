import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from mmgem.processing.processing_mmgem import MMGEMProcessor
from mmgem.training.data.collator import MMGEMCollator
from mmgem.training.data.mixture import Mixture
from mmgem.training.data.sources import DatasetSource

ROW = {
    "captions": ["a red star", "one star, red"],
    "long_caption": "a long text about a red star",
    "boxes": [[0, 0, 16, 16], [8, 8, 32, 32], [4, 4, 12, 30]],
    "region_captions": ["first region", "second region", "third region"],
    "label": "star",
    "qa": [{"question": "what color?", "answer": "red"}],
}

BOXED = {"image": "here", "caption": "a", "boxes": [[0, 0, 4, 4]], "region_captions": ["b"]}


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


def test_an_edited_image_that_is_a_row_too_has_the_id_of_that_row(tiny_processor, image):
    def row(name, edited):
        edit = {"instruction": "make it blue", "file_name": edited}
        return {"image": image, "caption": name, "file_name": name, "edit": edit, "edited_image": image}

    collator = MMGEMCollator(tiny_processor, edits_per_image=1)
    rows = [row("a", "b"), {"image": image, "caption": "b", "file_name": "b"}, row("c", "b"), row("d", None)]
    first, edited, second, third, again, *others = collator(rows)["image_ids"].tolist()
    assert edited == second == again and len({first, second, third, *others}) == 5
    mixed = {row["file_name"]: row for row in Mixture([DatasetSource(rows)], None, seed=0, num_samples=4)}
    assert mixed["a"]["edited_image_id"] == mixed["c"]["edited_image_id"] == mixed["b"]["image_id"]
    assert collator([mixed[name] for name in "abc"])["image_ids"].unique().numel() == 3


@pytest.mark.parametrize("template", ["a photo", "a photo of a {}", "a photo of {name}", "{label} and {name}", "{"])
def test_a_template_without_a_label_is_refused(tiny_processor, template):
    with pytest.raises(ValueError, match="`label_template` is .*; expected a text with {label} in it"):
        MMGEMCollator(tiny_processor, label_template=template)


def test_draw_seed_alone_decides_what_is_drawn(tiny_processor, image):
    def row(seed):
        return ROW | {"image": image, "captions": [f"caption {i}" for i in range(50)], "draw_seed": seed}

    collator = MMGEMCollator(tiny_processor, captions_per_image=3, long_caption_probability=0.5)
    torch.manual_seed(0)
    first = collator([row(1), row(2), row(3)])
    second = collator([row(4), row(2)])
    state = torch.get_rng_state()
    torch.manual_seed(0)
    assert torch.equal(state, torch.get_rng_state())  # torch's own generator was left alone

    def drawn(batch, image_index):
        rows = (batch["image_index"] == image_index).nonzero()[:, 0].tolist()
        return [texts_of(batch, tiny_processor)[i] for i in rows]

    assert drawn(first, 1) == drawn(second, 1)
    assert drawn(first, 0) != drawn(first, 1)


def test_texts_and_images_alone_stand_beside_pairs(tiny_processor, image):
    rows = [
        {"image": None, "text": "only words"},
        {"image": image, "captions": None},
        {"image": image, "caption": "a pair"},
        {"qa": [{"question": "two and two?", "answer": "four"}]},
    ]
    batch = MMGEMCollator(tiny_processor)(rows)
    assert texts_of(batch, tiny_processor) == ["only words", "a pair", "two and two? four"]
    assert batch["image_index"].tolist() == [-1, 1, -1]
    assert batch["contrastive_mask"].tolist() == [False, True, False]
    assert len(batch["pixel_values"]) == 2
    assert [labelled_text(batch, row, tiny_processor) for row in range(3)] == ["only words", "a pair", "four"]

    batch = MMGEMCollator(tiny_processor)([{"text": "only words"}])
    assert "pixel_values" not in batch and "image_ids" not in batch


def test_texts_and_images_alone_train_the_model(tiny_model, tiny_processor, image):
    rows = [{"text": "only words"}, {"image": image}, {"image": image, "caption": "a pair"}]
    assert tiny_model(**MMGEMCollator(tiny_processor)(rows)).loss.isfinite()
    assert tiny_model(**MMGEMCollator(tiny_processor)([{"text": "only words"}])).loss.isfinite()
    batch = MMGEMCollator(tiny_processor)([{"image": image}, {"image": image, "label": "star"}])
    assert batch["input_ids"].shape == (0, 0) and len(batch["pixel_values"]) == 2
    loss = tiny_model(**batch).loss
    loss.backward()
    assert loss == 0 and not any(p.grad.any() for p in tiny_model.parameters() if p.grad is not None)


def test_images_of_one_sample_share_its_id_and_its_texts(tiny_processor, image):
    red = Image.new("RGB", (32, 32), "red")
    rows = [
        {"image": image, "caption": "blue", "image_id": "a"},
        {"images": [red, image, red], "captions": [f"text {i}" for i in range(40)], "image_id": "b"},
        {"image": red, "caption": "red", "image_id": "c"},
    ]
    batch = MMGEMCollator(tiny_processor, captions_per_image=40)(rows)
    ids = batch["image_ids"].tolist()
    assert ids[1] == ids[2] == ids[3] and len(set(ids)) == 3
    assert batch["image_index"][0] == 0 and batch["image_index"][-1] == 4
    assert set(batch["image_index"][1:-1].tolist()) == {1, 2, 3}
    torch.testing.assert_close(batch["pixel_values"][1], batch["pixel_values"][4])
    with pytest.raises(ValueError, match="row 1 has several `images` and no id"):
        MMGEMCollator(tiny_processor)([{"image": image, "caption": "blue"}, {"images": [red, red], "caption": "red"}])


def test_queries_find_the_image_but_are_not_written(tiny_processor, image):
    row = {"image": image, "caption": "a red star", "queries": ["ein roter Stern", "stella rossa", "rouge"]}
    collator = MMGEMCollator(tiny_processor, queries_per_image=2)
    batch = collator([row, {"queries": ["no image to find"], "caption": "blue"}])
    texts = texts_of(batch, tiny_processor)
    assert texts[0] == "a red star" and set(texts[1:3]) < set(row["queries"]) and texts[3:] == ["blue"]
    assert batch["contrastive_mask"].tolist() == [True, True, True, False]
    assert batch["image_index"].tolist() == [0, 0, 0, -1]
    assert [labelled_text(batch, i, tiny_processor) for i in range(4)] == ["a red star", "", "", "blue"]
    with pytest.raises(ValueError, match="`queries`"):
        collator([{"image": image, "queries": ["fine", ""]}])


def test_hard_negatives_are_embedded_and_describe_nothing(tiny_processor, image):
    row = {"image": image, "caption": "a red star", "hard_negatives": ["a blue star", "a red moon", "a star"]}
    batch = MMGEMCollator(tiny_processor, hard_negatives_per_image=2)([row, {"image": image, "caption": "blue"}])
    assert batch["hard_negative_mask"].tolist() == [False, True, True, False]
    assert batch["contrastive_mask"].all()
    assert batch["image_index"].tolist() == [0, 0, 0, 1]
    assert set(texts_of(batch, tiny_processor)[1:3]) < set(row["hard_negatives"])
    assert [labelled_text(batch, i, tiny_processor) for i in range(4)] == ["a red star", "", "", "blue"]
    assert "hard_negative_mask" not in MMGEMCollator(tiny_processor)([row])


def test_boxes_that_are_cropped_away_are_not_drawn(tiny_processor):
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, do_center_crop=True
    )
    processor = MMGEMProcessor(image_processor, tiny_processor.tokenizer, num_visual_tokens=4)
    row = {
        "image": Image.new("RGB", (64, 32)),  # the model sees columns 16 to 48
        "caption": "wide",
        "boxes": [[0, 0, 16, 16], [0, 0, 24, 16], [40, 0, 64, 32], [48, 0, 64, 32]],
        "region_captions": ["outside left", "partly left", "partly right", "outside right"],
    }
    batch = MMGEMCollator(processor, regions_per_image=4)([row])
    seen = dict(zip(texts_of(batch, processor)[1:], batch["boxes"][0].tolist(), strict=True))
    assert seen == {"partly left": [0, 0, 0.25, 0.5], "partly right": [0.75, 0, 1, 1]}


def test_keys_are_passed_on_for_the_log(tiny_processor, image):
    rows = [{"image": image, "caption": "x", "row_key": key} for key in ("a:1", "b:2")]
    assert MMGEMCollator(tiny_processor)(rows)["row_keys"] == ["a:1", "b:2"]
    assert "row_keys" not in MMGEMCollator(tiny_processor)([*rows, {"image": image, "caption": "y"}])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label": "star"}, "row 0 has columns .* expected an `image`, one of .*, or both"),
        ({"image": "here", "captions": []}, "row 0 has `captions` .*expected text that is not empty"),
        ({"image": "here", "captions": ["fine", " "]}, "row 0 has `captions` .*expected text"),
        ({"image": "here", "caption": 3.5}, "row 0 has `caption` 3.5; expected text"),
        ({"image": "here", "text": b"bytes"}, "row 0 has `text` b'bytes'; expected text"),
        ({"image": "here", "caption": "a", "row_key": "x:7", "hard_negatives": [None]}, "row 'x:7' has `hard_neg"),
        ({"image": "here", "caption": "a", "qa": [{"question": "who?"}]}, "expected a `question` and an `answer`"),
        ({"image": "here", "caption": "a star", "boxes": [[0, 0, 4, 4]]}, "1 `boxes` and 0 `region_captions`"),
        ({"caption": "a", "boxes": [[0, 0, 4, 4]], "region_captions": ["b"]}, "`boxes` and 0 images"),
        (BOXED | {"instructions": [{"text": "b", "box": 1}]}, "'box': 1} in `instructions` and 1 `boxes`; expected"),
        (BOXED | {"instructions": [{"text": "b", "box": -1}]}, "'box': -1} in `instructions` and 1 `boxes`"),
        (BOXED | {"instructions": ["b"]}, "row 0 has 'b' in `instructions`"),
        (BOXED | {"instructions": [{"text": " ", "box": 0}]}, "row 0 has `instructions` .*expected text"),
        ({"image": "here", "caption": "a", "edit": "make it blue"}, "`edit` 'make it blue'; expected a mapping"),
        (
            {"image": "here", "caption": "a", "edit": {"instruction": ""}},
            "`edit` with an `instruction` .*expected text",
        ),
        ({"image": "here", "caption": "a", "edited_image": "there"}, "an `edited_image`; expected an `edit`"),
        ({"caption": "a", "edit": {"instruction": "b"}, "edited_image": "c"}, "an `edited_image` and no image"),
        ({"image": "here", "caption": "a", "prompt_name": " "}, "row 0 has `prompt_name` .*expected text"),
    ],
)
def test_rows_that_cannot_be_trained_are_named(tiny_processor, image, row, message):
    row = row | {"image": image} if "image" in row else row
    with pytest.raises(ValueError, match=message):
        MMGEMCollator(tiny_processor)([row])


def test_images_that_cannot_be_read_are_named(tiny_processor, tmp_path):
    tmp_path.joinpath("a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="image of row 'x:7'.*a.png.*no image"):
        MMGEMCollator(tiny_processor)([{"image": tmp_path / "a.png", "caption": "a", "row_key": "x:7"}])
