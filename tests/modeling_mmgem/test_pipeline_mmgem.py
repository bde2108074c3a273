"""The image-to-text pipeline, and the stock ones that work from the same folder."""

import json

import fresh_process
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import build_model
from transformers import pipeline

from mmgem.pipeline_mmgem import MMGEMFeatureExtractionPipeline, MMGEMImageToTextPipeline
from mmgem.processing import save_sentence_transformer


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)) for _ in range(3)]


@pytest.fixture
def folder(tiny_model, tiny_processor, tmp_path):
    tiny_model.save_pretrained(tmp_path / "hub")
    tiny_processor.save_pretrained(tmp_path / "hub")
    return str(tmp_path / "hub")


@pytest.fixture
def describe(tiny_model, tiny_processor) -> MMGEMImageToTextPipeline:
    return MMGEMImageToTextPipeline(tiny_model, processor=tiny_processor, max_new_tokens=6, device="cpu")


def generate(model, processor, photo, prompt="<image>", **kwargs) -> str:
    """The text that `model.generate` itself gives."""
    inputs = processor(images=photo, text=prompt, boxes=kwargs.pop("boxes", None), return_tensors="pt")
    ids = model.generate(**inputs, **{"max_new_tokens": 6, "pad_token_id": 0, **kwargs})
    return processor.batch_decode(ids[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)[0].strip()


def test_one_picture_of_any_kind(describe, tiny_model, tiny_processor, photos, tmp_path):
    expected = [{"generated_text": generate(tiny_model, tiny_processor, photos[0])}]
    assert expected[0]["generated_text"]
    path = tmp_path / "photo.png"
    photos[0].save(path)
    for source in (photos[0], str(path), path, path.read_bytes(), np.asarray(photos[0])):
        assert describe(source) == expected


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_lists_and_streams(describe, tiny_model, tiny_processor, photos, batch_size):
    expected = [[{"generated_text": generate(tiny_model, tiny_processor, photo)}] for photo in photos]
    assert len({str(result) for result in expected}) > 1
    assert describe(photos, batch_size=batch_size) == expected
    assert list(describe((photo for photo in photos), batch_size=batch_size)) == expected


def test_prompt(describe, tiny_model, tiny_processor, photos):
    expected = [{"generated_text": generate(tiny_model, tiny_processor, photos[0], "<image>a red")}]
    assert describe(photos[0], prompt="a red") == describe(photos[0], prompt="<image>a red") == expected
    assert describe(photos, prompt="a red", batch_size=3)[0] == expected


def test_boxes(describe, tiny_model, tiny_processor, photos):
    rows = [[[0, 0, 30, 20], [20, 10, 50, 40]], [[5, 5, 60, 40]], [[0, 0, 60, 40]]]
    expected = [
        [{"generated_text": generate(tiny_model, tiny_processor, photo, boxes=[[box]])} for box in boxes]
        for photo, boxes in zip(photos, rows)
    ]
    assert describe(photos[0], boxes=rows[0]) == expected[0]
    assert describe(photos, boxes=rows, batch_size=2) == expected
    assert describe(photos[2], boxes=rows[2]) == describe(photos[2])  # the box of the whole image


def test_boxes_are_asked_for_by_their_prompt(describe, tiny_model, photos, monkeypatch):
    box = [[0, 0, 30, 20]]
    expected = describe(photos[0], boxes=box, prompt="a red"), describe(photos[0]), describe(photos[0], boxes=box)
    monkeypatch.setattr(tiny_model.config, "prompts", {"region_caption": "a red"})
    assert expected[0] != expected[2]
    assert describe(photos[0], boxes=box) == expected[0] and describe(photos[0]) == expected[1]
    assert describe(photos[0], boxes=box, prompt="") == expected[2]


def test_generation_is_set_up_in_the_call(describe, tiny_model, tiny_processor, photos):
    expected = generate(tiny_model, tiny_processor, photos[0], num_beams=3, max_new_tokens=3)
    assert describe(photos[0], max_new_tokens=3, generate_kwargs={"num_beams": 3}) == [{"generated_text": expected}]
    torch.manual_seed(0)
    several = describe(photos, batch_size=3, generate_kwargs={"do_sample": True, "num_return_sequences": 2})
    assert [len(results) for results in several] == [2, 2, 2]
    assert len({result["generated_text"] for results in several for result in results}) > 3


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ([[]], {}, "`images` is an empty list"),
        ([["a.png", "b.png"]], {"boxes": [[[0, 0, 1, 1]]]}, "`boxes` has 1 entries for 2 images"),
        (
            ["a.png"],
            {"max_new_tokens": 3, "generate_kwargs": {"max_new_tokens": 5}},
            "`max_new_tokens` is given twice",
        ),
        ([np.full((8, 8, 3), np.nan)], {}, r"`images\[0\]` has pixels that are NaN"),
        ([Image.new("RGB", (8, 8))], {"boxes": [[9, 9, 12, 12]]}, r"`boxes\[0\]\[0\]` .*lies outside its image"),
    ],
)
def test_bad_input_is_named(describe, args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        describe(*args, **kwargs)


def test_it_is_loaded_from_the_folder(folder, describe, photos):
    loaded = pipeline("image-to-text", model=folder, trust_remote_code=True, max_new_tokens=6, device="cpu")
    assert type(loaded).__module__.startswith("transformers_modules.")
    assert loaded(photos, batch_size=2) == describe(photos)


def test_stock_pipelines(folder, tiny_model, tiny_processor, photos):
    inputs = tiny_processor(images=photos[0], text=["a star", "a moon"], return_tensors="pt")
    with torch.no_grad():
        scores = tiny_model(**inputs).logits_per_image.softmax(-1)[0].tolist()
        embedding = tiny_model.get_image_features(inputs.pixel_values).pooler_output

    answers = load("zero-shot-image-classification", folder)(
        photos[0], candidate_labels=["star", "moon"], hypothesis_template="a {}"
    )
    assert {row["label"]: row["score"] for row in answers} == pytest.approx(
        dict(zip(["star", "moon"], scores)), abs=1e-5
    )

    features = load("image-feature-extraction", folder)(photos[0], pool=True, return_tensors=True)
    assert torch.allclose(features, embedding, atol=1e-5)

    expected = generate(tiny_model, tiny_processor, photos[0], "<image>a red")
    ask = load("image-text-to-text", folder)
    contents = [{"type": "image", "image": photos[0]}, {"type": "text", "text": "a red"}]
    options = {"max_new_tokens": 6, "return_full_text": False}
    for result in (
        ask(text=[{"role": "user", "content": contents}], **options),
        ask(images=photos[0], text="<image>a red", **options),
    ):
        assert result[0]["generated_text"].strip() == expected


def load(task: str, folder):
    return pipeline(task, model=str(folder), trust_remote_code=True, device="cpu")


def test_several_vectors_of_a_picture_are_pooled_to_the_first(tiny_processor, photos, tmp_path):
    model = build_model(num_embedding_tokens=3, embedding_pooling="multi_vector")
    save_sentence_transformer(model, tiny_processor, tmp_path)
    with torch.no_grad():
        embedding = model.get_image_features(**tiny_processor(images=photos[0], return_tensors="pt")).pooler_output
        texts = model.get_text_features(**tiny_processor(text="a star", return_tensors="pt")).pooler_output
    features = load("image-feature-extraction", tmp_path)(photos[0], pool=True, return_tensors=True)
    torch.testing.assert_close(features, embedding[:, 0])
    torch.testing.assert_close(load("feature-extraction", tmp_path)("a star", return_tensors=True), texts)


def test_features_of_texts_are_embeddings(folder, tiny_model, tiny_processor):
    texts = ["a star", "two moons and a star"]
    embeddings = [
        tiny_model.get_text_features(**tiny_processor(text=text, return_tensors="pt")).pooler_output for text in texts
    ]
    features = load("feature-extraction", folder)(texts, batch_size=2)
    torch.testing.assert_close(torch.tensor(features), torch.stack(embeddings))


def test_a_model_that_is_loaded_already_names_the_class(tiny_model, tiny_processor):
    features = pipeline(
        "feature-extraction",
        model=tiny_model,
        tokenizer=tiny_processor.tokenizer,
        pipeline_class=MMGEMFeatureExtractionPipeline,
    )("a star", return_tensors=True)
    embeddings = tiny_model.get_text_features(**tiny_processor(text="a star", return_tensors="pt")).pooler_output
    torch.testing.assert_close(features, embeddings)


@pytest.mark.parametrize("labels", ["red, blue", [], [3], None], ids=["a text", "none", "a number", "None"])
def test_labels_that_are_no_texts_are_refused(folder, photos, labels):
    """The letters of a text would be its labels."""
    with pytest.raises(ValueError, match="`candidate_labels` is .*; expected a list of at least one text"):
        load("zero-shot-image-classification", folder)(photos[0], candidate_labels=labels)


@pytest.mark.parametrize("kind", ["16 bits", "transparent"])
def test_every_pipeline_sees_the_picture_that_the_processor_sees(folder, tiny_model, tiny_processor, kind, tmp_path):
    rng, path = np.random.default_rng(0), str(tmp_path / "picture.png")
    if kind == "16 bits":
        Image.fromarray(rng.integers(0, 65536, (40, 60), dtype=np.uint16)).save(path)
    else:
        Image.fromarray(rng.integers(0, 256, (40, 60, 4), dtype=np.uint8)).save(path)
    inputs = tiny_processor(images=path, text=["a star", "a moon"], return_tensors="pt")
    with torch.no_grad():
        outputs = tiny_model(**inputs)
        tokens = tiny_model.get_image_features(inputs.pixel_values).last_hidden_state
    torch.testing.assert_close(load("image-feature-extraction", folder)(path, return_tensors=True), tokens)
    answers = load("zero-shot-image-classification", folder)(
        path, candidate_labels=["a star", "a moon"], hypothesis_template="{}"
    )
    scores = dict(zip(["a star", "a moon"], outputs.logits_per_image.softmax(-1)[0].tolist()))
    assert {row["label"]: row["score"] for row in answers} == pytest.approx(scores, abs=1e-5)

    expected = generate(tiny_model, tiny_processor, path, "<image>a red")
    options = {"max_new_tokens": 6, "return_full_text": False}
    chat = [{"role": "user", "content": [{"type": "image", "path": path}, {"type": "text", "text": "a red"}]}]
    for task in ("image-text-to-text", "any-to-any"):
        ask = load(task, folder)
        for result in (ask(images=path, text="<image>a red", **options), ask(text=chat, **options)):
            assert result[0]["generated_text"].strip() == expected


def test_a_prompt_without_a_place_for_its_picture_is_refused(folder, tiny_model, tiny_processor, photos):
    message = "`pixel_values` came, but `input_ids` has no image placeholders; expected a prompt"
    with pytest.raises(ValueError, match=message):
        load("image-text-to-text", folder)(images=photos[0], text="what is it?")
    with pytest.raises(ValueError, match=message):
        tiny_model.generate(**tiny_processor(images=photos[0], text="what is it?", return_tensors="pt"))


FRESH_PROCESS = """
import json, sys
from transformers import AutoModelForImageTextToText, pipeline
folder, photo, again = sys.argv[1:]
AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).save_pretrained(again)
describe = pipeline("image-to-text", model=folder, trust_remote_code=True, device="cpu")
again = pipeline("image-to-text", model=again, processor=describe.processor, trust_remote_code=True, device="cpu")
print(json.dumps([task(photo, max_new_tokens=6) for task in (describe, again)]))
"""


@pytest.mark.slow
def test_in_a_fresh_process_without_the_package(folder, describe, photos, tmp_path):
    photos[0].save(tmp_path / "photo.png")
    arguments = (folder, tmp_path / "photo.png", tmp_path / "again")
    output = fresh_process.run(FRESH_PROCESS, *arguments, cwd=tmp_path, installed=False)
    assert json.loads(output.splitlines()[-1]) == [describe(photos[0])] * 2
