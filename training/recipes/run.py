"""A run of a recipe: stage after stage, each from where the one before it ended."""

import gc
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from peft import PeftModel
from transformers import set_seed

from mmgem.modeling_mmgem import MMGEMModel
from mmgem.processing.processing_mmgem import MMGEMProcessor
from mmgem.processing.sentence_transformers_export import save_sentence_transformer
from mmgem.training.data.mixture import Mixture
from mmgem.training.data.open_source import load_rows
from mmgem.training.data.skipped import SkippedLog
from mmgem.training.evaluation.evaluate import evaluate_model
from mmgem.training.loading import load_checkpoint
from mmgem.training.recipes.model_card import write_model_card
from mmgem.training.recipes.recipe import first_difference, load_recipe, stage_number
from mmgem.training.recipes.stage import open_sources, plain_model, stage_arguments, stage_rows, stage_trainer
from mmgem.training.recipes.starting_model import build_model, check_stages, prepare_for_stage
from mmgem.training.reconstruction.model import MMGEMForReconstruction
from mmgem.training.trainer.arguments import MMGEMTrainingArguments
from mmgem.training.trainer.checkpoints import is_complete, last_complete_checkpoint, mark_complete
from mmgem.training.trainer.trainer import MMGEMTrainer

RECIPE_NAME = "recipe.yaml"
LOG_NAME = "training_log.json"
RESULTS_NAME = "results.json"
SKIPPED_NAME = "skipped.jsonl"


@dataclass
class TrainingReport:
    """
    What a run came to.

    Args:
        model: folder of the trained model.
        metrics: of the final evaluation; empty without `eval_data`, or where the last stage was not run.
        skipped: for each source, how many rows and shards could not be read.
    """

    model: Path
    metrics: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)


def train(
    recipe_path: str | Path, out: str | Path, stage: str | int | None = None, resume: bool = False
) -> TrainingReport:
    """
    Train as a recipe says, and leave a complete Hub folder: weights, remote code, processor, sentence-transformers
    files, card, the recipe, the results and the log of the run.

    Stage after stage: each begins from the folder `stages/NAME` in which the one before it ended, a checkpoint that
    loads like any other (LoRA is merged into it; the adapter lies in its `adapter`). The optimizer starts anew in
    each. In a distributed run every process calls this, with `out` on a disk that they share.

    Args:
        recipe_path: see [`mmgem.training.recipes.recipe.load_recipe`].
        out: folder for the result; `checkpoints/NAME` holds what is needed to resume within a stage.
        stage: name, or number from 1 on, of the only stage to run.
        resume: go on from the last whole checkpoint in `out`. The rows that were trained on are not read again.

    Raises:
        FileNotFoundError, TypeError, ValueError: for a recipe or data that cannot be used; if `out` belongs to another
            recipe; if the stage before `stage` has not ended.
        FileExistsError: if there is something to resume in `out`, but that is not asked for.
    """
    recipe, out = load_recipe(recipe_path), Path(out)
    stages = recipe["stages"]
    numbers = list(range(len(stages))) if stage is None else [stage_number(recipe, stage)]
    check_stages(recipe)
    # All of them first: values out of range should not stop a run halfway.
    arguments = [stage_arguments(recipe, number, out) for number in range(len(stages))]
    has_results = (out / RESULTS_NAME).is_file()
    _claim(out, recipe_path, recipe, numbers, resume)

    eval_dataset = load_rows(recipe["eval_data"]) if "eval_data" in recipe else None
    unfinished = [number for number in numbers if not is_complete(stage_folder(out, stages[number]))]
    for number in unfinished:
        _run_stage(recipe, number, out, eval_dataset)
    report = TrainingReport(stage_folder(out, stages[numbers[-1]]))
    if numbers[-1] == len(stages) - 1:
        report.model = out
        if unfinished or not has_results:
            _finish(recipe, out, arguments[-1], eval_dataset)
        report.metrics = json.loads((out / RESULTS_NAME).read_text(encoding="utf-8"))
    report.skipped = SkippedLog(out / SKIPPED_NAME).counts()
    return report


def stage_folder(out: Path, stage: Mapping[str, Any]) -> Path:
    """Where a stage leaves its model."""
    return out / "stages" / stage["name"]


def starting_point(
    recipe: Mapping[str, Any], number: int, out: Path, rows: Mixture
) -> tuple[MMGEMModel, MMGEMProcessor]:
    """
    Model and processor that a stage begins with, on the CPU; the same whenever it is asked for.

    Args:
        recipe, number, out: as for `stage_arguments`.
        rows: training data of the stage.
    """
    if number:
        return load_checkpoint(stage_folder(out, recipe["stages"][number - 1]), device="cpu")
    set_seed(recipe.get("seed", 0))
    return build_model(recipe, rows)


