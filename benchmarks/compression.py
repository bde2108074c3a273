"""What learning to compress brings to contrastive training: the table of CoMa (https://arxiv.org/abs/2511.08480), on
generated scenes.

    python -m benchmarks.compression --out runs/compression

An image is embedded through the language model, by k [EMB] vectors after its visual tokens. The match stage teaches
that with pairs of a caption and an image; the compress stage, before it, with captions and answers that are written
from the states of the [EMB] vectors alone, and with no pair at all. Every run starts from `mmgem-tiny` as it is after
the second stage of its recipe (`make retrain` leaves it where `--checkpoint` expects it): its text embeddings are
trained, and its language model reads visual tokens to write captions, but has never embedded an image. The vision
tower is frozen; everything else is trained.

The table shows recall@1 of held-out captions among the held-out images, as the language model embeds them, by the
number of pairs seen, with and without the compress stage before. Every finished run is a line of `OUT/runs.jsonl`; a
command that was stopped is given again and goes on with the runs that are left.
"""

import json
import os
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch.nn.functional import normalize
from tqdm.auto import tqdm
from transformers import set_seed

from benchmarks.compression_data import GridModel, HeldOut, Setting, prepare_batches, prepare_held_out
from benchmarks.compression_report import report
from benchmarks.experiment_data import save_whole
from benchmarks.experiment_training import EVAL_BATCH, train
from benchmarks.peers import Batch
from benchmarks.workers import progress_line, worker_pool
from mmgem.training.evaluation.metrics import recall_at, retrieval_ranks
from mmgem.training.inference import embed_texts, inference
from mmgem.training.loading import load_checkpoint, load_config

CHECKPOINT = Path("runs/mmgem-tiny/stages/describe")
LOSSES = {"compress": "caption_loss", "match": "contrastive_loss"}


class Run(NamedTuple):
    """One run of the comparison.

    Args:
        vectors: The number k of [EMB] vectors.
        seed: The seed of scenes, order and new vectors.
        compressed: Whether the compress stage comes before.
        pairs: The pairs that the match stage sees; with 0 there is none.
    """

    vectors: int
    seed: int
    compressed: bool
    pairs: int


@dataclass(frozen=True)
class StageTraining:
    """What `train` asks of a stage: the loss it has, the schedule of its steps."""

    model: GridModel
    loss: str
    learning_rate: float
    warmup: int

    def losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {self.loss: getattr(self.model(**batch, return_loss=True), self.loss)}


def all_runs(setting: Setting) -> list[Run]:
    """The longest first, so that workers finish at about the same time."""
    return [
        Run(vectors, seed, compressed, pairs)
        for vectors in sorted(setting.vectors, reverse=True)
        for seed in range(setting.seeds)
        for compressed in (True, False)
        for pairs in (0, *setting.pairs)
    ]


def check_checkpoint(checkpoint: str) -> None:
    """Refuse a folder that the comparison cannot start from.

    Raises:
        FileNotFoundError: If it is no checkpoint.
        ValueError: If it has several [EMB] vectors, which have learned something already.
    """
    count = load_config(checkpoint).num_embedding_tokens
    if count != 1:
        raise ValueError(f"checkpoint is {checkpoint!r}, with {count} [EMB] vectors; expected one with a single one")


def build_model(setting: Setting, run: Run) -> GridModel:
    """The checkpoint with k [EMB] vectors. Its vision tower does not run, and so is not trained."""
    model = GridModel.from_pretrained(setting.checkpoint, attn_implementation="eager")  # the fastest for small heads
    set_seed(run.seed)
    model.set_embedding_tokens(run.vectors, "mean")
    return model


def recall(model: GridModel, processor, held_out: HeldOut) -> float:
    """Recall@1 of all held-out captions among the images, embedded through the language model."""
    image = processor.tokenizer(processor.image_token * processor.num_visual_tokens, return_tensors="pt")["input_ids"]
    with inference(model):
        parts = [
            model.get_multimodal_features(image.repeat(len(grids), 1), pixel_values=grids).pooler_output
            for grids in held_out.grids.split(EVAL_BATCH)
        ]
    return caption_recall(model, processor, held_out, torch.cat(parts))


def caption_recall(model: GridModel, processor, held_out: HeldOut, image_embeds: torch.Tensor) -> float:
    """Recall@1 of all held-out captions among the images, whose embeddings are (I, D)."""
    captions = embed_texts(model, processor, [text for texts in held_out.captions for text in texts])  # (T, D)
    right = [{number} for number, texts in enumerate(held_out.captions) for _ in texts]
    return recall_at(retrieval_ranks(captions, normalize(image_embeds, dim=-1), right), 1)


def execute(run: Run, setting: Setting, out: Path) -> dict:
    """Trains and measures. The run that has only the compress stage leaves its weights at `_weights_path`, from which
    those go on that have pairs, too.

    Returns:
        The line of the run: its fields, `recall`, and `losses`, means over every 25 steps of its last stage.
    """
    held_out = prepare_held_out(setting, out / "data" / "held-out.pt")
    batches = prepare_batches(setting, run.seed, out / "data" / f"seed-{run.seed}.pt")
    model, (_, processor) = build_model(setting, run), load_checkpoint(setting.checkpoint, "cpu")
    weights, losses = _weights_path(out, run), []
    if run.compressed and run.pairs:
        model.load_state_dict(torch.load(weights))
    elif run.compressed:
        losses = _train(model, "compress", setting, batches["compress"], run)
        save_whole(model.state_dict(), weights)
    if run.pairs:
        # The checkpoint's temperature is that of embeddings that fit already.
        torch.nn.init.constant_(model.logit_scale, GridModel.config_class().logit_scale_init_value)
        steps = run.pairs // setting.match.batch_size
        losses = _train(model, "match", setting, batches["match"][:steps], run)
    return run._asdict() | {"recall": recall(model, processor, held_out), "losses": losses}


