"""Unit vectors as they are stored: as they are, in a byte for each value, or in a bit for each."""

from dataclasses import dataclass

import numpy as np

from mmgem.training.search.settings import Precision


@dataclass(frozen=True)
class VectorCodec:
    """Between vectors and their codes, which are those of sentence-transformers' `quantize_embeddings`. To import it
    takes seconds, so they are written here.

    Encoding what was decoded gives the same codes again, so that an index can be rewritten without loss.

    Args:
        precision: `"float32"`; `"int8"`, one of 256 steps (stored as `uint8`, which is what FAISS takes); `"binary"`,
            the sign, eight to a byte.
        dimensions: The width D of a vector.
        bound: The steps of `"int8"` go from `-bound` to `bound`, for every dimension alike: then distances of codes
            are distances of vectors. Values beyond are cut.
    """

    precision: Precision
    dimensions: int
    bound: float = 1.0

    @property
    def width(self) -> int:
        """The number W of values of one code."""
        return -(-self.dimensions // 8) if self.precision == "binary" else self.dimensions

    @property
    def step(self) -> float:
        """The width of one of the 256 steps."""
        return 2 * self.bound / 255

    def encode(self, vectors: np.ndarray) -> np.ndarray:
        """Encodes (..., D) float32 vectors as (..., W) codes."""
        if self.precision == "float32":
            return vectors
        if self.precision == "int8":
            return ((vectors + self.bound) / self.step).clip(0, 255).astype(np.uint8)
        return np.packbits(vectors > 0, axis=-1)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Decodes (..., W) codes to (..., D) float32 vectors: the middle of each step, or signs at unit length."""
        if self.precision == "float32":
            return codes
        if self.precision == "int8":
            vectors = codes.astype(np.float32)
            vectors *= self.step
            vectors += self.step / 2 - self.bound
            return vectors
        bits = np.unpackbits(codes, axis=-1, count=self.dimensions)
        return (2 * bits.astype(np.float32) - 1) / np.float32(self.dimensions**0.5)
