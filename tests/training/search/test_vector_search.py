import numpy as np
import pytest
import torch

from mmgem.late_interaction import maxsim
from mmgem.training.search import vector_search
from mmgem.training.search.vector_codec import VectorCodec
from mmgem.training.search.vector_search import VectorSearch

QUERIES = 20
SHAPES = (5, 20), (5, 2, 20)


def unit_vectors(*shape, seed=0):
    vectors = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def corpus():
    """300 vectors, and queries near some of them."""
    vectors = unit_vectors(300, 20)
    queries = vectors[:QUERIES] + 0.5 * unit_vectors(QUERIES, 20, seed=1)
    return vectors, queries / np.linalg.norm(queries, axis=-1, keepdims=True)


def build(vectors, precision):
    codec = VectorCodec(precision, vectors.shape[-1], float(np.abs(vectors).max()))
    return VectorSearch(codec.encode(vectors), codec)


@pytest.mark.parametrize("precision", ["float32", "int8", "binary"])
def test_single_vectors_are_found_as_a_sort_of_all_cosines_finds_them(corpus, precision):
    vectors, queries = corpus
    search = build(vectors, precision)
    decoded = search.codec.decode(search.codes)
    for query in queries:
        scores, numbers = search.search(query, 5)
        assert list(scores) == sorted(scores, reverse=True)
        np.testing.assert_allclose(scores, decoded[numbers] @ query, atol=1e-5)  # so a score is a cosine
        expected = np.argsort(-(decoded @ query))[:5]
        if precision == "binary":  # bits alone choose the candidates
            assert numbers[0] == expected[0]
        else:
            np.testing.assert_array_equal(numbers, expected)


def test_quantized_vectors_are_scored_again_by_the_query_as_it_is(corpus, monkeypatch):
    """Signs alone tie; among enough candidates the query as it is finds what a sort of all finds."""
    vectors, queries = corpus
    monkeypatch.setattr(vector_search, "RESCORED_PER_ANSWER", len(vectors))
    search = build(vectors, "binary")
    for query in queries:
        _, numbers = search.search(query, 5)
        expected = np.argsort(-(search.codec.decode(search.codes) @ query))[:5]
        np.testing.assert_array_equal(numbers, expected)


def test_a_shift_of_all_vectors_does_not_hide_the_nearest_from_int8():
    """Codes are compared by distance: dot products of codes would prefer those with large values."""
    vectors = unit_vectors(400, 20) + 2 * unit_vectors(20, seed=1)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    search = build(vectors, "int8")
    for query in vectors[:QUERIES]:
        assert search.search(query, 1)[1][0] == np.argmax(vectors @ query)


@pytest.mark.parametrize("precision", ["float32", "int8", "binary"])
@pytest.mark.parametrize("at_a_time", [1, 1 << 24])
def test_several_vectors_are_searched_by_brute_force(precision, at_a_time, monkeypatch):
    monkeypatch.setattr(vector_search, "_VALUES_AT_A_TIME", at_a_time)
    search, queries = build(unit_vectors(60, 4, 20), precision), unit_vectors(QUERIES, 3, 20, seed=1)
    decoded = search.codec.decode(search.codes)
    for query in queries:
        expected = np.einsum("qd,nrd->nqr", query, decoded).max(-1).mean(-1)  # (60,)
        scores, numbers = search.search(query, 7)
        np.testing.assert_array_equal(numbers, np.argsort(-expected)[:7])
        np.testing.assert_allclose(scores, np.sort(expected)[::-1][:7], atol=1e-5)
    batch = maxsim(torch.from_numpy(queries), torch.from_numpy(decoded))
    np.testing.assert_allclose(search.search(queries[0], 60)[0], batch[0].sort(descending=True).values, atol=1e-5)


def test_the_first_vectors_are_searched_as_an_index_that_has_no_others():
    vectors, query = unit_vectors(60, 4, 20), unit_vectors(2, 20, seed=1)
    for sliced, whole in zip(
        build(vectors, "float32").search(query, 9, vectors=2),
        build(vectors[:, :2], "float32").search(query, 9),
        strict=True,
    ):
        np.testing.assert_allclose(sliced, whole, atol=1e-6)


@pytest.mark.parametrize("precision", ["float32", "int8", "binary"])
def test_more_answers_than_vectors_are_all_vectors(precision):
    for vectors, query in [
        (unit_vectors(3, 20), unit_vectors(20, seed=1)),
        (unit_vectors(3, 2, 20), unit_vectors(2, 20, seed=1)),
    ]:
        scores, numbers = build(vectors, precision).search(query, 50)
        assert sorted(numbers) == [0, 1, 2] and len(scores) == 3


@pytest.mark.parametrize("precision", ["float32", "int8", "binary"])
def test_some_vectors_are_searched_as_if_there_were_no_others(precision):
    rows = np.array([1, 4, 17, 30, 59])
    for vectors, query in [
        (unit_vectors(60, 20), unit_vectors(20, seed=1)),
        (unit_vectors(60, 4, 20), unit_vectors(2, 20, seed=1)),
    ]:
        search = build(vectors, precision)
        scores, numbers = search.search(query, 3, rows=rows)
        expected, places = VectorSearch(search.codes[rows], search.codec).search(query, 3)
        np.testing.assert_array_equal(numbers, rows[places])
        np.testing.assert_allclose(scores, expected, atol=1e-5)
        assert len(search.search(query, 3, rows=rows[:0])[0]) == 0


def test_codes_are_taken_as_they_are_unless_torch_would_warn_of_them():
    single, several = (np.frombuffer(unit_vectors(*shape).tobytes(), np.float32).reshape(shape) for shape in SHAPES)
    assert VectorSearch(single, VectorCodec("float32", 20)).codes is single  # read-only; FAISS takes a copy
    search = VectorSearch(several, VectorCodec("float32", 20))
    np.testing.assert_array_equal(search.codes, several)
    assert search.codes.flags.writeable


@pytest.mark.parametrize(("at_a_time", "images"), [(160, 2), (1, 1), (1 << 24, 60)])
def test_no_more_values_are_decoded_at_a_time_than_may_be(at_a_time, images, monkeypatch):
    decoded, decode = [], VectorCodec.decode
    monkeypatch.setattr(vector_search, "_VALUES_AT_A_TIME", at_a_time)
    monkeypatch.setattr(VectorCodec, "decode", lambda self, codes: decoded.append(len(codes)) or decode(self, codes))
    build(unit_vectors(60, 4, 20), "int8").search(unit_vectors(2, 20, seed=1), 3)
    assert max(decoded) == images and sum(decoded) == 60
