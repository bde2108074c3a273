"""What a model is composed from: a pretrained vision tower and a pretrained language model."""

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from .language_model_probe import check_text_config, probe_language_model
from .patch_grid import pair, patch_grid

# The library's default of 20 tokens counts the prompt, which an image alone fills.
DEFAULT_MAX_NEW_TOKENS = 128


def compose_towers(
    model_class: type[PreTrainedModel],
    vision: str | PreTrainedModel,
    text: str | PreTrainedModel,
    image_token_id: int | None,
    **config_kwargs,
) -> PreTrainedModel:
    """A model of `model_class`; see `MMGEMModel.from_towers`, which this is."""
    if isinstance(vision, str):
        vision_config = AutoConfig.from_pretrained(vision)
        vision_config = getattr(vision_config, "vision_config", vision_config)
        vision = AutoModel.from_pretrained(vision, config=vision_config)
    if isinstance(text, str):
        if image_token_id is None:
            tokenizer = AutoTokenizer.from_pretrained(text)
            tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
            image_token_id = tokenizer.convert_tokens_to_ids("<image>")
        text = AutoModelForCausalLM.from_pretrained(text)
    check_text_config(text.config)
    vocabulary_size = text.get_input_embeddings().num_embeddings
    image_token_id = vocabulary_size if image_token_id is None else image_token_id
    if image_token_id >= vocabulary_size:
        text.resize_token_embeddings(image_token_id + 1, mean_resizing=False)

    config = model_class.config_class(
        vision_config=vision.config.to_dict(),
        text_config=text.config.to_dict(),
        image_token_id=image_token_id,
        **config_kwargs,
    )
    model = model_class(config)
    model.vision_tower.load_state_dict(vision.state_dict())
    try:
        model.language_model.load_state_dict(text.state_dict())
    except RuntimeError as error:
        raise ValueError(
            f"`text` is a `{text.config.model_type}` model, whose configuration does not follow when its vocabulary "
            f"grows to {len(text.get_input_embeddings().weight)} tokens, one of them `<image>`; expected a language "
            "model that can be resized."
        ) from error
    model.to(text.dtype)
    model.generation_config = text.generation_config
    if model.generation_config.max_new_tokens is None:
        model.generation_config.max_new_tokens = DEFAULT_MAX_NEW_TOKENS
    model.eval()
    model.config.sequence_packing = probe_language_model(model)
    model._checked_reading = model._how_it_reads()
    with torch.no_grad():
        height, width = pair(config.vision_config.image_size)
        patch_grid(
            model.vision_tower, torch.zeros(1, config.vision_config.num_channels, height, width, dtype=model.dtype)
        )
    return model
