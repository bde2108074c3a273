import numpy as np
import pytest

from mmgem.training.search.vector_codec import VectorCodec


def unit_vectors(*shape):
    vectors = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


@pytest.mark.parametrize(("precision", "bytes_per_vector"), [("float32", 80), ("int8", 20), ("binary", 3)])
@pytest.mark.parametrize("shape", [(50, 20), (50, 4, 20)])
def test_codes_are_as_small_as_they_say_and_decoding_loses_nothing_more(precision, bytes_per_vector, shape):
    codec = VectorCodec(precision, 20, bound=0.9)
    codes = codec.encode(unit_vectors(*shape))
    assert codes.shape == (*shape[:-1], codec.width)
    assert codes.nbytes == bytes_per_vector * codes[..., 0].size
    np.testing.assert_array_equal(codec.encode(codec.decode(codes)), codes)


def test_codes_are_those_of_sentence_transformers():
    from sentence_transformers.util.quantization import quantize_embeddings

    vectors = unit_vectors(300, 20)
    ranges = np.array([[-0.4] * 20, [0.4] * 20], np.float32)
    expected = quantize_embeddings(vectors, precision="uint8", ranges=ranges)
    codes = VectorCodec("int8", 20, bound=0.4).encode(vectors)
    assert np.abs(codes.astype(int) - expected).max() <= 1 and (codes == expected).mean() > 0.999  # float32 rounds
    np.testing.assert_array_equal(VectorCodec("binary", 20).encode(vectors), quantize_embeddings(vectors, "ubinary"))


def test_int8_is_off_by_half_a_step_at_most_and_cuts_what_is_beyond_its_bound():
    vectors = unit_vectors(200, 20)
    bound = float(np.abs(vectors).max())
    codec = VectorCodec("int8", 20, bound)
    errors = np.abs(codec.decode(codec.encode(vectors)) - vectors)
    assert errors.max() <= codec.step / 2 + 1e-6 and abs(codec.step - 2 * bound / 255) < 1e-9
    assert errors.mean() > codec.step / 5  # a uniform error has a quarter
    narrow = VectorCodec("int8", 20, bound / 2)
    assert np.abs(narrow.decode(narrow.encode(vectors))).max() == pytest.approx(bound / 2, abs=narrow.step)


def test_binary_keeps_the_signs_at_unit_length():
    vectors = unit_vectors(30, 20)
    codec = VectorCodec("binary", 20)
    decoded = codec.decode(codec.encode(vectors))
    np.testing.assert_array_equal(np.sign(decoded), np.sign(vectors))
    np.testing.assert_allclose(np.linalg.norm(decoded, axis=-1), 1, atol=1e-6)


def test_codes_written_with_a_wider_bound_stay_near_the_vectors():
    vectors = unit_vectors(100, 20)
    narrow = VectorCodec("int8", 20, float(np.abs(vectors).max()))
    wide = VectorCodec("int8", 20, 1.5 * narrow.bound)
    again = wide.decode(wide.encode(narrow.decode(narrow.encode(vectors))))
    assert np.abs(again - vectors).max() <= (narrow.step + wide.step) / 2 + 1e-6


@pytest.mark.parametrize("dimensions", [1, 7, 8, 9, 64, 65])
@pytest.mark.parametrize("precision", ["float32", "int8", "binary"])
def test_the_width_is_that_of_the_codes_and_vectors_stay_float32(precision, dimensions):
    codec = VectorCodec(precision, dimensions)
    codes = codec.encode(unit_vectors(3, dimensions))
    assert codes.shape == (3, codec.width) and codec.decode(codes).dtype == np.float32


def test_the_sign_of_zero_is_minus():
    """As in sentence-transformers' `quantize_embeddings`."""
    assert VectorCodec("binary", 8).encode(np.zeros(8, np.float32)).tolist() == [0]
