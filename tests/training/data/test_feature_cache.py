import copy
import pickle

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_models import build_model
from torch.utils.data import DataLoader
from transformers import EfficientNetConfig, EfficientNetModel, SiglipImageProcessorPil

from mmgem.modeling_mmgem import MMGEMModel
from mmgem.patch_grid import image_size_of
from mmgem.training.data import feature_cache
from mmgem.training.data.augmentation import Augmentation
from mmgem.training.data.collator import MMGEMCollator
from mmgem.training.data.feature_cache import (
    CachedViews,
    FeatureCache,
    MissingViews,
    check_frozen,
    feature_maker,
    fill,
)
from mmgem.training.data.sources import DatasetSource
from mmgem.training.trainer.grad_cache import split_batch

BOX = [2.0, 2.0, 20.0, 30.0]


@pytest.fixture(scope="module")
def rows():
    noise = torch.randint(256, (5, 36, 30, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = [Image.fromarray(pixels.numpy()) for pixels in noise]
    return [
        {
            "image": image,
            "captions": [f"caption {number}"],
            "boxes": [BOX],
            "region_captions": ["a region"],
            "image_id": str(number),
            "draw_seed": number,
        }
        for number, image in enumerate(images)
    ]


@pytest.fixture(scope="module")
def model():
    model = build_model().requires_grad_(True)
    model.vision_tower.requires_grad_(False)
    return model


def filled(folder, model, processor, rows, count=1, augmentation=None):
    """The cached views of rows, and how many the tower was asked for."""
    made_by = feature_maker(model.vision_tower, processor.image_processor)
    views = CachedViews(FeatureCache(folder, made_by), count, augmentation, model.config.grid)
    missing = MissingViews(views, [DatasetSource(rows)], processor.image_processor)
    asked = sum(len(missing[number]) for number in range(len(missing)))
    fill(views.cache, model.vision_tower, model.config.grid, missing, batch_size=2)
    return views, asked


@pytest.mark.parametrize("augmentation", [None, {"min_crop": 0.3}])
def test_losses_and_gradients_are_those_of_the_tower_in_the_loop(model, tiny_processor, rows, tmp_path, augmentation):
    made = None if augmentation is None else Augmentation(**augmentation)
    views, _ = filled(tmp_path, model, tiny_processor, rows, 3 if made else 1, made)
    collator = MMGEMCollator(tiny_processor, augmentation=augmentation, cached_views=views)
    cached = collator(rows)
    assert "pixel_values" not in cached and cached["patch_features"].shape == (5, 32, 4, 4)
    chosen = [views.view(row, row["image"], collator.view_number(row))[0] for row in rows]
    looped = {name: value for name, value in cached.items() if name != "patch_features"}
    images = [view.apply(row["image"]) for view, row in zip(chosen, rows, strict=True)]
    looped["pixel_values"] = tiny_processor(images=images, return_tensors="pt")["pixel_values"]
    gradients = []
    for batch in (cached, looped):
        model.zero_grad()
        outputs = model.train()(**batch)
        outputs.loss.backward()
        gradients.append((outputs.loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
    assert "boxes" in cached and (made is None or len(set(chosen)) > 1)


def test_boxes_are_on_the_grid_of_an_image_whose_edge_fills_no_patch():
    """32 pixels are 6 patches of 5 and a rest, which has no features."""
    torch.manual_seed(0)
    config = build_model().config
    config.vision_config.patch_size, config.vision_grid = 5, None
    model = MMGEMModel(config).eval()
    pixels = torch.randn(2, 3, 32, 32)
    features = model._patch_grid(pixels)
    assert features.shape[2:] == (6, 6) and image_size_of(model.config.grid, features) == (32, 32)
    boxes = torch.tensor([[[0.1, 0.2, 0.7, 0.9]]] * 2)
    texts = {"input_ids": torch.randint(2, 99, (2, 4)), "box_index": torch.zeros(2).long(), "return_loss": True}
    losses = [
        model(**texts, **images, boxes=boxes).loss
        for images in (dict(pixel_values=pixels), dict(patch_features=features))
    ]
    torch.testing.assert_close(*losses)


def test_what_there_is_is_not_computed_again(model, tiny_processor, rows, tmp_path):
    _, asked = filled(tmp_path, model, tiny_processor, rows[:3])
    assert asked == 3
    files = set(tmp_path.iterdir())
    (tmp_path / "half.partial").write_bytes(b"half a fi")  # of a run that was killed
    views, asked = filled(tmp_path, model, tiny_processor, [*rows, *rows])
    assert asked == 2 * 2 and files < set(tmp_path.iterdir())  # the rows, which come twice, are computed once
    assert len(views.cache) == 5
    assert filled(tmp_path, model, tiny_processor, rows)[1] == 0


def test_two_runs_fill_one_cache(tmp_path, monkeypatch):
    made_by = {"weights": ""}
    first, second = FeatureCache(tmp_path, made_by), FeatureCache(tmp_path, made_by)
    features = {"a": torch.arange(6.0), "b": torch.ones(2)}

    def save_late(tensors, path, metadata):
        monkeypatch.undo()
        save_file(tensors, path, metadata)
        second.add(features)  # which is there before the first has moved its own

    monkeypatch.setattr(feature_cache, "save_file", save_late)
    first.add(features)
    assert len(list(tmp_path.iterdir())) == 1
    for cache in (first, second, FeatureCache(tmp_path, made_by)):
        assert all(torch.equal(cache[key], value) for key, value in features.items())


def test_features_are_read_in_workers_and_after_pickling(model, tiny_processor, rows, tmp_path):
    views, _ = filled(tmp_path, model, tiny_processor, rows)
    collator = MMGEMCollator(tiny_processor, cached_views=views)
    expected = collator(rows)["patch_features"]
    assert torch.equal(pickle.loads(pickle.dumps(collator))(rows)["patch_features"], expected)
    loader = DataLoader(rows, batch_size=5, collate_fn=collator, num_workers=1)
    assert torch.equal(next(iter(loader))["patch_features"], expected)


def test_features_of_another_tower_or_processor_are_refused_by_name(model, tiny_processor, rows, tmp_path):
    filled(tmp_path, model, tiny_processor, rows[:1])
    other, processor = copy.deepcopy(model.vision_tower), copy.deepcopy(tiny_processor.image_processor)
    with torch.no_grad():
        other.embeddings.patch_embedding.bias[0] += 1e-6
    with pytest.raises(ValueError, match="vision tower with other weights"):
        FeatureCache(tmp_path, feature_maker(other, processor))
    otherwise = type("OtherProcessor", (SiglipImageProcessorPil,), {})(**processor.to_dict())
    with pytest.raises(ValueError, match="`image_processor_type` SiglipImageProcessorPil instead of OtherProcessor"):
        FeatureCache(tmp_path, feature_maker(model.vision_tower, otherwise))
    processor.image_mean = [0.4, 0.5, 0.5]
    with pytest.raises(ValueError, match=r"`image_mean` \[0.5, 0.5, 0.5\] instead of \[0.4"):
        FeatureCache(tmp_path, feature_maker(model.vision_tower, processor))


def test_a_damaged_file_and_a_missing_image_are_named(model, tiny_processor, rows, tmp_path):
    views, _ = filled(tmp_path, model, tiny_processor, rows[:1])
    with pytest.raises(ValueError, match="no features of 1 of 2 images"):
        MMGEMCollator(tiny_processor, cached_views=views)(rows[:2])
    [path] = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{path.name}.*damaged"):
        FeatureCache(tmp_path, views.cache.made_by)


def test_a_tower_that_trains_and_images_in_their_own_aspect_ratio_are_refused(model, tiny_processor, rows, tmp_path):
    check_frozen(model)
    with pytest.raises(ValueError, match=r"vision_tower\..* trains"):
        check_frozen(build_model())
    views = CachedViews(FeatureCache(tmp_path, {}), 1, None, model.config.grid)
    processor = copy.copy(tiny_processor.image_processor)
    processor.model_input_names = ["pixel_values", "spatial_shapes"]
    with pytest.raises(ValueError, match="aspect ratio"):
        MissingViews(views, [DatasetSource(rows)], processor)


def test_a_cached_batch_is_divided_for_gradient_caching(model, tiny_processor, rows, tmp_path):
    views, _ = filled(tmp_path, model, tiny_processor, rows)
    batch = MMGEMCollator(tiny_processor, cached_views=views)(rows)
    chunks = split_batch(batch, 2)
    assert torch.equal(torch.cat([chunk["patch_features"] for chunk in chunks]), batch["patch_features"])


def test_the_statistics_of_a_frozen_tower_stay_as_they_are():
    vision = EfficientNetModel(
        EfficientNetConfig(width_coefficient=0.1, depth_coefficient=0.1, hidden_dim=128, image_size=32)
    )
    model = MMGEMModel.from_towers(vision, build_model().language_model, num_visual_tokens=1)
    before = {name: value.clone() for name, value in model.vision_tower.state_dict().items()}
    model.train()
    assert model.vision_tower.training
    model.vision_tower.requires_grad_(False)
    model.train()
    assert model.training and model.language_model.training and not model.vision_tower.training
    model.get_image_features(torch.randn(2, 3, 32, 32))
    assert all(torch.equal(before[name], value) for name, value in model.vision_tower.state_dict().items())
