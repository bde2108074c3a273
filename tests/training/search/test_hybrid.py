"""Hybrid search, in a corpus in which vectors, words and metadata each fail alone."""

import json
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch

from mmgem.training.search import index as index_module
from mmgem.training.search.conditions import Condition
from mmgem.training.search.hybrid import LabelledQuery, LexicalSearch, fit_lexical_weight, fuse_ranks
from mmgem.training.search.index import SearchIndex
from mmgem.training.search.settings import IndexSettings
from mmgem.training.search.storage import IndexFacts, IndexRows

# A vector says what is shown; only words tell serial numbers apart; only metadata say the year.
ROWS = [
    ("pump_a.png", "pump AX100", [1.0, 0.0, 0.0], 2021),
    ("pump_old.png", "pump AX200", [0.99, 0.1, 0.0], 2001),
    ("pump_b.png", "pump AX200", [0.99, 0.11, 0.0], 2021),
    ("manual.txt", "AX200 AX200 spare parts list", [0.0, 1.0, 0.0], 2021),
    ("fan_1.png", "fan", [0.9, 0.3, 0.1], 2021),
    ("fan_2.png", "fan", [0.9, 0.3, 0.2], 2021),
    ("fan_3.png", "fan", [0.9, 0.3, 0.3], 2021),
    ("valve.png", "valve", [0.0, 0.2, 1.0], 2021),
]
RIGHT = "pump_b.png"
RECENT = [Condition.parse("year>=2020")]


@pytest.fixture
def index(monkeypatch):
    """A search index whose model embeds any query as something that looks like the first pump."""
    vectors = np.array([vector for _, _, vector, _ in ROWS], np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    table = {
        "file_name": [name for name, *_ in ROWS],
        "kind": ["text" if name.endswith("txt") else "image" for name, *_ in ROWS],
        "part": [0] * len(ROWS),
        "text": [text for _, text, *_ in ROWS],
        "metadata": [json.dumps({"year": year}) for *_, year in ROWS],
        "box": [None] * len(ROWS),
        "width": [None] * len(ROWS),
        "height": [None] * len(ROWS),
    }
    facts = IndexFacts("/corpus", "a/model", IndexSettings(None, 3, "float32", None), None)
    model = SimpleNamespace(config=SimpleNamespace(num_embedding_tokens=1, prompts=None))
    monkeypatch.setattr(index_module, "embed_texts", lambda *arguments: torch.tensor([[1.0, 0.0, 0.0]]))
    return SearchIndex(IndexRows(pa.table(table), {"embedding": vectors}), facts, model, None)


def names(hits):
    return [hit.path.name for hit in hits]


def test_vectors_words_and_metadata_each_fail_alone_and_find_it_together(index):
    assert names(index.search("AX200", where=RECENT))[0] == "pump_a.png"  # looks like it, and is another one
    assert names(index.search("AX200", where=RECENT, lexical_weight=1))[0] == "manual.txt"  # has the word twice
    assert names(index.search("AX200", lexical_weight=0.5))[0] == "pump_old.png"  # of another year
    hits = index.search("AX200", where=RECENT, lexical_weight=0.5)
    assert names(hits)[0] == RIGHT and [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert names(index.search("AX200", kinds=["text"], lexical_weight=0.5)) == ["manual.txt"]


def test_a_word_that_one_row_has_comes_before_what_looks_alike(index, monkeypatch):
    monkeypatch.setattr(index_module, "RANKED", 1)  # so that neither ranking has the other's
    assert names(index.search("valve", lexical_weight=0.5, top=1)) == ["valve.png"]


def test_weights_0_and_1_are_each_search_alone(index):
    assert names(index.search("AX200", lexical_weight=0)) == names(index.search("AX200"))
    words = names(index.search("AX200", lexical_weight=1))
    assert words[0] == "manual.txt" and set(words) == {"manual.txt", RIGHT, "pump_old.png"}
    assert index.search("nothing of this", lexical_weight=1) == []
    assert names(index.search("old", lexical_weight=1)) == ["pump_old.png"]  # a word of the name of a file
    for weight in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=f"`lexical_weight` is {weight}; expected 0 to 1, or None"):
            index.search("AX200", lexical_weight=weight)
    with pytest.raises(ValueError, match="`lexical_weight` is 0.5, but there is no `text`"):
        index.search(image="a.png", lexical_weight=0.5)


def test_a_weight_is_fitted_to_labelled_queries(index):
    queries = [LabelledQuery("AX200", [RIGHT]), LabelledQuery("AX100", ["pump_a.png"])]
    fitted = fit_lexical_weight(index, queries, where=[Condition.parse("year>=2010")])
    assert fitted.reciprocal_rank == 1 > max(fitted.dense, fitted.lexical)
    assert 0 < fitted.lexical_weight < 1
    hits = index.search("AX200", where=RECENT, lexical_weight=fitted.lexical_weight)
    assert names(hits)[0] == RIGHT
    only_words = fit_lexical_weight(index, [LabelledQuery("valve", ["valve.png"])])
    assert (only_words.lexical, only_words.reciprocal_rank) == (1, 1) and only_words.dense < 0.5
    for bad, message in [
        ([], "`queries` is empty"),
        ([LabelledQuery("x", ["gone.png"])], "gone.png"),
        ([LabelledQuery("x", [])], "with the relevant files"),
    ]:
        with pytest.raises(ValueError, match=message):
            fit_lexical_weight(index, bad)


def test_ranks_are_fused_by_their_reciprocals():
    scores, numbers = fuse_ranks([np.array([3, 1, 2]), np.array([2, 3])], (0.5, 0.5), 2)
    assert numbers.tolist() == [3, 2]
    np.testing.assert_allclose(scores, [61 * (0.5 / 61 + 0.5 / 62), 61 * (0.5 / 63 + 0.5 / 61)])
    scores, numbers = fuse_ranks([np.array([7]), np.array([7])], (0.2, 0.8), 5)
    assert (scores.tolist(), numbers.tolist()) == ([pytest.approx(1)], [7])
    # Of equals the one in the first ranking comes first.
    assert fuse_ranks([np.array([9]), np.array([2])], (0.5, 0.5), 2)[1].tolist() == [
        9,
        2,
    ]  # of equals the first ranking
    assert fuse_ranks([np.array([], int), np.array([], int)], (0.5, 0.5), 3)[1].tolist() == []


def test_words_are_found_by_bm25_in_any_script_and_case():
    texts = ["a red star", "RED red red", "Rote ÄPFEL und A7", "", "звезда"]
    search = LexicalSearch(texts)
    assert search.rank("red", 9).tolist() == [1, 0]
    assert search.rank("äpfel", 9).tolist() == search.rank("a7", 9).tolist() == [2]
    assert search.rank("ЗВЕЗДА", 9).tolist() == [4]
    assert search.rank("red", 9, np.array([0, 3])).tolist() == [0] and search.rank("red", 1).tolist() == [1]
    for query in ("", "!?", "zebra"):
        assert search.rank(query, 9).tolist() == []
    assert LexicalSearch(["", "!"]).rank("a", 9).tolist() == LexicalSearch([]).rank("a", 9).tolist() == []
