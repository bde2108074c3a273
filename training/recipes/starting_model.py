"""The model and processor that a recipe starts from, and what a stage changes about them."""

from collections.abc import Iterator

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, SiglipImageProcessorPil
from transformers.image_utils import SizeDict

from mmgem.configuration_mmgem import MMGEMConfig
from mmgem.modeling_mmgem import MMGEMModel
from mmgem.processing.processing_mmgem import MMGEMProcessor
from mmgem.training.data.mixture import Mixture
from mmgem.training.data.rows import texts_of
from mmgem.training.data.skipped import readable_texts
from mmgem.training.loading import load_checkpoint
from mmgem.training.recipes.recipe import Recipe, Stage
from mmgem.training.recipes.tokenizer import train_tokenizer
from mmgem.training.recipes.trimming import keep_first_layers, trim_tokenizer, trim_vocabulary

TOKENIZER_TRAINING_ROWS = 4000


def build_model(recipe: Recipe, rows: Mixture | None = None) -> tuple[MMGEMModel, MMGEMProcessor]:
    """Build the model and processor of a recipe, on the CPU: a checkpoint, a finished VLM, composed towers, or fresh
    weights with a tokenizer that learns from data.

    Args:
        recipe: The recipe.
        rows: The rows of the first stage, from which a tokenizer learns where the recipe has that section.
    """
    section = recipe.model
    if section.pretrained is not None:
        model, processor = load_checkpoint(section.pretrained, device="cpu")
    elif section.is_fresh:
        model, processor = _fresh_model(recipe, rows)
    elif section.vlm is not None:
        model = MMGEMModel.from_vlm(section.vlm, **section.config)
        processor = MMGEMProcessor.from_vlm(
            section.vlm,
            num_visual_tokens=model.config.num_visual_tokens,
            num_embedding_tokens=model.config.num_embedding_tokens,
        )
    else:
        model, processor = _composed_model(recipe, rows)
    if recipe.image_processor is not None:
        changed = processor.image_processor.to_dict() | dict(recipe.image_processor)
        processor.image_processor = type(processor.image_processor)(**changed)
    return model, processor


def prepare_for_stage(model: MMGEMModel, processor: MMGEMProcessor, recipe: Recipe, stage: Stage) -> None:
    """Set, in place, what the recipe says about training, prompts and generation, and a stage about its images, its
    attention and its [EMB] vectors.

    The position embeddings of the vision tower stay as they are: the model interpolates them to the images it gets.

    Raises:
        ValueError: If the patches of the vision tower do not tile the images, or for an `embedding` that
            `MMGEMModel.set_embedding_tokens` refuses.
    """
    if stage.embedding is not None:
        model.set_embedding_tokens(**stage.embedding)
    _leave_room(processor.tokenizer, model.config)
    if recipe.model.dtype is not None:
        model.to(getattr(torch, recipe.model.dtype))
    if recipe.model.attn_implementation is not None:
        model.set_attn_implementation(recipe.model.attn_implementation)
    if recipe.prompts is not None:
        model.config.prompts = dict(recipe.prompts)
    model.generation_config.update(**recipe.generation, allow_custom_entries=True)
    if stage.text_attention is not None:
        model.config.text_attention = stage.text_attention
    if stage.image_size is not None:
        check_image_size(model.config, stage.image_size)
        set_image_size(processor.image_processor, stage.image_size)


def check_image_size(config: MMGEMConfig, image_size: int) -> None:
    """Refuse square images that the patches of the vision tower do not tile.

    Args:
        config: The configuration of the model.
        image_size: The side of the images in pixels.

    Raises:
        ValueError: If it is not a multiple of the patch size.
    """
    if config.vlm_config is not None:
        raise ValueError(f"`image_size` is {image_size}, but a model that began as a VLM has its own; expected none.")
    (own_height, own_width), (height, width) = config.grid.image_size, config.grid.stride
    if (image_size, image_size) == (own_height, own_width):
        return
    if not config.grid.any_size:
        raise ValueError(
            f"`image_size` is {image_size}; expected {own_height} x {own_width}, all that the vision tower takes."
        )
    if image_size % height or image_size % width:
        raise ValueError(f"`image_size` is {image_size}; expected a multiple of the patch size {height} x {width}.")


