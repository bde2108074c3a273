"""The settings of a search index: what it holds, how many vectors of each, how wide and exact, and how much memory."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    import torch

Kind = Literal["image", "fused", "region", "caption", "text"]  # of a row, see `Item`
KINDS: tuple[Kind, ...] = get_args(Kind)
Precision = Literal["float32", "int8", "binary"]
ImageMode = Literal["image", "fused"]
CaptionMode = Literal["beside", "fused"]
GRIDS = range(2, 17)  # cells across


@dataclass(frozen=True)
class IndexSettings:
    """What an index holds, and the parts of an embedding and a memory that are kept of each item.

    Args:
        vectors: The first R of the k vectors that a model with `embedding_pooling="multi_vector"` gives; None where a
            model gives one.
        dimensions: The first D values of each vector (Matryoshka, https://arxiv.org/abs/2205.13147).
        precision: How they are stored, see `VectorCodec`.
        memory: The first J of the k states from which the model writes about the image; None for none.
        image_mode: The embedding of an image and of a region, `"image"`, or `"fused"` through the language model.
        captions: `"beside"` the images, as texts, or `"fused"` with them; None for none.
        regions: `"boxes"` of the metadata, or the number of cells across of a grid; None for none.
        texts: The column of texts in files of records, besides files that are a text; None for no texts.
    """

    vectors: int | None
    dimensions: int
    precision: Precision
    memory: int | None
    image_mode: ImageMode = "image"
    captions: CaptionMode | None = None
    regions: Literal["boxes"] | int | None = None
    texts: str | None = None

    @classmethod
    def settle(
        cls, model, vectors: int | None, dimensions: int | None, precision: str, memory: int | bool, **items
    ) -> "IndexSettings":
        """Settles what a model can give of what is asked for: None, and True for the memory, are all that there is.

        Args:
            model: An `MMGEMModel`.
            vectors, dimensions, precision, memory: As for `build_index`.
            items: `image_mode`, `captions`, `regions` and `texts`, as for `build_index`.

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
        _check_items(config, **items)
        if memory is False:
            return cls(vectors, dimensions, precision, None, **items)  # type: ignore[arg-type]
        if not config.has_memory:
            raise ValueError(
                f"`memory` is {memory}, but the model has `embedding_prompt_ids`; expected one with [EMB] vectors."
            )
        memory = _within("memory", None if memory is True else memory, k)
        return cls(vectors, dimensions, precision, memory, **items)  # type: ignore[arg-type]

    @property
    def has_texts(self) -> bool:
        """Whether there are rows that are embedded as texts."""
        return self.texts is not None or self.captions == "beside"

    def shorten(self, embeddings: "torch.Tensor", vectors: int | None = None) -> "torch.Tensor":
        """The part of embeddings that is compared.

        Args:
            embeddings: (B, D') or (B, k, D').
            vectors: How many of the k; by default as many as are kept of an image.

        Returns:
            (B, D) or (B, vectors, D), of unit length.
        """
        from torch.nn.functional import normalize  # not before: who searches by words needs no torch

        if self.vectors is not None:
            embeddings = embeddings[:, : vectors or self.vectors]
        return normalize(embeddings[..., : self.dimensions], dim=-1)


def _check_items(
    config, image_mode: str = "image", captions: str | None = None, regions: Any = None, texts: str | None = None
) -> None:
    """Refuses what is no item of an index, or of a kind that the model, once calibrated, does not embed."""
    for name, value, known in [
        ("image_mode", image_mode, get_args(ImageMode)),
        ("captions", captions, (None, *get_args(CaptionMode))),
        ("regions", regions, (None, "boxes", *GRIDS)),
    ]:
        if value not in known or isinstance(value, bool):
            grid = f" or {GRIDS[0]} to {GRIDS[-1]}" if name == "regions" else ""
            shown = ", ".join(repr(one) for one in known if not isinstance(one, int))
            raise ValueError(f"`{name}` is {value!r}; expected one of {shown}{grid}.")
    if texts is not None and not texts.strip():
        raise ValueError(f"`texts` is {texts!r}; expected the name of a column, or None.")
    text_mode = "text" if captions == "beside" else captions
    needed = [("image_mode", image_mode, image_mode), ("captions", captions, text_mode)]
    for name, value, kind in [*needed, ("texts", texts, None if texts is None else "text")]:
        if kind is not None and kind not in config.embedded_kinds:
            raise ValueError(
                f"`{name}` is {value!r}, but the model is calibrated for {' and '.join(config.embedded_kinds)} only; "
                f"expected one that is calibrated for {kind}."
            )


def _within(name: str, number: int | None, limit: int) -> int:
    """The number, which may be from 1 to `limit`, the default."""
    if number is None:
        return limit
    if not 1 <= number <= limit:
        raise ValueError(f"`{name}` is {number}; expected 1 to {limit}, what the model gives.")
    return number
