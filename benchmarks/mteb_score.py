"""What mteb says of a checkpoint on a folder of photographs, beside what mmgem computes itself.

    pip install mteb && make hub-photo
    python -m benchmarks.mteb_score FOLDER [--model build/mmgem-photo] [--count 100]

FOLDER has the photographs and their captions in `metadata.jsonl`. Every caption looks for its photograph, by a task
that needs no network. `mmgem evaluate --mteb` runs the tasks of mteb itself.
"""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.measure import markdown_table
from mmgem.training.evaluation.metrics import recall_at, retrieval_ranks
from mmgem.training.evaluation.mteb_scores import wrap_model
from mmgem.training.inference import embed_images, embed_texts
from mmgem.training.loading import load_checkpoint

PHOTO = Path(__file__).parents[1] / "build" / "mmgem-photo"  # with the code that travels
CUTOFFS = (1, 5, 10)
BATCH_SIZE = 25


def read_rows(folder: Path, count: int) -> list[dict]:
    """The first rows that have captions."""
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row.get("captions")][:count]


def photographs_task(folder: Path, rows: list[dict]) -> type:
    """The task, which needs no network, as a class of mteb."""
    from datasets import Dataset, Image
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    unknown = ("reference", "date", "domains", "task_subtypes", "license", "annotations_creators", "dialect")
    unknown += ("sample_creation", "bibtex_citation")

    class Photographs(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="Photographs",
            description="Captions find their photograph.",
            type="Any2AnyRetrieval",
            category="t2i",
            dataset={"path": "local/photographs", "revision": "1"},
            modalities=["text", "image"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="recall_at_1",
            **dict.fromkeys(unknown),
        )

        def load_data(self, *args, **kwargs):
            names = [row["file_name"] for row in rows]
            files = {"id": names, "image": [str(folder / name) for name in names]}
            texts = {
                f"{n}-{k}": (name, text)
                for n, (name, row) in enumerate(zip(names, rows))
                for k, text in enumerate(row["captions"])
            }
            queries = {"id": list(texts), "text": [text for _, text in texts.values()]}
            split = {
                "corpus": Dataset.from_dict(files).cast_column("image", Image()),
                "queries": Dataset.from_dict(queries),
                "relevant_docs": {key: {name: 1} for key, (name, _) in texts.items()},
                "top_ranked": None,
            }
            self.dataset = {"default": {"test": split}}
            self.data_loaded = True

    return Photographs


def score_by_mteb(model: str, folder: Path, rows: list[dict], all_vectors: bool = False) -> dict[int, float]:
    """Recall at each of `CUTOFFS`, in the five decimals that mteb gives."""
    import mteb

    wrapped = wrap_model(model, all_vectors)
    [result] = mteb.evaluate(wrapped, photographs_task(folder, rows)(), cache=None).task_results
    return {cutoff: result.scores["test"][0][f"recall_at_{cutoff}"] for cutoff in CUTOFFS}


def score_ourselves(model: str, folder: Path, rows: list[dict], all_vectors: bool = False) -> dict[int, float]:
    """Likewise, by the vectors of `mmgem index`; of several vectors the first, as `SentenceTransformer` has it, or
    all."""
    loaded, processor = load_checkpoint(model)
    files = [folder / row["file_name"] for row in rows]
    batches = [files[start : start + BATCH_SIZE] for start in range(0, len(files), BATCH_SIZE)]
    images = torch.cat([embed_images(loaded, processor, batch) for batch in batches])
    texts = embed_texts(loaded, processor, [text for row in rows for text in row["captions"]])
    if images.ndim == 3 and not all_vectors:
        images, texts = images[:, 0], texts[:, 0]
    right = [{number} for number, row in enumerate(rows) for _ in row["captions"]]
    ranks = retrieval_ranks(texts, images, right)
    return {cutoff: recall_at(ranks, cutoff) for cutoff in CUTOFFS}


def main(
    folder: Annotated[Path, typer.Argument(help="Of photographs, with `metadata.jsonl`.")],
    model: Annotated[str, typer.Option(help="Folder of a checkpoint.")] = str(PHOTO),
    count: Annotated[int, typer.Option(min=2, help="Photographs to search among.")] = 100,
):
    rows = read_rows(folder, count)
    scores = {"mteb": score_by_mteb(model, folder, rows), "mmgem": score_ourselves(model, folder, rows)}
    table = [(name, *(f"{found[cutoff]:.5f}" for cutoff in CUTOFFS)) for name, found in scores.items()]
    print(f"{len(rows)} photographs, {sum(len(row['captions']) for row in rows)} captions of {Path(model).name}:\n")
    print(markdown_table(("computed by", *(f"recall@{cutoff}" for cutoff in CUTOFFS)), table))


if __name__ == "__main__":
    typer.run(main)
