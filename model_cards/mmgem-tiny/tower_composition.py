"""What a model is composed from: a pretrained vision tower and a pretrained language model."""

import copy
import importlib
import inspect
from dataclasses import asdict

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)

from .language_model_probe import check_text_config, probe_language_model
from .patch_grid import blank_image, find_grid, patch_grid
from .weight_checks import check_weights, loading

# The library's default of 20 tokens counts the prompt, which an image alone fills.
DEFAULT_MAX_NEW_TOKENS = 128


def compose_towers(
    model_class: type[PreTrainedModel],
    vision: str | PreTrainedModel,
    text: str | PreTrainedModel,
    image_token_id: int | None,
    dtype: str | torch.dtype | None,
    gguf_file: str | None,
    **config_kwargs,
) -> PreTrainedModel:
    """A model of `model_class`; see `MMGEMModel.from_towers`, which this is."""
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    options = {} if dtype is None else {"dtype": dtype}
    vision = _vision_encoder(vision, **options)
    text_name = text if isinstance(text, str) else None
    text = _language_model(text, **options, **({} if gguf_file is None else {"gguf_file": gguf_file}))
    if dtype is None and vision.dtype != text.dtype:
        raise ValueError(
            f"`vision` is of {vision.dtype} and `text` of {text.dtype}; expected one type, or `dtype`, in which to "
            "compose them."
        )
    if text_name is not None and image_token_id is None:
        tokenizer = AutoTokenizer.from_pretrained(text_name, **({} if gguf_file is None else {"gguf_file": gguf_file}))
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
        image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    vocabulary_size = text.get_input_embeddings().num_embeddings
    image_token_id = vocabulary_size if image_token_id is None else image_token_id
    if image_token_id >= vocabulary_size:
        _make_room(text, image_token_id)

    config = model_class.config_class(
        vision_config=_config_of(vision),
        vision_grid=asdict(find_grid(vision)),
        text_config=_config_of(text),
        image_token_id=image_token_id,
        **config_kwargs,
    )
    model = model_class(config)
    _load(model.vision_tower, vision)
    try:
        model.language_model.load_state_dict(text.state_dict())
    except RuntimeError as error:
        raise ValueError(
            f"`text` is a `{text.config.model_type}` model, whose configuration does not follow when its vocabulary "
            f"grows to {len(text.get_input_embeddings().weight)} tokens, one of them `<image>` "
            f"({' '.join(str(error).split())[:200]}); expected a language model that can be resized."
        ) from error
    model.to(text.dtype if dtype is None else dtype)
    model.generation_config = text.generation_config
    if model.generation_config.max_new_tokens is None:
        model.generation_config.max_new_tokens = DEFAULT_MAX_NEW_TOKENS
    model.eval()
    model.config.sequence_packing = probe_language_model(model)
    model._checked_reading = model._how_it_reads()
    return model


def build_vision_tower(config: PreTrainedConfig) -> PreTrainedModel:
    """A vision tower with fresh weights.

    Raises:
        ValueError: If transformers has no model for `config`, neither by its type nor by its `architectures`.
    """
    if type(config) in MODEL_MAPPING:
        return AutoModel.from_config(config)
    return _class_by_name(config)._from_config(config)


