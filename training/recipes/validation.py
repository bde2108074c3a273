"""Checks of a recipe before any data or weights are loaded: names and values against the classes that take them, and
stages against the model that they get."""

import difflib
import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig
from PIL import Image
from transformers import CONFIG_MAPPING, AutoConfig, GenerationConfig, SiglipImageProcessorPil

from mmgem.configuration_mmgem import MMGEMConfig
from mmgem.input_checks import check_generation
from mmgem.modeling_mmgem import MMGEMModel
from mmgem.processing.processing_mmgem import check_views
from mmgem.training.argument_checks import check_arguments, check_keys, check_type
from mmgem.training.data.augmentation import Augmentation
from mmgem.training.data.collator import MMGEMCollator
from mmgem.training.data.drawn_texts import TextDrawing
from mmgem.training.data.feature_cache import check_frozen
from mmgem.training.data.text_cache import check_frozen_texts
from mmgem.training.loading import load_config
from mmgem.training.recipes.recipe import TRAINED_WITH, ModelSection, Recipe, Stage
from mmgem.training.recipes.stage_kinds import STAGE_KINDS, stage_kind
from mmgem.training.recipes.starting_model import check_image_size
from mmgem.training.recipes.tokenizer import train_tokenizer
from mmgem.training.recipes.trimming import with_first_layers
from mmgem.training.trainer.arguments import MMGEMTrainingArguments
from mmgem.training.trainer.latent_alignment import LATENT_OPTIONS
from mmgem.training.trainer.lora import add_lora
from mmgem.training.trainer.parameter_selection import parameter_groups
from mmgem.vision_language_model import check_vlm_config

# Arguments of the trainer that the run sets itself, or that have a place of their own in a stage.
_NOT_IN_TRAINING = ("output_dir", "resume_from_checkpoint", "train_sampling_strategy", "contrastive_objective")
# Fields of the configuration that have a place of their own in a recipe, or are no choice of its author.
_NOT_IN_MODEL = (
    "vision_config",
    "vision_grid",
    "text_config",
    "vlm_config",
    "vlm_token_type",
    "vlm_pixel_dims",
    "vlm_attention",
    "image_token_id",
    "prompts",
    "calibrated_modalities",
)
_MAX_RANK = 1 << 14  # of LoRA; no matrix of a model has a higher one
# Of the collator: texts that stand after images, or after what was read of them.
_READ_WITH_IMAGES = (
    "edits_per_image",
    "instructed_regions_per_image",
    "memory_captions_per_image",
    "memory_questions_per_image",
    "match_captions_per_image",
)


def check_sections(recipe: Recipe) -> None:
    """Check the arguments in a recipe against the signatures of what takes them, to the last key.

    Raises:
        ValueError: If a key is unknown (the nearest known one is named), an argument is missing, or a value is of a
            wrong type or out of its range.
    """
    _check_model(recipe)
    _check_generation(recipe.generation)
    for stage in recipe.stages:
        _check_stage(stage)


def check_stages(recipe: Recipe) -> None:
    """Try what every stage does to the model on one without weights.

    Raises:
        FileNotFoundError: If the model that the recipe starts from is not there.
        ValueError: If a stage does not fit the model: a name that it does not have, an image size that its patches do
            not tile, an objective that it cannot have.
    """
    try:
        config = _starting_config(recipe.model)
        model = _on_meta(config)
    except (RuntimeError, ArithmeticError, TypeError) as error:  # of sizes below 1, or beyond all numbers
        reason = str(error).partition("\nException raised from")[0]
        raise ValueError(f"`model` cannot be built: {reason}; expected sizes that fit each other.") from error
    for number, stage in enumerate(recipe.stages):
        if number:
            model = _on_meta(config)
        try:
            _check_prompts(stage, recipe.prompts or config.prompts or {})
            if stage.image_size is not None:
                check_image_size(config, stage.image_size)
            if stage.embedding is not None:
                model.set_embedding_tokens(**stage.embedding)  # which `config` remembers for the stages after it
            if config.calibrated_modalities is not None or config.embedding_prompt_ids is not None:
                raise ValueError(
                    "the model's embeddings are calibrated or read by a prompt, which comes after training; expected "
                    "another checkpoint or, for a calibrated one, `embedding` in the stage, which ends that."
                )
            if stage.text_attention is not None:
                config.text_attention = stage.text_attention
            trained = stage_kind(stage).try_on_meta(model)
            if stage.cache_features is not None:
                check_frozen(model)
                if stage.cache_features.texts:
                    check_frozen_texts(model)
            parameter_groups(trained, 1.0, stage.training.get("learning_rates"), 0.0, [])
        except (TypeError, ValueError, StrictDataclassError) as error:
            raise ValueError(f"stage `{stage.name}`: {' '.join(str(error).split())}") from error


