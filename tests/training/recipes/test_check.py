import json

import pytest
import yaml
from PIL import Image

from mmgem.training.recipes.check import check_recipe

TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SCENES = {"scenes": {"seed": 1, "count": 16, "image_size": 48}}
TRAINING = {"max_steps": 20, "per_device_train_batch_size": 4, "learning_rate": 0.01}


@pytest.fixture
def recipe():
    return {
        "model": {
            "vision_config": {
                "model_type": "siglip_vision_model",
                "image_size": 32,
                "patch_size": 8,
                "vision_use_head": False,
            }
            | TOWER,
            "text_config": {"model_type": "llama", "max_position_embeddings": 512} | TOWER,
            "projection_dim": 8,
            "num_visual_tokens": 4,
        },
        "image_processor": {"size": {"height": 32, "width": 32}},
        "tokenizer": {"vocab_size": 300, "model_max_length": 400},
        "eval_data": SCENES,
        "stages": [
            {
                "name": "align",
                "train_data": SCENES,
                "training": TRAINING | {"train_only": ["pool_aggregator"], "save_steps": 1, "eval_strategy": "steps"},
            },
            {
                "name": "regions",
                "image_size": 48,
                "text_attention": "bidirectional",
                "train_data": [SCENES, {"folder": "photos", "weight": 0.5}],
                "training": TRAINING | {"lora": {"r": 2}, "gradient_accumulation_steps": 2},
            },
            {"name": "all", "train_data": SCENES, "training": TRAINING | {"grad_cache_chunk_size": 2}},
        ],
    }


@pytest.fixture
def write(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    lines = [{"file_name": f"{name}.png", "text": f"a {name} photo"} for name in ("green", "broken")]
    (tmp_path / "photos" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    Image.new("RGB", (60, 40), "green").save(tmp_path / "photos" / "green.png")
    (tmp_path / "photos" / "broken.png").write_bytes(b"no picture")

    def write():
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        return tmp_path / "recipe.yaml"

    return write


@pytest.mark.slow
def test_every_stage_is_shown_and_tried(write, tmp_path):
    lines = []
    before = {path for path in tmp_path.rglob("*")} | {write()}
    align, regions, everything = check_recipe(write(), tmp_path / "out", say=lines.append)

    text = "\n".join(lines)
    assert "eval_data: 16 rows with image, " in text and text.count("source scenes-1: 16 rows") == 3
    assert "photos:line 1: image of 60 x 40, captions (1) 'a green photo'" in text
    assert "[[ a green photo]]" in text and "1 of photos" in text
    assert "learns: pool_aggregator; text attention causal" in text and "text attention bidirectional" in text
    assert "images of 32 x 32 pixels, 4 visual tokens" in text and "images of 48 x 48 pixels" in text

    assert [check.images for check in (align, regions, everything)] == [
        tmp_path / "out" / "check" / name for name in ("1-align.png", "2-regions.png", "3-all.png")
    ]
    written = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path not in before}
    assert {str(path) for path in written} == {
        "out",
        "out/check",
        *(f"out/check/{name}" for name in ("1-align.png", "2-regions.png", "3-all.png", "skipped.jsonl")),
    }

    # Memory is that of what trains.
    total = everything.parameters
    assert align.parameters == everything.trained_parameters == total
    assert 0 < align.trained_parameters < regions.trained_parameters < total
    assert align.memory.gradients == 4 * align.trained_parameters
    assert align.memory.optimizer == pytest.approx(2 * align.memory.gradients, rel=0.02)
    assert align.memory.weights == pytest.approx(4 * total, rel=0.01)

    assert [check.steps for check in (align, regions, everything)] == [20] * 3
    assert [check.rows_per_step for check in (align, regions, everything)] == [4, 8, 4]
    assert regions.skipped == {"photos": 1} and not align.skipped
    assert all(check.seconds > 0 and 3 < check.losses["caption_loss"] < 8 for check in (align, regions, everything))


@pytest.mark.slow
def test_chunks_of_the_batch_keep_less_for_the_backward_pass(write, recipe, tmp_path):
    short = {"long_caption_probability": 0.0}
    plain = {"name": "plain", "train_data": SCENES, "training": TRAINING, "collator": short}
    recipe["stages"] = [plain, recipe["stages"][2] | {"collator": short}]
    plain, chunked = check_recipe(write(), tmp_path / "out", say=lambda line: None)
    assert 0.3 < chunked.memory.activations / plain.memory.activations < 0.7


@pytest.mark.slow
def test_a_stage_that_puts_back_what_is_masked_is_shown_and_tried(write, recipe, tmp_path):
    putting_back = recipe["stages"][1] | {"name": "back", "reconstruction": {}}
    recipe["stages"] = [putting_back, recipe["stages"][2]]
    lines = []
    back, everything = check_recipe(write(), tmp_path / "out", say=lines.append)
    text = "\n".join(lines)
    assert "reconstruction_head" in text and "[[what it puts back]]" in text and "put back" in text
    assert set(back.losses) == {"text_loss", "patch_loss"} and 3 < back.losses["text_loss"] < 8
    assert set(everything.losses) == {"caption_loss", "contrastive_loss"}
    assert everything.trained_parameters == everything.parameters  # without the head, and nothing frozen


@pytest.mark.slow
def test_one_stage_can_be_checked_alone(write, tmp_path):
    [check] = check_recipe(write(), tmp_path / "out", stage=3, say=lambda line: None)
    assert check.name == "all"


@pytest.mark.slow
def test_what_the_stage_before_froze_trains_again(write, recipe, tmp_path):
    recipe["stages"] = [recipe["stages"][0], recipe["stages"][2]]
    recipe["stages"][0]["training"]["ema_decay"] = 0.9
    recipe["stages"][1]["objective"] = {"soft_targets": 0.4, "teacher": {"momentum": 0.9}}
    first, second = check_recipe(write(), tmp_path / "out", say=lambda line: None)
    assert first.trained_parameters < second.trained_parameters == second.parameters
    assert [first.memory.copies, second.memory.copies] == [4 * first.trained_parameters, 4 * second.parameters]


def test_a_source_that_is_not_there_is_named(write, recipe, tmp_path):
    recipe["stages"] = [{"name": "x", "train_data": {"folder": "nowhere"}, "training": TRAINING}]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        check_recipe(write(), tmp_path / "out", say=lambda line: None)
