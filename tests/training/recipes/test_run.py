import copy
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from gguf_files import write_gguf
from image_folders import write_noise
from PIL import Image
from safetensors.torch import load_file
from tiny_models import build_towers
from transformers import SiglipImageProcessorPil

from mmgem.modeling_mmgem import MMGEMModel
from mmgem.processing.processing_mmgem import MMGEMProcessor
from mmgem.training.data import mixture as mixture_module
from mmgem.training.data.skipped import SkippedLog
from mmgem.training.recipes.recipe import ModelSection, Recipe, Stage
from mmgem.training.recipes.run import train
from mmgem.training.recipes.stage import open_sources, stage_arguments, stage_rows
from mmgem.training.trainer.lora import load_lora

pytestmark = pytest.mark.usefixtures("short_answers")

SCENES = {"scenes": {"seed": 1, "count": 16, "image_size": 48}}
TRAINING = {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 4, "disable_tqdm": True}
UNSAVED = TRAINING | {"save_strategy": "no"}  # of runs whose checkpoints nobody looks at
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


RECIPE = {
    "model": {
        "vision_config": {"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8} | TOWER,
        "text_config": {"model_type": "llama", "max_position_embeddings": 512, "attention_dropout": 0.1} | TOWER,
        "projection_dim": 8,
        "num_visual_tokens": 4,
        "attn_implementation": "eager",
    },
    "image_processor": {"size": {"height": 32, "width": 32}},
    "tokenizer": {"vocab_size": 300, "model_max_length": 400},
    "stages": [
        {"name": "first", "train_data": SCENES, "training": TRAINING},
        {
            "name": "second",
            "image_size": 48,
            "text_attention": "bidirectional",
            "train_data": SCENES,
            "training": TRAINING | {"max_steps": 3, "ema_decay": 0.9, "lora": {"r": 2, "lora_dropout": 0.1}},
        },
    ],
}


@pytest.fixture
def recipe():
    return copy.deepcopy(RECIPE)


@pytest.fixture
def write(recipe, tmp_path):
    def write(name="recipe.yaml", **changes):
        (tmp_path / name).write_text(yaml.safe_dump(recipe | changes))
        return tmp_path / name

    return write


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    train(folder / "recipe.yaml", folder / "out")
    return folder / "out"


def weights(folder):
    return MMGEMModel.from_pretrained(folder).state_dict()


def assert_same_weights(folder, other, atol=1e-6):
    expected = weights(other)
    for name, value in weights(folder).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mmgem-tiny", "mmgem-coma"])
def test_the_recipes_of_the_repository_run_from_beginning_to_end(name, pytestconfig, tmp_path, monkeypatch):
    monkeypatch.chdir(pytestconfig.rootpath)  # where `pretrained` begins
    recipe = yaml.safe_load(Path("model_cards", name, "recipe.yaml").read_text())
    del recipe["eval_data"]
    short = UNSAVED | {"warmup_steps": 0, "logging_steps": 1, "dataloader_num_workers": 0, "bf16": False}
    for stage in recipe["stages"]:
        stage["training"] |= short
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    out = train(tmp_path / "recipe.yaml", tmp_path / "out").model
    log = json.loads((out / "training_log.json").read_text())
    assert [entry["stage"] for entry in log if "loss" in entry] == [s["name"] for s in recipe["stages"] for _ in "12"]
    assert all(math.isfinite(float(entry["loss"])) and float(entry["loss"]) > 0 for entry in log if "loss" in entry)


# What the recipes of mmgem-photo name, and where it is in the test.
PLACES = {
    "../shared/photos": "",
    "runs/towers": "towers",
    "runs/mmgem-photo-mean": "out",
    "model_cards/mmgem-photo": "out",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["recipe.yaml", "recipe_gpu.yaml"])
def test_the_recipes_of_mmgem_photo_run_on_any_folder_of_the_same_form(name, pytestconfig, tmp_path):
    def shortened(name):
        text = Path(pytestconfig.rootpath, "model_cards", "mmgem-photo", name).read_text()
        for old, new in PLACES.items():
            text = text.replace(old, str(tmp_path / new))
        recipe = yaml.safe_load(text)
        for stage in recipe["stages"]:
            stage["training"] |= UNSAVED | {"warmup_steps": 0, "logging_steps": 1, "dataloader_num_workers": 0}
            stage["training"].pop("bf16", None)
        for source in [recipe["eval_data"], *(source for stage in recipe["stages"] for source in stage["train_data"])]:
            source.pop("subset", None)  # of which six images may have none
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        return recipe

    recipe = shortened(name)
    (tmp_path / "captions.txt").write_text("a dog runs\na cat sleeps\n")
    vision, language = Path(recipe["model"]["vision"]), Path(recipe["model"]["text"])
    build_towers()[0].save_pretrained(vision)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(vision)
    language.mkdir(parents=True)
    write_gguf(language / recipe["model"]["gguf_file"], num_layers=5)
    boxed = {"boxes": [[0, 0, 20, 20], [4, 4, 40, 30]], "region_captions": ["the sky", "a dog"]}
    words = {
        "captions_de": ["ein Hund"],
        "captions_zh": ["\u72d7"],
        "captions_fr": ["un chien"],
        "captions_cs": ["pes"],
    }
    for split, fields in {
        "flickr8k/train": {"captions": ["a dog runs"] * 5} | boxed | words,
        "flickr8k/val": {"captions": ["a dog runs"] * 5} | boxed | words,
        "daquar/train": {"qa": [{"question": "what is it?", "answer": "a chair"}]},
    }.items():
        for number in range(6):
            write_noise(tmp_path / split / f"{number}.png", number)
        lines = [json.dumps({"file_name": f"{number}.png"} | fields) for number in range(6)]
        (tmp_path / split / "metadata.jsonl").write_text("\n".join(lines))
    report = train(tmp_path / "recipe.yaml", tmp_path / "out")
    assert {"text_to_image_recall@1_zh", "region_in_image_recall@1", "caption_most_repeated"} <= report.metrics.keys()
    config = MMGEMModel.from_pretrained(report.model).config
    assert config.text_config.num_hidden_layers == recipe["model"]["num_hidden_layers"]
    keeps_features = any(stage.get("cache_features") for stage in recipe["stages"])
    assert not report.skipped and any((tmp_path / "out").glob("feature_cache/*/*")) == keeps_features
    after, figure = {
        "recipe.yaml": ("recipe_answers.yaml", "answer_accuracy"),
        "recipe_gpu.yaml": ("recipe_gpu_rewarded.yaml", "caption_reward"),
    }[name]
    shortened(after)
    report = train(tmp_path / "recipe.yaml", tmp_path / "after")
    log = json.loads((report.model / "training_log.json").read_text())
    assert figure in report.metrics.keys() | log[0].keys() and not report.skipped


@pytest.mark.slow
def test_a_run_on_cached_features_learns_what_one_with_the_tower_in_the_loop_does(write, tmp_path):
    stage = {"name": "only", "train_data": SCENES, "training": UNSAVED | {"freeze": ["vision_tower"]}}
    resized = stage | {"name": "resized", "image_size": 48}
    cached = [each | {"cache_features": True} for each in (stage, stage | {"name": "again"}, resized)]
    train(write(stages=[stage, stage | {"name": "again"}, resized]), tmp_path / "looped")
    train(write(stages=cached), tmp_path / "cached")
    logs = [json.loads((tmp_path / name / "training_log.json").read_text()) for name in ("cached", "looped")]
    assert [entry["train_loss"] for entry in logs[0]] == pytest.approx([e["train_loss"] for e in logs[1]], rel=1e-5)
    assert_same_weights(tmp_path / "cached", tmp_path / "looped", atol=1e-4)  # rounding, which Adam makes more of
    folders = [path for path in (tmp_path / "cached" / "feature_cache").iterdir() if any(path.iterdir())]
    assert len(folders) == 2  # the second stage used what the first one had computed


@pytest.mark.slow
def test_projections_learn_from_cached_features_of_both_towers_what_they_do_with_these_in_the_loop(
    write, recipe, tmp_path
):
    recipe["model"]["text_config"]["attention_dropout"] = 0.0  # which cached states have not
    parts = ["pool_aggregator", "image_projection", "text_projection", "logit_scale"]
    training = TRAINING | {"train_only": parts, "caption_loss_weight": 0}
    stage = {"name": "only", "train_data": SCENES, "training": training}
    mixed = stage | {"name": "mixed", "objective": {"fusemix": 1.0, "structure": 1.0, "structure_levels": 2}}
    mixed |= {"collator": {"regions_per_image": 0}, "cache_features": {"texts": True}}
    train(write(stages=[stage]), tmp_path / "looped")
    train(write(stages=[stage | {"cache_features": {"texts": True}}, mixed]), tmp_path / "cached")
    logs = [json.loads((tmp_path / name / "training_log.json").read_text()) for name in ("cached", "looped")]
    cached, looped = ([entry["train_loss"] for entry in log if entry["stage"] == "only"] for log in logs)
    assert cached == pytest.approx(looped, rel=1e-5) and len(cached) == 1
    one, other = (weights(tmp_path / "cached" / "stages" / name) for name in ("only", "mixed"))
    assert {name.partition(".")[0] for name in one if not torch.equal(one[name], other[name])} <= set(parts)
    assert not torch.equal(one["text_projection.weight"], other["text_projection.weight"])
    assert len([*(tmp_path / "cached" / "feature_cache").iterdir()]) == 2  # of images, and of texts


@pytest.mark.slow
def test_a_run_leaves_a_whole_hub_folder_and_one_for_each_stage(whole, recipe):
    names = {path.name for path in whole.iterdir()}
    expected = "config.json model.safetensors tokenizer.json processor_config.json modeling_mmgem.py modules.json"
    assert set(expected.split()) <= names and {"README.md", "recipe.yaml", "results.json"} <= names
    assert yaml.safe_load((whole / "recipe.yaml").read_text()) == recipe
    log = json.loads((whole / "training_log.json").read_text())
    assert [entry["stage"] for entry in log] == ["first", "second"]

    sizes = []
    for folder, attention in [("stages/first", "causal"), ("stages/second", "bidirectional"), ("", "bidirectional")]:
        assert MMGEMModel.from_pretrained(whole / folder).config.text_attention == attention
        sizes.append(MMGEMProcessor.from_pretrained(whole / folder).image_processor.size.height)
    assert sizes == [32, 48, 48]
    assert_same_weights(whole, whole / "stages" / "second")
    assert not torch.equal(weights(whole)["logit_scale"], weights(whole / "stages" / "first")["logit_scale"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "kept",
    [
        ["checkpoints/first/checkpoint-1"],
        ["checkpoints/first/checkpoint-2"],  # between the last step and the end of the stage
        ["checkpoints/first/checkpoint-2", "stages/first"],
        ["stages/first", "checkpoints/second/checkpoint-1"],
        ["stages/first", "checkpoints/second/checkpoint-3"],
        ["stages/first", "stages/second"],
    ],
)
def test_a_killed_run_ends_where_it_would_have(whole, write, tmp_path, kept):
    killed = tmp_path / "killed"
    for folder in kept:
        shutil.copytree(whole / folder, killed / folder)
    shutil.copy(whole / "recipe.yaml", killed)
    with pytest.raises(FileExistsError, match="resume"):
        train(write(), killed)
    train(write(), killed, resume=True)
    assert_same_weights(killed, whole)
    for stage in ("first", "second"):  # neither a step more nor a step less
        log = json.loads((killed / "stages" / stage / "training_log.json").read_text())
        assert log[-1]["step"] == json.loads((whole / "stages" / stage / "training_log.json").read_text())[-1]["step"]


@pytest.mark.slow
def test_rows_that_were_trained_on_are_not_read_again(whole, write, tmp_path, monkeypatch):
    killed = tmp_path / "killed"
    shutil.copytree(whole / "stages" / "first", killed / "stages" / "first")
    shutil.copytree(whole / "checkpoints/second/checkpoint-2", killed / "checkpoints/second/checkpoint-2")
    read = []
    original = mixture_module.Mixture.__getitem__

    def noting(self, position):
        read.append(position)
        return original(self, position)

    monkeypatch.setattr(mixture_module.Mixture, "__getitem__", noting)
    train(write(), killed, resume=True)
    assert sorted(read) == [8, 9, 10, 11]


@pytest.mark.slow
def test_stages_run_one_at_a_time(whole, write, recipe, tmp_path):
    for stage in recipe["stages"]:
        stage["training"]["save_strategy"] = "no"
    recipe, out = write(), tmp_path / "single"
    with pytest.raises(FileNotFoundError, match="stage `second` begins where `first` ends"):
        train(recipe, out, stage="second")
    report = train(recipe, out, stage=1)
    assert report.model == out / "stages" / "first" and not (out / "model.safetensors").exists()
    with pytest.raises(FileExistsError, match="stage `first`"):
        train(recipe, out, stage=1)
    assert train(recipe, out, stage="second").model == out
    assert_same_weights(out, whole)


@pytest.mark.slow
def test_another_recipe_is_not_gone_on_with(whole, write, recipe):
    recipe["stages"][1]["training"]["learning_rate"] = 1.0
    for options in ({"resume": True}, {"stage": 2}):
        with pytest.raises(ValueError, match=r"another recipe: `stages\[1\].training.learning_rate` is new"):
            train(write("other.yaml"), whole, **options)


@pytest.mark.slow
def test_a_finished_run_is_not_run_again(whole, write, monkeypatch):
    monkeypatch.setattr("mmgem.training.recipes.run._run_stage", None)
    monkeypatch.setattr("mmgem.training.recipes.run._finish", None)
    assert train(write(), whole, resume=True).model == whole


@pytest.mark.slow
def test_lora_is_merged_and_its_adapter_kept(write, recipe, tmp_path):
    recipe["stages"][0]["training"] = UNSAVED | {"lora": {"r": 2}, "learning_rate": 0.01}
    train(write(), tmp_path / "out", stage="first")
    folder = tmp_path / "out" / "stages" / "first"
    recipe["stages"][0]["training"] = UNSAVED | {"learning_rate": 0.0}
    before = train(write("still.yaml"), tmp_path / "still", stage="first").model
    merged = load_lora(MMGEMModel.from_pretrained(before), folder / "adapter").state_dict()
    assert all(torch.allclose(merged[name], tensor, atol=1e-6) for name, tensor in weights(folder).items())
    name = "language_model.model.layers.0.self_attn.q_proj.weight"
    difference = weights(folder)[name] - weights(before)[name]
    assert 0 < torch.linalg.matrix_rank(difference) <= 2


@pytest.fixture
def in_two_steps(recipe):
    """A recipe that first puts back what is masked, and then embeds with several vectors."""
    groups = {"vector_groups": [[1, 1], [4, 4]]}
    recipe["stages"] = [
        {
            "name": "first",
            "text_attention": "bidirectional",
            "train_data": SCENES,
            "reconstruction": {"text_mask_ratio": 0.3},
            "training": TRAINING | {"learning_rate": 0.01, "logging_steps": 1},
        },
        {
            "name": "second",
            "embedding": {"num_embedding_tokens": 4, "embedding_pooling": "multi_vector"},
            "train_data": SCENES,
            "objective": groups,
            "training": TRAINING | {"logging_steps": 1},
        },
    ]
    return recipe | {"prompts": {"query": "Find the image that shows: "}, "generation": {"num_beams": 2}}


@pytest.mark.slow
def test_a_stage_may_put_back_what_is_masked(in_two_steps, write, tmp_path):
    whole = train(write(**in_two_steps), tmp_path / "whole").model
    for folder, count, pooling in (
        ("stages/first", 1, "last"),
        ("stages/second", 4, "multi_vector"),
        ("", 4, "multi_vector"),
    ):
        config = json.loads((whole / folder / "config.json").read_text())
        assert config["architectures"] == ["MMGEMModel"] and config["text_attention"] == "bidirectional"
        assert (config["num_embedding_tokens"], config["embedding_pooling"]) == (count, pooling)
        assert config["prompts"] == in_two_steps["prompts"]
        assert json.loads((whole / folder / "generation_config.json").read_text())["num_beams"] == 2
        assert not any("reconstruction" in name for name in load_file(whole / folder / "model.safetensors"))
        assert MMGEMProcessor.from_pretrained(whole / folder).image_processor.size.height == 32
        assert not (whole / folder / "trained").exists()
    log = json.loads((whole / "training_log.json").read_text())
    assert [entry["stage"] for entry in log if "patch_loss" in entry] == ["first", "first"]
    assert [entry["stage"] for entry in log if "contrastive_loss" in entry] == ["second", "second"]

    killed = tmp_path / "killed"
    shutil.copytree(
        whole / "checkpoints" / "first" / "checkpoint-1", killed / "checkpoints" / "first" / "checkpoint-1"
    )
    shutil.copy(whole / "recipe.yaml", killed)
    train(write(**in_two_steps), killed, resume=True)
    for folder in ("stages/first", ""):
        assert_same_weights(killed / folder, whole / folder)


@pytest.mark.slow
def test_what_is_put_back_with_lora_is_merged_without_its_head(in_two_steps, write, tmp_path):
    in_two_steps["stages"][0]["training"] |= {"lora": {"r": 2}, "save_strategy": "no"}
    train(write(**in_two_steps), tmp_path / "out", stage="first")
    folder = tmp_path / "out" / "stages" / "first"
    assert any("reconstruction_head" in name for name in load_file(folder / "adapter" / "adapter_model.safetensors"))
    trained = weights(folder)
    assert not any("reconstruction" in name for name in load_file(folder / "model.safetensors"))
    in_two_steps["stages"][0]["training"] |= {"learning_rate": 0.0}
    before = weights(train(write("still.yaml", **in_two_steps), tmp_path / "still", stage="first").model)
    moved = {name for name in before if not torch.equal(before[name], trained[name])}
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in moved
    assert "token_projection.1.weight" in moved and "text_projection.weight" not in moved


@pytest.mark.slow
def test_evaluation_is_written_and_carded(write, tmp_path):
    stage = {"name": "only", "train_data": SCENES, "training": UNSAVED}
    report = train(write(eval_data=SCENES, stages=[stage]), tmp_path / "out")
    metrics = report.metrics
    assert {"text_to_image_recall@1", "caption_fidelity", "region_recall@1", "zero_shot_accuracy"} <= set(metrics)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == metrics
    assert f"| zero_shot_accuracy | {metrics['zero_shot_accuracy']:.3f} |" in (tmp_path / "out/README.md").read_text()


@pytest.mark.slow
def test_what_cannot_be_read_is_counted(write, tmp_path):
    (tmp_path / "photos").mkdir()
    lines = [{"file_name": f"{number}.png", "caption": f"picture {number}"} for number in range(4)]
    (tmp_path / "photos" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for number in range(3):
        Image.new("RGB", (40, 40), (number, 0, 0)).save(tmp_path / "photos" / f"{number}.png")
    (tmp_path / "photos" / "3.png").write_bytes(b"no picture")
    stage = {"name": "photos", "train_data": {"folder": str(tmp_path / "photos")}, "training": UNSAVED}
    report = train(write(stages=[stage]), tmp_path / "out")
    assert report.skipped == {str(tmp_path / "photos"): 1}


def test_epochs_are_those_of_all_sources(tmp_path):
    training = {"num_train_epochs": 2, "per_device_train_batch_size": 5, "gradient_accumulation_steps": 2}
    stage = Stage(name="x", train_data=[SCENES | {"weight": 3}, SCENES], training=training)
    arguments = stage_arguments(Recipe(model=ModelSection(), stages=[stage]), stage, tmp_path)
    rows = stage_rows(stage, open_sources(stage), arguments, 0, SkippedLog())
    assert arguments.max_steps == 7 and len(rows) == 70  # 2 * 32 rows are 6.4 steps of 10


def test_values_out_of_range_are_found_before_the_first_stage(write, recipe, tmp_path):
    recipe["stages"][1]["training"] = TRAINING | {"ema_decay": 2.0}
    with pytest.raises(ValueError, match="`training` of stage `second`: .*ema_decay"):
        train(write(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
