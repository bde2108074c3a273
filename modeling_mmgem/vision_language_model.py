"""A finished vision-language model as the parts of an MM-GEM, on which its own code goes on to run."""

import copy
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from operator import attrgetter
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, MoeModelOutputWithPast

from .language_model_probe import agree, at_rest, probe_language_model
from .patch_grid import find_grid
from .text_rows import first_token_id
from .tower_composition import DEFAULT_MAX_NEW_TOKENS, merged
from .weight_checks import check_weights, loading

CROSS_ATTENTION = re.compile(r"cross_?att|encoder_attn", re.IGNORECASE)


class LanguageModelOfVLM(PreTrainedModel):
    """The language model of a VLM: its decoder and its vocabulary head, the modules themselves.

    Args:
        config: Of the decoder.
        decoder: The VLM's.
        head: The VLM's output embeddings.
    """

    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: PreTrainedConfig, decoder: PreTrainedModel, head: nn.Module):
        super().__init__(config)
        self.model = decoder
        self.lm_head = head
        words = decoder.get_input_embeddings()
        name = next(name for name, module in decoder.named_modules() if module is words)
        self._tied_weights_keys = {"lm_head.weight": f"model.{name}.weight"}
        self.post_init()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # where the decoder has experts; the library looks for them in this file

    def get_decoder(self) -> PreTrainedModel:
        return self.model

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module):
        self.lm_head = value

    def forward(self, *args, **kwargs) -> CausalLMOutputWithPast:
        """As the decoder, with `logits` (B, L, vocabulary)."""
        outputs = self.model(*args, **kwargs)
        return CausalLMOutputWithPast(logits=self.lm_head(outputs.last_hidden_state))


