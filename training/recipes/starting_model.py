"""The model and processor that a recipe starts from, and what a stage changes about them."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, SiglipImageProcessorPil
from transformers.image_utils import SizeDict

from mmgem.configuration_mmgem import MMGEMConfig
from mmgem.modeling_mmgem import MMGEMModel
from mmgem.processing.processing_mmgem import MMGEMProcessor
from mmgem.training.data.mixture import Mixture
from mmgem.training.data.rows import CAPTION_COLUMNS
from mmgem.training.loading import load_checkpoint, load_config
from mmgem.training.recipes.recipe import MODEL_SECTIONS
from mmgem.training.recipes.tokenizer import train_tokenizer
from mmgem.training.reconstruction.model import MMGEMForReconstruction
from mmgem.training.reconstruction.trainer import freeze_read_out
from mmgem.training.trainer.contrastive_losses import PairwiseSigmoid, build_objective, check_embedding_views
from mmgem.training.trainer.lora import add_lora
from mmgem.training.trainer.parameter_selection import parameter_groups, set_trainable

TOKENIZER_TRAINING_ROWS = 4000
_TEXT_COLUMNS = (*CAPTION_COLUMNS, "long_caption", "region_captions", "label", "qa", "hard_negatives", "instructions")


def build_model(recipe: Mapping[str, Any], rows: Mixture | None = None) -> tuple[MMGEMModel, MMGEMProcessor]:
    """
    Model and processor of a recipe, on the CPU: a checkpoint, composed towers, or fresh weights with a tokenizer that
    learns from data.

    Args:
        recipe: from `load_recipe`.
        rows: of the first stage, from which a tokenizer is trained where the recipe has that section.
    """
    section = {key: value for key, value in recipe["model"].items() if key not in MODEL_SECTIONS}
    if "pretrained" in section:
        model, processor = load_checkpoint(section["pretrained"], device="cpu")
    elif "vision" in section:
        model = MMGEMModel.from_towers(**section)
        processor = MMGEMProcessor.from_towers(
            section["vision"],
            section["text"],
            num_visual_tokens=model.config.num_visual_tokens,
            num_embedding_tokens=model.config.num_embedding_tokens,
        )
    else:
        assert rows is not None
        texts = _texts(rows.texts(row) for row in range(min(len(rows), TOKENIZER_TRAINING_ROWS)))
        tokenizer = train_tokenizer(texts, **recipe["tokenizer"])
        section["text_config"] = section["text_config"] | {
            "vocab_size": len(tokenizer),
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        config = MMGEMConfig(image_token_id=tokenizer.convert_tokens_to_ids("<image>"), **section)
        model = MMGEMModel(config)
        processor = MMGEMProcessor(SiglipImageProcessorPil(), tokenizer, num_visual_tokens=config.num_visual_tokens)
    if "image_processor" in recipe:
        changed = processor.image_processor.to_dict() | recipe["image_processor"]
        processor.image_processor = type(processor.image_processor)(**changed)
    return model, processor


def prepare_for_stage(
    model: MMGEMModel, processor: MMGEMProcessor, recipe: Mapping[str, Any], stage: Mapping[str, Any]
) -> None:
    """
    Set, in place, what the recipe says about training and prompts, and a stage about its images, its attention and its
    [EMB] vectors. The position embeddings of the vision tower stay as they are: the model interpolates them to the
    images it gets.

    Raises:
        ValueError: if the patches of the vision tower do not tile the images; as `MMGEMModel.set_embedding_tokens`.
    """
    if "embedding" in stage:
        model.set_embedding_tokens(**stage["embedding"])
        _leave_room(processor.tokenizer, model.config)
    if "dtype" in recipe["model"]:
        model.to(getattr(torch, recipe["model"]["dtype"]))
    if "attn_implementation" in recipe["model"]:
        model.set_attn_implementation(recipe["model"]["attn_implementation"])
    if "prompts" in recipe:
        model.config.prompts = dict(recipe["prompts"])
    if "text_attention" in stage:
        model.config.text_attention = stage["text_attention"]
    if "image_size" in stage:
        _check_image_size(model.config, stage["image_size"])
        set_image_size(processor.image_processor, stage["image_size"])


def _leave_room(tokenizer, config: MMGEMConfig) -> None:
    """Truncate texts so that the [EMB] vectors fit behind them, as `MMGEMProcessor.from_towers` does."""
    limit = getattr(config.text_config, "max_position_embeddings", None)
    if limit is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, limit - config.num_embedding_tokens)


def set_image_size(image_processor, image_size: int) -> None:
    """
    Let an image processor make square views of another size. One that resizes the shorter side and crops the center
    goes on to do so, in the same proportion.

    Args:
        image_processor: changed in place.
        image_size: side of the views in pixels.
    """
    square = SizeDict(height=image_size, width=image_size)
    if image_processor.do_center_crop:
        if image_processor.size.shortest_edge is not None:
            scale = image_size / image_processor.crop_size.height
            image_processor.size = SizeDict(shortest_edge=round(scale * image_processor.size.shortest_edge))
        else:
            image_processor.size = square
        image_processor.crop_size = square
    else:
        image_processor.size = square


def check_stages(recipe: Mapping[str, Any]) -> None:
    """
    Try what every stage does to the model on one without weights, so that a name it does not have, or an image size
    that does not fit, is found before anything is loaded.

    Raises:
        TypeError, ValueError: see [`set_trainable`], [`add_lora`] and [`parameter_groups`].
    """
    section = {key: value for key, value in recipe["model"].items() if key not in MODEL_SECTIONS}
    if "pretrained" in section:
        config = load_config(section["pretrained"])
    else:
        for tower in ("vision", "text"):
            if tower in section:
                tower_config = AutoConfig.from_pretrained(section.pop(tower))
                section[f"{tower}_config"] = getattr(tower_config, f"{tower}_config", tower_config).to_dict()
        config = MMGEMConfig(**section)
    for stage in recipe["stages"]:
        training = stage["training"]
        with torch.device("meta"):
            model = MMGEMModel(config)
        try:
            if "image_size" in stage:
                _check_image_size(config, stage["image_size"])
            if "embedding" in stage:
                model.set_embedding_tokens(**stage["embedding"])  # which `config` remembers for the stages after it
            if config.calibrated_modalities is not None or config.embedding_prompt_ids is not None:
                raise ValueError(
                    "the model's embeddings are calibrated or read by a prompt, which comes after training; expected "
                    "another checkpoint or, for a calibrated one, `embedding` in the stage, which ends that."
                )
            objective = build_objective(**stage.get("objective", {}))
            check_embedding_views(objective, config)
            if "text_attention" in stage:
                config.text_attention = stage["text_attention"]
            if isinstance(objective, PairwiseSigmoid) and config.logit_bias_init_value is None:
                raise ValueError("the loss `sigmoid` needs a bias; expected `logit_bias_init_value` in `model`: -10.")
            if "reconstruction" in stage:
                model = MMGEMForReconstruction.from_model(model)
            set_trainable(model, training.get("freeze"), training.get("train_only"))
            adapted = model if training.get("lora") is None else add_lora(model, **training["lora"])
            if "reconstruction" in stage:
                freeze_read_out(adapted)
            parameter_groups(adapted, 1.0, training.get("learning_rates"), 0.0, [])
        except (TypeError, ValueError, StrictDataclassError) as error:
            raise ValueError(f"stage `{stage['name']}`: {' '.join(str(error).split())}") from error


def _check_image_size(config: MMGEMConfig, image_size: int) -> None:
    vision_config: Any = config.vision_config
    patch_size = vision_config.patch_size
    if any(image_size % side for side in ([patch_size] if isinstance(patch_size, int) else patch_size)):
        raise ValueError(f"`image_size` is {image_size}; expected a multiple of the patch size {patch_size}.")


def _texts(rows) -> Iterator[str]:
    for row in rows:
        for column in _TEXT_COLUMNS:
            yield from _strings(row.get(column))
        yield from _strings((row.get("edit") or {}).get("instruction"))


def _strings(value) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _strings(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
