import pytest
from tiny_models import build_model as tiny_model

from mmgem.training.recipes.recipe import load_recipe, parse_recipe
from mmgem.training.recipes.validation import check_sections, check_stages
from mmgem.training.reconstruction.model import MMGEMForReconstruction

TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SCENES = {"scenes": {"seed": 1, "count": 8}}


def check(sections):
    check_stages(parse_recipe(sections))


def recipe_with(**training):
    model = {
        "vision_config": {"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8} | TOWER,
        "text_config": {"model_type": "llama", "max_position_embeddings": 256} | TOWER,
        "projection_dim": 8,
        "num_visual_tokens": 4,
    }
    stages = [
        {"name": name, "train_data": SCENES, "training": arguments}
        for name, arguments in (("first", {}), ("second", training))
    ]
    return {
        "model": model,
        "tokenizer": {"vocab_size": 300, "model_max_length": 16},
        "image_processor": {},
        "stages": stages,
    }


def recipe_from(checkpoint, **sections):
    """A recipe of one stage that starts from a checkpoint."""
    stage = {"name": "first", "train_data": SCENES, "training": {}} | sections
    return {"model": {"pretrained": str(checkpoint)}, "stages": [stage]}


@pytest.mark.parametrize(
    "training",
    [
        {"freeze": ["vision_tower", "language_model.model"]},
        {"train_only": ["image_projection"], "learning_rates": {"image_projection": 1.0}},
        {"lora": {"towers": ["vision_tower", "language_model"], "target_modules": ["q_proj"], "r": 2}},
    ],
)
def test_stages_that_fit_the_model_pass(training):
    check(recipe_with(**training))


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
        check(recipe_with(**training))


def test_images_and_objectives_that_do_not_fit_the_model_are_found(tmp_path):
    recipe = recipe_with()
    recipe["stages"][1]["image_size"] = 36
    with pytest.raises(
        ValueError, match="stage `second`: `image_size` is 36; expected a multiple of the patch size 8 x 8"
    ):
        check(recipe)
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="patch size 8"):
        check(recipe_from(tmp_path, image_size=36))
    recipe["stages"][1] |= {"image_size": 40, "objective": {"loss": "sigmoid"}}
    with pytest.raises(ValueError, match="stage `second`: `logit_bias_init_value` is None; .*`sigmoid`"):
        check(recipe)
    recipe["model"]["logit_bias_init_value"] = -10.0
    check(recipe)


EMBEDDING = {"num_embedding_tokens": 4, "embedding_pooling": "multi_vector"}


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"num_embedding_tokens": 0, "embedding_pooling": "mean"}, {}, "`first`: .*`num_embedding_tokens` is 0"),
        ({"num_embedding_tokens": 4, "embedding_pooling": "median"}, {}, "`first`: .*embedding_pooling.*median"),
        ({"num_embedding_tokens": 252, "embedding_pooling": "mean"}, {}, "`first`: .*4 beside 252 .*the 256 tokens"),
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
        check(recipe)


def test_a_stage_has_the_embeddings_of_those_before_it():
    recipe = recipe_with()
    recipe["stages"][0]["embedding"] = EMBEDDING
    recipe["stages"][1]["objective"] = {"vector_groups": [[1, 1], [4, 4]], "dimensions": [4]}
    check(recipe)


@pytest.mark.parametrize(
    ("training", "attention", "message"),
    [
        ({}, "causal", "`second`: `text_attention` is 'causal'; expected 'bidirectional'"),
        ({"train_only": ["text_projection"]}, "bidirectional", "`second`: nothing is left to train"),
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
        return check(recipe)
    with pytest.raises(ValueError, match=message):
        check(recipe)


ALIGNED = {
    "cache_features": {"texts": True},
    "objective": {"fusemix": 1.0, "structure": 10},
    "collator": {"regions_per_image": 0},
    "training": {
        "caption_loss_weight": 0,
        "train_only": ["pool_aggregator", "image_projection", "text_projection", "logit_scale"],
    },
}


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("training", {}, None),
        ("training", {"caption_loss_weight": 0.5}, "the language model learns to write"),
        ("training", {"train_only": ["text_projection", "embedding_tokens"]}, "`embedding_tokens` trains; expected"),
        ("training", {"train_only": ["image_projection", "language_model"]}, "`language_model.* trains; expected"),
        ("collator", {"regions_per_image": 1}, "`fusemix` .* mixes whole images .*`regions_per_image` 1; expected 0"),
        ("collator", {"hard_negatives_per_image": 1}, "`hard_negatives_per_image` 1; expected 0"),
        ("collator", {"edits_per_image": 1}, "`edits_per_image` is 1, for which the language model runs"),
        ("objective", {"soft_targets": 0.1, "teacher": {"pretrained": "x"}}, "`teacher` has a tower of its own"),
    ],
)
def test_what_cached_texts_cannot_train_is_refused(section, changes, message):
    recipe = recipe_with()
    recipe["stages"][1] |= ALIGNED | {section: ALIGNED[section] | changes}

    def check_all():
        check_sections(parse_recipe(recipe))
        check(recipe)

    if message is None:
        return check_all()
    with pytest.raises(ValueError, match=message):
        check_all()


def test_a_calibrated_checkpoint_is_not_trained_unless_read_anew(tmp_path):
    model = tiny_model(calibrated_modalities=["image", "text"])
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="stage `first`: the model's embeddings are calibrated"):
        check(recipe_from(tmp_path))
    check(recipe_from(tmp_path, embedding=EMBEDDING))
    model.config.text_attention = "bidirectional"
    with pytest.raises(ValueError, match="`calibrated_modalities` is .*; expected a model that is calibrated after"):
        MMGEMForReconstruction.from_model(model)


def test_a_checkpoint_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        check(recipe_from(tmp_path / "nowhere"))


@pytest.mark.parametrize("name", ["mmgem-tiny", "mmgem-mini", "mmgem-coma"])
def test_stages_of_the_repository_fit_their_models(name, pytestconfig):
    check_stages(load_recipe(pytestconfig.rootpath / "model_cards" / name / "recipe.yaml"))


def test_the_prompt_of_a_source_is_one_of_the_model():
    sections = recipe_with() | {"prompts": {"query": "find: "}}
    sections["stages"][1]["train_data"] = SCENES | {"prompt_name": "query"}
    check(sections)
    sections["stages"][1]["train_data"] = SCENES | {"prompt_name": "ask"}
    with pytest.raises(ValueError, match="`prompt_name` of `train_data` is 'ask'; expected one of query"):
        check(sections)