def set_image_size(image_processor, image_size: int) -> None:
    """Let an image processor make square views of another size.

    One that resizes the shorter side and crops the center goes on to do so, in the same proportion.

    Args:
        image_processor: The image processor, changed in place.
        image_size: The side of the views in pixels.
    """
    if "spatial_shapes" in image_processor.model_input_names:  # as many patches, in the aspect ratio of the image
        image_processor.max_num_patches = (image_size // image_processor.patch_size) ** 2
        return
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


def _composed_model(recipe: Recipe, rows: Mixture | None) -> tuple[MMGEMModel, MMGEMProcessor]:
    """Pretrained towers, the language model perhaps with fewer layers and words."""
    section = recipe.model
    towers: dict = {"vision": section.vision, "text": section.text, "gguf_file": section.gguf_file}
    if section.num_hidden_layers is None and section.trim_vocabulary is None:
        model = MMGEMModel.from_towers(**towers, dtype=section.dtype, **section.config)
        config = model.config
        processor = MMGEMProcessor.from_towers(
            **towers, num_visual_tokens=config.num_visual_tokens, num_embedding_tokens=config.num_embedding_tokens
        )
        return model, processor
    gguf = {} if section.gguf_file is None else {"gguf_file": section.gguf_file}
    language_model = AutoModelForCausalLM.from_pretrained(section.text, **gguf)
    tokenizer = AutoTokenizer.from_pretrained(section.text, **gguf)
    limit = getattr(language_model.config, "max_position_embeddings", None)
    tokenizer.model_max_length = min(tokenizer.model_max_length, limit or tokenizer.model_max_length)
    if section.num_hidden_layers is not None:
        language_model = keep_first_layers(language_model, section.num_hidden_layers)
    if section.trim_vocabulary is not None:
        assert rows is not None
        tokenizer, old_ids = trim_tokenizer(tokenizer, _all_texts(rows), section.trim_vocabulary)
        trim_vocabulary(language_model, old_ids)
    config = MMGEMConfig(text_config=language_model.config.to_dict(), **section.config)
    processor = MMGEMProcessor.from_towers(
        section.vision,
        tokenizer,
        num_visual_tokens=config.num_visual_tokens,
        num_embedding_tokens=config.num_embedding_tokens,
    )
    model = MMGEMModel.from_towers(
        section.vision,
        language_model,
        image_token_id=processor.image_token_id,
        dtype=section.dtype,
        **section.config,
    )
    return model, processor


def _all_texts(rows: Mixture) -> Iterator[str]:
    """The texts of all rows of the sources of a mixture, or, of a stream, those of its first rows."""
    if rows.has_streams:
        return _first_texts(rows)
    return (text for source in rows.sources for row in readable_texts(source) for text in texts_of(row))


def _first_texts(rows: Mixture) -> Iterator[str]:
    numbers = range(min(len(rows), TOKENIZER_TRAINING_ROWS))
    return (text for number in numbers for text in texts_of(rows.texts(number)))


def _fresh_model(recipe: Recipe, rows: Mixture | None) -> tuple[MMGEMModel, MMGEMProcessor]:
    """Random weights, and a tokenizer that learns from the rows."""
    section = recipe.model
    assert rows is not None and recipe.tokenizer is not None and section.text_config is not None
    tokenizer = train_tokenizer(_first_texts(rows), **recipe.tokenizer)
    text_config = dict(section.text_config) | {
        "vocab_size": len(tokenizer),
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = MMGEMConfig(
        vision_config=section.vision_config,
        text_config=text_config,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        **section.config,
    )
    processor = MMGEMProcessor(SiglipImageProcessorPil(), tokenizer, num_visual_tokens=config.num_visual_tokens)
    return MMGEMModel(config), processor


def _leave_room(tokenizer, config: MMGEMConfig) -> None:
    """Truncate texts so that an image and the [EMB] vectors fit beside them, as `MMGEMProcessor.from_towers` does."""
    limit = config.max_sequence_length
    if limit is not None:
        room = limit - config.num_visual_tokens - config.num_embedding_tokens
        tokenizer.model_max_length = min(tokenizer.model_max_length, room)
