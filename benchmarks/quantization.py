"""What torchao's quantized weights cost a checkpoint, on a folder of photographs.

    pip install torchao
    python -m benchmarks.quantization FOLDER [--model model_cards/mmgem-photo] [--count 60]

FOLDER has the photographs and their captions in `metadata.jsonl`. Prints for each kind of weights their size, recall
of the captions among the photographs, the mean cosine of its vectors to those of float32, and the processor time of
the texts. torchao quantizes linear layers, so the vision tower of mmgem-photo, of convolutions, stays as it is.
"""

import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer

from benchmarks.measure import machine_facts, markdown_table
from benchmarks.mteb_score import BATCH_SIZE, CUTOFFS, read_rows
from mmgem.training.evaluation.metrics import recall_at, retrieval_ranks
from mmgem.training.inference import embed_images, embed_texts
from mmgem.training.loading import load_checkpoint

PHOTO = Path(__file__).parents[1] / "model_cards" / "mmgem-photo"
HEADER = ("weights", "MB", *(f"R@{cutoff}" for cutoff in CUTOFFS), "cosine, images", "cosine, texts", "CPU s of texts")


class Vectors(NamedTuple):
    """(I, D) and (T, D) unit vectors, and the processor seconds of the texts."""

    images: torch.Tensor
    texts: torch.Tensor
    seconds: float


def weight_kinds() -> dict[str, Callable[[], object] | None]:
    """Configurations of torchao by the names of the table."""
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

    return {
        "float32": None,
        "int8 (`Int8WeightOnlyConfig`)": Int8WeightOnlyConfig,
        "int4, groups of 32 (`IntxWeightOnlyConfig`)": lambda: IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=PerGroup(32)
        ),
    }


def embed(model, processor, folder: Path, rows: list[dict]) -> Vectors:
    """Of several vectors the first."""
    files = [folder / row["file_name"] for row in rows]
    batches = [files[start : start + BATCH_SIZE] for start in range(0, len(files), BATCH_SIZE)]
    images = torch.cat([embed_images(model, processor, batch) for batch in batches])
    start = time.process_time()
    texts = embed_texts(model, processor, [text for row in rows for text in row["captions"]])
    seconds = time.process_time() - start
    if images.ndim == 3:
        images, texts = images[:, 0], texts[:, 0]
    return Vectors(images, texts, seconds)


def megabytes(model) -> float:
    """Size of the weights, as they would be saved."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell() / 1e6


def compare(model: str, folder: Path, rows: list[dict]) -> str:
    """The table, as markdown."""
    from torchao.quantization import quantize_

    right = [{number} for number, row in enumerate(rows) for _ in row["captions"]]
    table, exact = [], None
    for name, config in weight_kinds().items():
        loaded, processor = load_checkpoint(model, "cpu")
        if config is not None:
            quantize_(loaded, config())
        found = embed(loaded, processor, folder, rows)
        exact = exact or found
        ranks = retrieval_ranks(found.texts, found.images, right)
        cosines = [(own * other).sum(-1).mean().item() for own, other in zip(found[:2], exact[:2], strict=True)]
        recalls = [f"{recall_at(ranks, cutoff):.3f}" for cutoff in CUTOFFS]
        near = [f"{cosine:.4f}" for cosine in cosines]
        table.append((name, f"{megabytes(loaded):.1f}", *recalls, *near, f"{found.seconds:.1f}"))
    return markdown_table(HEADER, table)


def main(
    folder: Annotated[Path, typer.Argument(help="Of photographs, with `metadata.jsonl`.")],
    model: Annotated[str, typer.Option(help="Folder of a checkpoint.")] = str(PHOTO),
    count: Annotated[int, typer.Option(min=2, help="Photographs to search among.")] = 60,
):
    rows = read_rows(folder, count)
    print(machine_facts(), compare(model, folder, rows), sep="\n\n")


if __name__ == "__main__":
    typer.run(main)