class VisionLanguageModel:
    """A VLM whose modules belong to an MM-GEM under the names that its parts have there.

    | there | in the VLM |
    |---|---|
    | `vision_tower` | its vision encoder |
    | `language_model` | its decoder and its vocabulary head |
    | `connector` | whatever else it has: projector, resampler, separator of rows, ... |

    The modules that hold these together belong to nobody and have no parameters of their own. This is no module, so
    that nothing of the VLM is counted, saved or moved twice.

    Args:
        vlm: Taken apart, but left as it is.

    Attributes:
        parts: The three modules by their names.

    Raises:
        ValueError: If the VLM has no vision encoder, or no decoder that reads one sequence.
    """

    def __init__(self, vlm: PreTrainedModel):
        self._vlm = vlm
        decoder, vision_tower, head = _decoder(vlm), _vision_tower(vlm), vlm.get_output_embeddings()
        language_model = LanguageModelOfVLM(decoder.config, decoder, head)
        connector = nn.Module()
        self.parts = {"vision_tower": vision_tower, "language_model": language_model, "connector": connector}
        known = {id(vision_tower): "vision_tower", id(decoder): "language_model.model"}
        known[id(head)] = "language_model.lm_head"
        names = [name for name, module in vlm.named_modules() if id(module) in known]
        frames = {".".join(name.split(".")[:depth]) for name in names for depth in range(name.count(".") + 1)}
        self._frames = [vlm.get_submodule(name) for name in sorted(frames)]
        # Which entry of which frame is what of the MM-GEM.
        self._links: list[tuple[dict, str, str]] = []
        for frame in self._frames:
            for name, child in frame.named_children():
                if id(child) in known:
                    self._links.append((frame._modules, name, known[id(child)]))
                elif not any(child is other for other in self._frames):
                    own = _free_name(connector, name)
                    connector.add_module(own, child)
                    self._links.append((frame._modules, name, f"connector.{own}"))
            for name, parameter in frame.named_parameters(recurse=False):
                own = _free_name(connector, name)
                connector.register_parameter(own, parameter)
                self._links.append((frame._parameters, name, f"connector.{own}"))
            for name, buffer in frame.named_buffers(recurse=False):
                own = _free_name(connector, name)
                connector.register_buffer(own, buffer, persistent=name not in frame._non_persistent_buffers_set)
                self._links.append((frame._buffers, name, f"connector.{own}"))

    def of(self, model: Any) -> Any:
        """The VLM, made of what the parts of an MM-GEM are now: adapters and new embeddings included."""
        for table, name, path in self._links:
            table[name] = attrgetter(path)(model)
        for frame in self._frames:
            frame.training = model.training
        self._vlm.generation_config = model.generation_config
        return self._vlm

    def image_tokens(self, model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
        """(I, channels, H, W) whole images -> (I, p, H), the vectors that its image tokens become."""
        config = model.config
        pixel_values = pixel_values.to(model.dtype)
        if config.vlm_pixel_dims == 5:
            pixel_values = pixel_values[:, None]  # (I, 1, channels, H, W)
        vlm = self.of(model)
        inputs = whole_images(vlm, pixel_values)
        outputs = _image_features_of(vlm)(**inputs, return_dict=True)
        tokens = outputs.pooler_output
        tokens = torch.cat(list(tokens)) if isinstance(tokens, list | tuple) else tokens
        return tokens.reshape(len(pixel_values), -1, tokens.shape[-1])

    def head(self, model: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        """(M, H) -> (M, vocabulary), by whatever the VLM does to the states of its decoder."""
        with without_layers(model.get_decoder()):
            return self.of(model)(inputs_embeds=hidden_states[:, None], use_cache=False).logits[:, 0]


def _image_features_of(vlm: PreTrainedModel) -> Callable:
    return getattr(vlm, "get_image_features", None) or vlm.base_model.get_image_features


def whole_images(vlm: PreTrainedModel, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
    """(I, ..., H, W) pixels as inputs of a VLM; some have to be told `image_sizes`, (I, 2)."""
    inputs = {"pixel_values": pixel_values}
    parameters = inspect.signature(_image_features_of(vlm)).parameters
    if "image_sizes" in parameters and parameters["image_sizes"].default is inspect.Parameter.empty:
        sizes = [pixel_values.shape[-2:]] * len(pixel_values)
        inputs["image_sizes"] = torch.tensor(sizes, device=pixel_values.device)
    return inputs


def compose_from_vlm(
    model_class: type[PreTrainedModel], vlm: str | PreTrainedModel, processor: Any, **config_kwargs
) -> PreTrainedModel:
    """A model of `model_class`; see `MMGEMModel.from_vlm`, which this is."""
    if isinstance(vlm, str):
        processor = vlm if processor is None else processor
        check_vlm_config(AutoConfig.from_pretrained(vlm))
        with loading("vlm", vlm):
            name, (vlm, report) = vlm, AutoModelForImageTextToText.from_pretrained(vlm, output_loading_info=True)
        check_weights("vlm", name, vlm, report, report["missing_keys"])
    vlm = merged(vlm, "vlm")
    check_vlm_config(vlm.config)
    _decoder(vlm)
    try:
        grid = find_grid(_vision_tower(vlm))
    except ValueError as error:
        raise _refusal(vlm.config, f"has a vision encoder without a patch grid ({error})") from error
    config = model_class.config_class(
        vlm_config=vlm.config.to_dict(),
        vision_grid=asdict(grid),
        image_token_id=vlm.config.image_token_id,
        **config_kwargs,
    )
    model = model_class(config)
    model.to(vlm.dtype)
    model.vlm.of(model).load_state_dict(vlm.state_dict())
    model.generation_config = copy.deepcopy(vlm.generation_config)
    if model.generation_config.max_new_tokens is None and model.generation_config.max_length is None:
        model.generation_config.max_new_tokens = DEFAULT_MAX_NEW_TOKENS
    model.eval()
    model.config.sequence_packing = probe_language_model(model)
    find_image_reading(model, processor)
    model._checked_reading = model._how_it_reads()
    return model


def find_image_reading(model: Any, processor: Any):
    """Find out how a VLM reads an image in a prompt, so that packed rows read it in the same way.

    The answer goes to `vlm_token_type`, `vlm_pixel_dims` and `vlm_attention` of the configuration.

    Args:
        model: An `MMGEMModel` that began as a VLM.
        processor: The processor of the VLM, or its name, for the kinds of tokens that some VLMs tell apart; or None.
    """
    config = model.config
    if processor is not None and "token_type_ids" in inspect.signature(model.vlm.of(model).forward).parameters:
        if isinstance(processor, str):
            processor = AutoProcessor.from_pretrained(processor)
        config.vlm_token_type = _kind_of_image(processor)
    config.vlm_pixel_dims, config.vlm_attention = _image_reading(model)


@torch.compiler.disable
def check_image_reading(model: Any):
    """Make sure that a VLM reads images as the configuration says. Nothing is checked without weights, on the meta
    device, and where the configuration says that nobody knows.

    Args:
        model: An `MMGEMModel` that began as a VLM; afterwards it is as it was.

    Raises:
        ValueError: If `vlm_pixel_dims` or `vlm_attention` is not what the VLM does.
    """
    config = model.config
    if model.embedding_tokens.is_meta or config.vlm_attention == "unknown":
        return
    dims, attention = _image_reading(model)
    if (dims, attention) != (config.vlm_pixel_dims, config.vlm_attention):
        raise ValueError(
            f"`vlm_attention` is {config.vlm_attention!r} and `vlm_pixel_dims` {config.vlm_pixel_dims}, which do not "
            f"hold for this `{config.vlm_config.model_type}` with `vlm_token_type` {config.vlm_token_type}; expected "
            f"what `from_vlm` finds, here {attention!r} and {dims}."
        )


def _image_reading(model: Any) -> tuple[int, str]:
    """`vlm_pixel_dims` and `vlm_attention` of a VLM.

    The states of a prompt and of two tokens written after it, as the VLM has them, are compared with those of a packed
    row for each kind of attention.
    """
    config = model.config
    kept = config.vlm_pixel_dims, config.vlm_attention
    try:
        with at_rest(model), torch.no_grad():
            return _try_readings(model)
    finally:
        config.vlm_pixel_dims, config.vlm_attention = kept


def _try_readings(model: Any) -> tuple[int, str]:
    config, words, vlm = model.config, model.get_input_embeddings(), model.vlm.of(model)
    generator = torch.Generator().manual_seed(0)
    size = config.grid.num_channels, *config.grid.image_size
    image = torch.randn(1, *size, generator=generator).to(model.device)
    for config.vlm_pixel_dims in (4, 5):
        try:
            tokens = model._vlm_image_tokens(image)[0]  # (p, H)
            break
        except Exception:  # whatever VLMs raise
            continue
    else:
        return 4, "unknown"
    dims = config.vlm_pixel_dims
    ids = torch.randint(config.text_config.vocab_size, (4,), generator=generator).tolist()
    ids = [token if token != config.image_token_id else token - 1 for token in ids]
    prompt = torch.tensor(
        [[ids[0], *[config.image_token_id] * len(tokens), ids[1]]], device=model.device
    )  # (1, p + 2)
    is_image = prompt == config.image_token_id
    inputs = {"attention_mask": torch.ones_like(prompt)}
    inputs |= whole_images(vlm, (image if dims == 4 else image[:, None]).to(model.dtype))
    parameters = inspect.signature(vlm.forward).parameters
    if "mm_token_type_ids" in parameters:
        inputs["mm_token_type_ids"] = is_image.long()
    if "token_type_ids" in parameters:
        if config.vlm_token_type is None:
            return dims, "unknown"
        inputs["token_type_ids"] = is_image.long() * config.vlm_token_type
    for _ in ids[2:]:
        inputs = vlm._update_model_kwargs_for_generation(BaseModelOutputWithPast(), inputs)
    inputs["input_ids"] = torch.cat([prompt, prompt.new_tensor([ids[2:]])], dim=1)  # (1, p + 4)
    expected = vlm.base_model(**inputs, use_cache=False).last_hidden_state[0]  # (p + 4, H)

    embeds = words(
        inputs["input_ids"][0].masked_fill(inputs["input_ids"][0] == config.image_token_id, 0)
    )  # (p + 4, H)
    embeds[1 : 1 + len(tokens)] = tokens.to(embeds.dtype)
    place, lengths = torch.arange(len(embeds), device=model.device), torch.tensor([len(embeds)], device=model.device)
    spans = {"causal": (0, 0), "image": (1, 1 + len(tokens)), "prompt": (0, prompt.shape[1])}
    for attention, (start, stop) in spans.items():
        config.vlm_attention = attention
        blocks = torch.where((place >= start) & (place < stop), 0, -1)
        if agree(model._run_packed(embeds.clone(), lengths, blocks), expected):
            return dims, attention
    return dims, "unknown"


def _kind_of_image(processor: Any) -> int:
    """The `token_type_ids` of image tokens, where those of a text are 0."""
    image = Image.new("RGB", (64, 64), "gray")
    inputs = processor(images=[[image]], text=[f"{processor.image_token}a"], return_tensors="pt")
    return int(inputs["token_type_ids"].max())


def _free_name(module: nn.Module, name: str) -> str:
    while hasattr(module, name):
        name = f"{name}_"
    return name


def build_vlm(config: PreTrainedConfig) -> PreTrainedModel:
    """A VLM with fresh weights.

    Raises:
        ValueError: If transformers knows no such VLM, or it is an encoder-decoder.
    """
    check_vlm_config(config)
    return AutoModelForImageTextToText.from_config(config)


def check_vlm_config(config: PreTrainedConfig):
    """What a configuration says by itself.

    Raises:
        ValueError: If transformers knows no such VLM, or it is an encoder-decoder.
    """
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise _refusal(config, "is no image-text-to-text model of transformers")
    if config.is_encoder_decoder or config.get_text_config().is_encoder_decoder:
        raise _refusal(config, "has an encoder-decoder in the place of a causal language model")
    if getattr(config, "vision_config", None) is None:
        raise _refusal(config, "has no vision encoder of its own (`vision_config`)")
    if getattr(config, "image_token_id", None) is None:
        raise _refusal(config, "has no token that stands for an image (`image_token_id`)")


def _decoder(vlm: PreTrainedModel) -> PreTrainedModel:
    """What reads vectors in the place of tokens, without the vocabulary head."""
    head, decoder = vlm.get_output_embeddings(), vlm.get_decoder()
    while head is not None and any(module is head for module in decoder.modules()):
        inner = decoder.get_decoder()
        if inner is decoder:
            raise _refusal(vlm.config, "keeps its vocabulary head within its decoder")
        decoder = inner
    words = vlm.get_input_embeddings()
    if head is None or not isinstance(decoder, PreTrainedModel) or all(m is not words for m in decoder.modules()):
        raise _refusal(vlm.config, "has no decoder with embeddings of tokens and a vocabulary head")
    if any(CROSS_ATTENTION.search(name) for name, _ in decoder.named_modules()):
        raise _refusal(vlm.config, "sees its images by cross-attention")
    return decoder


def _vision_tower(vlm: PreTrainedModel) -> PreTrainedModel:
    """The vision encoder: the outermost module of that configuration."""
    kind = type(vlm.config.vision_config)
    for module in vlm.modules():
        if isinstance(module, PreTrainedModel) and type(module.config) is kind and module is not vlm:
            return module
    raise _refusal(vlm.config, f"has no module for its `vision_config`, a `{vlm.config.vision_config.model_type}`")


def _refusal(config: PreTrainedConfig, reason: str) -> ValueError:
    return ValueError(
        f"`vlm` is a `{config.model_type}`, which {reason}; expected a VLM of a vision encoder and a causal language "
        "model that reads image tokens, such as LLaVA, SmolVLM, PaliGemma, Gemma 3, InternVL."
    )


@contextmanager
def without_layers(decoder: nn.Module) -> Iterator[None]:
    """Within, a decoder answers with the vectors it is given, so that whatever runs around it can be had alone."""

    def give_back(inputs_embeds: torch.Tensor, **kwargs) -> MoeModelOutputWithPast:
        return MoeModelOutputWithPast(last_hidden_state=inputs_embeds)  # with all that some read

    decoder.forward = give_back  # type: ignore[method-assign]
    try:
        yield
    finally:
        del decoder.forward


def read_prompt(
    vlm: Any, base: Any, decoder: nn.Module, embedding_tokens: torch.Tensor, inputs: dict[str, Any]
) -> torch.Tensor:
    """The states of [EMB] vectors after prompts that a VLM reads in its own way, images included.

    Args:
        vlm: The whole VLM, which knows how to go on after a prompt.
        base: The VLM without its vocabulary head.
        decoder: Of the VLM.
        embedding_tokens: (k, H), appended to each prompt.
        inputs: As its processor makes them: `input_ids` (B, L), `attention_mask`, `pixel_values`, ...; prompts are
            padded on either side.

    Returns:
        (B, k, H).
    """
    input_ids, k = inputs["input_ids"], len(embedding_tokens)
    (batch, length), device = input_ids.shape, input_ids.device
    # Whatever has a value for each token goes on as if the VLM had written k tokens itself, one after the other.
    for _ in range(k):
        inputs = vlm._update_model_kwargs_for_generation(BaseModelOutputWithPast(), dict(inputs))
    stand_in = max(first_token_id(decoder.config.eos_token_id), 0)  # [EMB] takes its place
    inputs["input_ids"] = torch.cat([input_ids, input_ids.new_full((batch, k), stand_in)], dim=1)  # (B, L + k)
    # Padding goes to the right, so that [EMB] stands right after the prompt. No two keys are equal.
    place = torch.arange(length + k, device=device)  # (L + k,)
    order = torch.where(inputs["attention_mask"].bool(), place, place + length + k).argsort(dim=1)  # (B, L + k)
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.shape == order.shape:
            inputs[name] = value.gather(1, order)
    read_out = inputs["attention_mask"].sum(-1, keepdim=True) - k + place[:k]  # (B, k)

    def put_vectors(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        embeds = kwargs["inputs_embeds"]  # (B, L + k, H)
        vectors = embedding_tokens.to(embeds.dtype).expand(batch, -1, -1)
        places = read_out[..., None].expand_as(vectors)
        return args, {**kwargs, "inputs_embeds": embeds.scatter(1, places, vectors)}

    hook = decoder.register_forward_pre_hook(put_vectors, with_kwargs=True)
    try:
        states = base(**inputs, use_cache=False).last_hidden_state  # (B, L + k, H)
    finally:
        hook.remove()
    return states.gather(1, read_out[..., None].expand(-1, -1, states.shape[-1]))
