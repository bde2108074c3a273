"""One folder, loaded by sentence-transformers: each input goes through the method made for its kind."""

import json
import sys
from pathlib import Path

import fresh_process
import numpy as np
import pytest
import torch
from datasets import Dataset
from encoders import learns_pairs
from PIL import Image
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)

from mmgem.processing import save_sentence_transformer

TEXTS = ["a red star", "", "a large blue circle in the center"]
FUSED = {"image": "photo.png", "text": "in green"}


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def folder(tiny_model, tiny_processor, photo, tmp_path, monkeypatch) -> Path:
    """A complete Hub folder, with `photo.png` in the working directory."""
    save_sentence_transformer(tiny_model, tiny_processor, tmp_path / "hub")
    photo.save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


@pytest.fixture
def encoder(folder) -> SentenceTransformer:
    return SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")


@pytest.fixture
def expected(tiny_model, tiny_processor, photo) -> dict[str, torch.Tensor]:
    """Unit embeddings straight from the model: three texts, the photo, the photo with a text."""
    fused = tiny_processor(images=photo, text="<image>in green", return_tensors="pt")
    with torch.no_grad():
        embeddings = {
            "texts": tiny_model.get_text_features(**tiny_processor(text=TEXTS, return_tensors="pt")),
            "image": tiny_model.get_image_features(**tiny_processor(images=photo, return_tensors="pt")),
            "fused": tiny_model.get_multimodal_features(**fused),
        }
    return {name: torch.nn.functional.normalize(output.pooler_output, dim=-1) for name, output in embeddings.items()}


def close(embeddings, expected: torch.Tensor) -> bool:
    return torch.allclose(torch.as_tensor(embeddings), expected, atol=1e-5)


def test_texts_images_and_both_alone(encoder, expected, photo):
    assert close(encoder.encode(TEXTS), expected["texts"])
    assert close(encoder.encode([FUSED]), expected["fused"])
    assert close(encoder.encode(photo), expected["image"][0])
    for image in ("photo.png", Path("photo.png"), Path("photo.png").read_bytes(), np.asarray(photo), {"image": photo}):
        assert close(encoder.encode([image]), expected["image"])


@pytest.mark.parametrize("batch_size", [2, 32])
def test_a_list_that_mixes_them(encoder, expected, photo, batch_size):
    inputs = [TEXTS[0], photo, FUSED, TEXTS[1], Path("photo.png"), {"text": TEXTS[2]}, "photo.png"]
    texts, image, fused = expected["texts"], expected["image"], expected["fused"]
    embeddings = encoder.encode(inputs, batch_size=batch_size)
    assert close(embeddings, torch.cat([texts[:1], image, fused, texts[1:2], image, texts[2:], image]))


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_batch_of_texts_runs_in_parts_of_about_one_length(encoder, monkeypatch, padding_side):
    texts = ["star " * length for length in (1, 90, 3, 100, 2, 95, 4, 0)]
    expected = torch.cat([torch.as_tensor(encoder.encode([text])) for text in texts])
    encoder[0].processor.tokenizer.padding_side = padding_side
    model, shapes = encoder[0].model, []
    embed = type(model).get_text_features.__get__(model)

    def get_text_features(input_ids, **others):
        shapes.append(input_ids.numel())
        return embed(input_ids, **others)

    monkeypatch.setattr(model, "get_text_features", get_text_features)
    monkeypatch.setattr(sys.modules[type(encoder[0]).__module__], "tokens_at_a_time", lambda device: 250)
    assert close(encoder.encode(texts, batch_size=8), expected)
    assert len(shapes) > 2 and max(shapes) <= 250


def test_an_image_never_reaches_the_language_model(encoder, photo):
    rows = []
    decoder = encoder[0].model.language_model.get_decoder()
    decoder.register_forward_hook(
        lambda module, args, kwargs, output: rows.append(output[0].shape[0]), with_kwargs=True
    )
    encoder.encode([photo] * 3)
    assert rows == []
    encoder.encode([photo, "a", photo, "b"])
    assert rows == [2]


def test_what_is_called_a_text_is_read_as_one(encoder, tiny_model, tiny_processor):
    features = tiny_model.get_text_features(**tiny_processor(text="photo.png", return_tensors="pt")).pooler_output
    assert close(encoder.encode([{"text": "photo.png"}]), torch.nn.functional.normalize(features, dim=-1))


