"""A dry run of a recipe: what is read, what the model sees of it, what a step takes, before hours are spent on it."""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, TrainerCallback, set_seed

from mmgem.training.data.mixture import Mixture
from mmgem.training.data.open_source import load_rows
from mmgem.training.data.skipped import SkippedLog
from mmgem.training.data.sources import Source
from mmgem.training.recipes.batch_preview import contact_sheet, describe_row, describe_texts
from mmgem.training.recipes.recipe import load_recipe, stage_number
from mmgem.training.recipes.run import SKIPPED_NAME
from mmgem.training.recipes.stage import (
    open_sources,
    plain_model,
    rows_per_step,
    stage_arguments,
    stage_rows,
    stage_trainer,
)
from mmgem.training.recipes.starting_model import build_model, check_stages
from mmgem.training.recipes.step_memory import SavedTensors, StepMemory, step_memory
from mmgem.training.trainer.arguments import MMGEMTrainingArguments
from mmgem.training.trainer.parameter_selection import own_name, set_trainable
from mmgem.training.trainer.trainer import MMGEMTrainer

ROWS_SHOWN = 2  # of each source
# One step as in training, on one process, that leaves nothing behind.
_DRY_RUN = {
    "max_steps": 1,
    "save_strategy": "no",
    "eval_strategy": "no",
    "load_best_model_at_end": False,
    "push_to_hub": False,
    "report_to": "none",
    "logging_strategy": "steps",
    "logging_steps": 1,
    "disable_tqdm": True,
    "fsdp": None,
    "deepspeed": None,
}


@dataclass
class StageCheck:
    """
    What a dry run found out about a stage, on one process.

    Args:
        name: of the stage.
        steps: optimizer steps of the whole stage.
        rows_per_step: rows of each.
        parameters, trained_parameters: how many.
        memory: of the step.
        seconds: that the step took; the first of a run, which is slower than those after it.
        losses: of the step, by name.
        images: file with the images as the model sees them; None where there are none.
        skipped: for each source, how many of the rows and shards met could not be read.
    """

    name: str
    steps: int
    rows_per_step: int
    parameters: int
    trained_parameters: int
    memory: StepMemory
    seconds: float
    losses: dict[str, float]
    images: Path | None
    skipped: dict[str, int]


def check_recipe(
    recipe_path: str | Path,
    out: str | Path,
    stage: str | int | None = None,
    say: Callable[[str], object] = print,
) -> list[StageCheck]:
    """
    Read some rows of every source, show them as the model will see them, and take one step of every stage on a batch
    of full size. Nothing is written but the folder `check` in `out`.

    Every stage is tried on the model that the recipe starts from, since what the stages before it make of it is not
    known yet.

    Args:
        recipe_path: see [`mmgem.training.recipes.recipe.load_recipe`].
        out: folder of the run to be.
        stage: name, or number from 1 on, of the only stage to check.
        say: is called with each line to show, as soon as it is known.

    Raises:
        FileNotFoundError, TypeError, ValueError: for a recipe or data that cannot be used.
        FloatingPointError: if a loss is no finite number.
        MemoryError: if a step does not fit; it says what to lower.
    """
    recipe, out = load_recipe(recipe_path), Path(out)
    check_stages(recipe)
    stages = recipe["stages"]
    numbers = range(len(stages)) if stage is None else [stage_number(recipe, stage)]
    planned = [stage_arguments(recipe, number, out) for number in range(len(stages))]
    folder = out / "check"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if "eval_data" in recipe:
        eval_rows = load_rows(recipe["eval_data"])
        count = f"{len(eval_rows):,} rows" if isinstance(eval_rows, Sized) else "a stream of rows"
        say(f"eval_data: {count} with {', '.join(next(iter(eval_rows)))}")

    skipped = SkippedLog(folder / SKIPPED_NAME)
    rows = None
    if "tokenizer" in recipe:
        rows = stage_rows(stages[0], open_sources(stages[0]), planned[0], planned[0].seed, skipped)
    set_seed(recipe.get("seed", 0))
    model, processor = build_model(recipe, rows)
    checks = []
    for number in numbers:
        this, sources = stages[number], open_sources(stages[number])
        rows = stage_rows(this, sources, planned[number], planned[number].seed + number, skipped)
        set_trainable(model)  # whatever the stage before it froze
        arguments = stage_arguments(recipe, number, out, output_dir=str(folder), **_DRY_RUN)
        trainer = stage_trainer(recipe, number, model, processor, arguments, rows)
        say(f"\nstage {number + 1} of {len(stages)}: {this['name']}")
        say(_describe_model(trainer))
        images = _show_rows(trainer, sources, skipped, folder / f"{number + 1}-{this['name']}.png", say)
        checks.append(_take_step(trainer, this["name"], planned[number], images, skipped))
        for line in _describe_check(checks[-1]):
            say(line)
        model = plain_model(trainer.accelerator.unwrap_model(trainer.model))
        trainer.accelerator.free_memory()
    return checks


