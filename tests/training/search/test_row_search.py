"""Rows asked by words and by metadata alone: the answers of the whole index, without a model and without torch."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from mmgem.training.cli import app
from mmgem.training.search.conditions import Condition
from mmgem.training.search.fingerprint import Fingerprint
from mmgem.training.search.index import SearchIndex
from mmgem.training.search.row_search import RowSearch
from mmgem.training.search.settings import IndexSettings
from mmgem.training.search.storage import IndexFacts, write_index

ROWS = [("a.png", "image", "a red star", 2020), ("b.png", "image", "star star", 2021), ("c.txt", "text", "moon", 2022)]
RECENT = [Condition.parse("year>=2021")]


@pytest.fixture
def place(tmp_path):
    facts = IndexFacts("/photos", "gone/model", IndexSettings(None, 4, "float32", None), Fingerprint({}, {}))
    files, kinds, texts, years = map(list, zip(*ROWS, strict=True))
    same = {"part": 0, "version": "", "content": "", "box": None, "width": None, "height": None}
    columns = {name: [value] * len(ROWS) for name, value in same.items()}
    columns |= {"file_name": files, "kind": kinds, "text": texts, "embedding": np.eye(3, 4, dtype=np.float32)}
    columns["metadata"] = [json.dumps({"year": year}) for year in years]
    write_index(tmp_path / "index", facts, 1, len(ROWS), [columns])
    return tmp_path / "index"


def names(hits):
    return [hit.path.name for hit in hits]


def test_words_find_what_the_whole_index_finds_by_them_alone(place):
    rows = RowSearch.load(place)
    whole = SearchIndex(rows.rows, rows.facts, None, None)
    whole.query = lambda *arguments: torch.zeros(1, 4)  # of vectors nothing counts
    whole.vectors.search = lambda *arguments: (np.empty(0), np.empty(0, int))
    for text, limits in [("star", {}), ("STAR", {"where": RECENT}), ("moon star", {"kinds": ["text"]}), ("sun", {})]:
        assert rows.search_words(text, **limits) == whole.search(text, lexical_weight=1, **limits)
    assert names(rows.search_words("star", top=1)) == ["b.png"]  # which has it twice
    with pytest.raises(ValueError, match="`text` is ' '; expected something to look for"):
        rows.search_words(" ")


def test_rows_are_listed_in_order_as_far_as_conditions_hold(place):
    rows = RowSearch.load(place)
    assert names(rows.list_rows()) == ["a.png", "b.png", "c.txt"] and names(rows.list_rows(2)) == ["a.png", "b.png"]
    assert names(rows.list_rows(where=RECENT)) == ["b.png", "c.txt"]
    [hit] = rows.list_rows(kinds=["image"], where=RECENT)
    assert (hit.path.name, hit.score, hit.text) == ("b.png", 1, "star star")
    assert rows.list_rows(where=[Condition.parse("year>2030")]) == []
    with pytest.raises(ValueError, match="`top` is 0; expected 1 or more"):
        rows.list_rows(0)


@pytest.mark.parametrize(
    ("query", "found"),
    [(["star", "--lexical-weight", "1"], ["b.png", "a.png"]), (["--where", "year>=2021"], ["b.png", "c.txt"])],
)
def test_the_command_needs_no_model_and_no_torch(place, query, found):
    """The model of the index is nowhere; in a process of its own, as torch is in this one."""
    code = (
        "import sys\nfrom mmgem.training.cli import app\napp(sys.argv[1:], standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'pandas', 'datasets', 'sentence_transformers'} & {*sys.modules}\n"
        "assert not heavy, heavy"
    )
    arguments = [sys.executable, "-c", code, "search", str(place), *query, "--json"]
    result = subprocess.run(arguments, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert result.returncode == 0, result.stderr
    assert [hit["path"] for hit in json.loads(result.stdout)] == [f"/photos/{name}" for name in found]


def test_that_nothing_was_found_is_said_beside_the_answer(place):
    result = CliRunner().invoke(app, ["search", str(place), "sun", "--lexical-weight", "1"])
    assert (result.exit_code, result.stdout, result.stderr) == (
        0,
        "",
        "nothing was found: no text, caption or name of a file has a word of it\n",
    )
