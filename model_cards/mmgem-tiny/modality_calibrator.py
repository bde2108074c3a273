"""ModalityCalibrator: the gap between the embeddings of images, texts and both, closed after training."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_mmgem import EMBEDDING_METHODS

_set_aside: ContextVar[tuple[int, ...]] = ContextVar("set_aside", default=())


class ModalityCalibrator(nn.Module):
    """Takes from every embedding the mean of its modality (GR-CLIP, https://arxiv.org/abs/2507.19054).

    Contrastive training leaves each modality in a cone of its own (https://arxiv.org/abs/2203.02053). A text may then
    be nearer to the texts of others than to its own image, and in a corpus of both, texts come first. With m the mean
    of the unit vectors of a modality in a sample, an embedding e becomes

        e / |e| - m, divided by its length.

    That takes no training, only a sample of what will be searched. A box counts as an image. Of an embedding of k
    vectors, each has a mean of its own, so that the first of them are calibrated as they would be without the rest.

    Args:
        dim: Width D of the embeddings.
        modalities: At least two of `"image"`, `"text"` and `"fused"`, each once.
        num_vectors: Number k of the vectors, for embeddings (k, D); by default an embedding is one vector, (D,).

    Raises:
        ValueError: For other modalities, or a width or a number of vectors below 1.
    """

    def __init__(self, dim: int, modalities: list[str], num_vectors: int | None = None):
        super().__init__()
        if dim < 1:
            raise ValueError(f"`dim` is {dim}; expected a width of at least 1.")
        if num_vectors is not None and num_vectors < 1:
            raise ValueError(f"`num_vectors` is {num_vectors}; expected at least 1, or None for one vector.")
        known = list(EMBEDDING_METHODS)
        if len(modalities) < 2 or len(set(modalities)) < len(modalities) or not set(modalities) <= set(known):
            raise ValueError(
                f"`modalities` is {list(modalities)}; expected at least two different ones of {known}: of one alone "
                "there is no gap."
            )
        self.dim = dim
        self.modalities = tuple(modalities)
        self.num_vectors = num_vectors
        for modality in self.modalities:
            self.register_buffer(f"{modality}_mean", torch.full(self.embedding_shape, math.nan))  # NaN: not fitted

    def extra_repr(self) -> str:
        return f"{self.dim}, {list(self.modalities)}, num_vectors={self.num_vectors}"

    @property
    def embedding_shape(self) -> tuple[int, ...]:
        """(D,), or (k, D)."""
        return (self.dim,) if self.num_vectors is None else (self.num_vectors, self.dim)

    def mean(self, modality: str) -> torch.Tensor:
        """(D,) mean of the unit vectors of a modality, or (k, D) one for each of k vectors; lengths are from 0 (no
        gap) to 1 (all embeddings are equal).

        Raises:
            ValueError: For a modality that this calibrator is not for, or that it was not fitted on.
        """
        if modality not in self.modalities:
            raise ValueError(
                f"`modality` is {modality!r}; expected one of those that are calibrated, {list(self.modalities)}."
            )
        mean = self.get_buffer(f"{modality}_mean")
        if not torch.compiler.is_compiling() and mean.isnan().any():
            raise ValueError(f"`modality` is {modality!r}, whose mean is not known; call `fit` first.")
        return mean

    @torch.no_grad()
    def fit(self, embeds_by_modality: dict[str, torch.Tensor]):
        """Learn the means from a sample. The calibrator stays as it was if the sample is refused.

        Args:
            embeds_by_modality: For each modality, and no other, (N, D) or (N, k, D) embeddings that are not
                calibrated, of any length other than 0; N at least 2, and its own for each modality.

        Raises:
            ValueError: For other modalities, shapes that do not fit, vectors that are not finite or zero, and
                embeddings, or n-th vectors of them, that are all alike, of which nothing would be left.
        """
        if set(embeds_by_modality) != set(self.modalities):
            raise ValueError(
                f"`embeds_by_modality` holds {list(embeds_by_modality)}; expected embeddings of each of "
                f"{list(self.modalities)}."
            )
        means = {modality: self._mean_of(modality, embeds) for modality, embeds in embeds_by_modality.items()}
        for modality, mean in means.items():
            self.get_buffer(f"{modality}_mean").copy_(mean)

    def _mean_of(self, modality: str, embeds: torch.Tensor) -> torch.Tensor:
        """(N, D) -> (D,), or (N, k, D) -> (k, D)"""
        name = f"`embeds_by_modality[{modality!r}]`"
        if embeds.shape[1:] != self.embedding_shape or len(embeds) < 2:
            expected = ", ".join(map(str, self.embedding_shape))
            raise ValueError(f"{name} has shape {tuple(embeds.shape)}; expected (2 or more, {expected}).")
        if not embeds.isfinite().all():
            raise ValueError(f"{name} has values that are not finite; expected finite embeddings.")
        if (embeds == 0).all(-1).any():
            raise ValueError(f"{name} has rows of zeros; expected embeddings, which have a direction.")
        units = F.normalize(embeds.double(), dim=-1)  # (N, D) or (N, k, D)
        mean = units.mean(dim=0)
        is_alike = ((units - mean).abs() <= 1e-6).all(-1).all(0)  # () or (k,)
        if is_alike.any():
            where = "" if is_alike.ndim == 0 else f" in vector {is_alike.nonzero()[0].item()}"
            raise ValueError(f"{name} has {len(embeds)} rows that are all alike{where}; expected different ones.")
        return mean

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Leaves embeddings as they are within, for this thread alone."""
        token = _set_aside.set((*_set_aside.get(), id(self)))
        try:
            yield
        finally:
            _set_aside.reset(token)

    def forward(self, embeds: torch.Tensor, modality: str) -> torch.Tensor:
        """Calibrate embeddings of one modality.

        Args:
            embeds: (..., D) or (..., k, D) embeddings of one modality, of any length.
            modality: Of all of them.

        Returns:
            Unit vectors of the same shape, in the precision of `embeds`.

        Raises:
            ValueError: For a modality as [`mean`] says, or embeddings of another width or number of vectors.
        """
        if not torch.compiler.is_compiling() and id(self) in _set_aside.get():
            return embeds
        mean = self.mean(modality)
        if embeds.shape[-len(self.embedding_shape) :] != self.embedding_shape:
            expected = ", ".join(map(str, self.embedding_shape))
            raise ValueError(f"`embeds` has shape {tuple(embeds.shape)}; expected (..., {expected}).")
        # In float32: near the mean, most digits of half precision cancel.
        centered = F.normalize(embeds.float(), dim=-1) - mean.float()
        return F.normalize(centered, dim=-1).to(embeds.dtype)
