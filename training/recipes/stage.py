"""One stage of a recipe: its arguments, its data in their order, its trainer."""

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import set_seed

from mmgem.modeling_mmgem import MMGEMModel
from mmgem.processing.processing_mmgem import MMGEMProcessor
from mmgem.training.data.collator import MMGEMCollator
from mmgem.training.data.mixture import Mixture
from mmgem.training.data.open_source import open_source
from mmgem.training.data.skipped import SkippedLog
from mmgem.training.data.sources import Source
from mmgem.training.recipes.starting_model import prepare_for_stage
from mmgem.training.reconstruction.masking import Reconstruction
from mmgem.training.reconstruction.model import MMGEMForReconstruction
from mmgem.training.reconstruction.trainer import ReconstructionTrainer
from mmgem.training.trainer.arguments import MMGEMTrainingArguments
from mmgem.training.trainer.lora import merge_lora
from mmgem.training.trainer.trainer import MMGEMTrainer


def stage_arguments(recipe: Mapping[str, Any], number: int, out: Path, **changes) -> MMGEMTrainingArguments:
    """
    The arguments of the trainer for one stage.

    Args:
        recipe: from `load_recipe`.
        number: of the stage, from 0 on.
        out: folder of the run.
        changes: arguments that matter more than those of the recipe.

    Raises:
        ValueError: for values that `MMGEMTrainingArguments` refuses.
    """
    stage = recipe["stages"][number]
    arguments: dict[str, Any] = {
        "seed": recipe.get("seed", 0),
        "report_to": "none",
        "disable_tqdm": False,
        "use_cpu": not torch.accelerator.is_available(),  # bf16 on a CPU has to be asked for
        **copy.deepcopy(stage["training"]),  # some of whose mappings the arguments change
        "output_dir": str(out / "checkpoints" / stage["name"]),
        "contrastive_objective": stage.get("objective"),
        "train_sampling_strategy": "sequential",  # the mixture is shuffled already
        **changes,
    }
    if "reconstruction" in stage:
        arguments["contrastive_loss_weight"] = 0.0  # nothing is compared, so a batch of 1 will do
    try:
        return MMGEMTrainingArguments(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`training` of stage `{stage['name']}`: {error}") from error


def open_sources(stage: Mapping[str, Any]) -> list[Source]:
    """The sources of a stage's training data."""
    sections = stage["train_data"]
    return [open_source(section) for section in (sections if isinstance(sections, list) else [sections])]


def stage_rows(
    stage: Mapping[str, Any],
    sources: Sequence[Source],
    arguments: MMGEMTrainingArguments,
    seed: int,
    skipped: SkippedLog,
) -> Mixture:
    """
    The training data of a stage, in the order in which it is trained, first to last.

    Args:
        stage: of the recipe.
        sources: its own.
        arguments: its own; `max_steps` is set to the steps of the stage.
        seed: of the order.
        skipped: where to note what cannot be read.

    Raises:
        ValueError: without `max_steps`, where a source is a stream.
    """
    sections = stage["train_data"]
    weights = [section.get("weight", 1) for section in sections] if isinstance(sections, list) else None
    arguments.max_steps = _steps_of(arguments, sources)
    return Mixture(sources, weights, seed, arguments.max_steps * rows_per_step(arguments), skipped)


def rows_per_step(arguments: MMGEMTrainingArguments) -> int:
    """Rows of an optimizer step, over all processes."""
    return arguments.train_batch_size * arguments.world_size * arguments.gradient_accumulation_steps


def stage_trainer(
    recipe: Mapping[str, Any],
    number: int,
    model: MMGEMModel,
    processor: MMGEMProcessor,
    arguments: MMGEMTrainingArguments,
    train_dataset,
    eval_dataset=None,
) -> MMGEMTrainer:
    """The trainer of one stage, with its model and processor set for it."""
    stage = recipe["stages"][number]
    set_seed(arguments.seed)  # for LoRA, which starts at random
    prepare_for_stage(model, processor, recipe, stage)
    trainer_class, options = MMGEMTrainer, {}
    if "reconstruction" in stage:
        trainer_class, options = ReconstructionTrainer, {"options": Reconstruction(**stage["reconstruction"])}
    return trainer_class(
        model,
        arguments,
        processing_class=processor,
        data_collator=MMGEMCollator(
            processor,
            prompts=model.config.prompts,
            **stage.get("collator", {}),
        ),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        **options,
    )


def plain_model(model: nn.Module) -> MMGEMModel:
    """What a stage has trained as a model like any other: LoRA merged, without a head for reconstruction."""
    model = merge_lora(model) if isinstance(model, PeftModel) else model
    return model.released() if isinstance(model, MMGEMForReconstruction) else model


def _steps_of(arguments: MMGEMTrainingArguments, sources: Sequence) -> int:
    """Optimizer steps of a stage: `max_steps`, or `num_train_epochs` times those that the rows of its sources make."""
    if arguments.max_steps > 0:
        return arguments.max_steps
    try:
        rows = sum(len(source) for source in sources)
    except TypeError as error:
        raise ValueError(f"a stream has no length ({error}); expected `max_steps` in `training`.") from error
    return max(1, math.ceil(rows * arguments.num_train_epochs / rows_per_step(arguments)))
