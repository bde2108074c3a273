"""Images with texts, several vectors, and memories, as a demonstration shows them."""

import json

import pytest
import torch
from demonstrations import READING, Page, demonstrate, read_rows
from image_folders import build_multi_vector_model
from PIL import Image
from tiny_models import build_model

from mmgem.late_interaction import similarity
from mmgem.training.demo import embedding_modes
from mmgem.training.demo.embedding_modes import ask_index, follow_instructions, search_edits
from mmgem.training.demo.gallery import Gallery
from mmgem.training.demo.page import FIGURES, budget_curve
from mmgem.training.inference import embed_fused, embed_images, embed_regions
from mmgem.training.search.building import build_index
from mmgem.training.search.index import SearchIndex

pytestmark = pytest.mark.usefixtures("short_answers")

PROMPTS = {"edit": "find the image after this change: ", "object": "find in the image: "}
VECTORS = 3


@pytest.fixture(scope="module")
def model():
    return build_multi_vector_model(VECTORS, prompts=PROMPTS)


@pytest.fixture(scope="module")
def demonstration(tmp_path_factory, model, tiny_processor):
    return demonstrate(tmp_path_factory.mktemp("demo") / "out", model, tiny_processor)


@pytest.fixture
def gallery(demonstration):
    return Gallery.read(demonstration[0] / "gallery", 16)


@pytest.fixture
def index(demonstration, model, tiny_processor):
    return SearchIndex.load(demonstration[0] / "index", model, tiny_processor)


def test_the_page_shows_every_result(demonstration):
    out, results = demonstration
    page = Page((out / "index.html").read_text())
    text = " ".join(page.text.split())
    assert all(page.all("section", id=name) for name in READING)
    for name in results["figures"]:
        assert FIGURES[name][0] in text
    for search in results["edit_searches"]:
        assert search["instruction"] in text and len(search["hits"]) == 5
    for item in results["instructed"]:
        assert all(one["text"] in text for one in item["instructions"])
    for search in results["nested"]["searches"]:
        assert search["text"] in text
    for budget in results["nested"]["budgets"]:
        assert f"{budget['bytes']:,}" in text and f"{budget['recall']:.1%}" in text
    for turn in (turn for item in results["asked"]["items"] for turn in item["turns"]):
        assert turn["question"] in text and turn["memory"]["text"] in text and turn["image"]["text"] in text
        assert (turn["memory"]["right"] and turn["image"]["right"]) or f"right: {turn['answer']}" in text
    assert f"{results['asked']['bytes']['memory']:,}" in text
    assert len(page.all("circle")) == len(results["nested"]["budgets"]) == len({1, 2, VECTORS})


def test_an_image_with_its_edit_looks_for_the_twin(demonstration, model, tiny_processor):
    out, results = demonstration
    edits = {row["file_name"]: row["edit"] for row in read_rows(out / "gallery")}
    files = sorted((out / "gallery").glob("*.png"))
    images = embed_images(model, tiny_processor, [Image.open(file) for file in files])
    assert results["edit_searches"]
    assert [search["file_name"] for search in results["edit_searches"]] == [
        search["file_name"] for search in results["image_searches"]
    ]
    for search in results["edit_searches"]:
        edit = edits[search["file_name"]]
        picture = Image.open(out / "gallery" / search["file_name"])
        query = embed_fused(model, tiny_processor, [picture], [PROMPTS["edit"] + edit["instruction"]])
        nearest = similarity(query, images)[0].topk(5)
        assert [hit["file_name"] for hit in search["hits"]] == [files[row].name for row in nearest.indices.tolist()]
        assert [hit["score"] for hit in search["hits"]] == pytest.approx(nearest.values.tolist(), abs=1e-4)
        for hit in search["hits"]:
            assert hit["right"] == (hit["file_name"] == edit["file_name"])


def test_an_instruction_looks_for_the_object_that_it_names(demonstration, model, tiny_processor):
    out, results = demonstration
    rows = [row for row in read_rows(out / "gallery") if len(row["boxes"]) > 1][:6]
    assert [item["file_name"] for item in results["instructed"]] == [row["file_name"] for row in rows]
    for row, item in zip(rows, results["instructed"], strict=True):
        picture = Image.open(out / "gallery" / row["file_name"])
        regions = embed_regions(model, tiny_processor, [picture], [row["boxes"]])
        assert [region["box"] for region in item["regions"]] == row["boxes"]
        for one, shown in zip(row["instructions"], item["instructions"], strict=True):
            query = embed_fused(model, tiny_processor, [picture], [PROMPTS["object"] + one["text"]])
            found = similarity(query, regions)[0].argmax().item()
            assert shown == {"text": one["text"], "found": found, "right": found == one["box"]}


