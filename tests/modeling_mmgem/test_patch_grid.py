"""Towers of every shape: the grid is the tower's own output, put where it belongs."""

import inspect
import json
from dataclasses import replace

import pytest
import torch
from families import every
from tiny_models import build_model, build_towers
from transformers import (
    AutoConfig,
    BertConfig,
    BertModel,
    GroupViTVisionConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ViTMAEConfig,
    ViTMAEModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
)
from transformers.modeling_outputs import BaseModelOutput
from vision_towers import MECHANISMS, VISION_TOWERS

from mmgem import modeling_mmgem, patch_grid
from mmgem.configuration_mmgem import MMGEMConfig
from mmgem.modeling_mmgem import MMGEMModel
from mmgem.patch_grid import check_grid, find_grid
from mmgem.pool_aggregator import roi_align
from mmgem.tower_composition import build_vision_tower
from mmgem.training.trainer.parameter_selection import freeze_unused

every_tower = pytest.mark.parametrize("name", every(VISION_TOWERS, MECHANISMS))


def images(height: int, width: int, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def compose(name: str) -> tuple[MMGEMModel, torch.nn.Module]:
    tower = VISION_TOWERS[name].build()
    return MMGEMModel.from_towers(tower, build_towers()[1], projection_dim=16, num_visual_tokens=4), tower


@every_tower
def test_what_is_found_out_is_what_is_known(name):
    known, tower = VISION_TOWERS[name], VISION_TOWERS[name].build()
    grid = find_grid(tower)
    assert (grid.layout, grid.stride, grid.any_size) == (known.layout, (known.stride,) * 2, known.any_size)
    assert (grid.prefix_tokens, grid.suffix_tokens) == (known.prefix_tokens, known.suffix_tokens)
    assert grid.hidden_size == known.expected_grid(tower, images(known.image_size, known.image_size)).shape[1]


@every_tower
def test_a_tower_of_any_shape_composes_trains_saves_and_loads(name, tmp_path, monkeypatch):
    known = VISION_TOWERS[name]
    model, tower = compose(name)
    side = known.image_size
    pixel_values = images(side, side)
    grid = model._patch_grid(pixel_values)
    torch.testing.assert_close(grid, known.expected_grid(tower, pixel_values), rtol=0, atol=1e-5)
    torch.nn.init.normal_(model.pool_aggregator.output.weight, std=0.1)

    # Other sizes and shapes, and boxes in them.
    view = pixel_values
    if known.any_size:
        view = images(2 * side, 3 * side)
        grid = model._patch_grid(view)
        assert grid.shape[2:] == (2 * side // known.stride, 3 * side // known.stride)
        torch.testing.assert_close(grid, known.expected_grid(tower, view), rtol=0, atol=1e-5)
    else:
        with pytest.raises(ValueError, match=f"expected {side} x {side}, the only size that .* takes"):
            model.get_image_features(images(2 * side, 3 * side))
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.5, 1.0]]).expand(2, -1, -1)
    tokens = model.get_image_features(view, boxes).last_hidden_state  # (2, 2, n, C)
    torch.testing.assert_close(tokens[:, 0], model.pool_aggregator(grid), rtol=0, atol=1e-5)
    half = model.pool_aggregator(roi_align(grid, boxes[:, 1:]))
    torch.testing.assert_close(tokens[:, 1], half, rtol=0, atol=1e-5)

    # A saved model knows its grid.
    expected = model.get_image_features(view).pooler_output
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(modeling_mmgem, "find_grid", None)
    loaded = MMGEMModel.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.get_image_features(view).pooler_output, expected)

    # A step moves every parameter that is not frozen as unused.
    freeze_unused(loaded)
    parameters = {n: p for n, p in loaded.vision_tower.named_parameters() if p.requires_grad}
    assert parameters
    input_ids = torch.randint(2, 300, (2, 6), generator=torch.Generator().manual_seed(2))
    loaded.train()(input_ids, pixel_values, return_loss=True).loss.backward()
    assert [n for n, p in parameters.items() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("name", ["clip", "deit", "yolos", "dinov2_with_registers"])
def test_tokens_beside_the_patches_are_left_out(name):
    """Of a tower whose tokens are marked: the patches by the mean color of their pixels, the others by 100."""
    known = VISION_TOWERS[name]
    model, tower = compose(name)
    forward = model.vision_tower.forward

    def marked(pixel_values, **kwargs):
        outputs = forward(pixel_values, **kwargs)
        colors = torch.nn.functional.avg_pool2d(pixel_values.mean(1, keepdim=True), known.stride).flatten(2).mT
        tokens = torch.full_like(outputs.last_hidden_state, 100.0)
        tokens[:, known.prefix_tokens : known.prefix_tokens + colors.shape[1]] = colors
        outputs.last_hidden_state = tokens
        return outputs

    marked.__signature__ = inspect.signature(forward)
    model.vision_tower.forward = marked
    pixel_values = images(32, 32)
    colors = torch.nn.functional.avg_pool2d(pixel_values.mean(1, keepdim=True), known.stride)
    torch.testing.assert_close(model._patch_grid(pixel_values), colors.expand(-1, 32, -1, -1))


def test_boxes_leave_out_the_pixels_that_fill_no_patch():
    """SigLIP of 38 pixels has 4 patches of 9: its grid ends at pixel 36."""
    tower = build_vision_tower(
        AutoConfig.for_model(**VISION_TOWERS["siglip"].config | {"image_size": 38, "patch_size": 9})
    )
    model = MMGEMModel.from_towers(tower, build_towers()[1], projection_dim=16, num_visual_tokens=4)
    assert model.config.grid.image_size == (38, 38) and model.config.grid.stride == (9, 9)
    pixel_values = images(38, 38)
    grid = model._patch_grid(pixel_values)
    assert grid.shape[2:] == (4, 4)
    boxes = torch.tensor([[[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 18 / 38, 36 / 38]]]).expand(2, -1, -1)
    tokens = model.get_image_features(pixel_values, boxes).last_hidden_state
    torch.testing.assert_close(tokens[:, 0], model.get_image_features(pixel_values).last_hidden_state)
    half = torch.tensor([[[0.0, 0.0, 0.5, 1.0]]]).expand(2, -1, -1)
    torch.testing.assert_close(tokens[:, 1], model.pool_aggregator(roi_align(grid, half)))


def test_towers_without_weights_that_are_configured_alike_are_run_once(monkeypatch):
    with torch.device("meta"):
        towers = [build_vision_tower(AutoConfig.for_model(**VISION_TOWERS["clip"].config)) for _ in range(2)]
    grid = find_grid(towers[0])
    monkeypatch.setattr(patch_grid, "_find_grid", None)
    assert find_grid(towers[1]) == grid
    monkeypatch.undo()
    towers[1].config.image_size *= 2
    assert find_grid(towers[1]).image_size != grid.image_size


class TimmTower(PreTrainedModel):
    """As transformers wraps a model of timm, whose own class is not installed here: it takes one size."""

    config_class = PreTrainedConfig
    main_input_name = "pixel_values"

    def __init__(self, config, model: dict, patches: dict):
        super().__init__(config)
        self.timm_model = torch.nn.Module()
        self.timm_model.patch_embed = torch.nn.Conv2d(3, 8, 8, 8)
        vars(self.timm_model).update(model)
        vars(self.timm_model.patch_embed).update(patches)
        self.post_init()

    def forward(self, pixel_values):
        assert pixel_values.shape[2:] == (40, 24)
        return BaseModelOutput(self.timm_model.patch_embed(pixel_values).flatten(2).mT)


@pytest.mark.parametrize(
    ("config", "model", "patches"),
    [
        ({"pretrained_cfg": {"input_size": [3, 40, 24]}}, {}, {}),
        ({}, {"pretrained_cfg": {"input_size": (3, 40, 24)}}, {}),
        ({}, {"pretrained_cfg": {"input_size": (3, 224, 224)}}, {"img_size": (40, 24)}),
    ],
    ids=["configuration", "architecture", "patches"],
)
def test_a_model_of_timm_says_its_size(config, model, patches):
    grid = find_grid(TimmTower(PreTrainedConfig(**config), model, patches))
    assert grid.image_size == (40, 24) and grid.stride == (8, 8) and not grid.any_size


def test_a_model_from_nothing_finds_its_grid_and_an_older_configuration_keeps_its_own(tmp_path):
    tower = VISION_TOWERS["convnext"]
    text_config = build_towers()[1].config.to_dict()
    model = MMGEMModel(MMGEMConfig(vision_config=tower.config, text_config=text_config, num_visual_tokens=4))
    assert model.config.grid.layout == "channels_first" and model.pool_aggregator.query.in_features == 32
    for name in ("clip", "siglip", "siglip2", "dinov2_with_registers"):
        model = build_model(name)
        expected, found = model.get_image_features(images(32, 32)).pooler_output, model.config.vision_grid
        model.config.vision_grid = None  # as before there was one
        model.save_pretrained(tmp_path / name)
        loaded = MMGEMModel.from_pretrained(tmp_path / name)
        assert loaded.config.vision_grid == found
        torch.testing.assert_close(loaded.get_image_features(images(32, 32)).pooler_output, expected)


@pytest.mark.parametrize(
    ("tower", "message"),
    [
        (lambda: ViTMAEModel(ViTMAEConfig(**_transformer())), "`vit_mae`, which answers the same image in two ways"),
        (
            lambda: BertModel(BertConfig(hidden_size=32, num_attention_heads=4)),
            "an encoder of im",
        ),
        (
            lambda: Wav2Vec2Model(Wav2Vec2Config(hidden_size=32, num_attention_heads=4, num_hidden_layers=1)),
            r"`wav2vec2`, which takes \['input_values'\]; expected an encoder of images",
        ),
        (lambda: group_vit(), "`groupvit_vision_model`, whose features do not change where the image does"),
        (lambda: pooling_tower(), r"features of shape \(2, 32\).*; expected a grid of patches"),
    ],
)
def test_what_has_no_grid_is_refused(tower, message):
    with pytest.raises(ValueError, match=message):
        MMGEMModel.from_towers(tower(), build_towers()[1], num_visual_tokens=4)


def _transformer() -> dict:
    return {name: value for name, value in VISION_TOWERS["vit"].config.items() if name != "model_type"}


def group_vit():
    config = _transformer() | {"depths": [1, 1, 1], "num_group_tokens": [4, 4, 0], "num_output_groups": [4, 4, 0]}
    return build_vision_tower(GroupViTVisionConfig(**config, architectures=["GroupViTVisionModel"]))


def pooling_tower():
    tower = VISION_TOWERS["vit"].build()
    forward = tower.forward

    def pooled(pixel_values, **kwargs):
        outputs = forward(pixel_values, **kwargs)
        outputs.last_hidden_state = outputs.last_hidden_state.mean(1)
        return outputs

    tower.forward = pooled
    return tower


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stride": [16, 16]}, "`vision_grid` is .*answers 2 images of 32 x 32 with features of shape"),
        ({"prefix_tokens": 0}, "`vision_grid` is .*; expected what `MMGEMModel.from_towers` finds out"),
        ({"layout": "channels_first"}, "`vision_grid` is "),
        ({"layout": "rows"}, "`vision_grid` is .*'rows'"),
        ({"stride": [0, 8]}, "`vision_grid` is .*; expected sizes above 0"),
        ({"strides": [8, 8]}, "`vision_grid` is .*'strides'"),
    ],
)
def test_a_grid_edited_by_hand_is_refused(change, message):
    model = build_model("clip")
    with pytest.raises(ValueError, match=message):
        config = MMGEMConfig(**model.config.to_dict() | {"vision_grid": model.config.vision_grid | change})
        MMGEMModel(config).get_image_features(images(32, 32))


