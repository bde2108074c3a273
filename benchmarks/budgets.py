"""What an index finds by the bytes it spends on an image.

    python -m benchmarks.budgets [--model MODEL] [--scenes 1000] [--out runs/budgets]

Embeds held-out scenes and their captions once and prints recall@1 of the captions at every budget: of one vector in
fewer dimensions (Matryoshka, https://arxiv.org/abs/2205.13147) and in int8 and binary codes, searched as
`mmgem search` does; and of a model with several vectors (MetaEmbed, https://arxiv.org/abs/2509.18095) by how many of
them a query and an image have. `OUT/budgets.png` shows all of them over the bytes of an image.
"""

from collections.abc import Collection, Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import typer
from torch.nn.functional import normalize
from tqdm.auto import tqdm

from benchmarks.measure import machine_facts, markdown_table
from benchmarks.search import PRECISIONS, TOP, halves
from mmgem.training.evaluation.metrics import BudgetRecall, recall_by_budget
from mmgem.training.inference import embed_images, embed_texts
from mmgem.training.loading import load_checkpoint
from mmgem.training.scenes.dataset import SceneDataset
from mmgem.training.search.settings import Precision
from mmgem.training.search.vector_codec import VectorCodec
from mmgem.training.search.vector_search import VectorSearch

CHECKPOINT = Path(__file__).parents[1] / "model_cards" / "mmgem-tiny"
SCENE_SEED = 5_000_000  # of no training data
BATCH_SIZE = 64


class Embedded(NamedTuple):
    """The embeddings of captions and images.

    Args:
        captions: (T, D) or (T, k, D) unit vectors.
        images: (I, D) or (I, k, D), likewise.
        right: For each caption its image.
    """

    captions: torch.Tensor
    images: torch.Tensor
    right: Sequence[Collection[int]]

    def first_vectors(self) -> "Embedded":
        """The first of k vectors, which has learned to do without the others."""
        captions, images = (embeds[:, 0] if embeds.ndim == 3 else embeds for embeds in self[:2])
        return Embedded(captions, images, self.right)


class CodeRecall(NamedTuple):
    """Recall@1 of one vector of so many dimensions, kept in codes of so many bytes."""

    dimensions: int
    precision: Precision
    bytes_per_document: int
    recall: float


def embed_scenes(model, processor, count: int) -> Embedded:
    """So many scenes, no two alike, with all their captions."""
    scenes = SceneDataset(SCENE_SEED, count, unique=True, columns=("image", "captions"))
    images: list[torch.Tensor] = []
    captions: list[str] = []
    right: list[set[int]] = []
    for start in tqdm(range(0, count, BATCH_SIZE), desc="images", unit="batch"):
        rows = [scenes[number] for number in range(start, min(start + BATCH_SIZE, count))]
        images.append(embed_images(model, processor, [row["image"] for row in rows]))
        for number, row in enumerate(rows, start):
            captions += row["captions"]
            right += [{number}] * len(row["captions"])
    return Embedded(embed_texts(model, processor, captions), torch.cat(images), right)


def recall_by_vectors(embedded: Embedded) -> list[BudgetRecall]:
    """With k vectors: every pair of k, k/2, ..., 1 of a query with as many of an image; else nothing."""
    if embedded.images.ndim == 2:
        return []
    counts = sorted(halves(embedded.images.shape[1], embedded.images.shape[1]))
    return recall_by_budget(*embedded, vectors=list(product(counts, counts)))


def recall_by_code(embedded: Embedded) -> list[CodeRecall]:
    """One vector, of all dimensions and of a half, a quarter and an eighth, in each precision. Codes choose
    candidates, which are compared with the exact query, for `TOP` answers; that of int8 is as wide as the largest
    value.
    """
    captions, images, right = embedded.first_vectors()
    found = []
    widths = halves(images.shape[-1], 4)
    for width, precision in tqdm(list(product(widths, PRECISIONS)), desc="codes"):
        queries, vectors = (normalize(embeds[:, :width], dim=-1).numpy() for embeds in (captions, images))
        codec = VectorCodec(precision, width, bound=float(np.abs(vectors).max()))
        codes = codec.encode(vectors)
        search = VectorSearch(codes, codec)
        hits = [search.search(query, TOP)[1][0] in own for query, own in zip(queries, right, strict=True)]
        found.append(CodeRecall(width, precision, codes[0].nbytes, float(np.mean(hits))))
    return found


def tables(by_vectors: Sequence[BudgetRecall], by_code: Sequence[CodeRecall]) -> str:
    """Markdown; each table where there is something for it."""
    parts = []
    if by_vectors:
        counts = sorted({budget.query_vectors for budget in by_vectors})
        rows = [
            [str(count), next(str(b.bytes_per_document) for b in by_vectors if b.document_vectors == count)]
            + [f"{budget.recall:.3f}" for budget in by_vectors if budget.document_vectors == count]
            for count in counts
        ]
        header = ["vectors of an image", "bytes", *(f"R@1, {count} of a query" for count in counts)]
        parts.append(markdown_table(header, rows))
    rows = []
    for width in sorted({code.dimensions for code in by_code}, reverse=True):
        cells = [f"{code.recall:.3f} ({code.bytes_per_document} B)" for code in by_code if code.dimensions == width]
        rows.append([str(width), *cells])
    parts.append(markdown_table(("dimensions", *(f"R@1, {precision}" for precision in PRECISIONS)), rows))
    return "\n\n".join(parts)


def draw_plot(by_vectors: Sequence[BudgetRecall], by_code: Sequence[CodeRecall], path: Path) -> None:
    """Recall over bytes of an image: a line for each precision, and one for as many vectors on both sides."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines: dict[str, list[tuple[int, float]]] = {
        f"one vector, {precision}": [(c.bytes_per_document, c.recall) for c in by_code if c.precision == precision]
        for precision in PRECISIONS
    }
    equal = [(b.bytes_per_document, b.recall) for b in by_vectors if b.query_vectors == b.document_vectors]
    if equal:
        lines["several vectors, float32"] = equal
    figure, axis = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for title, points in lines.items():
        axis.plot(*zip(*sorted(points), strict=True), marker="o", label=title)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_xlabel("bytes of an image")
    axis.set_ylabel("text → image R@1")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(
    model: Annotated[str, typer.Option(help="Folder of a checkpoint, or a name on the Hub.")] = str(CHECKPOINT),
    scenes: Annotated[int, typer.Option(min=2, help="To search among.")] = 1000,
    out: Annotated[Path, typer.Option(help="Folder for the plot.")] = Path("runs/budgets"),
):
    loaded, processor = load_checkpoint(model)
    embedded = embed_scenes(loaded, processor, scenes)
    by_vectors, by_code = recall_by_vectors(embedded), recall_by_code(embedded)
    out.mkdir(parents=True, exist_ok=True)
    draw_plot(by_vectors, by_code, out / "budgets.png")
    counts = f"{scenes} scenes, {len(embedded.captions)} captions."
    print(machine_facts(), counts, tables(by_vectors, by_code), sep="\n\n")


if __name__ == "__main__":
    typer.run(main)