def test_conversations(encoder, expected, photo):
    contents = [{"type": "image", "image": photo}, {"type": "text", "text": "in green"}]
    assert close(encoder.encode([[{"role": "user", "content": contents}]]), expected["fused"])
    assert close(encoder.encode([[{"role": "user", "content": TEXTS[0]}], TEXTS[1], TEXTS[2]]), expected["texts"])


@pytest.mark.parametrize(
    "part",
    [{"type": "image_url", "image_url": {"url": "photo.png"}}, {"type": "image"}, {"type": "video", "video": "a"}],
)
def test_parts_of_a_conversation_that_cannot_be_read_are_not_left_out(encoder, part):
    contents = [part, {"type": "text", "text": "in green"}]
    with pytest.raises(ValueError, match="conversation with .*; expected parts of type 'text', or of type 'image'"):
        encoder.encode([[{"role": "user", "content": contents}]])


def test_prompts_stand_before_the_text(encoder, expected, photo):
    assert close(encoder.encode([" star"], prompt="a red"), expected["texts"][:1])
    fused, text = encoder.encode([{"image": photo, "text": " green"}, "x"], prompt="in")
    assert close(fused, expected["fused"][0])
    assert not close(text, torch.as_tensor(encoder.encode("x")))


def test_placeholders(encoder, tiny_model, tiny_processor, photo):
    """In a text alone they are words; beside images their number must fit."""
    assert encoder.encode(["<image> of a star"]).shape == (1, 16)
    inputs = tiny_processor(images=[photo, photo], text="<image><image>or", return_tensors="pt")
    pair = torch.nn.functional.normalize(tiny_model.get_multimodal_features(**inputs).pooler_output, dim=-1)
    assert close(encoder.encode([{"image": [photo, photo], "text": "or"}]), pair)
    assert close(encoder.encode([{"image": [photo, photo], "text": "<image><image>or"}]), pair)
    with pytest.raises(ValueError, match="3 <image> placeholders for 1 images"):
        encoder.encode([{"image": photo, "text": "<image><image><image>"}])


def test_the_rest_of_the_interface(encoder, photo):
    queries, documents = encoder.encode_query(["a star", "a circle"]), encoder.encode_document([photo, "a moon"])
    assert encoder.similarity(queries, documents).shape == (2, 2)
    assert encoder.encode(["a", photo], truncate_dim=4).shape == (2, 4)
    assert encoder.get_embedding_dimension() == 16


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (["a", None], "NoneType"),
        ([3], "int"),
        ([("photo.png", "a", "b")], "tuple"),
        ([{"image": ["photo.png", "photo.png"]}], "a list of 2 images without a text"),
        ([{"picture": "photo.png"}], "picture"),
        ([{"image": "photo.png", "text": None}], "a text of type NoneType"),
        ([np.zeros((4, 4))], "audio"),
        ([np.full((4, 4, 3), np.nan), "a"], r"`images\[0\]` has pixels that are NaN"),
    ],
)
def test_bad_input_is_named(encoder, inputs, message):
    with pytest.raises(ValueError, match=message):
        encoder.encode(inputs)


def test_saving_again_changes_nothing(encoder, expected, folder, tmp_path):
    encoder.save(str(tmp_path / "again"))
    again = SentenceTransformer(str(tmp_path / "again"), trust_remote_code=True, device="cpu")
    assert close(again.encode([TEXTS[0], FUSED]), torch.cat([expected["texts"][:1], expected["fused"]]))

    def files(path):
        return {file.name for file in path.glob("*")} - {"README.md", "1_Normalize"}

    assert files(tmp_path / "again") == files(folder)
    configs = [json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "again")]
    assert [config["text_config"].get("use_cache", True) for config in configs] == [True, True]  # for captions
    assert configs[0]["auto_map"] == configs[1]["auto_map"]


