import copy

import pytest
import torch
from PIL import Image
from tiny_models import build_model as tiny_model
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

from mmgem.training.recipes.recipe import load_recipe
from mmgem.training.recipes.starting_model import build_model, check_stages, prepare_for_stage, set_image_size
from mmgem.training.reconstruction.model import MMGEMForReconstruction

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


EMBEDDING = {"num_embedding_tokens": 4, "embedding_pooling": "multi_vector"}


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"num_embedding_tokens": 0, "embedding_pooling": "mean"}, {}, "`first`: .*`num_embedding_tokens` is 0"),
        ({"num_embedding_tokens": 4, "embedding_pooling": "median"}, {}, "`first`: .*embedding_pooling.*median"),
        (EMBEDDING, {"vector_groups": [[1, 1], [8, 8]]}, r"`second`: `vector_groups` .*at most .*, 4"),
        ({}, {"vector_groups": [[1, 1]]}, "`second`: .*expected 'multi_vector'"),
        ({}, {"dimensions": [4, 16]}, "`second`: `dimensions` is .*at most `projection_dim`, 8"),
    ],
)  # fmt: skip
def test_embeddings_that_the_model_will_not_have_are_found(first, second, message):
    recipe = recipe_with()
    recipe["stages"][0] |= {"embedding": first} if first else {}
    recipe["stages"][1] |= {"objective": second}
    with pytest.raises(ValueError, match=message):
        check_stages(recipe)


def test_a_stage_has_the_embeddings_of_those_before_it():
    recipe = recipe_with()
    recipe["stages"][0]["embedding"] = EMBEDDING
    recipe["stages"][1]["objective"] = {"vector_groups": [[1, 1], [4, 4]], "dimensions": [4]}
    check_stages(recipe)


@pytest.mark.parametrize(
    ("training", "attention", "message"),
    [
        ({}, "causal", "`second`: `text_attention` is 'causal'; reconstruction expects 'bidirectional'"),
        ({"train_only": ["text_projection"]}, "bidirectional", "`second`: Nothing is left to train"),
        ({"learning_rates": {"logit_scale": 1.0}}, "bidirectional", "`second`: .*`logit_scale`, where nothing trains"),
        ({"lora": {"r": 2}, "learning_rates": {"reconstruction_head": 1.0}}, "bidirectional", None),
        ({"freeze": ["reconstruction_head.pixels", "vision_tower"]}, "bidirectional", None),
    ],
)
def test_reconstruction_takes_a_bidirectional_model_and_its_own_parts(training, attention, message):
    recipe = recipe_with(**training)
    recipe["stages"][0]["text_attention"] = attention
    recipe["stages"][1]["reconstruction"] = {}
    if message is None:
        return check_stages(recipe)
    with pytest.raises(ValueError, match=message):
        check_stages(recipe)


def test_a_calibrated_checkpoint_is_not_trained_unless_read_anew(tiny_processor, tmp_path):
    model = tiny_model(calibrated_modalities=["image", "text"])
    model.save_pretrained(tmp_path)
    tiny_processor.save_pretrained(tmp_path)
    recipe = {"model": {"pretrained": str(tmp_path)}, "stages": [{"name": "first", "training": {}}]}
    with pytest.raises(ValueError, match="stage `first`: the model's embeddings are calibrated"):
        check_stages(recipe)
    recipe["stages"][0]["embedding"] = EMBEDDING
    check_stages(recipe)
    model.config.text_attention = "bidirectional"
    with pytest.raises(ValueError, match="`calibrated_modalities` is .*; expected a model that is calibrated after"):
        MMGEMForReconstruction.from_model(model)


def test_a_checkpoint_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        check_stages(recipe_with() | {"model": {"pretrained": str(tmp_path / "nowhere")}})


@pytest.mark.parametrize("name", ["mmgem-tiny", "mmgem-mini", "mmgem-coma"])
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


def test_a_stage_sets_prompts_and_embedding_tokens_and_leaves_room_for_them(tiny_processor):
    model, processor = tiny_model(), copy.deepcopy(tiny_processor)
    before = model.embedding_tokens.detach().clone()
    processor.tokenizer.model_max_length = 250
    recipe = {"model": {"attn_implementation": "eager"}, "prompts": {"query": "Find "}}
    stage = {"name": "many", "text_attention": "bidirectional", "embedding": EMBEDDING | {"num_embedding_tokens": 16}}
    prepare_for_stage(model, processor, recipe, stage)
    assert model.config.prompts == {"query": "Find "} and model.config.text_attention == "bidirectional"
    assert model.embedding_tokens.shape[0] == model.config.num_embedding_tokens == 16
    torch.testing.assert_close(model.embedding_tokens[:1], before)
    assert model.config._attn_implementation == model.language_model.config._attn_implementation == "eager"
    inputs = processor(text="star " * 400, return_tensors="pt")
    assert inputs["input_ids"].shape[1] == 256 - 16
    assert model.get_text_features(**inputs).pooler_output.shape == (1, 16, 16)


def test_the_tokenizer_learns_every_text_that_a_row_may_bring():
    rows = [
        {
            "captions": ["aaaa"],
            "long_caption": "bbbb",
            "region_captions": ["cccc"],
            "qa": [{"question": "dddd", "answer": "eeee"}],
            "hard_negatives": ["ffff"],
            "instructions": [{"text": "gggg", "box": 0}],
            "edit": {"instruction": "hhhh", "file_name": "zzzz"},
            "label": "iiii",
        },
        {"captions": ["aaaa"], "edit": None},
    ]

    class Rows(list):
        texts = list.__getitem__

    recipe = recipe_with() | {"tokenizer": {"vocab_size": 400, "model_max_length": 16}}
    _, processor = build_model(recipe, Rows(rows))
    words = processor.tokenizer.get_vocab()
    assert all(f"Ġ{letter * 4}" in words for letter in "abcdefghi")
    assert not any("zz" in word for word in words)


def test_a_recipe_changes_the_image_processor_of_a_checkpoint(checkpoint):
    recipe = {"model": {"pretrained": checkpoint}, "image_processor": {"image_mean": [0.1, 0.2, 0.3]}}
    model, processor = build_model(recipe)
    assert tuple(processor.image_processor.image_mean) == (0.1, 0.2, 0.3)
    assert processor.image_processor.size.height == 32 and model.device.type == "cpu"