@pytest.mark.parametrize("name", ["clip", "yolos", "dinov2_with_registers", "pixio", "dinov3_convnext"])
def test_tokens_beside_the_patches_are_looked_for_on_the_side_where_they_are(name):
    tower = VISION_TOWERS[name].build()
    grid = find_grid(tower)
    check_grid(tower, grid)
    num_beside = grid.prefix_tokens + grid.suffix_tokens
    for start in set(range(num_beside + 1)) - {grid.prefix_tokens}:  # also by as many as there are in a row
        with pytest.raises(
            ValueError, match=f"expected {grid.prefix_tokens} and {grid.suffix_tokens}, by the features"
        ):
            check_grid(tower, replace(grid, prefix_tokens=start, suffix_tokens=num_beside - start))


@pytest.mark.parametrize("name", ["clip", "convnext"])  # tokens, and a map
def test_a_stride_that_makes_as_many_patches_is_refused(name):
    """Patches would stand in other rows, or boxes be laid on other ones."""
    tower = VISION_TOWERS[name].build()
    grid = find_grid(tower)
    check_grid(tower, grid)
    down, right = grid.stride
    others = [(down - 1, right), (down, right - 1), (down // 2, 2 * right), (2 * down, right // 2)]
    for stride in [stride for stride in others if min(stride) > 0]:
        with pytest.raises(ValueError, match="`vision_grid` is "):
            check_grid(tower, replace(grid, stride=stride))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stride": [4, 16]}, r"`stride` of `vision_grid` is \(4, 16\); expected \(8, 8\), by the features"),
        ({"stride": [16, 16]}, "`vision_grid` is .*answers 2 images of 32 x 32 with features of shape"),
        (
            {"prefix_tokens": 0, "suffix_tokens": 1},
            "`prefix_tokens` .* is 0, and `suffix_tokens` 1; expected 1 and 0, by",
        ),
        ({"suffix_tokens": 2}, "`vision_grid` is .*; expected what `MMGEMModel.from_towers` finds out"),
        ({"layout": "channels_last"}, "`vision_grid` is "),
        ({"image_size": [40, 32]}, r"`image_size` of `vision_grid` is \(40, 32\); expected \(32, 32\), the tower's"),
        ({"image_size": [10**6, 10**6]}, "`image_size` of `vision_grid` is .*; expected"),
        ({"num_channels": 1}, "`num_channels` of `vision_grid` is 1; expected 3, the tower's"),
    ],
)
def test_a_grid_edited_by_hand_is_refused_when_the_model_is_loaded(tmp_path, change, message):
    build_model("clip").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_grid"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        MMGEMModel.from_pretrained(tmp_path)
