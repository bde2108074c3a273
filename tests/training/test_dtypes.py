"""The type in which a machine is faster: whichever is measured so, in which the model says the same."""

import pytest
import torch
from tiny_models import build_model
from torch import nn

from mmgem.training import dtypes
from mmgem.training.dtypes import fastest_dtype

F32, BF16 = torch.float32, torch.bfloat16
LINEAR, DEPTHWISE = (8, 4), (6, 1, 3, 3)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({(LINEAR, F32): 10, (LINEAR, BF16): 3, (DEPTHWISE, F32): 1, (DEPTHWISE, BF16): 2}, BF16),
        ({(LINEAR, F32): 10, (LINEAR, BF16): 3, (DEPTHWISE, F32): 1, (DEPTHWISE, BF16): 20}, F32),
        ({(LINEAR, F32): 10, (LINEAR, BF16): 9, (DEPTHWISE, F32): 1, (DEPTHWISE, BF16): 1}, F32),  # too little
    ],
)
def test_the_faster_type_of_the_largest_layers(monkeypatch, seconds, expected):
    monkeypatch.setattr(dtypes, "_seconds", lambda shape, dtype, device: seconds[shape, dtype])
    layers = nn.Linear(2, 2), nn.Linear(4, 8), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(9, 9, 5)
    assert fastest_dtype(nn.Sequential(*layers)) == expected


@pytest.mark.parametrize("layer", [nn.Linear(64, 64), nn.Conv2d(8, 8, 3, groups=8)])
def test_a_layer_is_measured_once(monkeypatch, layer):
    dtypes._seconds.cache_clear()
    assert fastest_dtype(nn.Sequential(nn.Linear(64, 64), layer)) in (F32, BF16)
    monkeypatch.setattr(dtypes.time, "perf_counter", None)
    fastest_dtype(nn.Sequential(nn.Linear(64, 64), layer))


def test_embeddings_in_bfloat16_are_those_in_float32():
    model, pixels, ids = build_model().eval(), torch.randn(3, 3, 32, 32), torch.randint(4, 300, (3, 9))
    before = model.get_image_features(pixels).pooler_output, model.get_text_features(ids).pooler_output
    model.to(BF16)
    after = model.get_image_features(pixels.to(BF16)).pooler_output, model.get_text_features(ids).pooler_output
    for found, expected in zip(after, before, strict=True):
        assert found.dtype == BF16
        assert torch.cosine_similarity(found.float(), expected, dim=-1).min() > 0.999
