"""Whether data keeps up with training: scenes, drawn and collated on the fly, beside the steps of mmgem-tiny.

    python -m benchmarks.data_loading

Prints, for each stage of the recipe of mmgem-tiny, the rows per second that its loader alone gives, the rows per
second that its training step takes, and the share of a real run's time that is spent waiting for data. A row is an
image with its texts and boxes.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from transformers import PrinterCallback, TrainerCallback

from benchmarks.measure import machine_facts, markdown_table
from mmgem.training.data.skipped import SkippedLog
from mmgem.training.loading import load_checkpoint
from mmgem.training.recipes.recipe import Recipe, load_recipe
from mmgem.training.recipes.stage import open_sources, stage_arguments, stage_rows, stage_trainer
from mmgem.training.trainer.trainer import MMGEMTrainer

CHECKPOINT = Path(__file__).parents[1] / "model_cards" / "mmgem-tiny"
WARM_UP_STEPS = 2
HEADER = ("stage", "loader alone, rows/s", "training steps, rows/s", "loader / steps", "time waiting for data")


class StepClock(TrainerCallback):
    """Seconds that each step of a training run takes, and seconds that it waits for its batch."""

    def __init__(self):
        self.steps: list[float] = []
        self.waits: list[float] = []
        self._last = time.perf_counter()

    def on_step_begin(self, args, state, control, **kwargs):
        self.waits.append(self._tick())

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(self._tick())

    def _tick(self) -> float:
        last, self._last = self._last, time.perf_counter()
        return self._last - last


def build_trainer(recipe: Recipe, number: int, folder: Path, num_steps: int, **changes) -> MMGEMTrainer:
    """The trainer that the recipe describes for a stage, at the published weights."""
    stage = recipe.stages[number]
    arguments = stage_arguments(
        recipe, stage, folder, max_steps=num_steps, save_strategy="no", disable_tqdm=True, **changes
    )
    rows = stage_rows(stage, open_sources(stage), arguments, arguments.seed + number, SkippedLog())
    model, processor = load_checkpoint(CHECKPOINT, device="cpu")
    return stage_trainer(recipe, stage, model, processor, arguments, rows)


def loader_rate(trainer: MMGEMTrainer) -> float:
    """Rows per second of the loader of a trainer; the first batch, for which a worker starts, is left out."""
    batches = iter(trainer.get_train_dataloader())
    next(batches)
    start = time.perf_counter()
    rows = sum(len(batch["pixel_values"]) for batch in batches)
    return rows / (time.perf_counter() - start)


def training_clock(trainer: MMGEMTrainer) -> StepClock:
    """Train, by the clock."""
    clock = StepClock()
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(clock)
    trainer.train()
    return clock


def compare(num_steps: int, **changes) -> str:
    """The table of the benchmark, as markdown.

    Args:
        num_steps: Trained, after those that warm up; the batches of all are read from the loader alone, too.
        changes: Of the training arguments.
    """
    recipe, rows = load_recipe(CHECKPOINT / "recipe.yaml"), []
    with tempfile.TemporaryDirectory() as folder:
        for number, stage in enumerate(recipe.stages):
            trainer = build_trainer(recipe, number, Path(folder), WARM_UP_STEPS + num_steps, **changes)
            loader, clock = loader_rate(trainer), training_clock(trainer)
            steps, waits = clock.steps[WARM_UP_STEPS:], clock.waits[WARM_UP_STEPS:]
            rate = trainer.args.train_batch_size / statistics.median(steps)
            waiting = sum(waits) / (sum(waits) + sum(steps))
            row = (f"{loader:.0f}", f"{rate:.0f}", f"{loader / rate:.1f}", f"{waiting:.1%}")
            rows.append((f"{stage.name}, {trainer.args.dataloader_num_workers} worker", *row))
    return markdown_table(HEADER, rows)


def main(
    steps: Annotated[int, typer.Option(help="Training steps, after two that warm up.")] = 10,
):
    print(machine_facts(), compare(steps), sep="\n\n")


if __name__ == "__main__":
    typer.run(main)
