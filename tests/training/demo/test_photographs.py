"""A demonstration on a folder of pictures of which nothing is known."""

import json

import pytest
import torch
from demonstrations import Page
from image_folders import NAMES, write_folder
from PIL import Image
from tiny_models import build_model

from mmgem.training.demo import photographs
from mmgem.training.demo.photographs import as_prose, copy_free_photographs, suggest_words
from mmgem.training.demo.run import run_demo
from mmgem.training.inference import embed_images, embed_regions, embed_texts

CAPTIONS = ["a dog runs", "a dog swims in the sea", "two boats on the sea", "a dog", "the red door", "sea", "3 doors"]
LABELS = ["a cat", "a boat", "a door", "a sea"]


@pytest.fixture(scope="module")
def model():
    return build_model()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("photographs"))


@pytest.fixture(scope="module")
def demonstration(tmp_path_factory, model, tiny_processor, folder):
    captions = iter(CAPTIONS)

    def write(model, processor, images, questions=None, limit=None):
        return [f"{question} no" for question in questions] if questions else [next(captions) for _ in images]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(photographs, "generate_captions", write)
        patch.setattr(photographs, "generate_answers", write)
        out = tmp_path_factory.mktemp("demo") / "out"
        page, figures = run_demo(out, model, tiny_processor, folder=folder, labels=LABELS, questions=["is it?"])
    assert page == out / "index.html" and figures == {}
    return Page(page.read_text()), json.loads((out / "demo.json").read_text()), out


def test_the_page_shows_every_result_and_knows_no_scenes(demonstration):
    page, results, out = demonstration
    assert results["photographs"]["skipped"] == []
    text = " ".join(page.text.split())
    shown = results["photographs"]
    assert results["images"] == shown["images"] == len(NAMES) and results["gallery"] is None
    assert {item["caption"] for item in shown["captions"]} == set(CAPTIONS)
    for told in (*CAPTIONS, *LABELS, "is it? no", *(search["text"] for search in shown["searches"])):
        assert told in text
    assert "scene" not in text and "twin" not in text
    maps = sum(len(search["maps"]) for search in shown["searches"])
    assert maps == 5 * len(shown["searches"]) > 0 and len(page.all("ol", **{"class": "hits why"})) == maps / 5
    assert len(page.all("rect")) == sum(len(search["hits"]) for search in shown["region_searches"]) > 0
    assert {file.name for file in out.iterdir()} == {"demo.json", "index.html", "photograph_index"}


def test_answers_are_those_of_the_model(demonstration, model, tiny_processor, folder):
    _, results, _ = demonstration
    shown, names = results["photographs"], sorted(NAMES)
    images = embed_images(model, tiny_processor, [folder / name for name in names])
    for search in shown["searches"]:
        scores = images @ embed_texts(model, tiny_processor, [search["text"]])[0]
        assert [hit["file_name"] for hit in search["hits"]] == [names[row] for row in scores.topk(5).indices.tolist()]
        for hit, found in zip(search["hits"], search["maps"], strict=True):
            assert hit["file_name"] == found["file_name"] and found["part"] == [0, 0, 1, 1]
            assert torch.tensor(found["shares"]).sum().item() == pytest.approx(hit["score"], abs=1e-5)
    for search in shown["image_searches"]:
        scores = images @ images[names.index(search["file_name"])]
        assert [hit["file_name"] for hit in search["hits"]] == [
            names[row] for row in scores.topk(6).indices.tolist()[1:]
        ]
    for search in shown["region_searches"]:
        query = embed_texts(model, tiny_processor, [search["text"]])[0]
        for hit in search["hits"]:
            [region] = embed_regions(model, tiny_processor, [folder / hit["file_name"]], [[hit["box"]]])
            assert float(region @ query) == pytest.approx(hit["score"], abs=1e-4)
    queries = embed_texts(model, tiny_processor, [f"a picture of {label}" for label in LABELS])
    for item in shown["classified"]:
        scores = model.logit_scale.detach().exp() * queries @ images[names.index(item["file_name"])]
        values, rows = scores.softmax(0).topk(3)
        assert [guess["label"] for guess in item["guesses"]] == [LABELS[row] for row in rows.tolist()]
        assert [guess["probability"] for guess in item["guesses"]] == pytest.approx(values.tolist(), abs=1e-4)


def test_words_are_those_that_tell_pictures_apart():
    assert suggest_words(CAPTIONS, 3) == ["dog", "sea", "runs"]  # of 3, 3 and 1 captions
    assert suggest_words(["a dog", "the dog and a dog"], 5) == []  # all have it, and nothing else is said
    assert suggest_words([], 5) == []


def test_free_photographs_are_real_pictures(tmp_path):
    count = copy_free_photographs(tmp_path)
    files = list(tmp_path.iterdir())
    assert len(files) == count >= 13  # of scikit-image
    assert all(min(Image.open(file).size) > 100 for file in files)


def test_photographs_that_cannot_be_read_are_named(tmp_path, model, tiny_processor, caplog):
    write_folder(tmp_path / "photographs")
    (tmp_path / "photographs" / "0\n.png").write_bytes(b"no picture")
    run_demo(tmp_path / "out", model, tiny_processor, folder=tmp_path / "photographs", questions=["is it?"])
    shown = json.loads((tmp_path / "out" / "demo.json").read_text())["photographs"]
    assert shown["images"] == len(NAMES) and [file["file_name"] for file in shown["skipped"]] == ["0\n.png"]
    assert any(record.message.startswith("left out 0\\n.png: the file holds 10 bytes") for record in caplog.records)


def test_what_is_no_place_for_photographs_is_refused(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="which is no folder; expected photographs"):
        run_demo(tmp_path / "out", None, None, folder=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="in `out`, which is replaced"):
        run_demo(folder.parent, None, None, folder=folder)
    assert len(list(folder.rglob("*.png"))) == len(NAMES)
    assert not (tmp_path / "out").exists()


def test_captions_are_shown_without_a_space_before_stops():
    assert as_prose("Two dogs , one of them brown , run .") == "Two dogs, one of them brown, run."
    assert as_prose("A sign says 3.5 m.") == "A sign says 3.5 m."
