"""The settings of a search index: how many vectors it keeps of an image, how wide and exact, and how much memory."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch.nn.functional import normalize

Precision = Literal["float32", "int8", "binary"]


@dataclass(frozen=True)
class IndexSettings:
    """The parts of an embedding and a memory that are kept of each image.

    Args:
        vectors: The first R of the k vectors that a model with `embedding_pooling="multi_vector"` gives; None where a
            model gives one.
        dimensions: The first D values of each vector (Matryoshka, https://arxiv.org/abs/2205.13147).
        precision: How they are stored, see `VectorCodec`.
        memory: The first J of the k states from which the model writes about the image; None for none.
    """

    vectors: int | None
    dimensions: int
    precision: Precision
    memory: int | None

    @classmethod
    def settle(
        cls, model, vectors: int | None, dimensions: int | None, precision: str, memory: int | bool
    ) -> "IndexSettings":
        """Settles what a model can give of what is asked for: None, and True for the memory, are all that there is.

        Args:
            model: An `MMGEMModel`.
            vectors, dimensions, precision, memory: As for `build_index`.

        Raises:
            ValueError: If it does not give as much, or not this kind.
        """
        config = model.config
        k = config.num_embedding_tokens
        if precision not in get_args(Precision):
            raise ValueError(f"`precision` is {precision!r}; expected one of {', '.join(get_args(Precision))}.")
        if config.is_multi_vector:
            vectors = _within("vectors", vectors, k)
        elif vectors is not None:
            raise ValueError(
                f"`vectors` is {vectors}, but the model gives a single vector of an image; expected a model with "
                "`embedding_pooling` 'multi_vector'."
            )
        dimensions = _within("dimensions", dimensions, model.embedding_dim)
        if memory is False:
            return cls(vectors, dimensions, precision, None)  # type: ignore[arg-type]
        if not config.has_memory:
            raise ValueError(
                f"`memory` is {memory}, but the model has `embedding_prompt_ids`; expected one with [EMB] vectors."
            )
        return cls(vectors, dimensions, precision, _within("memory", None if memory is True else memory, k))  # type: ignore[arg-type]

    def shorten(self, embeddings: torch.Tensor, vectors: int | None = None) -> torch.Tensor:
        """The part of embeddings that is compared.

        Args:
            embeddings: (B, D') or (B, k, D').
            vectors: How many of the k; by default as many as are kept of an image.

        Returns:
            (B, D) or (B, vectors, D), of unit length.
        """
        if self.vectors is not None:
            embeddings = embeddings[:, : vectors or self.vectors]
        return normalize(embeddings[..., : self.dimensions], dim=-1)


def _within(name: str, number: int | None, limit: int) -> int:
    """The number, which may be from 1 to `limit`, the default."""
    if number is None:
        return limit
    if not 1 <= number <= limit:
        raise ValueError(f"`{name}` is {number}; expected 1 to {limit}, what the model gives.")
    return number
