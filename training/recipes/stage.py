"""One stage of a recipe: its arguments, its data in their order, its trainer."""

import copy
import hashlib
import json
import math
from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.utils.data import Dataset
from transformers import set_seed

from mmgem.modeling_mmgem import MMGEMModel
from mmgem.processing.processing_mmgem import MMGEMProcessor
from mmgem.training.data.collator import MMGEMCollator
from mmgem.training.data.feature_cache import (
    CachedViews,
    FeatureCache,
    MissingViews,
    check_frozen,
    feature_maker,
    fill,
)
from mmgem.training.data.mixture import Mixture
from mmgem.training.data.open_source import load_rows, open_source
from mmgem.training.data.skipped import SkippedLog, readable_texts
from mmgem.training.data.sources import Source
from mmgem.training.data.text_cache import CachedTexts, check_frozen_texts, fill_texts, text_maker
from mmgem.training.data.text_coverage import TEXTS_READ, warn_uncovered
from mmgem.training.recipes.recipe import Recipe, Stage
from mmgem.training.recipes.stage_kinds import stage_kind
from mmgem.training.recipes.starting_model import prepare_for_stage
from mmgem.training.trainer.arguments import MMGEMTrainingArguments
from mmgem.training.trainer.trainer import MMGEMTrainer


def stage_arguments(recipe: Recipe, stage: Stage, out: Path, **changes) -> MMGEMTrainingArguments:
    """Make the arguments of the trainer for one stage.

    Args:
        recipe: The recipe.
        stage: One of its stages.
        out: The folder of the run.
        changes: Arguments that matter more than those of the recipe.

    Raises:
        ValueError: If `MMGEMTrainingArguments` refuses a value.
    """
    arguments: dict[str, Any] = {
        "seed": recipe.seed,
        "report_to": "none",
        "disable_tqdm": False,
        "use_cpu": not torch.accelerator.is_available(),  # bf16 on a CPU has to be asked for
        **copy.deepcopy(dict(stage.training)),  # some of whose mappings the arguments change
        "output_dir": str(out / "checkpoints" / stage.name),
        "train_sampling_strategy": "sequential",  # the mixture is shuffled already
        **stage_kind(stage).arguments(),
        **changes,
    }
    try:
        return MMGEMTrainingArguments(**arguments)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"`training` of stage `{stage.name}`: {error}") from error


def open_sources(stage: Stage) -> list[Source]:
    """Open the sources of a stage's training data."""
    return [open_source(section) for section in stage.train_data]


def eval_rows(recipe: Recipe) -> Dataset | None:
    """Open the rows that the model is measured on, if there are any.

    Raises:
        ValueError: If they are fewer than two, of which one could not be found among others.
    """
    if recipe.eval_data is None:
        return None
    rows = load_rows(recipe.eval_data)
    if isinstance(rows, Sized) and len(rows) < 2:
        raise ValueError(f"`eval_data` has {len(rows)} row; expected 2 or more, to find one among others.")
    return rows


