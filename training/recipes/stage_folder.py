"""Where a stage leaves its model, and where the next one takes it from."""

import shutil
from pathlib import Path

from accelerate import PartialState
from peft import PeftModel
from transformers import set_seed

from mmgem.modeling_mmgem import MMGEMModel
from mmgem.processing.processing_mmgem import MMGEMProcessor
from mmgem.training.data.mixture import Mixture
from mmgem.training.json_text import write_json
from mmgem.training.loading import load_checkpoint
from mmgem.training.recipes.recipe import Recipe, Stage
from mmgem.training.recipes.stage_kinds import stage_kind
from mmgem.training.recipes.starting_model import build_model, prepare_for_stage
from mmgem.training.trainer.checkpoints import mark_complete
from mmgem.training.trainer.trainer import MMGEMTrainer

LOG_NAME = "training_log.json"


def stage_folder(out: Path, stage: Stage) -> Path:
    """Return the folder in which a stage leaves its model."""
    return out / "stages" / stage.name


def starting_point(recipe: Recipe, number: int, out: Path, rows: Mixture) -> tuple[MMGEMModel, MMGEMProcessor]:
    """Load or build the model and processor that a stage begins with, on the CPU; the same in every call.

    Args:
        recipe: The recipe.
        number: The number of the stage, from 0 on.
        out: The folder of the run.
        rows: The training data of the stage.
    """
    if number:
        return load_checkpoint(stage_folder(out, recipe.stages[number - 1]), device="cpu")
    set_seed(recipe.seed)
    return build_model(recipe, rows)


def save_stage(trainer: MMGEMTrainer, recipe: Recipe, number: int, out: Path) -> None:
    """Save the plain model of a trained stage in its folder, which appears under its name only once it is whole.

    With LoRA, the adapter lies in its `adapter`. Every process of a distributed run calls this.

    Args:
        trainer: The trainer of the stage, after training.
        recipe: The recipe.
        number: The number of the stage, from 0 on.
        out: The folder of the run.
    """
    stage, state = recipe.stages[number], PartialState()
    kind, folder = stage_kind(stage), stage_folder(out, stage)
    partial = folder.with_name(f"{folder.name}.partial")
    if state.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    state.wait_for_everyone()
    has_lora = isinstance(trainer.accelerator.unwrap_model(trainer.model), PeftModel)
    is_plain = not has_lora and kind.model_class is MMGEMModel
    trained = partial if is_plain else partial / ("adapter" if has_lora else "trained")
    if trainer.is_fsdp_enabled:  # whose checkpoints may be in shards
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(trained))
    if state.is_main_process:
        if has_lora:
            model, processor = starting_point(recipe, number, out, trainer.train_dataset)
            prepare_for_stage(model, processor, recipe, stage)
            kind.released(PeftModel.from_pretrained(kind.extended(model), trained)).save_pretrained(partial)
        elif not is_plain:
            kind.released(kind.model_class.from_pretrained(trained)).save_pretrained(partial)
            shutil.rmtree(trained)
        if not is_plain:
            trainer.processing_class.save_pretrained(partial)
        write_json(partial / LOG_NAME, [{"stage": stage.name} | entry for entry in trainer.state.log_history])
    mark_complete(partial)
    if state.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)  # one that somebody took files from
        partial.rename(folder)
    state.wait_for_everyone()
