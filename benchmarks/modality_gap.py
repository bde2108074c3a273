"""What closing the gap between modalities brings to text search in a corpus of images, captions and both.

    python -m benchmarks.modality_gap [--model MODEL]

Prints nDCG@10 before a model is calibrated and after, by the number of scenes that the calibrator is fitted on, each
as a mean over corpora of other scenes with its 95% interval. Scenes to fit on and scenes to search are of different
seeds. See [`benchmarks.mixed_corpus`] for the corpus.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Annotated

import typer

from benchmarks.experiment_report import interval
from benchmarks.measure import machine_facts, markdown_table
from benchmarks.mixed_corpus import embed_mixed_corpus, mixed_corpus_figures
from mmgem.training.evaluation.calibration import calibrate
from mmgem.training.inference import uncalibrated
from mmgem.training.loading import load_checkpoint
from mmgem.training.scenes.dataset import SceneDataset

CHECKPOINT = Path(__file__).parents[1] / "model_cards" / "mmgem-tiny"
SAMPLE_SEED, CORPUS_SEED = 3_000_000, 4_000_000  # of no training data
UNCALIBRATED = "not calibrated"
FIGURES = ("modality_gap", "image_recall@10", "text_recall@10", "fused_recall@10")
HEADER = ("", "nDCG@10", "gain", "gap", "finds the image", "the caption", "image + caption")

Corpora = Sequence[SceneDataset]


def build_corpora(count: int, scenes: int) -> Corpora:
    """`count` corpora of so many scenes each."""
    columns = ("image", "captions", "hard_negatives")
    return [SceneDataset(CORPUS_SEED + number, scenes, unique=True, columns=columns) for number in range(count)]


def compare(model, processor, sample_sizes: Sequence[int], corpora: Corpora) -> str:
    """The table of the benchmark, as markdown. The model keeps the last calibrator.

    Args:
        model, processor: An `MMGEMModel` and its processor.
        sample_sizes: Scenes to fit a calibrator on, in the order of the rows.
        corpora: At least two, for an interval.
    """
    with uncalibrated(model):
        embedded = [embed_mixed_corpus(model, processor, corpus) for corpus in corpora]
    before = [mixed_corpus_figures(corpus) for corpus in embedded]
    rows = [_row(UNCALIBRATED, before)]
    for size in sample_sizes:
        calibrate(model, processor, SceneDataset(SAMPLE_SEED, size, columns=("image", "captions")))
        calibrator = copy.deepcopy(model.calibrator).cpu()
        after = [mixed_corpus_figures(corpus.calibrated(calibrator)) for corpus in embedded]
        rows.append(_row(f"calibrated on {size} scenes", after, before))
    return markdown_table(HEADER, rows)


def _row(title: str, results: Sequence[dict], before: Sequence[dict] | None = None) -> tuple[str, ...]:
    """Title, nDCG, what each corpus gained of it, and the other figures."""
    gains = [new["ndcg@10"] - old["ndcg@10"] for new, old in zip(results, before or (), strict=before is not None)]
    figures = (_spread([result[figure] for result in results]) for figure in FIGURES)
    return title, _spread([result["ndcg@10"] for result in results]), _spread(gains) if gains else "", *figures


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.3f} ± {interval(values):.3f}"


def main(
    model: Annotated[str, typer.Option(help="Folder of a checkpoint, or a name on the Hub.")] = str(CHECKPOINT),
    corpora: Annotated[int, typer.Option(min=2, help="Corpora to search.")] = 5,
    scenes: Annotated[int, typer.Option(min=10, help="Scenes of each; at most six documents come of one.")] = 300,
):
    table = compare(*load_checkpoint(model), (8, 32, 128, 512), build_corpora(corpora, scenes))
    print(
        machine_facts(),
        f"{corpora} corpora of at most {6 * scenes} documents, {scenes} queries each.",
        table,
        sep="\n\n",
    )


if __name__ == "__main__":
    typer.run(main)