def warn_of_languages(tokenizer, sources: Sequence[Source]) -> None:
    """Warn of columns of sources with a length whose language a tokenizer does not cover, by rows from all over them.

    Args:
        tokenizer: The tokenizer of the model.
        sources: Of a stage, from `open_sources`.
    """
    if not PartialState().is_main_process:
        return
    for source in sources:
        if isinstance(source, Sized):
            places = range(0, len(source), max(1, len(source) // TEXTS_READ))
            warn_uncovered(tokenizer, readable_texts(source, places), source.name)


def stage_rows(
    stage: Stage, sources: Sequence[Source], arguments: MMGEMTrainingArguments, seed: int, skipped: SkippedLog
) -> Mixture:
    """Mix the training data of a stage, in the order in which it is trained, first to last.

    Args:
        stage: The stage.
        sources: Its sources, from `open_sources`.
        arguments: Its arguments; `max_steps` is set to the steps of the stage.
        seed: The seed of the order.
        skipped: Where to note what cannot be read.

    Raises:
        ValueError: If a source is a stream and there is no `max_steps`, or if all weights are 0.
    """
    weights = [section.get("weight", 1) for section in stage.train_data]
    arguments.max_steps = _steps_of(arguments, sources)
    return Mixture(sources, weights, seed, arguments.max_steps * rows_per_step(arguments), skipped)


def rows_per_step(arguments: MMGEMTrainingArguments) -> int:
    """Return the rows of an optimizer step, over all processes."""
    return arguments.train_batch_size * arguments.world_size * arguments.gradient_accumulation_steps


def stage_trainer(
    recipe: Recipe,
    stage: Stage,
    model: MMGEMModel,
    processor: MMGEMProcessor,
    arguments: MMGEMTrainingArguments,
    train_dataset,
    eval_dataset=None,
) -> MMGEMTrainer:
    """Build the trainer of one stage, with its model and processor set for it."""
    from mmgem.training.evaluation.scene_metrics import SCENE_JUDGE

    set_seed(arguments.seed)  # for LoRA, which starts at random
    prepare_for_stage(model, processor, recipe, stage)
    collator = MMGEMCollator(processor, prompts=model.config.prompts, **stage.collator)
    trainer = stage_kind(stage).trainer(model, arguments, processor, collator, train_dataset, eval_dataset)
    if isinstance(train_dataset, Mixture):
        train_dataset.check = collator.check
        for source in train_dataset.sources:
            source.shorter_side = collator.shorter_side
    trainer.caption_judge = SCENE_JUDGE  # which leaves what is not of scenes unjudged
    return trainer


def cached_views(
    stage: Stage, model: MMGEMModel, trainer: MMGEMTrainer, sources: Sequence[Source], folder: Path
) -> CachedViews:
    """Compute, once, the features that the frozen vision tower has of all images of a stage.

    Every process of a distributed run calls this, and computes its part.

    Args:
        stage: The stage, with `cache_features`.
        model: Its plain model, set for it.
        trainer: Its trainer.
        sources: Its sources.
        folder: Where features are kept, those of each tower and image processor in a folder of their own.

    Raises:
        ValueError: If there is a file of other features, or a damaged one; if a source is a stream.
    """
    assert stage.cache_features is not None
    check_frozen(model)
    collator, state, arguments = trainer.data_collator, PartialState(), trainer.args
    image_processor, grid = collator.processor.image_processor, model.config.grid
    cache = _open_cache(folder, feature_maker(model.vision_tower, image_processor))
    views = CachedViews(cache, stage.cache_features.views, collator.augmentation_of_images, grid)
    missing = MissingViews(views, sources, image_processor, state.process_index, state.num_processes)
    batch_size, num_workers = arguments.per_device_eval_batch_size, arguments.dataloader_num_workers
    fill(cache, model.vision_tower, grid, missing, arguments.device, batch_size, num_workers)
    state.wait_for_everyone()
    cache.refresh()
    return views


def cached_texts(model: MMGEMModel, trainer: MMGEMTrainer, sources: Sequence[Source], folder: Path) -> CachedTexts:
    """Compute, once, the states that the frozen language model has after all texts of a stage.

    Every process of a distributed run calls this, and computes its part.

    Args:
        model: The plain model of the stage, set for it.
        trainer: Its trainer.
        sources: Its sources.
        folder: Where states are kept, those of each language model in a folder of their own.

    Raises:
        ValueError: If there is a file of other states, or a damaged one; if a source is a stream.
    """
    check_frozen_texts(model)
    cache, state = _open_cache(folder, text_maker(model)), PartialState()
    texts = fill_texts(cache, model, trainer.data_collator, sources, state.process_index, state.num_processes)
    state.wait_for_everyone()
    cache.refresh()
    return texts


def _open_cache(folder: Path, made_by: Mapping[str, str]) -> FeatureCache:
    name = hashlib.blake2b(json.dumps(made_by, sort_keys=True).encode(), digest_size=8).hexdigest()
    return FeatureCache(folder / name, made_by)


def _steps_of(arguments: MMGEMTrainingArguments, sources: Sequence) -> int:
    """Optimizer steps of a stage: `max_steps`, or `num_train_epochs` times those that the rows of its sources make."""
    if arguments.max_steps > 0:
        return arguments.max_steps
    try:
        rows = sum(len(source) for source in sources)
    except TypeError as error:
        raise ValueError(f"a stream has no length ({error}); expected `max_steps` in `training`.") from error
    return max(1, math.ceil(rows * arguments.num_train_epochs / rows_per_step(arguments)))