def test_a_mixed_batch_can_be_trained_on_but_not_cut(encoder, photo):
    inputs = ["a", photo, FUSED, "b"]
    features = encoder.preprocess(inputs)
    embeddings = encoder({**features})["sentence_embedding"]
    assert close(embeddings.detach(), torch.as_tensor(encoder.encode(inputs)))
    embeddings[1].sum().backward()  # the image's
    assert encoder[0].model.image_projection[1].weight.grad.abs().sum() > 0
    assert encoder[0].model.text_projection.weight.grad.abs().sum() == 0

    features = encoder.preprocess(inputs)
    features = {name: value[:2] if isinstance(value, torch.Tensor) else value for name, value in features.items()}
    with pytest.raises(ValueError, match="expected a mixed batch as `preprocess` returned it"):
        encoder(features)


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True])
def test_training_on_image_text_pairs(encoder, tmp_path, cached):
    loss = CachedMultipleNegativesRankingLoss(encoder, mini_batch_size=2)
    loss = loss if cached else MultipleNegativesRankingLoss(encoder)
    assert learns_pairs(encoder, SentenceTransformerTrainer, SentenceTransformerTrainingArguments, loss, tmp_path)


def test_mixed_columns_reach_the_loss_whole(encoder, photo, tmp_path):
    """The trainer finds columns by known keys; a column it misses would silently be left out of the loss."""
    trainer = SentenceTransformerTrainer(
        model=encoder,
        args=SentenceTransformerTrainingArguments(str(tmp_path / "run"), report_to=[], use_cpu=True),
        train_dataset=Dataset.from_dict({"anchor": ["a"], "positive": ["b"]}),
        loss=MultipleNegativesRankingLoss(encoder),
    )
    rows = [{"anchor": "a", "positive": photo}, {"anchor": "b", "positive": "c"}, {"anchor": "c", "positive": FUSED}]
    columns, _ = trainer.collect_features(trainer.data_collator(rows))
    assert [encoder(column)["sentence_embedding"].shape for column in columns] == [(3, 16)] * 2


FRESH_PROCESS = """
import json, sys
from PIL import Image
from sentence_transformers import SentenceTransformer
encoder = SentenceTransformer(sys.argv[1], trust_remote_code=True, device="cpu")
inputs = ["a red star", Image.open("photo.png"), {"image": "photo.png", "text": "in green"}, "photo.png"]
encoder.save("again")
again = SentenceTransformer("again", trust_remote_code=True, device="cpu")
print(json.dumps([encoder.encode(inputs).tolist(), again.encode(inputs).tolist()]))
"""


@pytest.mark.slow
def test_in_a_fresh_process_without_the_package(folder, expected, tmp_path):
    output = fresh_process.run(FRESH_PROCESS, folder, cwd=tmp_path, installed=False)
    rows = torch.cat([expected["texts"][:1], expected["image"], expected["fused"], expected["image"]])
    for embeddings in json.loads(output.splitlines()[-1]):
        assert close(embeddings, rows)


def test_the_limit_of_a_text_is_the_users_and_is_saved(encoder, folder, tiny_model, tmp_path):
    text = "a red star at the top left " * 10
    whole = encoder.encode(text)
    encoder.encode(text, processing_kwargs={"text": {"max_length": 2}})
    assert close(encoder.encode(text), torch.tensor(whole))  # what one call asks for is over with it
    input_ids = torch.tensor([encoder.tokenizer(text)["input_ids"][:4]])
    with torch.no_grad():
        cut = torch.nn.functional.normalize(tiny_model.get_text_features(input_ids).pooler_output, dim=-1)
    encoder.max_seq_length = 4
    encoder.save(str(tmp_path / "short"))
    options = {"trust_remote_code": True, "device": "cpu"}
    saved = SentenceTransformer(str(tmp_path / "short"), **options)
    by_argument = SentenceTransformer(str(folder), **options, processor_kwargs={"model_max_length": 4})
    for each in (encoder, saved, by_argument):
        assert each.max_seq_length == 4 and close(each.encode([text]), cut)
    assert not close(whole[None], cut)


def test_a_text_in_a_dictionary_is_a_text_whatever_it_names(encoder, tiny_model, tiny_processor):
    for text in ("photo.png", "http://127.0.0.1/photo.png"):
        with torch.no_grad():
            output = tiny_model.get_text_features(**tiny_processor(text=text, return_tensors="pt"))
        assert close(encoder.encode([{"text": text}]), torch.nn.functional.normalize(output.pooler_output, dim=-1))
    with pytest.raises(ValueError, match="fetching is off"):
        encoder.encode(["http://127.0.0.1/photo.png"])
