"""An index with lists: kept beside its vectors, up to date, checked, and searched as one without them."""

import json
import os

import numpy as np
import pytest
from image_folders import NAMES, build_multi_vector_model, write_noise
from tiny_models import build_model
from typer.testing import CliRunner

from mmgem.training.cli import app
from mmgem.training.search import inverted_lists
from mmgem.training.search.building import build_index
from mmgem.training.search.conditions import Condition
from mmgem.training.search.index import SearchIndex
from mmgem.training.search.storage import read_index, verify_index


@pytest.fixture(autouse=True)
def lists_from_five_vectors_on(monkeypatch):
    monkeypatch.setattr(inverted_lists, "EXACT_BELOW", 5)


@pytest.fixture
def exact(monkeypatch):
    """Makes and searches an index as if it were small."""

    def search(folder, model, processor, out, query, **limits):
        with monkeypatch.context() as patch:
            patch.setattr(inverted_lists, "EXACT_BELOW", 1 << 40)
            build_index(folder, model, processor, out)
        assert read_index(out, "out").lists is None
        return SearchIndex.load(out, model, processor).search(query, **limits)

    return search


@pytest.mark.parametrize("vectors", [None, 4])
def test_answers_are_those_of_an_index_without_lists(folder, out, tmp_path, tiny_processor, exact, vectors):
    model = build_model() if vectors is None else build_multi_vector_model(vectors)
    lines = [{"file_name": name, "caption": f"a star {number}", "x": number} for number, name in enumerate(NAMES)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = build_index(folder, model, tiny_processor, out)
    assert report.recall.keys() == {"rows", "captions"} and min(report.recall.values()) >= 0.98
    index = SearchIndex.load(out, model, tiny_processor)
    assert index.vectors.lists.vectors == (vectors or 1) and len(index.vectors.lists.cells()) == 7
    index.vectors.lists.effort = index.vectors.lists.index.nlist
    limits = [{"top": 3}, {"top": 50}, {"where": [Condition("x", "<", 3)]}, {"kinds": ["image"], "top": 2}]
    limits += [{"lexical_weight": 0.5}, {"where": [Condition("x", "<", 6)]}]
    for limit in limits + [{"vectors": 2, "top": 4}] * (vectors is not None):
        expected = exact(folder, model, tiny_processor, tmp_path / "exact", "a star 3", **limit)
        found = index.search("a star 3", **limit)
        assert [hit.path for hit in found] == [hit.path for hit in expected]
        np.testing.assert_allclose([hit.score for hit in found], [hit.score for hit in expected], atol=1e-6)


def test_lists_follow_what_is_added_and_deleted_and_go_when_little_is_left(folder, out, tiny_model, tiny_processor):
    build_index(folder, tiny_model, tiny_processor, out)
    first = read_index(out, "out")
    assert [path.name for path in out.glob("lists*")] == ["lists-1.faiss"]
    assert build_index(folder, tiny_model, tiny_processor, out).recall == first.lists.recall  # nothing is new
    assert read_index(out, "out").version == 1
    (folder / NAMES[2]).unlink()
    write_noise(folder / "00.png", 11)
    build_index(folder, tiny_model, tiny_processor, out)
    assert [path.name for path in out.glob("lists*")] == ["lists-2.faiss"]
    index = SearchIndex.load(out, tiny_model, tiny_processor)
    assert index.rows["file_name"] == sorted({*NAMES, "00.png"} - {NAMES[2]})
    for row in range(len(index)):  # each is found by itself, and nothing else is there
        hits = index.search(image=index.path(row), top=50)
        assert hits[0].row == row and sorted(hit.row for hit in hits) == list(range(7))
    cells = {name: cell for name, [cell] in zip(index.rows["file_name"], index.vectors.lists.cells(), strict=True)}
    for name, [cell] in zip(first.rows["file_name"], first.lists.read().cells(), strict=True):
        assert name == NAMES[2] or cells[name] == cell
    for name in NAMES[3:]:
        (folder / name).unlink()
    assert build_index(folder, tiny_model, tiny_processor, out).recall == {}
    assert not list(out.glob("lists*")) and len(SearchIndex.load(out, tiny_model, tiny_processor)) == 3


def test_an_index_from_before_there_were_lists_gets_them(folder, out, tiny_model, tiny_processor, exact):
    exact(folder, tiny_model, tiny_processor, out, "a star")
    report = build_index(folder, tiny_model, tiny_processor, out)
    assert report.embedded == 0 and report.recall["rows"] >= 0.99 and read_index(out, "out").lists is not None


@pytest.mark.parametrize("damage", ["bit", "cut", "longer"])
def test_damaged_lists_are_named_refused_and_made_anew(folder, out, tiny_model, tiny_processor, damage):
    build_index(folder, tiny_model, tiny_processor, out)
    file = out / "lists-1.faiss"
    content = bytearray(file.read_bytes())
    content[40] ^= 1
    file.write_bytes({"bit": content, "cut": content[:40], "longer": file.read_bytes() + b"\0"}[damage])
    assert list(verify_index(out).damaged) == ["lists-1.faiss"]
    with pytest.raises(ValueError, match="lists-1.faiss' (is damaged|has).*`mmgem index` makes the lists anew"):
        SearchIndex.load(out, tiny_model, tiny_processor)
    assert build_index(folder, tiny_model, tiny_processor, out).embedded == 0
    assert verify_index(out).damaged == {} and len(SearchIndex.load(out, tiny_model, tiny_processor)) == 7


def test_who_has_an_index_open_keeps_it_and_a_full_disk_leaves_it(
    folder, out, tiny_model, tiny_processor, monkeypatch
):
    build_index(folder, tiny_model, tiny_processor, out)
    index = SearchIndex.load(out, tiny_model, tiny_processor)
    before = [hit[:2] for hit in index.search("a star")]
    write_noise(folder / "00.png", 11)
    fsync = os.fsync

    def fail(number):
        if "lists" in os.readlink(f"/proc/self/fd/{number}"):
            raise OSError(28, "No space left on device")
        fsync(number)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space"):
            build_index(folder, tiny_model, tiny_processor, out)
    assert read_index(out, "out").version == 1 and verify_index(out).damaged == {}
    report = build_index(folder, tiny_model, tiny_processor, out)
    assert report.embedded == 0 and report.images == 8  # what was embedded was kept
    assert [hit[:2] for hit in index.search("a star")] == before


def test_the_command_says_what_the_lists_find(folder, out, tiny_model, tiny_processor, monkeypatch):
    monkeypatch.setattr("mmgem.training.loading.load_checkpoint", lambda name: (tiny_model, tiny_processor))
    result = CliRunner().invoke(app, ["index", str(folder), "--model", "m", "--out", str(out)])
    reached = "recall@10 against a comparison with all vectors: 1.000 by images and texts of it, 1.000 half"
    assert reached in result.stdout
    result = CliRunner().invoke(app, ["index", str(folder), "--model", "m", "--out", str(out), "--json"])
    assert json.loads(result.stdout)["recall"] == {"rows": 1.0, "between": 1.0}
