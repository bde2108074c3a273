"""The sizes that the benchmarks of speed share, the model of that size, and a batch for it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from transformers import CLIPVisionConfig, LlamaConfig

from mmgem import MMGEMConfig, MMGEMModel

IMAGE_TOKEN_ID = 3
FIRST_WORD_ID = 4


@dataclass
class Setting:
    """By default the towers of the paper's recipe, CLIP ViT-L/14 and TinyLlama, at three eighths of their width and
    half of their depth: 256 patches, 32,000 words, a language model three times as large as the vision tower.

    Args:
        num_images: Images of a batch, one caption each.
        num_visual_tokens: Of an image, for MM-GEM.
        caption_lengths: Tokens of the shortest and the longest caption; the others lie evenly between them.
        vision, text: Fields of `CLIPVisionConfig` and `LlamaConfig`.
    """

    num_images: int = 12
    num_visual_tokens: int = 16
    caption_lengths: tuple[int, int] = (5, 60)
    projection_dim: int = 512
    vision: dict = field(
        default_factory=lambda: {
            "hidden_size": 384,
            "intermediate_size": 1536,
            "num_hidden_layers": 12,
            "num_attention_heads": 6,
            "image_size": 224,
            "patch_size": 14,
        }
    )
    text: dict = field(
        default_factory=lambda: {
            "vocab_size": 32000,
            "hidden_size": 768,
            "intermediate_size": 2112,
            "num_hidden_layers": 11,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            "max_position_embeddings": 2048,
        }
    )

    def vision_config(self) -> CLIPVisionConfig:
        return CLIPVisionConfig(**self.vision)

    def text_config(self) -> LlamaConfig:
        return LlamaConfig(**self.text, bos_token_id=None, eos_token_id=2, pad_token_id=0)

    @property
    def num_patches(self) -> int:
        return (self.vision["image_size"] // self.vision["patch_size"]) ** 2


def laptop_setting() -> Setting:
    """Towers of 10 million parameters each, the words not counted: what a processor of two cores serves."""
    shared = {"hidden_size": 320, "num_attention_heads": 5, "num_hidden_layers": 8}
    return Setting(
        num_images=4,
        projection_dim=320,
        vision=shared | {"intermediate_size": 1280, "image_size": 224, "patch_size": 16},
        text=shared
        | {"vocab_size": 8000, "intermediate_size": 864, "num_key_value_heads": 5, "max_position_embeddings": 2048},
    )


def paper_setting() -> Setting:
    """CLIP ViT-L/14 at 336 pixels and TinyLlama 1.1B, the towers of the paper: for an accelerator."""
    return Setting(
        num_images=32,
        projection_dim=768,
        vision={
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
        },
        text={
            "vocab_size": 32000,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 22,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "max_position_embeddings": 2048,
        },
    )


class Size(StrEnum):
    """Of the towers: 10 M each, three eighths of the paper's, the paper's."""

    laptop = "laptop"
    half = "half"
    paper = "paper"


SETTINGS: dict[Size, Callable[[], Setting]] = {
    Size.laptop: laptop_setting,
    Size.half: Setting,
    Size.paper: paper_setting,
}


def micro_setting() -> Setting:
    """The same in a size for tests: milliseconds."""
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return Setting(
        num_images=4,
        num_visual_tokens=4,
        caption_lengths=(3, 9),
        projection_dim=16,
        vision=vision | {"image_size": 32, "patch_size": 8},
        text=vision | {"vocab_size": 300, "num_key_value_heads": 2, "max_position_embeddings": 64},
    )


def build_model(setting: Setting, **config_kwargs) -> MMGEMModel:
    """An `MMGEMModel` with random weights, in training mode; `config_kwargs` are more fields of its configuration."""
    torch.manual_seed(0)
    config = MMGEMConfig(
        vision_config=setting.vision_config().to_dict(),
        text_config=setting.text_config().to_dict(),
        projection_dim=setting.projection_dim,
        num_visual_tokens=setting.num_visual_tokens,
        image_token_id=IMAGE_TOKEN_ID,
        **config_kwargs,
    )
    return MMGEMModel(config).train()


def build_batch(setting: Setting, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random images and captions, padded on the right: `pixel_values`, `input_ids`, `attention_mask`."""
    generator = torch.Generator().manual_seed(seed)
    size, (shortest, longest) = setting.vision["image_size"], setting.caption_lengths
    lengths = torch.linspace(shortest, longest, setting.num_images).round().long()
    lengths = lengths[torch.randperm(setting.num_images, generator=generator)]
    attention_mask = (torch.arange(longest) < lengths[:, None]).long()  # (B, L)
    words = torch.randint(
        FIRST_WORD_ID, setting.text["vocab_size"], (setting.num_images, longest), generator=generator
    )
    return {
        "pixel_values": torch.randn(setting.num_images, 3, size, size, generator=generator),
        "input_ids": words * attention_mask,
        "attention_mask": attention_mask,
    }
