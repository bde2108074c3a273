import copy

import pytest
import torch
from PIL import Image
from tiny_models import build_model as tiny_model
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

from mmgem.training.recipes.recipe import load_recipe
from mmgem.training.recipes.starting_model import build_model, check_stages, prepare_for_stage, set_image_size

TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def checkpoint(tiny_processor, tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_processor.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def recipe_with(**training):
    model = {
        "vision_config": {"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8} | TOWER,
        "text_config": {"model_type": "llama"} | TOWER,
        "projection_dim": 8,
        "num_visual_tokens": 4,
    }
    return {"model": model, "stages": [{"name": "first", "training": {}}, {"name": "second", "training": training}]}


@pytest.mark.parametrize(
    "training",
    [
        {"freeze": ["vision_tower", "language_model.model"]},
        {"train_only": ["image_projection"], "learning_rates": {"image_projection": 1.0}},
        {"lora": {"towers": ["vision_tower", "language_model"], "target_modules": ["q_proj"], "r": 2}},
    ],
)
def test_stages_that_fit_the_model_pass(training):
    check_stages(recipe_with(**training))


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"freeze": ["vision_towr"]}, "stage `second`: `freeze` has .*`vision_towr`.*Did you mean `vision_tower`"),
        ({"train_only": []}, "stage `second`: .*nothing to train"),
        ({"learning_rates": {"imageprojection": 1.0}}, "Did you mean `image_projection`"),
        ({"learning_rates": {"logit_scale": 1.0}, "freeze": ["logit_scale"]}, "`logit_scale`, where nothing trains"),
        ({"lora": {"target_modules": ["q_prj"]}}, "Did you mean `q_proj`"),
        ({"lora": {"bias": "all"}}, "unknown key `bias`"),
    ],
)
def test_names_that_the_model_does_not_have_are_found(training, message):
    with pytest.raises(ValueError, match=message):
        check_stages(recipe_with(**training))


def test_images_and_objectives_that_do_not_fit_the_model_are_found(checkpoint):
    recipe = recipe_with()
    recipe["stages"][1]["image_size"] = 36
    with pytest.raises(
        ValueError, match="stage `second`: `image_size` is 36; expected a multiple of the patch size 8"
    ):
        check_stages(recipe)
    with pytest.raises(ValueError, match="patch size 8"):
        check_stages(recipe | {"model": {"pretrained": checkpoint}})
    recipe["stages"][1] |= {"image_size": 40, "objective": {"loss": "sigmoid"}}
    with pytest.raises(ValueError, match="stage `second`: .*`sigmoid`.*`logit_bias_init_value`"):
        check_stages(recipe)
    recipe["model"]["logit_bias_init_value"] = -10.0
    check_stages(recipe)


def test_a_checkpoint_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        check_stages(recipe_with() | {"model": {"pretrained": str(tmp_path / "nowhere")}})


@pytest.mark.parametrize("name", ["mmgem-tiny", "mmgem-mini"])
def test_stages_of_the_repository_fit_their_models(name, pytestconfig):
    check_stages(load_recipe(pytestconfig.rootpath / "model_cards" / name / "recipe.yaml"))


@pytest.mark.parametrize(
    ("image_processor", "size", "crop"),
    [
        (SiglipImageProcessorPil(size={"height": 32, "width": 32}), {"height": 48, "width": 48}, None),
        (CLIPImageProcessorPil(), {"shortest_edge": 48}, {"height": 48, "width": 48}),
        (CLIPImageProcessorPil(size={"shortest_edge": 256}), {"shortest_edge": 55}, {"height": 48, "width": 48}),
        (
            CLIPImageProcessorPil(size={"height": 9, "width": 9}, do_center_crop=False),
            {"height": 48, "width": 48},
            None,
        ),
    ],
)
def test_image_processors_of_each_kind_change_their_size_for_good(image_processor, size, crop, tmp_path):
    image_processor = copy.deepcopy(image_processor)
    set_image_size(image_processor, 48)
    image_processor.save_pretrained(tmp_path)
    for changed in (image_processor, type(image_processor).from_pretrained(tmp_path)):
        assert {key: value for key, value in dict(changed.size).items() if value} == size
        if crop is not None:
            assert {key: value for key, value in dict(changed.crop_size).items() if value} == crop
        pixels = changed([Image.new("RGB", (90, 60))], return_tensors="pt")["pixel_values"]
        assert pixels.shape == (1, 3, 48, 48)


def test_a_stage_changes_what_it_names_and_nothing_else(tiny_processor):
    recipe = {"model": {"dtype": "bfloat16", "attn_implementation": "eager"}}
    model, processor = tiny_model(), copy.deepcopy(tiny_processor)
    before = processor.image_processor.to_dict()
    prepare_for_stage(model, processor, recipe, {"name": "first"})
    assert model.dtype == torch.bfloat16 and model.config.text_attention == "causal"
    assert model.language_model.config._attn_implementation == "eager"
    assert processor.image_processor.to_dict() == before
    prepare_for_stage(
        model, processor, {"model": {}}, {"name": "second", "image_size": 40, "text_attention": "bidirectional"}
    )
    assert model.config.text_attention == "bidirectional"
    pixels = processor(images=[Image.new("RGB", (50, 30))], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 40, 40)
    assert model.get_image_features(pixels).last_hidden_state.shape[1] == 4  # positions are interpolated


def test_a_recipe_changes_the_image_processor_of_a_checkpoint(checkpoint):
    recipe = {"model": {"pretrained": checkpoint}, "image_processor": {"image_mean": [0.1, 0.2, 0.3]}}
    model, processor = build_model(recipe)
    assert tuple(processor.image_processor.image_mean) == (0.1, 0.2, 0.3)
    assert processor.image_processor.size.height == 32 and model.device.type == "cpu"
