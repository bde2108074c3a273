"""Closing the gap between the modalities of a trained model, from a sample of its data and without training."""

from collections.abc import Iterable, Mapping
from itertools import combinations, islice
from typing import Any, NamedTuple

import torch
from torch.nn.functional import normalize
from tqdm.auto import tqdm

from mmgem.modality_calibrator import MODALITIES, ModalityCalibrator
from mmgem.training.data.rows import captions_of, check_row, images_of, row_name
from mmgem.training.inference import embed_fused, embed_images, embed_texts, uncalibrated


class CalibrationReport(NamedTuple):
    """What `calibrate` did.

    Args:
        counts: Number of embeddings that the mean of each modality is taken over.
        gap_before, gap_after: `modality_gap` of the sample.
    """

    counts: dict[str, int]
    gap_before: float
    gap_after: float


def calibrate(model, processor, rows: Iterable[Mapping[str, Any]], batch_size: int = 64) -> CalibrationReport:
    """Fits a `ModalityCalibrator` (GR-CLIP, arXiv:2507.19054), through which a model's embeddings go from then on.

    It is saved with the model. A model that has one gets a new one, fitted on what the model gives without it, so that
    calibrating twice is calibrating once. If the sample is refused, the model stays as it was.

    Args:
        model: An `MMGEMModel`. Of k vectors per embedding, each gets a mean of its own.
        processor: Its `MMGEMProcessor`.
        rows: A sample of what will be searched; some hundred rows are enough. Of each row its images, its first
            caption, and where it has both, images and caption together, as the fused modality.
        batch_size: Rows at a time.

    Raises:
        ValueError: If the rows have fewer than two modalities, or less than two different examples of one; or a row
            cannot be used, see [`mmgem.training.data.rows.check_row`].
    """
    with uncalibrated(model):
        embeds = embed_modalities(model, processor, rows, batch_size)
    if len(embeds) < 2:
        raise ValueError(f"rows must have images and captions, got {' and '.join(embeds) or 'neither'} only")
    *num_vectors, dim = next(iter(embeds.values())).shape[1:]  # (k, D) or (D,)
    calibrator = ModalityCalibrator(dim, list(embeds), *num_vectors)
    calibrator.fit(embeds)
    model.calibrator = calibrator.to(model.device, model.dtype)
    model.config.calibrated_modalities = list(embeds)
    calibrated = {modality: calibrator(part.to(model.device), modality).cpu() for modality, part in embeds.items()}
    counts = {modality: len(part) for modality, part in embeds.items()}
    return CalibrationReport(counts, modality_gap(embeds), modality_gap(calibrated))


def embed_modalities(
    model, processor, rows: Iterable[Mapping[str, Any]], batch_size: int = 64
) -> dict[str, torch.Tensor]:
    """Embeddings of the images, first captions and fused inputs of rows, see `calibrate`, by modality.

    Returns:
        (N, D) or (N, k, D) unit vectors, float32, on the CPU, of those modalities that occur; N is each one's own.
    """
    parts: dict[str, list[torch.Tensor]] = {modality: [] for modality in MODALITIES}
    remaining = enumerate(tqdm(rows, desc="sample", unit="row", leave=False))
    while batch := list(islice(remaining, batch_size)):
        for number, row in batch:
            check_row(row, row_name(row, number))
        images = [images_of(row) for _, row in batch]
        captions = [captions_of(row)[:1] for _, row in batch]
        pairs = [(own, text) for own, texts in zip(images, captions, strict=True) for text in texts if own]
        if any(images):
            parts["image"].append(embed_images(model, processor, [image for own in images for image in own]))
        if any(captions):
            parts["text"].append(embed_texts(model, processor, [text for own in captions for text in own]))
        if pairs:
            parts["fused"].append(embed_fused(model, processor, *zip(*pairs, strict=True)))
    return {modality: torch.cat(embeds) for modality, embeds in parts.items() if embeds}


def modality_gap(embeds_by_modality: Mapping[str, torch.Tensor]) -> float:
    """The largest distance between the means of two modalities' unit vectors (arXiv:2203.02053).

    Args:
        embeds_by_modality: (N, D) or (N, k, D) of two modalities or more, of any length.

    Returns:
        0 to 2.
    """
    units = [normalize(embeds.float(), dim=-1).flatten(0, -2) for embeds in embeds_by_modality.values()]
    means = [vectors.mean(dim=0) for vectors in units]
    return max(torch.dist(first, second).item() for first, second in combinations(means, 2))
