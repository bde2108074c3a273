"""Lists find what a comparison with all vectors finds, also of some rows, of some vectors, and after an update."""

import numpy as np
import pytest

from mmgem.training.search import inverted_lists, list_making, vector_search
from mmgem.training.search.inverted_lists import InvertedLists
from mmgem.training.search.list_making import settle_effort
from mmgem.training.search.vector_codec import VectorCodec
from mmgem.training.search.vector_search import VectorSearch

ROWS, DIMENSIONS = 3000, 24


def clustered(rows, *shape, seed=0):
    generator = np.random.default_rng(seed)
    centers = np.random.default_rng(9).standard_normal((40, DIMENSIONS))
    vectors = centers[generator.integers(40, size=(rows, 1) if len(shape) else rows)]
    vectors = vectors + 0.5 * generator.standard_normal((rows, *shape, DIMENSIONS))
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def several():
    """Rows of four vectors, and their lists."""
    vectors = clustered(ROWS, 4)
    return vectors, InvertedLists.build(vectors)


def searches(vectors, lists, precision="float32"):
    codec = VectorCodec(precision, DIMENSIONS, float(np.abs(vectors).max()))
    codes = codec.encode(vectors)
    return VectorSearch(codes, codec), VectorSearch(codes, codec, lists)


@pytest.mark.parametrize("precision", ["float32", "int8", "binary"])
def test_the_effort_is_the_least_that_reaches_the_recall_and_scores_are_those_of_all(precision, monkeypatch):
    monkeypatch.setattr(list_making, "RECALL", 0.99)
    vectors = clustered(ROWS)
    lists = InvertedLists.build(vectors[:, None], bits=4 if precision == "binary" else 8)
    _, search = searches(vectors, lists, precision)
    queries = {"others": clustered(30, seed=1)[:, None], "rows": vectors[:40, None]}
    settle_effort(lists, search, queries, {"rows": np.arange(40)})
    assert 4 < lists.effort < lists.index.nlist and min(lists.recall.values()) >= list_making.RECALL

    def recall(kind):
        hits = []
        for number, [query] in enumerate(queries[kind]):
            every = search.codec.decode(search.codes) @ query
            scores, found = search.search(query, 11)
            np.testing.assert_allclose(scores, every[found], atol=1e-5)
            if kind == "rows":
                every[number], scores = -1, scores[found != number]
            hits.append((scores[:10] >= np.sort(every)[-10] - 1e-5).mean())
        return np.mean(hits)

    assert {kind: recall(kind) for kind in queries} == pytest.approx(lists.recall)
    lists.effort //= 2
    assert min(recall(kind) for kind in queries) < list_making.RECALL


@pytest.mark.parametrize("vectors_compared", [None, 1, 3])
def test_of_several_vectors_maxsim_decides_among_candidates_of_the_first_ones(several, vectors_compared):
    vectors, lists = several
    all_of_them, search = searches(vectors, lists)
    lists.effort = lists.index.nlist // 2
    hits = 0
    for query in clustered(20, 4, seed=1)[:, :vectors_compared]:
        expected = all_of_them.search(query, 10, vectors_compared)
        scores, rows = search.search(query, 10, vectors_compared)
        hits += len({*rows} & {*expected[1]})
        own = [float((query @ vectors[row, :vectors_compared].T).max(1).mean()) for row in rows]
        np.testing.assert_allclose(scores, own, atol=1e-5)
    assert hits >= 190


def test_no_more_than_candidates_are_compared(several, monkeypatch):
    vectors, lists = several
    lists.effort = 4
    _, search = searches(vectors, lists)
    compared = []
    compare = search.compare
    monkeypatch.setattr(search, "compare", lambda *given: compared.append(len(given[3])) or compare(*given))
    search.search(clustered(1, 4, seed=1)[0], 10)
    assert 10 <= compared[0] <= 4 * inverted_lists.CANDIDATES
    asked = []
    candidates = lists.candidates
    monkeypatch.setattr(lists, "candidates", lambda *given: asked.append(given[1:3]) or candidates(*given))
    search.search(clustered(1, 4, seed=1)[0], 10, 2)  # of which the first two vectors count
    assert asked == [(10, 2)]


@pytest.mark.parametrize("share", [0.02, 0.6])
def test_some_rows_are_compared_one_and_all_where_they_are_few_and_by_lists_otherwise(several, monkeypatch, share):
    vectors, lists = several
    monkeypatch.setattr(vector_search, "COMPARED_ALL", 100)
    lists.effort = lists.index.nlist // 2
    all_of_them, search = searches(vectors, lists)
    rows = np.flatnonzero(np.random.default_rng(2).random(ROWS) < share)
    asked = []
    candidates = lists.candidates
    monkeypatch.setattr(lists, "candidates", lambda *given: asked.append(given) or candidates(*given))
    hits = 0
    for query in clustered(10, 4, seed=1):
        _, found = search.search(query, 10, rows=rows)
        assert len(found) == 10 and np.isin(found, rows).all()
        hits += len({*found} & {*all_of_them.search(query, 10, rows=rows)[1]})
    assert (hits, len(asked)) == (100, 0) if share < 0.1 else (hits >= 97 and len(asked) == 10)


def test_as_many_answers_as_are_wanted_come_though_the_lists_that_are_near_have_fewer(several):
    vectors, lists = several
    lists.effort = 1
    _, search = searches(vectors, lists)
    for top in (1, 700, ROWS, 2 * ROWS):
        scores, rows = search.search(clustered(1, 4, seed=1)[0], top)
        assert len({*rows.tolist()}) == len(scores) == min(top, ROWS)


def test_an_update_keeps_what_was_there_in_its_lists_and_seeks_no_centers_anew(several, monkeypatch):
    vectors, lists = several
    kept = np.delete(np.arange(ROWS), np.arange(0, ROWS, 7))
    later = np.concatenate([clustered(50, 4, seed=5), vectors[kept]])
    earlier_rows = np.concatenate([np.full(50, -1), kept])
    monkeypatch.setattr(inverted_lists.faiss.IndexIVFScalarQuantizer, "train", None)
    updated = InvertedLists.build(later, earlier=lists, earlier_rows=earlier_rows)
    np.testing.assert_array_equal(updated.cells()[50:], lists.cells()[kept])
    again = InvertedLists.from_bytes(memoryview(updated.to_bytes()), 4, 16, {})
    anew = InvertedLists.build(later, earlier=lists)  # each vector is in the list of the nearest center
    for one in (updated, again):
        np.testing.assert_array_equal(one.cells(), anew.cells())
        one.effort = 16
        query = later[20]
        assert VectorSearch(later, VectorCodec("float32", DIMENSIONS), one).search(query, 1)[1][0] == 20


def test_another_number_of_lists_is_made_anew_where_the_rows_are_many_more(several):
    vectors, lists = several
    assert InvertedLists.build(vectors[:300], earlier=lists).index.nlist < lists.index.nlist
