import copy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mmgem.training.recipes.recipe import first_difference, load_recipe, parse_recipe, read_yaml
from mmgem.training.recipes.validation import check_sections

CARDS = Path(__file__).parents[3] / "model_cards"
SCENES = {"scenes": {"seed": 1, "count": 8}}


@pytest.fixture
def recipe():
    return {
        "model": {
            "vision_config": {"model_type": "siglip_vision_model", "image_size": 32},
            "text_config": {"model_type": "llama", "hidden_size": 64},
            "projection_dim": 8,
        },
        "image_processor": {"size": {"height": 32, "width": 32}},
        "tokenizer": {"vocab_size": 300, "model_max_length": 400},
        "prompts": {"query": "Find the image that shows: ", "object": "Embed "},
        "generation": {"num_beams": 3, "no_repeat_ngram_size": 3},
        "eval_data": SCENES,
        "stages": [
            {"name": "first", "train_data": SCENES, "training": {"max_steps": 2, "lora": {"r": 4}}},
            {
                "name": "second",
                "image_size": 64,
                "text_attention": "bidirectional",
                "embedding": {"num_embedding_tokens": 4, "embedding_pooling": "multi_vector"},
                "train_data": [SCENES | {"weight": 2}, {"folder": "photos", "columns": {"captions": "text"}}],
                "collator": {"captions_per_image": 2},
                "objective": {"hardness": 9},
                "training": {"learning_rate": 1e-3, "learning_rates": {"vision_tower": 1}, "freeze": ["logit_scale"]},
            },
            {
                "name": "third",
                "train_data": SCENES,
                "reconstruction": {"text_mask_ratio": 0.3, "patch_loss_weight": 1},
                "training": {"max_steps": 2, "freeze": ["vision_tower"]},
            },
        ],
    }


@pytest.fixture
def load(recipe, tmp_path):
    """Loads and checks the recipe with a value at a path of keys put in; `DELETE` takes it out."""

    def load(*path, value=None):
        changed = copy.deepcopy(recipe)
        section = changed
        for key in path[:-1]:
            section = section[key]
        if value is DELETE:
            del section[path[-1]]
        elif path:
            section[path[-1]] = value
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(changed))
        loaded = load_recipe(file)
        check_sections(loaded)
        return loaded

    return load


DELETE = object()


def test_a_recipe_is_what_its_file_says(load, recipe, tmp_path):
    loaded = load()
    assert read_yaml(tmp_path / "recipe.yaml") == recipe
    for name in ("image_processor", "tokenizer", "prompts", "generation", "eval_data"):
        assert getattr(loaded, name) == recipe[name]
    assert loaded.seed == 0 and loaded.model.config == {"projection_dim": 8} and loaded.model.pretrained is None
    assert loaded.model.vision_config == recipe["model"]["vision_config"]
    first, second, third = loaded.stages
    assert [stage.kind for stage in loaded.stages] == ["objective", "objective", "reconstruction"]
    assert first.options == {} and first.train_data == [SCENES] and first.embedding is first.image_size is None
    assert second.options == {"hardness": 9} and second.train_data == recipe["stages"][1]["train_data"]
    for name in ("name", "image_size", "text_attention", "embedding", "collator", "training"):
        assert getattr(second, name) == recipe["stages"][1][name]
    assert third.options == recipe["stages"][2]["reconstruction"]


