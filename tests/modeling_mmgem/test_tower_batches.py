"""A vision tower on a CPU runs over a few images at a time, and its features stay what they are."""

import pytest
import torch
from tiny_models import VISION_CONFIGS, build_model

from mmgem import tower_batches
from mmgem.modeling_mmgem import MMGEMModel


@pytest.fixture
def runs(monkeypatch):
    """The number of images of each run of the tower of a model, and no memory for two images."""
    monkeypatch.setattr(tower_batches, "REUSED_BYTES", 1)
    counts = []

    def watch(model):
        model.vision_tower.register_forward_pre_hook(
            lambda module, args, kwargs: counts.append(len(args[0] if args else kwargs["pixel_values"])),
            with_kwargs=True,
        )
        return counts

    return watch


@pytest.mark.parametrize("vision", sorted(VISION_CONFIGS))
@torch.no_grad()
def test_features_are_those_of_all_images_at_once(vision, runs, monkeypatch):
    model = build_model(vision)
    counts = runs(model)
    size = model.config.grid.image_size
    pixel_values = torch.randn(3, model.config.grid.num_channels, *size, generator=torch.Generator().manual_seed(0))
    expected = model.get_image_features(pixel_values).pooler_output
    split = model.get_image_features(pixel_values).pooler_output
    assert counts == [3, 1, 1, 1]
    torch.testing.assert_close(split, expected, rtol=0, atol=1e-5)
    monkeypatch.setattr(tower_batches, "REUSED_BYTES", 1 << 30)
    model.get_image_features(pixel_values)
    assert counts[4:] == [3]


def test_all_images_run_at_once_where_it_matters(runs, pixel_values):
    model = build_model()
    counts = runs(model)
    with torch.no_grad():
        model.get_image_features(pixel_values)
    model.get_image_features(pixel_values).pooler_output.sum().backward()
    with torch.no_grad():
        model.train().get_image_features(pixel_values)
    assert counts == [len(pixel_values)] * 3


@torch.no_grad()
def test_as_many_images_run_as_keep_the_largest_tensor_small(runs, pixel_values, monkeypatch):
    model = build_model()
    counts = runs(model)
    images = pixel_values[:1].repeat(7, 1, 1, 1)
    model.get_image_features(images)
    [largest] = tower_batches._bytes_of_image[model.vision_tower].values()
    hidden = model.config.vision_config
    rows, columns = (side // hidden.patch_size for side in images.shape[2:])
    assert largest == rows * columns * hidden.intermediate_size * 4
    monkeypatch.setattr(tower_batches, "REUSED_BYTES", 3 * largest)
    model.get_image_features(images)
    assert counts == [7, 3, 3, 1]


@torch.no_grad()
def test_the_check_of_a_checkpoint_tells_how_large_they_are(runs, pixel_values, tmp_path):
    build_model().save_pretrained(tmp_path)
    model = MMGEMModel.from_pretrained(tmp_path).eval()
    counts = runs(model)
    model.get_image_features(pixel_values)
    assert counts == [1] * len(pixel_values)