def _train(model: GridModel, name: str, setting: Setting, batches: list[Batch], run: Run) -> list[float]:
    training = StageTraining(model, LOSSES[name], getattr(setting, name).learning_rate, len(batches) // 10)
    title = f"k {run.vectors}, seed {run.seed}, {name}"
    return train(training, batches, training, title, progress_line(), bf16=False)["losses"][training.loss]


def _weights_path(out: Path, run: Run) -> Path:
    return out / "data" / f"compressed-{run.vectors}-{run.seed}.pt"


def finished_runs(out: Path, setting: Setting, run_class: Any) -> dict[Any, dict]:
    """What `OUT/runs.jsonl` holds; an empty one begins with the setting. A line that was cut off is removed.

    Args:
        out: The folder.
        setting: That all its runs have.
        run_class: A named tuple of those fields of a line that tell runs apart.

    Returns:
        The lines, by run.

    Raises:
        ValueError: If it is that of another setting.
    """
    path = out / "runs.jsonl"
    text = path.read_text() if path.is_file() else ""
    whole = text[: text.rfind("\n") + 1]
    if not whole:
        out.mkdir(parents=True, exist_ok=True)
        whole = json.dumps(setting.as_dict()) + "\n"
    if whole != text:
        path.write_text(whole)
    first, *lines = (json.loads(line) for line in whole.splitlines())
    if first != setting.as_dict():
        raise ValueError(f"`out` is {str(out)!r}, which holds runs of another setting; expected another folder.")
    return {run_class(*(line[name] for name in run_class._fields)): line for line in lines}


def write_line(out: Path, line: dict) -> dict:
    """Append the line of a run to those of [`finished_runs`], and return it."""
    with open(out / "runs.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    return line


def run_all(setting: Setting, out: Path, workers: int) -> list[dict]:
    """The runs that are left, `workers` at a time with one thread each.

    Returns:
        The lines of all runs.

    Raises:
        FileNotFoundError, ValueError: As `check_checkpoint` and `finished_runs`.
    """
    check_checkpoint(setting.checkpoint)
    finished, runs = finished_runs(out, setting, Run), all_runs(setting)
    bases = {
        run._replace(pairs=0) for run in runs if run.compressed and run not in finished
    }  # whose weights are needed
    lost = {run for run in bases if not _weights_path(out, run).is_file()}
    left = [run for run in runs if run not in finished or run in lost]
    with (
        worker_pool(workers) as pool,
        tqdm(total=len(runs), initial=len(runs) - len(left), desc="runs", unit="run") as progress,
    ):
        if left:
            pool.submit(prepare_held_out, setting, out / "data" / "held-out.pt").result()
        draws = [pool.submit(_draw, setting, seed, out) for seed in sorted({run.seed for run in left})]
        for draw in draws:
            draw.result()

        submit = partial(_submit, pool, setting, out)
        waiting = [run for run in left if run.compressed and run.pairs and run._replace(pairs=0) in left]
        running = {submit(run): run for run in left if run not in waiting}
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run = running.pop(future)
                finished[run] = write_line(out, future.result())
                progress.update()
                if run.compressed and not run.pairs:
                    running |= {submit(later): later for later in waiting if later._replace(pairs=0) == run}
    return [finished[run] for run in runs]


def _submit(pool, setting: Setting, out: Path, run: Run) -> Future:
    return pool.submit(execute, run, setting, out)


def _draw(setting: Setting, seed: int, out: Path) -> None:
    prepare_batches(setting, seed, out / "data" / f"seed-{seed}.pt", progress_line())


def main(
    out: Annotated[Path, typer.Option(help="Folder for the runs and the table.")] = Path("runs/compression"),
    checkpoint: Annotated[Path, typer.Option(help="That all runs start from.")] = CHECKPOINT,
    vectors: Annotated[list[int], typer.Option(min=1, help="k; may be given again.")] = list(Setting.vectors),  # noqa: B006
    pairs: Annotated[list[int], typer.Option(min=1, help="Pairs seen; may be given again.")] = list(Setting.pairs),  # noqa: B006
    compress_images: Annotated[int, typer.Option(min=1, help="Of a compress stage.")] = Setting.compress_images,
    held_out: Annotated[int, typer.Option(min=2, help="Scenes to search among.")] = Setting.held_out,
    max_objects: Annotated[int, typer.Option(min=1, help="Of a scene.")] = Setting.max_objects,
    seeds: Annotated[int, typer.Option(min=1, help="Of each kind of run.")] = Setting.seeds,
    workers: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 2,
):
    """Train and measure every run; print the table."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    setting = Setting(
        checkpoint=str(checkpoint),
        vectors=tuple(vectors),
        seeds=seeds,
        pairs=tuple(pairs),
        compress_images=compress_images,
        held_out=held_out,
        max_objects=max_objects,
    )
    table = report(run_all(setting, out, workers))
    (out / "table.md").write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    typer.run(main)