def _on_meta(config: MMGEMConfig) -> MMGEMModel:
    with torch.device("meta"):
        return MMGEMModel(config)


def _check_prompts(stage: Stage, prompts: Mapping[str, str]) -> None:
    for section in stage.train_data:
        name = section.get("prompt_name")
        if name is not None and name not in prompts:
            known = f"one of {', '.join(prompts)}" if prompts else "None, since the model has no prompts"
            raise ValueError(f"`prompt_name` of `train_data` is {name!r}; expected {known}.")


def _starting_config(section: ModelSection) -> MMGEMConfig:
    """The configuration of the model that a recipe starts from."""
    if section.pretrained is not None:
        return load_config(section.pretrained)
    if section.is_fresh:
        return MMGEMConfig(vision_config=section.vision_config, text_config=section.text_config, **section.config)
    if section.vlm is not None:
        vlm_config = AutoConfig.from_pretrained(section.vlm)
        check_vlm_config(vlm_config)
        return MMGEMConfig(vlm_config=vlm_config, **section.config)
    towers = {}
    gguf = {} if section.gguf_file is None else {"gguf_file": section.gguf_file}
    for name, tower, options in (("vision_config", section.vision, {}), ("text_config", section.text, gguf)):
        tower_config = AutoConfig.from_pretrained(tower, **options)
        towers[name] = getattr(tower_config, name, tower_config).to_dict()
    if section.num_hidden_layers is not None:
        towers["text_config"] = with_first_layers(tower_config, section.num_hidden_layers).to_dict()
    return MMGEMConfig(**towers, **section.config)


def _check_model(recipe: Recipe) -> None:
    section = recipe.model
    if recipe.tokenizer is not None:
        check_arguments(recipe.tokenizer, train_tokenizer, "`tokenizer`", given=["texts"])
    if recipe.image_processor is not None:
        check_keys(recipe.image_processor, SiglipImageProcessorPil.valid_kwargs.__annotations__, "`image_processor`")
        _check_image_processor(recipe.image_processor)
    composed = (
        ("vlm",)
        if section.vlm is not None
        else ("vision", "text", "gguf_file", "num_hidden_layers", "trim_vocabulary")
    )
    required = ("vision_config", "text_config") if section.is_fresh else composed
    own_fields = [name for name in MMGEMConfig.__annotations__ if name not in _NOT_IN_MODEL]
    check_keys(section.config, [*required, *own_fields, *TRAINED_WITH], "`model`")
    config: dict[str, Any] = dict(section.config)
    if recipe.prompts is not None:
        config["prompts"] = dict(recipe.prompts)
    for name in required if section.is_fresh else ():
        tower_section = getattr(section, name)
        _check_tower_config(tower_section, f"`{name}` in `model`")
        config[name] = dict(tower_section)
    try:
        MMGEMConfig(**config)
    except StrictDataclassError as error:
        raise ValueError(f"`model`: {' '.join(str(error).split())}") from error


def _check_image_processor(section: Mapping[str, Any]) -> None:
    try:
        check_views(section)
        pixels = SiglipImageProcessorPil(**section)([Image.new("RGB", (8, 8))], return_tensors="pt")["pixel_values"]
    except Exception as error:  # of any kind, by what libraries make of it
        raise ValueError(
            f"`image_processor` is {dict(section)!r:.200}, with which no picture can be processed: {error}"
        ) from error
    if not pixels.isfinite().all():
        raise ValueError(
            f"`image_processor` is {dict(section)!r:.200}, which makes pixels that are NaN or infinite; expected "
            "finite ones."
        )


def _check_generation(section: Mapping[str, Any]) -> None:
    check_keys(section, [*GenerationConfig().to_dict(), "image_similarity_weight"], "`generation`")
    try:
        check_generation(section, 1 << 31)  # the vocabulary is not known yet
        GenerationConfig(**section).validate(strict=True)
        if section.get("image_similarity_weight") and (section.get("num_beams") or 1) == 1:
            raise ValueError("`num_beams` is 1; expected more beside `image_similarity_weight`, which ranks them.")
    except (TypeError, ValueError) as error:
        raise ValueError(f"`generation` is {dict(section)!r:.80}; {' '.join(str(error).split())}") from error


