"""A dry run of a recipe: its rows, its batches and one step of each stage, before hours are spent on it."""

import shutil
import time
from collections.abc import Callable, Sequence, Sized
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, TrainerCallback, set_seed

from mmgem.training.data.mixture import Mixture
from mmgem.training.data.skipped import SkippedLog
from mmgem.training.data.sources import Source
from mmgem.training.output_lock import one_writer
from mmgem.training.printable import counted
from mmgem.training.recipes.batch_preview import contact_sheet, describe_row, describe_texts, image_pixels
from mmgem.training.recipes.check_report import StageCheck, describe_check, describe_model
from mmgem.training.recipes.recipe import Stage, load_recipe
from mmgem.training.recipes.run import SKIPPED_NAME
from mmgem.training.recipes.stage import (
    eval_rows,
    open_sources,
    rows_per_step,
    stage_arguments,
    stage_rows,
    stage_trainer,
    warn_of_languages,
)
from mmgem.training.recipes.stage_kinds import stage_kind
from mmgem.training.recipes.starting_model import build_model
from mmgem.training.recipes.step_memory import SavedTensors, step_memory
from mmgem.training.recipes.validation import check_sections, check_stages
from mmgem.training.trainer.arguments import MMGEMTrainingArguments
from mmgem.training.trainer.latent_alignment import LATENT_OPTIONS
from mmgem.training.trainer.parameter_selection import set_trainable
from mmgem.training.trainer.trainer import MMGEMTrainer

ROWS_SHOWN = 2  # of each source
ROWS_READ, TEXTS_READ = 32, 1000  # of each source, to find those that a run would leave out
# One step as in training, on one process, that leaves nothing on the disk.
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


@one_writer
def check_recipe(
    recipe_path: str | Path,
    out: str | Path,
    stage: str | int | None = None,
    say: Callable[[str], object] = print,
) -> list[StageCheck]:
    """Read some rows of every source, show them as the model will see them, and take one step of every stage on a
    batch of full size. Nothing is written but the folder `check` in `out`.

    Every stage is tried on the model that the recipe starts from, since the models that the stages before it will
    leave are not known yet.

    Args:
        recipe_path: See [`mmgem.training.recipes.recipe.load_recipe`].
        out: The folder of the run to be.
        stage: The name, or the number from 1 on, of the only stage to check.
        say: Is called with each line to show, as soon as it is known.

    Raises:
        FileNotFoundError: If the recipe, its data or its model is not there.
        TypeError: If rows of the data have values of a wrong type.
        ValueError: If the recipe or its data cannot be used.
        FloatingPointError: If a loss is no finite number.
        MemoryError: If a step does not fit; it says what to lower.
    """
    recipe, out = load_recipe(recipe_path), Path(out)
    stages = recipe.stages
    numbers = range(len(stages)) if stage is None else [recipe.stage_number(stage)]
    check_sections(recipe)
    check_stages(recipe)
    planned = [stage_arguments(recipe, each, out) for each in stages]
    folder = out / "check"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    measured = eval_rows(recipe)
    if measured is not None:
        count = counted(len(measured), "row") if isinstance(measured, Sized) else "a stream of rows"
        say(f"eval_data: {count} with {', '.join(next(iter(measured)))}")

    skipped = SkippedLog(folder / SKIPPED_NAME)
    rows = None
    if recipe.model.reads_data:
        rows = stage_rows(stages[0], open_sources(stages[0]), planned[0], planned[0].seed, skipped)
    set_seed(recipe.seed)
    model, processor = build_model(recipe, rows)
    checks = []
    for number in numbers:
        this, sources = stages[number], open_sources(stages[number])
        rows = stage_rows(this, sources, planned[number], planned[number].seed + number, skipped)
        set_trainable(model)  # whatever the stage before it froze
        arguments = stage_arguments(recipe, this, out, output_dir=str(folder), **_DRY_RUN | _without_latents(this))
        warn_of_languages(processor.tokenizer, sources)
        trainer = stage_trainer(recipe, this, model, processor, arguments, rows)
        say(f"\nstage {number + 1} of {len(stages)}: {this.name}")
        say(describe_model(trainer.model))
        images = _show_rows(this, trainer, sources, skipped, folder / f"{number + 1}-{this.name}.png", say)
        checks.append(_take_step(trainer, this.name, planned[number], images, skipped))
        for line in describe_check(checks[-1]):
            say(line)
        model = stage_kind(this).released(trainer.accelerator.unwrap_model(trainer.model))
        trainer.accelerator.free_memory()
    return checks


def _without_latents(stage: Stage) -> dict[str, Any]:
    """Arguments without the options that ask for cached features, which a dry run does not compute."""
    if not any(name in stage.options for name in LATENT_OPTIONS):
        return {}
    options = {name: value for name, value in stage.options.items() if name not in LATENT_OPTIONS}
    return {"contrastive_objective": options}


def _show_rows(
    stage: Stage,
    trainer: MMGEMTrainer,
    sources: Sequence[Source],
    skipped: SkippedLog,
    sheet: Path,
    say: Callable[[str], object],
) -> Path | None:
    """Say what some rows of each source hold and what the model gets of them; draw their images."""
    rows: list[dict[str, Any]] = []
    for source in sources:
        say(f"  source {source.name}: {counted(len(source), 'row') if isinstance(source, Sized) else 'a stream'}")
        sample = Mixture([source], None, trainer.args.seed, ROWS_SHOWN, skipped)
        rows += [sample[position] for position in range(ROWS_SHOWN)]
        _read_ahead(source, trainer, skipped)
        for row in rows[-ROWS_SHOWN:]:
            say(f"    {describe_row(row)}")
    preview = stage_kind(stage).preview(trainer.data_collator(rows))
    say(f"  what the model gets of them; {preview.legend}")
    for line in describe_texts(preview, trainer.processing_class):
        say(f"    {line}")
    images = contact_sheet(preview, trainer.processing_class)
    if images is None:
        return None
    images.save(sheet)
    height, width = image_pixels(preview.batch, 0).shape[1:]
    tokens = trainer.processing_class.num_visual_tokens
    say(f"  images of {width} x {height} pixels, {tokens} visual tokens for each of them and for each box: {sheet}")
    return sheet


def _read_ahead(source: Source, trainer: MMGEMTrainer, skipped: SkippedLog) -> None:
    """Note the rows of a source that a run would leave out: some with their images, and more without."""
    is_sized = isinstance(source, Sized)
    count = min(len(source), TEXTS_READ) if is_sized else ROWS_READ
    sample = Mixture([source], None, trainer.args.seed, max(1, count), skipped)
    sample.check = trainer.data_collator.check
    for position in range(len(sample)):
        _ = sample[position] if position < ROWS_READ else sample.texts(position)


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


class _StopWatch(TrainerCallback):
    """The seconds of the last step."""

    seconds = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds = time.perf_counter() - self._start
