"""Tiny vision towers of every shape, and what is known about each from its paper and its code."""

import inspect
from dataclasses import dataclass

import torch
from transformers import AutoConfig, PreTrainedModel

from mmgem.tower_composition import build_vision_tower

_TRANSFORMER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
_WINDOWS = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "image_size": 32, "patch_size": 4}
_CONVOLUTIONS = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
# oneDNN of torch 2.13 corrupts memory in the backward pass of some 1 x 1 convolutions of stride 2 with fewer than 16
# channels, where the processor has AVX512.
_STRIDED_CONVOLUTIONS = _CONVOLUTIONS | {"hidden_sizes": [16, 16, 24, 32], "embedding_size": 16}
_PYRAMID = {**_CONVOLUTIONS, "image_size": 64, "num_attention_heads": [1, 1, 1, 2]}


@dataclass
class VisionTower:
    """A family, and where its patches are.

    Args:
        config: Fields of its configuration, which `model_type` belongs to.
        image_size: Side of the images it is tried on.
        stride: Side of a patch.
        prefix_tokens, suffix_tokens: Beside the patches, if its features are tokens.
        layout: Of its features.
        any_size: Whether it takes other sizes.
    """

    config: dict
    image_size: int = 32
    stride: int = 8
    prefix_tokens: int = 0
    suffix_tokens: int = 0
    layout: str = "tokens"
    any_size: bool = True

    def build(self) -> PreTrainedModel:
        """The tower with random weights."""
        torch.manual_seed(0)
        return build_vision_tower(AutoConfig.for_model(**self.config)).eval()

    def expected_grid(self, tower: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, C, rows, columns) features by what is known about the family."""
        kwargs = {}
        if "interpolate_pos_encoding" in inspect.signature(tower.forward).parameters:
            kwargs["interpolate_pos_encoding"] = pixel_values.shape[-2:] != (self.image_size, self.image_size)
        answers = [tower(image[None], **kwargs).last_hidden_state for image in pixel_values]  # each image alone
        features = torch.cat(answers)
        if self.layout == "channels_first":
            return features
        if self.layout == "channels_last":
            return features.permute(0, 3, 1, 2)
        height, width = (side // self.stride for side in pixel_values.shape[-2:])
        patches = features[:, self.prefix_tokens : self.prefix_tokens + height * width]
        assert features.shape[1] == self.prefix_tokens + height * width + self.suffix_tokens
        return patches.reshape(len(patches), height, width, -1).permute(0, 3, 1, 2)


def _tokens(model_type: str, prefix_tokens: int = 0, suffix_tokens: int = 0, any_size: bool = True, **config):
    config = {"model_type": model_type} | _TRANSFORMER | config
    return VisionTower(config, prefix_tokens=prefix_tokens, suffix_tokens=suffix_tokens, any_size=any_size)


def _map(model_type: str, config: dict, **known) -> VisionTower:
    known = {"image_size": 64, "stride": 32, "layout": "channels_first"} | known
    return VisionTower({"model_type": model_type} | config, **known)


# One for each mechanism, which `make test` runs.
MECHANISMS = {
    "clip": "a class token",
    "siglip": "patches alone",
    "dinov3_vit": "registers, rotary positions",
    "yolos": "tokens after the patches",
    "pixtral": "the patches of all images in one row",
    "blip": "no AutoModel",
    "aimv2": "tokens, one size",
    "sam": "a feature map, one size, inside another model",
    "swin": "tokens of merged windows",
    "dinov3_convnext": "tokens of a feature map",
    "convnext": "a feature map",
    "efficientnet": "a feature map, batch norm, depthwise convolutions",
}
VISION_TOWERS: dict[str, VisionTower] = {
    "clip": _tokens("clip_vision_model", 1),
    "siglip": _tokens("siglip_vision_model"),
    "vit": _tokens("vit", 1),
    "deit": _tokens("deit", 2),
    "beit": _tokens("beit", 1),
    "data2vec-vision": _tokens("data2vec-vision", 1),
    "dinov2": _tokens("dinov2", 1),
    "dinov2_with_registers": _tokens("dinov2_with_registers", 5),
    "dinov3_vit": _tokens("dinov3_vit", 4, num_register_tokens=3),
    "ijepa": _tokens("ijepa"),
    "pixio": _tokens("pixio", 8),
    "yolos": _tokens("yolos", 1, 6, image_size=[32, 32], num_detection_tokens=6),
    "internvl": _tokens("internvl_vision", 1, image_size=[32, 32], patch_size=[8, 8]),
    "pixtral": _tokens("pixtral"),
    "idefics3": _tokens("idefics3_vision"),
    "blip": _tokens("blip_vision_model", 1, architectures=["BlipVisionModel"]),
    "aimv2": _tokens("aimv2_vision_model", any_size=False),
    "sam": _map(
        "sam_vision_model",
        _TRANSFORMER | {"window_size": 2, "global_attn_indexes": [1], "output_channels": 16},
        image_size=32,
        stride=8,
        any_size=False,
    ),
    "vitdet": _map("vitdet", _TRANSFORMER, image_size=32, stride=8),
    "swin": VisionTower({"model_type": "swin", "window_size": 4} | _WINDOWS),
    "swinv2": VisionTower({"model_type": "swinv2", "window_size": 4} | _WINDOWS),
    "focalnet": VisionTower({"model_type": "focalnet", "focal_levels": [1, 1], "focal_windows": [3, 3]} | _WINDOWS),
    "hiera": VisionTower(
        {"model_type": "hiera", "image_size": [64, 64], "embed_dim": 8, "depths": [1] * 4, "num_heads": [1, 1, 2, 2]},
        image_size=64,
        stride=32,
    ),
    "pvt": VisionTower({"model_type": "pvt"} | _PYRAMID, image_size=64, stride=32, prefix_tokens=1, any_size=False),
    "dinov3_convnext": VisionTower(
        {"model_type": "dinov3_convnext", "image_size": 64} | _CONVOLUTIONS, 64, 32, prefix_tokens=1
    ),
    "convnext": _map("convnext", _CONVOLUTIONS | {"image_size": 64}),
    "convnextv2": _map("convnextv2", _CONVOLUTIONS | {"image_size": 64}),
    "resnet": _map("resnet", _STRIDED_CONVOLUTIONS),
    "regnet": _map("regnet", _STRIDED_CONVOLUTIONS | {"groups_width": 8}),
    "efficientnet": _map(
        "efficientnet", {"image_size": 64, "width_coefficient": 0.2, "depth_coefficient": 0.1, "hidden_dim": 256}
    ),
    "mobilenet_v1": _map("mobilenet_v1", {"depth_multiplier": 0.25, "image_size": 64}),
    "mobilenet_v2": _map("mobilenet_v2", {"depth_multiplier": 0.1, "image_size": 64}),
    "mobilevit": _map(
        "mobilevit",
        {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 24, 32, 32, 64], "image_size": 64},
    ),
    "pvt_v2": _map("pvt_v2", _PYRAMID),
    "segformer": _map("segformer", _PYRAMID),
}
