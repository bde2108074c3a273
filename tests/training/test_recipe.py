import json

import pytest
import torch
import yaml

from mmgem.modeling_mmgem import MMGEMModel
from mmgem.training.recipe import load_recipe, train

SCENES = {"scenes": {"seed": 1, "count": 8, "image_size": 48}}
# All there is of each row, so that nothing is left to a draw.
EVERYTHING = {
    "captions_per_image": 4,
    "regions_per_image": 5,
    "questions_per_image": 5,
    "long_caption_probability": 1.0,
}
TRAINING = {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 4, "disable_tqdm": True}


@pytest.fixture
def recipe():
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return {
        "model": {
            "vision_config": {"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8} | tower,
            "text_config": {"model_type": "llama", "max_position_embeddings": 512} | tower,
            "projection_dim": 8,
            "num_visual_tokens": 4,
            "attn_implementation": "eager",
        },
        "image_processor": {"size": {"height": 32, "width": 32}},
        "tokenizer": {"vocab_size": 300, "model_max_length": 400},
        "stages": [
            {"name": "first", "train_data": SCENES, "training": TRAINING},
            {"name": "second", "train_data": SCENES, "training": TRAINING, "collator": EVERYTHING},
        ],
    }


@pytest.fixture
def written(recipe, tmp_path):
    def write(**changes):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe | changes))
        return path

    return write


def weights(folder):
    return MMGEMModel.from_pretrained(folder).state_dict()


def test_a_recipe_leaves_a_whole_hub_folder(written, tmp_path):
    assert train(written(), tmp_path / "out") == {}
    names = {path.name for path in (tmp_path / "out").iterdir()}
    expected = "config.json model.safetensors tokenizer.json processor_config.json modeling_mmgem.py modules.json"
    assert set(expected.split()) <= names and {"README.md", "recipe.yaml", "results.json"} <= names
    log = json.loads((tmp_path / "out" / "training_log.json").read_text())
    assert [entry["stage"] for entry in log] == ["first", "second"]


def test_killed_runs_end_where_others_do(written, tmp_path):
    recipe = written()
    train(recipe, tmp_path / "whole")
    expected = weights(tmp_path / "whole")
    checkpoints = tmp_path / "whole" / "checkpoints"
    # Killed in the middle of the second stage, and between the two.
    for name, kept in {
        "middle": ["first/checkpoint-2", "second/checkpoint-1"],
        "between": ["first/checkpoint-2"],
    }.items():
        for checkpoint in kept:
            target = tmp_path / name / "checkpoints" / checkpoint
            target.parent.mkdir(parents=True)
            target.symlink_to(checkpoints / checkpoint)
        with pytest.raises(FileExistsError, match="resume"):
            train(recipe, tmp_path / name)
        train(recipe, tmp_path / name, resume=True)
        for key, value in weights(tmp_path / name).items():
            torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-5)


def test_evaluation_is_written_and_carded(written, tmp_path):
    metrics = train(written(eval_data=SCENES), tmp_path / "out")
    assert {"text_to_image_recall@1", "caption_fidelity", "region_recall@1", "zero_shot_accuracy"} <= set(metrics)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == metrics
    assert f"| zero_shot_accuracy | {metrics['zero_shot_accuracy']:.3f} |" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stagse": []}, "unknown key `stagse`.*Did you mean `stages`"),
        ({"stages": []}, "no section `stages`"),
        ({"stages": [{"name": "x", "training": {}}]}, "without `train_data`"),
        ({"stages": [{"nmae": "x"}]}, "Did you mean `name`"),
    ],
)
def test_mistakes_in_a_recipe_are_named(written, change, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(written(**change))


def test_a_recipe_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.yaml"):
        load_recipe(tmp_path / "nothing.yaml")


def test_data_is_named_once(written, tmp_path):
    stage = {"name": "x", "train_data": {"scenes": {}, "folder": "y"}, "training": {}}
    with pytest.raises(ValueError, match="either `scenes` or `folder`"):
        train(written(stages=[stage]), tmp_path / "out")
