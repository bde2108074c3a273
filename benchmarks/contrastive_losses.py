"""What each option of the contrastive loss brings, on generated scenes, where some pairs are wrong.

    python -m benchmarks.contrastive_losses --out runs/contrastive-losses

Every run starts from the vision tower of `mmgem-tiny`, frozen, and a new language model, and learns to embed from
pairs of a caption and an image, by the contrastive loss alone. A caption is often true of several images of its batch,
so false negatives are natural here; and a share of the captions is paired with another image of the batch.

The table shows recall@1 of held-out captions among the held-out images, and the difference to the plain loss, paired
by seed. Every finished run is a line of `OUT/runs.jsonl`; a command that was stopped is given again and goes on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Annotated, Any, NamedTuple

import torch
import typer
from transformers import set_seed

from benchmarks.compression import caption_recall, finished_runs, write_line
from benchmarks.compression_data import GridModel, Setting, Stage, prepare_batches, prepare_held_out
from benchmarks.experiment_report import interval
from benchmarks.experiment_training import train
from benchmarks.measure import machine_facts, markdown_table
from benchmarks.peers import Batch
from mmgem.text_rows import IGNORED_LABEL
from mmgem.training.inference import inference
from mmgem.training.loading import load_checkpoint
from mmgem.training.trainer.contrastive_losses import build_objective
from mmgem.training.trainer.teacher import Teacher

CHECKPOINT = Path(__file__).parents[1] / "model_cards" / "mmgem-tiny"
PLAIN = "plain"
MOMENTUM = {"teacher": {"momentum": 0.99}}
OPTIONS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "hardness 9": {"hardness": 9},
    "all_positives": {"all_positives": True},
    "false_negative_threshold 0.9": {"false_negative_threshold": 0.9},
    "false_negative_margin 0.1": {"false_negative_margin": 0.1},
    "false_negative_teacher_margin 0": {"false_negative_teacher_margin": 0.0, **MOMENTUM},
    "soft_targets 0.4": {"soft_targets": 0.4, **MOMENTUM},
    "sigmoid": {"loss": "sigmoid"},
}
HEADER = ("option", "R@1", "difference", "seeds")


class Run(NamedTuple):
    """One run of the comparison: the name of the option, the share of wrong pairs, the seed."""

    option: str
    wrong: float
    seed: int


@dataclass(frozen=True)
class ObjectiveTraining:
    """What `train` asks for: the loss of a batch, by an objective and, where it needs one, its teacher; the schedule
    of its steps.
    """

    model: GridModel
    objective: Any
    teacher: Teacher | None
    learning_rate: float
    warmup: int

    def losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        if self.teacher is not None:  # which follows the step before
            self.teacher.on_step_end(None, None, None, model=self.model)
        labels = torch.full_like(batch["input_ids"], IGNORED_LABEL)
        inputs = {**batch, "labels": labels, "return_loss": True}
        contrastive_batch = self.model(**inputs, return_contrastive_batch=True).contrastive_batch
        teacher = None if self.teacher is None else self.teacher.embed([inputs])
        return {"contrastive_loss": self.objective(contrastive_batch, teacher)}


def build_model(setting: Setting, seed: int, logit_bias: float | None) -> GridModel:
    """The vision tower of the checkpoint, and a new language model, projections and one [EMB] vector."""
    changes = {} if logit_bias is None else {"logit_bias_init_value": logit_bias}
    model = GridModel.from_pretrained(setting.checkpoint, attn_implementation="eager")
    set_seed(seed)
    model.set_embedding_tokens(1, "mean")
    fresh = GridModel(type(model.config)(**{**model.config.to_dict(), **changes}))
    kept = {
        name: value
        for name, value in model.state_dict().items()
        if name.startswith(("vision_tower", "pool_aggregator"))
    }
    fresh.load_state_dict(kept, strict=False)
    return fresh


def with_wrong_pairs(batch: Batch, share: float) -> Batch:
    """The batch, in which the first texts describe each other's images."""
    count = int(share * len(batch["input_ids"]))
    image_index = batch["image_index"].clone()
    image_index[:count] = image_index[:count].roll(1)
    return {**batch, "image_index": image_index}


