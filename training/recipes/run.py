"""A run of a recipe: stage after stage, each from where the one before it ended."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from mmgem.processing.sentence_transformers_export import save_sentence_transformer
from mmgem.training.data.skipped import SkippedLog
from mmgem.training.data.sources import Source
from mmgem.training.evaluation.evaluate import evaluate_model
from mmgem.training.json_text import write_json
from mmgem.training.loading import load_checkpoint
from mmgem.training.output_folder import whole_file, whole_folder
from mmgem.training.output_lock import only_writer
from mmgem.training.recipes.model_card import write_model_card
from mmgem.training.recipes.recipe import Recipe, first_difference, load_recipe, read_yaml
from mmgem.training.recipes.stage import (
    cached_texts,
    cached_views,
    eval_rows,
    open_sources,
    stage_arguments,
    stage_rows,
    stage_trainer,
    warn_of_languages,
)
from mmgem.training.recipes.stage_folder import LOG_NAME, save_stage, stage_folder, starting_point
from mmgem.training.recipes.validation import check_sections, check_stages
from mmgem.training.trainer.arguments import MMGEMTrainingArguments
from mmgem.training.trainer.checkpoints import is_complete, last_complete_checkpoint
from mmgem.training.worker_memory import free_memory

RECIPE_NAME = "recipe.yaml"
RESULTS_NAME = "results.json"
SKIPPED_NAME = "skipped.jsonl"


@dataclass
class TrainingReport:
    """The result of a run.

    Args:
        model: The folder of the trained model.
        metrics: The figures of the final evaluation; empty without `eval_data`, or where the last stage was not run.
        skipped: For each source, how many rows and shards could not be read.
    """

    model: Path
    metrics: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)


def train(
    recipe_path: str | Path, out: str | Path, stage: str | int | None = None, resume: bool = False
) -> TrainingReport:
    """Train as a recipe says, and leave a complete Hub folder: weights, remote code, processor, sentence-transformers
    files, card, the recipe, the results and the log of the run.

    Stage after stage: each begins from the folder `stages/NAME` in which the one before it ended, a checkpoint that
    loads like any other (LoRA is merged into it; the adapter lies in its `adapter`). The optimizer starts anew in
    each. In a distributed run every process calls this, with `out` on a disk that they share.

    Args:
        recipe_path: See [`mmgem.training.recipes.recipe.load_recipe`].
        out: The folder for the result; `checkpoints/NAME` holds what is needed to resume within a stage.
        stage: The name, or the number from 1 on, of the only stage to run.
        resume: Whether to go on from the last whole checkpoint in `out`. Rows that were trained on are not read again.

    Raises:
        BlockingIOError: If another job writes `out`.
        FileNotFoundError: If the recipe, its data or its model is not there, or the stage before `stage` has not
            ended.
        TypeError: If rows of the data have values of a wrong type.
        ValueError: If the recipe or its data cannot be used, or `out` belongs to another recipe.
        FileExistsError: If there is something to resume in `out`, but that is not asked for.
    """
    with only_job(Path(out)):
        return _train(recipe_path, Path(out), stage, resume)


@contextmanager
def only_job(out: Path) -> Iterator[None]:
    """Holds the lock of `out` for all processes of this job, by the first of them."""
    refusal: Exception | None = None
    with ExitStack() as stack:
        if PartialState().is_main_process:
            try:
                stack.enter_context(only_writer(out))
            except (OSError, ValueError) as error:
                refusal = error
        [refusal] = broadcast_object_list([refusal])
        if refusal is not None:
            raise refusal
        yield


def _train(recipe_path: str | Path, out: Path, stage: str | int | None, resume: bool) -> TrainingReport:
    recipe = load_recipe(recipe_path)
    numbers = list(range(len(recipe.stages))) if stage is None else [recipe.stage_number(stage)]
    check_sections(recipe)
    check_stages(recipe)
    # All of them first: values out of range should not stop a run halfway.
    arguments = [stage_arguments(recipe, each, out) for each in recipe.stages]
    has_results = (out / RESULTS_NAME).is_file()
    _claim(out, recipe_path, recipe, numbers, resume)

    eval_dataset = eval_rows(recipe)
    unfinished = [number for number in numbers if not is_complete(stage_folder(out, recipe.stages[number]))]
    sources = [open_sources(recipe.stages[number]) for number in unfinished]  # of all, before the first is trained
    for number in unfinished:
        _run_stage(recipe, number, out, sources.pop(0), eval_dataset)
    report = TrainingReport(stage_folder(out, recipe.stages[numbers[-1]]))
    if numbers[-1] == len(recipe.stages) - 1:
        report.model = out
        if unfinished or not has_results:
            _finish(recipe, out, arguments[-1], eval_dataset)
        report.metrics = json.loads((out / RESULTS_NAME).read_text(encoding="utf-8"))
    report.skipped = SkippedLog(out / SKIPPED_NAME).counts()
    return report


def _claim(out: Path, recipe_path: str | Path, recipe: Recipe, numbers: list[int], resume: bool) -> None:
    """Make sure that what is in `out` may be gone on with, and keep the recipe there."""
    stages, kept = recipe.stages, out / RECIPE_NAME
    has_begun = any(any((out / name).glob("*/*")) for name in ("checkpoints", "stages"))
    if has_begun and kept.is_file() and (difference := first_difference(read_yaml(kept), read_yaml(recipe_path))):
        raise ValueError(f"`out` is {str(out)!r}, a run of another recipe: {difference}; expected another folder.")
    for number in numbers:
        folders = (stage_folder(out, stages[number]), out / "checkpoints" / stages[number].name)
        if not resume and any(any(folder.glob("*")) for folder in folders):
            raise FileExistsError(
                f"`out` is {str(out)!r}, which holds stage `{stages[number].name}`; expected `resume`, or another "
                "folder."
            )
    if numbers[0] and not is_complete(stage_folder(out, stages[numbers[0] - 1])):
        raise FileNotFoundError(
            f"stage `{stages[numbers[0]].name}` begins where `{stages[numbers[0] - 1].name}` ends, but that has not "
            f"ended in {str(out)!r}; expected it to be run first."
        )
    if PartialState().is_main_process and not has_begun:
        out.mkdir(parents=True, exist_ok=True)
        with whole_file(kept) as partial:
            partial.write_bytes(Path(recipe_path).read_bytes())
    PartialState().wait_for_everyone()  # until all have looked at `out`


def _run_stage(recipe: Recipe, number: int, out: Path, sources: list[Source], eval_dataset) -> None:
    """Train one stage, from its last whole checkpoint if there is one, and leave its folder."""
    stage, skipped = recipe.stages[number], SkippedLog(out / SKIPPED_NAME)
    arguments = stage_arguments(recipe, stage, out)
    rows = stage_rows(stage, sources, arguments, arguments.seed + number, skipped)
    model, processor = starting_point(recipe, number, out, rows)
    warn_of_languages(processor.tokenizer, sources)
    trainer = stage_trainer(recipe, stage, model, processor, arguments, rows, eval_dataset)
    if stage.cache_features is not None:
        folder = Path(stage.cache_features.folder or out / "feature_cache")
        trainer.data_collator.cached_views = cached_views(stage, model, trainer, sources, folder)
        if stage.cache_features.texts:
            trainer.data_collator.cached_texts = cached_texts(model, trainer, sources, folder)
    # All rows of the stage are one epoch, so after its last step the Trainer finds nothing left to do.
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(arguments.output_dir))
    save_stage(trainer, recipe, number, out)
    trainer.accelerator.free_memory()
    del trainer, model
    free_memory()


def _finish(recipe: Recipe, out: Path, arguments: MMGEMTrainingArguments, eval_dataset) -> None:
    """Evaluate the model of the last stage and make `out` its Hub folder."""
    folders = [stage_folder(out, stage) for stage in recipe.stages]
    model, processor = load_checkpoint(folders[-1], device=arguments.device)
    if recipe.model.attn_implementation is not None:
        model.set_attn_implementation(recipe.model.attn_implementation)
    metrics: dict[str, float] = {}
    if eval_dataset is not None:
        from mmgem.training.evaluation.scene_metrics import SCENE_JUDGE

        batch_size = arguments.per_device_eval_batch_size
        skipped = SkippedLog(out / SKIPPED_NAME, "eval_data")
        metrics = evaluate_model(
            model, processor, eval_dataset, batch_size=batch_size, caption_judge=SCENE_JUDGE, skipped=skipped
        )
    if PartialState().is_main_process:
        logs = [json.loads((folder / LOG_NAME).read_text(encoding="utf-8")) for folder in folders]
        log_history = [entry for log in logs for entry in log]
        with whole_folder(out) as folder:
            save_sentence_transformer(model, processor, folder)
        write_json(out / LOG_NAME, log_history)
        write_model_card(out, model, recipe, metrics, log_history)
        write_json(out / RESULTS_NAME, metrics)
    PartialState().wait_for_everyone()