def _describe_model(trainer: MMGEMTrainer) -> str:
    """What learns, and from images of what size."""
    parts: dict[str, list[int]] = {}  # parameters, and those of them that learn
    for name, parameter in trainer.model.named_parameters():
        if ".original_module." in name:  # of which LoRA trains a copy
            continue
        counts = parts.setdefault(own_name(name).partition(".")[0], [0, 0])
        counts[0] += parameter.numel()
        counts[1] += parameter.numel() if parameter.requires_grad else 0
    learning = [
        name if learned == count else f"{name} ({learned / count:.1%})"
        for name, (count, learned) in parts.items()
        if learned
    ]
    return f"  learns: {', '.join(learning)}; text attention {trainer.model.config.text_attention}"


def _show_rows(
    trainer: MMGEMTrainer, sources: Sequence[Source], skipped: SkippedLog, sheet: Path, say: Callable[[str], object]
) -> Path | None:
    """Say what some rows of each source hold and what the model gets of them; draw their images."""
    rows: list[dict[str, Any]] = []
    for source in sources:
        say(f"  source {source.name}: {f'{len(source):,} rows' if isinstance(source, Sized) else 'a stream'}")
        sample = Mixture([source], None, trainer.args.seed, ROWS_SHOWN, skipped)
        rows += [sample[position] for position in range(ROWS_SHOWN)]
        for row in rows[-ROWS_SHOWN:]:
            say(f"    {describe_row(row)}")
    batch = trainer.data_collator(rows)
    learned = (
        "[[what it puts back]]" if "text_mask" in batch else "[[what it learns to write]], each with an end token"
    )
    say(f"  what the model gets of them; {learned}")
    for line in describe_texts(batch, trainer.processing_class):
        say(f"    {line}")
    images = contact_sheet(batch, trainer.processing_class)
    if images is None:
        return None
    images.save(sheet)
    height, width = batch["pixel_values"].shape[2:]
    tokens = trainer.processing_class.num_visual_tokens
    say(f"  images of {width} x {height} pixels, {tokens} visual tokens for each of them and for each box: {sheet}")
    return sheet


def _take_step(
    trainer: MMGEMTrainer, name: str, planned: MMGEMTrainingArguments, images: Path | None, skipped: SkippedLog
) -> StageCheck:
    """Train one step and measure it."""
    watch = _StopWatch()
    trainer.add_callback(watch)
    trainer.remove_callback(PrinterCallback)
    model = trainer.accelerator.unwrap_model(trainer.model)
    saved = SavedTensors(model)
    with nullcontext() if planned.torch_compile else saved:  # which compiled graphs do without
        trainer.train()
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    copies = sum(parameter.nbytes for parameter in trainer.teacher.model.parameters()) if trainer.teacher else 0
    copies += 4 * trained if trainer.ema else 0
    log = next(entry for entry in trainer.state.log_history if "effective_batch_size" in entry)
    return StageCheck(
        name=name,
        steps=planned.max_steps,
        rows_per_step=rows_per_step(planned),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        trained_parameters=trained,
        memory=step_memory(model, trainer.optimizer, saved.peak, copies),
        seconds=watch.seconds,
        losses={name: log[name] for name, kind in trainer.FIGURES.items() if kind == "loss"},
        images=images,
        skipped=skipped.counts(),
    )


def _describe_check(check: StageCheck) -> Iterator[str]:
    memory = check.memory
    parts = ", ".join(f"{part} {_in_bytes(size)}" for part, size in asdict(memory).items() if size)
    per_row = _in_bytes(memory.activations // check.rows_per_step)
    yield f"  trains {check.trained_parameters:,} of {check.parameters:,} parameters"
    yield f"  memory: {parts} ({per_row} a row); {_in_bytes(memory.total)} in all, on each process"
    losses = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in check.losses.items())
    yield f"  one of {check.steps:,} steps, of {check.rows_per_step} rows: {losses}"
    yield f"  it took {check.seconds:.1f} s, as the first one; those after it are faster"
    if check.skipped:
        yield f"  could not be read so far: {', '.join(f'{n} of {source}' for source, n in check.skipped.items())}"


def _in_bytes(size: int) -> str:
    unit, name = next(
        (unit, name)
        for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))
        if size >= unit or unit == 1
    )
    return f"{size / unit:.1f} {name}"


class _StopWatch(TrainerCallback):
    """The seconds of the last step."""

    seconds = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds = time.perf_counter() - self._start