@pytest.mark.slow
def test_a_recipe_is_read_without_a_model_or_a_trainer_and_a_section_without_what_reads_it():
    """Neither libraries of data and models, nor scenes where no scenes are asked for."""
    code = (
        "import sys; from mmgem.training.data.open_source import check_section\n"
        "for section in ({'folder': 'x'}, {'parquet': 'x'}, {'dataset': 'x'}, {'webdataset': 'x'}):\n"
        "    check_section(section, 'x')\n"
        "unwanted = {'datasets', 'pyarrow', 'peft', 'transformers', 'mmgem.training.scenes', 'mmgem.modeling_mmgem'}\n"
        "print(sorted(unwanted & set(sys.modules)))\n"
        "from mmgem.training.recipes.recipe import load_recipe\n"
        "unwanted = {'peft', 'transformers', 'mmgem.modeling_mmgem', 'mmgem.training.trainer.trainer'}\n"
        "print(load_recipe(sys.argv[1]).stages[0].name, sorted(unwanted & set(sys.modules)))\n"
    )
    command = [sys.executable, "-c", code, str(CARDS / "mm-gem" / "recipe.yaml")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\nalign []\n"


@pytest.mark.parametrize("name", sorted(path.parent.name for path in CARDS.glob("*/recipe.yaml")))
def test_recipes_of_the_repository_are_valid(name):
    recipe = load_recipe(CARDS / name / "recipe.yaml")
    check_sections(recipe)
    assert all(stage.training["learning_rate"] > 0 for stage in recipe.stages)


def test_the_miniature_has_the_stages_of_mm_gem():
    mini, full = (load_recipe(CARDS / name / "recipe.yaml").stages for name in ("mmgem-mini", "mm-gem"))
    assert [stage.name for stage in mini] == [stage.name for stage in full]
    for small, large in zip(mini, full, strict=True):
        assert small.training.get("train_only") == large.training.get("train_only")
        assert (len(small.train_data) > 1) == (len(large.train_data) > 1)
        assert (small.image_size is None) == (large.image_size is None)


def test_numbers_may_be_written_without_a_point(load, tmp_path):
    file = tmp_path / "recipe.yaml"
    load()
    file.write_text(file.read_text().replace("learning_rate: 0.001", "learning_rate: 1e-3"))
    assert load_recipe(file).stages[1].training["learning_rate"] == 1e-3


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["stagse"], [], "recipe has the unknown key `stagse`.*Did you mean `stages`"),
        (["stages"], [], "no section `stages`"),
        (["stages"], {"name": "x"}, "`stages` is .*expected list"),
        (["prompts"], ["Find"], "`prompts` is .*expected dict"),
        (["prompts", "query"], 3, "`prompts` is .*expected dict"),
        (["generation"], [3], "`generation` is .*expected"),
        (["generation", "num_beans"], 3, "`generation` has the unknown key `num_beans`.*num_beams"),
        (["generation", "num_beams"], 0, "`num_beams` is 0; expected a whole number of at least 1"),
        (["generation", "num_beams"], "3", "`generation` is .*; `num_beams` is '3'"),
        (["generation", "temperature"], 0.5, "`generation` is .*temperature"),
        (["model", "prompts"], {"query": "Find"}, "`model` has the unknown key `prompts`"),
        (["seed"], "zero", "`seed` is 'zero'; expected int"),
        (["model", "projection_dmi"], 8, "`model` has .*`projection_dmi`.*Did you mean `projection_dim`"),
        (["model", "projection_dim"], "eight", "`model`: .*projection_dim.*expected int, got str"),
        (["model", "num_visual_tokens"], 5, "num_visual_tokens.*expected a square"),
        (["model", "dtype"], "float31", "`dtype` in `model` is 'float31'; expected .*'float32'"),
        (["model", "vision_config", "hidden_sise"], 8, "`vision_config` in `model` .*`hidden_sise`.*`hidden_size`"),
        (["model", "text_config", "hidden_size"], "x", "`model`: .*hidden_size.*expected int"),
        (["model", "text_config", "model_type"], "lama", "is 'lama'; expected one such as 'llama'"),
        (["model", "text_config", "model_type"], DELETE, "`text_config` in `model` .*with a `model_type`"),
        (["model", "vision_config"], DELETE, "`model` has no `vision_config`; expected `pretrained`, or"),
        (["model"], {"vision": "clip"}, "`model` has no `text`"),
        (["model"], {"vision": "clip", "text": 3}, "`text` in `model` is 3; expected str"),
        (["model"], {"pretrained": "folder", "projection_dim": 8}, "`model` has the unknown key `projection_dim`"),
        (["model"], {"pretrained": "folder"}, "recipe has a section `tokenizer`, but the model has one"),
        (["tokenizer"], DELETE, "no section `tokenizer`"),
        (["tokenizer", "vocab"], 3, "`tokenizer` has the unknown key `vocab`.*Did you mean `vocab_size`"),
        (["tokenizer", "vocab_size"], DELETE, "`tokenizer` has no `vocab_size`"),
        (["image_processor", "sise"], 32, "`image_processor` has the unknown key `sise`.*Did you mean `size`"),
        (["eval_data"], {"foldr": "x"}, "`eval_data` has the unknown key `foldr`.*Did you mean `folder`"),
        (["eval_data", "scenes", "sede"], 3, "`scenes` in `eval_data` .*`sede`.*Did you mean `seed`"),
        (["stages", 0, "nmae"], "x", "stage 1 has the unknown key `nmae`.*Did you mean `name`"),
        (["stages", 0, "train_data"], DELETE, "stage 1 comes without `train_data`"),
        (["stages", 0, "name"], "a/b", "`name` of stage 1 is 'a/b'; expected a name for a folder"),
        (["stages", 0, "name"], "second", "`stages` are called second, second, third; expected a name"),
        (["stages", 1, "image_size"], "large", "`image_size` of stage `second` is 'large'; expected int"),
        (["stages", 1, "image_size"], 0, "`image_size` of stage `second` is 0; expected 1 to 16384"),
        (["stages", 1, "text_attention"], "both", "`text_attention` of stage `second` is 'both'; expected .*'causal'"),
        (["stages", 1, "embedding", "num_tokens"], 4, "`embedding` of stage `second` .* unknown key `num_tokens`"),
        (["stages", 1, "embedding", "num_embedding_tokens"], "four", "`num_embedding_tokens` in .*expected int"),
        (["stages", 1, "embedding", "embedding_pooling"], DELETE, "`embedding` of .* has no `embedding_pooling`"),
        (["stages", 1, "train_data"], [], "`train_data` of stage `second` is an empty list"),
        (["stages", 1, "train_data", 1, "weight"], -1, "`weight` in `train_data` of stage `second` is -1"),
        (["stages", 1, "train_data", 0, "wieght"], 1, "`wieght`.*Did you mean `weight`"),
        (["stages", 1, "collator", "captions_per_imag"], 1, "`collator` of stage `second`.*`captions_per_image`"),
        (["stages", 1, "collator", "captions_per_image"], "two", "`captions_per_image` in .* is 'two'; expected int"),
        (["stages", 1, "objective", "hardnes"], 1, "`objective` of stage `second`.*Did you mean `hardness`"),
        (["stages", 1, "objective", "soft_targets"], 0.4, "`objective` of stage `second`.*exclude each other"),
        (["stages", 1, "collator", "prompts"], {}, "`collator` of stage `second` has the unknown key `prompts`"),
        (["stages", 2, "reconstruction"], None, "`reconstruction` of stage `third` is None; expected a mapping"),
        (["stages", 2, "reconstruction", "mask_ratio"], 0.3, "unknown key `mask_ratio`.*Did you mean"),
        (["stages", 2, "reconstruction", "patch_mask_ratio"], "half", "`patch_mask_ratio` in .*expected float"),
        (["stages", 2, "reconstruction", "text_mask_ratio"], 1.5, "stage `third`: `text_mask_ratio` is 1.5"),
        (["stages", 2, "objective"], {}, "`reconstruction` and `objective` of stage `third` exclude each other"),
        (["stages", 2, "training", "grad_cache_chunk_size"], 2, "`reconstruction` and `grad_cache_chunk_size` of"),
        (["stages", 2, "training", "caption_loss_weight"], 2, "`reconstruction` and `caption_loss_weight` of"),
        (["stages", 1, "training"], None, "`training` of stage `second` is None; expected a mapping"),
        (["stages", 1, "training", "max_step"], 3, "unknown key `max_step`. Did you mean `max_steps`"),
        (["stages", 1, "training", "max_steps"], "abc", "`max_steps` in .* of stage `second` is 'abc'; expected int"),
        (["stages", 1, "training", "freeze"], "vision_tower", "`freeze` in .* expected list"),
        (["stages", 1, "training", "output_dir"], "x", "unknown key `output_dir`"),
        (["stages", 1, "training", "learning_rates", "vision_tower"], "fast", "`vision_tower` in .*'fast'"),
        (["stages", 0, "training", "lora", "rank"], 4, "`lora` of stage `first` has the unknown key `rank`"),
        (["stages", 0, "training", "lora", "r"], "four", "`r` in `lora` of stage `first` is 'four'; expected int"),
    ],
)  # fmt: skip
def test_mistakes_in_a_recipe_are_named(load, path, value, message):
    with pytest.raises(ValueError, match=message):
        load(*path, value=value)


