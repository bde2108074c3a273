"""Closing the gap between the modalities of a trained model, from a sample of its data and without training."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.functional import normalize
from tqdm.auto import tqdm

from mmgem.modality_calibrator import ModalityCalibrator
from mmgem.processing.sentence_transformers_export import save_sentence_transformer
from mmgem.training.data.image_folder import read_image_folder
from mmgem.training.data.rows import captions_of, check_row, images_of, row_name
from mmgem.training.data.skipped import SkippedLog, readable_rows
from mmgem.training.inference import EMBEDDING_MODES, uncalibrated
from mmgem.training.output_folder import whole_folder
from mmgem.training.output_lock import one_writer


class CalibrationReport(NamedTuple):
    """Report of `calibrate`.

    Args:
        counts: Number of embeddings that the mean of each modality is taken over.
        gap_before, gap_after: The `modality_gap` of the sample.
    """

    counts: dict[str, int]
    gap_before: float
    gap_after: float


def calibrate(
    model, processor, rows: Iterable[Mapping[str, Any]], batch_size: int = 64, skipped: SkippedLog | None = None
) -> CalibrationReport:
    """Fits a `ModalityCalibrator` (GR-CLIP, arXiv:2507.19054), through which a model's embeddings go from then on.

    It is saved with the model. A model that has one gets a new one, fitted on what the model gives without it, so that
    calibrating twice is calibrating once. If the sample is refused, the model stays as it was.

    Args:
        model: An `MMGEMModel`. Of k vectors per embedding, each gets a mean of its own.
        processor: Its `MMGEMProcessor`.
        rows: A sample of what will be searched; some hundred rows are enough. Of each row its images, its first
            caption, and where it has both, images and caption together, as the fused modality.
        batch_size: Rows at a time.
        skipped: Where to note rows that cannot be used (see [`mmgem.training.data.rows.check_row`]) or read, which are
            left out; they are logged in any case.

    Returns:
        How many embeddings there were, and the gap before and after.

    Raises:
        ValueError: If the rows have fewer than two modalities, or less than two different examples of one.
    """
    with uncalibrated(model):
        embeds = embed_modalities(model, processor, rows, batch_size, skipped)
    if len(embeds) < 2:
        raise ValueError(f"`rows` is of {' and '.join(embeds) or 'no'} inputs only; expected images and captions.")
    *num_vectors, dim = next(iter(embeds.values())).shape[1:]  # (k, D) or (D,)
    calibrator = ModalityCalibrator(dim, list(embeds), *num_vectors)
    calibrator.fit(embeds)
    model.calibrator = calibrator.to(model.device, model.dtype)
    model.config.calibrated_modalities = list(embeds)
    calibrated = {modality: calibrator(part.to(model.device), modality).cpu() for modality, part in embeds.items()}
    counts = {modality: len(part) for modality, part in embeds.items()}
    return CalibrationReport(counts, modality_gap(embeds), modality_gap(calibrated))


@one_writer
def write_calibrated(
    model, processor, data: str | Path, out: str | Path, batch_size: int = 64, skipped: SkippedLog | None = None
) -> CalibrationReport:
    """Calibrates a model, see `calibrate`, and leaves it in a new folder.

    Args:
        model, processor: As for `calibrate`.
        data: An image folder, see `read_image_folder`.
        out: A new or empty folder.
        batch_size: Rows at a time.
        skipped: As for `calibrate`.

    Raises:
        BlockingIOError: If another job writes `out`.
        FileExistsError: If `out` holds something.
        ValueError: As `calibrate` and `read_image_folder`.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"`out` is {str(out)!r}, which holds something; expected a new or empty folder.")
    report = calibrate(model, processor, read_image_folder(data), batch_size, skipped)
    with whole_folder(out) as folder:
        save_sentence_transformer(model, processor, folder)
    return report


def embed_modalities(
    model, processor, rows: Iterable[Mapping[str, Any]], batch_size: int = 64, skipped: SkippedLog | None = None
) -> dict[str, torch.Tensor]:
    """Embeddings of the images, first captions and fused inputs of rows, see `calibrate`, by modality.

    Returns:
        (N, D) or (N, k, D) unit vectors, float32, on the CPU, of those modalities that occur; N is each one's own.
    """
    parts: dict[str, list[torch.Tensor]] = {modality: [] for modality in EMBEDDING_MODES}
    skipped = SkippedLog() if skipped is None else skipped
    readable = readable_rows(rows, processor, skipped, lambda row, number: check_row(row, row_name(row, number)))
    remaining = (row for row in tqdm(readable, desc="sample", unit="row", leave=False) if row is not None)
    while batch := list(islice(remaining, batch_size)):
        of_rows = [{"images": images_of(row), "texts": captions_of(row)[:1]} for row in batch]
        for modality, mode in EMBEDDING_MODES.items():
            if inputs := [one for of_row in of_rows for one in _inputs(of_row, mode.takes)]:
                parts[modality].append(mode.embed(model, processor, *zip(*inputs, strict=True)))
    return {modality: torch.cat(embeds) for modality, embeds in parts.items() if embeds}


def _inputs(of_row: Mapping[str, list], takes: Sequence[str]) -> list[tuple]:
    """The inputs of a row for a mode: each image or text alone, or all images with the text."""
    if len(takes) == 1:
        return [(one,) for one in of_row[takes[0]]]
    if not all(of_row[name] for name in takes):
        return []
    return [tuple(of_row[name] if name == "images" else of_row[name][0] for name in takes)]


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