def test_fewer_vectors_answer_as_an_index_of_fewer(demonstration, index, model, tiny_processor, tmp_path):
    out, results = demonstration
    build_index(out / "gallery", model, tiny_processor, tmp_path / "one", vectors=1)
    one = SearchIndex.load(tmp_path / "one", model, tiny_processor)
    rows = {row["captions"][0]: row["file_name"] for row in read_rows(out / "gallery")}
    assert results["nested"]["searches"]
    for search in results["nested"]["searches"]:
        for smaller, found in zip((one, index), search["answers"], strict=True):
            hits = smaller.search(search["text"], top=5)
            assert [hit["file_name"] for hit in found] == [hit.path.name for hit in hits]
            assert [hit["right"] for hit in found] == [hit.path.name == rows[search["text"]] for hit in hits]


def test_budgets_are_what_searches_find(demonstration, index):
    out, results = demonstration
    captions = [(text, row["file_name"]) for row in read_rows(out / "gallery") for text in row["captions"]]
    nested = results["nested"]
    assert nested["texts"] == len(captions)
    assert [budget["vectors"] for budget in nested["budgets"]] == [1, 2, VECTORS]
    for budget in nested["budgets"]:
        kept = budget["vectors"]
        right = [index.search(text, top=1, vectors=kept)[0].path.name == name for text, name in captions]
        assert budget["recall"] == pytest.approx(sum(right) / len(right))
        assert budget["bytes"] == 4 * kept * index.facts.settings.dimensions


def test_the_index_answers_from_its_memory_of_the_right_image(gallery, index, monkeypatch):
    answers = {(row["file_name"], turn["question"]): turn["answer"] for row in gallery.rows for turn in row["qa"]}
    names, memories = index.rows["file_name"][:], index.memory(range(len(index)))
    calls = []

    def from_memory(model, processor, memory, questions, max_new_tokens):
        texts = []
        for own, question in zip(memory, questions, strict=True):
            name = names[(memories - own).abs().flatten(1).sum(dim=1).argmin()]
            calls.append((name, question))
            texts.append(answers[name, question].upper() if len(calls) % 4 else "a cloud")
        return texts

    def from_image(model, processor, images, questions, max_new_tokens):
        return [question for question in questions]

    monkeypatch.setattr(embedding_modes, "answer_from_memory", from_memory)
    monkeypatch.setattr(embedding_modes, "generate_answers", from_image)
    asked = ask_index(gallery, index, image_accuracy=0.25, count=3)
    turns = [(row["file_name"], turn["question"]) for row in gallery.rows for turn in row["qa"]]
    assert calls == turns and asked["questions"] == len(turns) > embedding_modes.BATCH_SIZE
    assert asked["memory_accuracy"] == pytest.approx(1 - len(turns) // 4 / len(turns))
    assert asked["image_accuracy"] == 0.25
    shown = [(item["file_name"], turn) for item in asked["items"] for turn in item["turns"]]
    assert [(name, turn["question"]) for name, turn in shown] == turns[: len(shown)] and len(shown) == 15
    assert [turn["memory"]["right"] for _, turn in shown] == [number % 4 > 0 for number in range(1, 16)]
    assert not any(turn["image"]["right"] for _, turn in shown)
    assert [turn["image"]["text"] for _, turn in shown] == [question for _, question in turns[:15]]


def test_memory_takes_what_the_index_holds(demonstration, index):
    out, results = demonstration
    files = list((out / "gallery").glob("*.png"))
    kept = torch.tensor(index.rows.arrays["memory"][:1][0])  # (k, H)
    assert results["asked"]["bytes"]["memory"] == 2 * kept.numel()  # float16
    assert results["asked"]["bytes"]["file"] == pytest.approx(sum(file.stat().st_size for file in files) / len(files))


def test_the_accuracy_from_the_image_is_that_of_the_figures(demonstration):
    _, results = demonstration
    assert results["asked"]["image_accuracy"] == results["figures"]["answer_accuracy"]
    assert json.dumps(results)  # plain numbers all


@pytest.mark.parametrize("prompts", [{"edit": "x: "}, {"object": "x: "}, None])
def test_a_prompt_that_is_missing_leaves_out_its_section(gallery, index, tiny_processor, prompts, monkeypatch):
    monkeypatch.setattr(index.model.config, "prompts", prompts)
    monkeypatch.setattr(index, "_check", lambda *kinds: None)
    assert bool(search_edits(gallery, index)) == ("edit" in (prompts or {}))
    assert bool(follow_instructions(gallery, index.model, tiny_processor)) == ("object" in (prompts or {}))


def test_a_model_that_is_not_calibrated_for_both_together_is_not_asked_with_both(gallery, tiny_processor):
    model = build_model(prompts=PROMPTS, calibrated_modalities=["image", "text"])
    assert follow_instructions(gallery, model, tiny_processor) == []


def test_a_curve_doubles_from_left_to_right():
    budgets = [{"bytes": 100, "recall": 0.0}, {"bytes": 200, "recall": 0.5}, {"bytes": 400, "recall": 1.0}]
    assert budget_curve(budgets, 200, 80) == [pytest.approx(point) for point in [(0, 80), (100, 40), (200, 0)]]
    assert budget_curve(budgets[:1], 200, 80) == [(0, 80)]