def _class_by_name(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that `architectures` names: many towers inside VLMs are no `AutoModel`."""
    modeling = importlib.import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
    found = getattr(modeling, (config.architectures or [""])[0], None)
    if not (inspect.isclass(found) and issubclass(found, PreTrainedModel)):
        raise ValueError(
            f"`vision_config` is of type `{config.model_type}` with `architectures` {config.architectures}; expected "
            "the name of a vision encoder of transformers."
        )
    return found


def _vision_encoder(vision: str | PreTrainedModel, **options) -> PreTrainedModel:
    """The encoder, complete and without adapters; that of a dual encoder or of a VLM where one is given."""
    if not isinstance(vision, str):
        return _encoder_inside(merged(vision, "vision"))[1]
    config = AutoConfig.from_pretrained(vision)
    model_class = AutoModel if type(config) in MODEL_MAPPING else _class_by_name(config)
    with loading("vision", vision):
        whole, report = model_class.from_pretrained(vision, output_loading_info=True, **options)
    prefix, encoder = _encoder_inside(merged(whole, "vision"))
    missing = [name.removeprefix(prefix) for name in report["missing_keys"] if name.startswith(prefix)]
    check_weights("vision", vision, whole, report, _used_by_grid(encoder, missing) if missing else [])
    return encoder


def _encoder_inside(model: PreTrainedModel) -> tuple[str, PreTrainedModel]:
    """The vision encoder of a dual encoder or of a VLM, and the prefix of its names there; or the model itself."""
    config = getattr(model.config, "vision_config", None)
    if config is None:
        return "", model
    for name, module in model.named_modules():
        if name and isinstance(module, PreTrainedModel) and type(module.config) is type(config):
            return f"{name}.", module
    raise ValueError(
        f"`vision` is a `{model.config.model_type}`, in which no `{config.model_type}` was found; expected a vision "
        "encoder, or a model that contains one."
    )


def _language_model(text: str | PreTrainedModel, **options) -> PreTrainedModel:
    """The causal language model, complete and without adapters."""
    if not isinstance(text, str):
        text = merged(text, "text")
        _check_language_model(text.config)
    else:
        if "gguf_file" not in options:  # which holds nothing else, and takes long to read
            _check_language_model(AutoConfig.from_pretrained(text))
        with loading("text", text):
            model, report = AutoModelForCausalLM.from_pretrained(text, output_loading_info=True, **options)
        check_weights("text", text, model, report, report["missing_keys"])
        text = merged(model, "text")
    return text


def _check_language_model(config: PreTrainedConfig):
    check_text_config(config)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"`text` is a `{config.model_type}` model; expected a causal language model.")


def _make_room(text: PreTrainedModel, image_token_id: int):
    """A row of the vocabulary for `<image>`."""
    try:
        text.resize_token_embeddings(image_token_id + 1, mean_resizing=False)
    except Exception as error:  # of a model that has its words in another form than a table
        raise ValueError(
            f"`text` is a `{text.config.model_type}`, whose vocabulary of {text.config.vocab_size} has no room for "
            f"`image_token_id` {image_token_id} ({error}); expected an id that nothing else has."
        ) from error


def merged(model: PreTrainedModel, argument: str) -> PreTrainedModel:
    """The model with its adapters merged, if it is one of PEFT; refuses weights that cannot be copied."""
    if hasattr(model, "merge_and_unload"):
        return copy.deepcopy(model).merge_and_unload()
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"`{argument}` has PEFT adapters beside its weights; expected them merged: a `PeftModel`, or what its "
            "`merge_and_unload` returns."
        )
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            raise ValueError(
                f"`{argument}` is quantized, `{name}` is {parameter.dtype}; expected weights of floating point."
            )
    return model


def _used_by_grid(vision: PreTrainedModel, names: list[str]) -> list[str]:
    """Those of the parameters that the patch features depend on: of a pooling head they do not."""
    grid, parameters = find_grid(vision), dict(vision.named_parameters())
    with torch.enable_grad():
        features = patch_grid(vision, grid, blank_image(grid, vision.device).to(vision.dtype))
        asked = [parameters[name] for name in names if name in parameters]
        gradients = torch.autograd.grad(features.sum(), asked, allow_unused=True)
    unused = {id(p) for p, gradient in zip(asked, gradients, strict=True) if gradient is None}
    return [name for name in names if name not in parameters or id(parameters[name]) not in unused]


def _config_of(tower: PreTrainedModel) -> dict:
    """Its configuration, which finds its class again and does not ask for weights to be quantized."""
    config = tower.config.to_dict()
    config.pop("quantization_config", None)  # of what was read from GGUF
    if type(tower.config) not in MODEL_MAPPING:
        config["architectures"] = [type(tower).__name__]
    return config


def _load(tower: PreTrainedModel, given: PreTrainedModel):
    """Copy weights into a tower built from the same configuration, which may wrap what was taken out of a model."""
    inside = next((module for module in tower.modules() if type(module) is type(given)), None)
    if inside is None or len(list(inside.parameters())) != len(list(tower.parameters())):
        raise ValueError(
            f"`vision` is a {type(given).__name__}, but a `{tower.config.model_type}` is built as a "
            f"{type(tower).__name__}; expected one of these."
        )
    inside.load_state_dict(given.state_dict())
