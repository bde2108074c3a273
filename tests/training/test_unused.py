"""What of a tower nothing depends on is found, and nothing else."""

import pytest
import torch
from tiny_models import VISION_CONFIGS, build_model

from mmgem.training.unused import freeze_unused

UNUSED = {
    "clip": ["vision_tower.post_layernorm"],
    "siglip": ["vision_tower.head"],
    "siglip2": ["vision_tower.head"],
    "vit": ["vision_tower.pooler"],
    "dinov2": ["vision_tower.embeddings.mask_token"],
    "dinov2_with_registers": ["vision_tower.embeddings.mask_token"],
    "dinov3": ["vision_tower.embeddings.mask_token"],
}


@pytest.mark.parametrize("vision", VISION_CONFIGS)
def test_unused_parameters_are_those_without_gradient(vision, text_batch, pixel_values):
    model = build_model(vision)
    frozen = freeze_unused(model)
    assert frozen == [name for name, _ in model.named_parameters() if name.startswith(tuple(UNUSED[vision]))]
    assert frozen == [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    model(**text_batch, pixel_values=pixel_values, return_loss=True).loss.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert freeze_unused(model) == []


def test_nothing_else_about_the_model_changes():
    model = build_model("clip")
    model.vision_tower.encoder.requires_grad_(False)
    model.train()
    state, random_state = {name: t.clone() for name, t in model.state_dict().items()}, torch.get_rng_state()
    freeze_unused(model)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.vision_tower.encoder.parameters())


def test_frozen_tower_is_not_run():
    model = build_model()
    model.vision_tower.requires_grad_(False)
    model.vision_tower.forward = None
    assert freeze_unused(model) == []