def _check_tower_config(section: Mapping[str, Any], where: str) -> None:
    model_type = section.get("model_type")
    if not isinstance(model_type, str):
        raise ValueError(f"{where} is {dict(section)!r:.80}; expected a mapping with a `model_type` and its fields.")
    if model_type not in CONFIG_MAPPING:
        nearest = difflib.get_close_matches(model_type, CONFIG_MAPPING, n=1) or ["siglip_vision_model"]
        raise ValueError(f"`model_type` of {where} is {model_type!r:.80}; expected one such as {nearest[0]!r}.")
    config_class = CONFIG_MAPPING[model_type]
    check_keys(section, ["model_type", *config_class.__dataclass_fields__, *config_class.attribute_map], where)


def _check_stage(stage: Stage) -> None:
    of_stage = f"of stage `{stage.name}`"
    if stage.embedding is not None:
        check_arguments(stage.embedding, MMGEMModel.set_embedding_tokens, f"`embedding` {of_stage}", given=["self"])
    given = ["processor", "prompts", "cached_views", "cached_texts"]  # by the run
    check_arguments(stage.collator, MMGEMCollator, f"`collator` {of_stage}", given=given)
    if (augmentation := stage.collator.get("augmentation")) is not None:
        check_arguments(augmentation, Augmentation, f"`augmentation` in `collator` {of_stage}")
    drawing = {option.name for option in fields(TextDrawing)} & set(stage.collator)
    try:
        TextDrawing(**{name: stage.collator[name] for name in drawing})
        Augmentation(**(augmentation or {}))
    except ValueError as error:
        raise ValueError(f"`collator` {of_stage}: {error}") from error
    if stage.cache_features is not None and (stage.cache_features.views > 1) != (augmentation is not None):
        raise ValueError(
            f"`cache_features` {of_stage} has {stage.cache_features.views} `views`, and the `collator` has "
            f"{'no' if augmentation is None else 'an'} `augmentation`; expected several views, drawn by it, or one "
            "without it."
        )
    stage_kind(stage).check()
    _check_caching(stage, of_stage)
    training = stage.training
    # `fsdp: true` is what the library asks for, but not what its annotation says.
    typed = {name: value for name, value in training.items() if name != "fsdp"}
    check_arguments(typed, MMGEMTrainingArguments, f"`training` {of_stage}", given=_NOT_IN_TRAINING)
    if training.get("lora") is not None:
        check_arguments(training["lora"], add_lora, f"`lora` {of_stage}", given=["model"], rest=LoraConfig)
    for part, rate in (training.get("learning_rates") or {}).items():
        check_type(rate, float, f"`{part}` in `learning_rates` {of_stage}")
        if not 0 <= rate < math.inf:
            raise ValueError(f"`{part}` in `learning_rates` {of_stage} is {rate}; expected 0 or more.")
    rank = (training.get("lora") or {}).get("r", 1)
    if not 1 <= rank <= _MAX_RANK:
        raise ValueError(f"`r` in `lora` {of_stage} is {rank}; expected 1 or more, up to {_MAX_RANK}.")
    if not any(section.get("weight", 1) for section in stage.train_data):
        raise ValueError(f"`weight` of all `train_data` {of_stage} is 0; expected one above it.")


def _check_caching(stage: Stage, of_stage: str) -> None:
    """Refuse what cached features cannot be used for, or what only they can."""
    options, collator, caching = stage.options, stage.collator, stage.cache_features
    if caching is not None and "pretrained" in (options.get("teacher") or {}):
        raise ValueError(
            f"`cache_features` {of_stage} is given, but the pretrained `teacher` has a tower of its own; expected one "
            "of them."
        )
    if caching is None or not caching.texts:
        if asking := [name for name in LATENT_OPTIONS if options.get(name)]:
            raise ValueError(
                f"`{asking[0]}` in `objective` {of_stage} is {options[asking[0]]}, without features of both towers; "
                "expected `cache_features: {texts: true}`."
            )
        return
    if stage.training.get("caption_loss_weight", 1.0) or stage.kind != next(iter(STAGE_KINDS)):
        raise ValueError(
            f"`texts` of `cache_features` {of_stage} is True, but the language model learns to write; expected "
            "`caption_loss_weight: 0` in `training`."
        )
    if read := [name for name in _READ_WITH_IMAGES if collator.get(name)]:
        raise ValueError(
            f"`texts` of `cache_features` {of_stage} is True, but `{read[0]}` is {collator[read[0]]}, for which the "
            "language model runs; expected 0."
        )
    alone = {"regions_per_image": 2, "hard_negatives_per_image": 0}  # and what they are by default
    if options.get("fusemix") and (others := [name for name, count in alone.items() if collator.get(name, count)]):
        raise ValueError(
            f"`fusemix` in `objective` {of_stage} mixes whole images and their texts, but the `collator` has "
            f"`{others[0]}` {collator.get(others[0], alone[others[0]])}; expected 0."
        )