def execute(run: Run, setting: Setting, out: Path) -> dict:
    """Trains and measures one run.

    Returns:
        Its line: the fields of the run, and `recall`, recall@1 of all held-out captions among the images.
    """
    options = OPTIONS[run.option]
    batches = prepare_batches(setting, run.seed, out / f"seed-{run.seed}.pt")["match"]
    model = build_model(setting, run.seed, -10.0 if options.get("loss") == "sigmoid" else None)
    _, processor = load_checkpoint(setting.checkpoint, "cpu")
    objective = build_objective(**options)
    teacher = Teacher(model, processor, **objective.teacher) if objective.teacher else None
    training = ObjectiveTraining(model, objective, teacher, setting.match.learning_rate, len(batches) // 10)
    title = f"{run.option}, {run.wrong}, seed {run.seed}"
    train(training, [with_wrong_pairs(batch, run.wrong) for batch in batches], training, title, bf16=False)
    held_out = prepare_held_out(setting, out / "held-out.pt")
    with inference(model):
        images = model.get_image_features(held_out.grids).pooler_output  # (I, D)
    return run._asdict() | {"recall": caption_recall(model, processor, held_out, images)}


def run_all(setting: Setting, out: Path, wrong: float) -> list[dict]:
    """The runs that are left, one after the other.

    Returns:
        The lines of all runs.

    Raises:
        ValueError: As `finished_runs`.
    """
    finished = finished_runs(out, setting, Run)
    runs = [Run(option, wrong, seed) for seed in range(setting.seeds) for option in OPTIONS]
    for run in runs:
        if run not in finished:
            finished[run] = write_line(out, execute(run, setting, out))
    return [finished[run] for run in runs]


def report(lines: Sequence[Mapping]) -> str:
    """Markdown: means over the seeds with half the width of their 95% intervals, by Student's t."""
    recalls = {(line["option"], line["seed"]): line["recall"] for line in lines}
    seeds, rows = sorted({line["seed"] for line in lines}), []
    plain = [recalls[PLAIN, seed] for seed in seeds]
    for option in OPTIONS:
        own = [recalls[option, seed] for seed in seeds]
        gains = [after - before for after, before in zip(own, plain, strict=True)]
        difference = "" if option == PLAIN else f"{mean(gains):+.3f} ± {interval(gains):.3f}"
        rows.append((option, f"{mean(own):.3f} ± {interval(own):.3f}", difference, len(seeds)))
    return markdown_table(HEADER, rows)


def main(
    out: Annotated[Path, typer.Option(help="Folder of the runs.")],
    checkpoint: Annotated[str, typer.Option(help="Checkpoint whose towers all runs start from.")] = str(CHECKPOINT),
    seeds: Annotated[int, typer.Option(min=2, help="Seeds of each run.")] = 3,
    pairs: Annotated[int, typer.Option(min=32, help="Pairs of a caption and an image, a multiple of 32.")] = 2048,
    held_out: Annotated[int, typer.Option(min=10, help="Scenes to measure on.")] = 300,
    wrong: Annotated[float, typer.Option(min=0, max=1, help="Share of the pairs that are wrong.")] = 0.25,
):
    match = Stage(32, 1e-3, {"captions_per_image": 1})
    compress = Stage(1, 0.0, {"memory_captions_per_image": 1})  # is not trained here
    setting = Setting(checkpoint, (1,), seeds, (pairs,), 1, held_out, 5, compress, match)
    table = report(run_all(setting, out, wrong))
    print(machine_facts(), table, sep="\n\n")


if __name__ == "__main__":
    typer.run(main)