@pytest.mark.parametrize("text", ["a: [", "a\n\tb: c", "- 1", "", "\xff"])
def test_what_is_no_recipe_is_refused(text, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match="recipe"):
        load_recipe(file)


def test_a_recipe_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.yaml"):
        load_recipe(tmp_path / "nothing.yaml")


def test_stages_go_by_name_and_by_number(recipe):
    loaded = parse_recipe(recipe)
    assert [loaded.stage_number(stage) for stage in ("first", "second", 1, "2")] == [0, 1, 0, 1]
    for unknown in ("fourth", 0, 4):
        with pytest.raises(ValueError, match="expected a number from 1 to 3 or one of first, second, third"):
            loaded.stage_number(unknown)


def test_the_first_difference_is_named(recipe):
    assert first_difference(recipe, copy.deepcopy(recipe)) is None
    other = copy.deepcopy(recipe)
    other["stages"][1]["training"]["learning_rate"] = 1.0
    other["stages"][1]["training"]["freeze"] = ["vision_tower"]
    assert first_difference(recipe, other) == "`stages[1].training.learning_rate` is 1.0, was 0.001"
    del other["stages"][1]["collator"]
    assert first_difference(recipe, other) == "`stages[1].collator` is gone"
    assert first_difference(other, recipe) == "`stages[1].training.learning_rate` is 0.001, was 1.0"
    assert first_difference(recipe, recipe | {"seed": 1}) == "`seed` is new"
    assert first_difference(recipe, recipe | {"stages": []}) == "`stages` has 0 entries, had 3"
