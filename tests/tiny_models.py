"""Tiny random towers and models, built from configs in milliseconds."""

import copy
import io
import pickle
from typing import NamedTuple

import torch
from language_models import LLAMA
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CohereConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    Qwen3Config,
    Siglip2VisionConfig,
    SiglipVisionConfig,
    ViTConfig,
)

from mmgem.configuration_mmgem import MMGEMConfig
from mmgem.modeling_mmgem import MMGEMModel

IMAGE_SIZE = 32
TEXTS = ["a red star at the top left", "a large blue circle in the center and a striped green moon on the right"]

_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": IMAGE_SIZE,
    "patch_size": 8,
}
VISION_CONFIGS = {
    "clip": lambda: CLIPVisionConfig(**_VISION),
    "siglip": lambda: SiglipVisionConfig(**_VISION),
    "siglip2": lambda: Siglip2VisionConfig(**_VISION, num_patches=16),
    "vit": lambda: ViTConfig(**_VISION),
    "dinov2": lambda: Dinov2Config(**_VISION),
    "dinov2_with_registers": lambda: Dinov2WithRegistersConfig(**_VISION),
    "dinov3": lambda: DINOv3ViTConfig(**_VISION),
}
TEXT_CONFIGS = {
    "llama": lambda: LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**LLAMA, head_dim=8),
    "gemma3": lambda: Gemma3TextConfig(**LLAMA, head_dim=8, sliding_window=16),
    "gemma2": lambda: Gemma2Config(**LLAMA, head_dim=8, final_logit_softcapping=0.5),
    "granite": lambda: GraniteConfig(**LLAMA, logits_scaling=3.0),
    "cohere": lambda: CohereConfig(**LLAMA, logit_scale=0.25),
    "gpt2": lambda: GPT2Config(
        vocab_size=300, n_positions=256, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    ),
}


def build_towers(vision: str = "siglip", text: str = "llama"):
    """Random towers by the names of `VISION_CONFIGS` and `TEXT_CONFIGS`."""
    torch.manual_seed(0)
    vision_tower = AutoModel.from_config(VISION_CONFIGS[vision]())
    language_model = AutoModelForCausalLM.from_config(TEXT_CONFIGS[text]())
    return vision_tower.eval(), language_model.eval()


class _Built(NamedTuple):
    """A model without its tensors, pickled, which is copied in a third of the time of `copy.deepcopy`; its tensors,
    and the state of the random numbers after it was built."""

    pickled: bytes
    tensors: list[torch.Tensor]
    random_state: torch.Tensor

    @classmethod
    def of(cls, model: MMGEMModel, random_state: torch.Tensor) -> "_Built":
        numbers: dict[int, int] = {}
        tensors: list[torch.Tensor] = []

        def number_of(item):
            if isinstance(item, torch.Tensor) and id(item) not in numbers:
                numbers[id(item)] = len(tensors)
                tensors.append(item)
            return numbers.get(id(item)) if isinstance(item, torch.Tensor) else None

        file = io.BytesIO()
        pickler = pickle.Pickler(file)
        pickler.persistent_id = number_of  # type: ignore[method-assign]
        pickler.dump(model)
        return cls(file.getvalue(), tensors, random_state)

    def copy(self) -> MMGEMModel:
        unpickler = pickle.Unpickler(io.BytesIO(self.pickled))
        tensors = copy.deepcopy(self.tensors)
        unpickler.persistent_load = tensors.__getitem__  # type: ignore[method-assign]
        return unpickler.load()


_built: dict[str, _Built] = {}


def build_model(vision: str = "siglip", text: str = "llama", layers: int | None = None, **config_kwargs) -> MMGEMModel:
    """A random model whose aggregator attends, as a trained one does. Its towers have two `layers` by default.

    It is a copy of one that is built once and has checked how its language model reads, which takes longer.
    """
    name = repr((vision, text, layers, sorted(config_kwargs.items())))
    if name not in _built:
        model = _build_model(vision, text, {} if layers is None else {"num_hidden_layers": layers}, **config_kwargs)
        random_state = torch.get_rng_state()
        model._check_reading()
        _built[name] = _Built.of(model, random_state)
    torch.set_rng_state(_built[name].random_state)
    return _built[name].copy()


def _build_model(vision: str, text: str, changes: dict, **config_kwargs) -> MMGEMModel:
    torch.manual_seed(0)
    config = {"projection_dim": 16, "num_visual_tokens": 4, "image_token_id": 1} | config_kwargs
    towers = {
        "vision_config": VISION_CONFIGS[vision]().to_dict() | changes,
        "text_config": TEXT_CONFIGS[text]().to_dict() | changes,
    }
    model = MMGEMModel(MMGEMConfig(**towers, **config))
    torch.nn.init.normal_(model.pool_aggregator.output.weight, std=0.1)
    return model.eval()