def _claim(out: Path, recipe_path: str | Path, recipe: Mapping[str, Any], numbers: list[int], resume: bool) -> None:
    """Make sure that what is in `out` may be gone on with, and keep the recipe there."""
    stages, kept = recipe["stages"], out / RECIPE_NAME
    has_begun = any(any((out / name).glob("*/*")) for name in ("checkpoints", "stages"))
    if has_begun and kept.is_file() and (difference := first_difference(load_recipe(kept), recipe)):
        raise ValueError(f"`out` is {str(out)!r}, a run of another recipe: {difference}. Expected another folder.")
    for number in numbers:
        folders = (stage_folder(out, stages[number]), out / "checkpoints" / stages[number]["name"])
        if not resume and any(any(folder.glob("*")) for folder in folders):
            raise FileExistsError(
                f"`out` is {str(out)!r}, which holds stage `{stages[number]['name']}`; resume, or choose another "
                "folder."
            )
    if numbers[0] and not is_complete(stage_folder(out, stages[numbers[0] - 1])):
        raise FileNotFoundError(
            f"stage `{stages[numbers[0]]['name']}` begins where `{stages[numbers[0] - 1]['name']}` ends, but that has "
            f"not ended in {str(out)!r}; run it first."
        )
    if PartialState().is_main_process and not has_begun:
        out.mkdir(parents=True, exist_ok=True)
        partial = kept.with_name(f"{kept.name}.partial")
        partial.write_bytes(Path(recipe_path).read_bytes())
        partial.replace(kept)
    PartialState().wait_for_everyone()  # until all have looked at `out`


def _run_stage(recipe: Mapping[str, Any], number: int, out: Path, eval_dataset) -> None:
    """Train one stage, from its last whole checkpoint if there is one, and leave its folder."""
    arguments = stage_arguments(recipe, number, out)
    stage, skipped = recipe["stages"][number], SkippedLog(out / SKIPPED_NAME)
    rows = stage_rows(stage, open_sources(stage), arguments, arguments.seed + number, skipped)
    model, processor = starting_point(recipe, number, out, rows)
    trainer = stage_trainer(recipe, number, model, processor, arguments, rows, eval_dataset)
    # All rows of the stage are one epoch, so after its last step the Trainer finds nothing left to do.
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(arguments.output_dir))
    _save_stage(trainer, recipe, number, out)
    trainer.accelerator.free_memory()
    del trainer, model
    gc.collect()


def _save_stage(trainer: MMGEMTrainer, recipe: Mapping[str, Any], number: int, out: Path) -> None:
    """Leave the model of a stage in its folder, which appears under its name only once it is whole."""
    stage, state = recipe["stages"][number], PartialState()
    folder = stage_folder(out, stage)
    partial = folder.with_name(f"{folder.name}.partial")
    if state.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    state.wait_for_everyone()
    # What trains may be no model of its own, or more than one, from which the model is then made.
    has_lora = isinstance(trainer.accelerator.unwrap_model(trainer.model), PeftModel)
    trained = partial / "adapter" if has_lora else partial / "trained" if "reconstruction" in stage else partial
    if trainer.is_fsdp_enabled:  # whose checkpoints may be in shards
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(trained))
    if state.is_main_process:
        if has_lora:
            model, processor = starting_point(recipe, number, out, trainer.train_dataset)
            prepare_for_stage(model, processor, recipe, stage)
            model = MMGEMForReconstruction.from_model(model) if "reconstruction" in stage else model
            plain_model(PeftModel.from_pretrained(model, trained)).save_pretrained(partial)
            processor.save_pretrained(partial)
        elif "reconstruction" in stage:
            plain_model(MMGEMForReconstruction.from_pretrained(trained)).save_pretrained(partial)
            trainer.processing_class.save_pretrained(partial)
            shutil.rmtree(trained)
        _write_json(partial / LOG_NAME, [{"stage": stage["name"]} | entry for entry in trainer.state.log_history])
    mark_complete(partial)
    if state.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)  # one that somebody took files from
        partial.rename(folder)
    state.wait_for_everyone()


def _finish(recipe: Mapping[str, Any], out: Path, arguments: MMGEMTrainingArguments, eval_dataset) -> None:
    """Evaluate the model of the last stage and make `out` its Hub folder."""
    folders = [stage_folder(out, stage) for stage in recipe["stages"]]
    model, processor = load_checkpoint(folders[-1], device=arguments.device)
    if "attn_implementation" in recipe["model"]:
        model.set_attn_implementation(recipe["model"]["attn_implementation"])
    metrics: dict[str, float] = {}
    if eval_dataset is not None:
        metrics = evaluate_model(model, processor, eval_dataset, batch_size=arguments.per_device_eval_batch_size)
    if PartialState().is_main_process:
        logs = [json.loads((folder / LOG_NAME).read_text(encoding="utf-8")) for folder in folders]
        log_history = [entry for log in logs for entry in log]
        save_sentence_transformer(model, processor, out)
        _write_json(out / LOG_NAME, log_history)
        write_model_card(out, model, recipe, metrics, log_history)
        _write_json(out / RESULTS_NAME, metrics)
    PartialState().wait_for_everyone()


def _write_json(path: Path, content: Mapping | list) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
