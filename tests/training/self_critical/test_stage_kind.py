import pytest
from tiny_models import build_model

from mmgem.training.data.mixture import Mixture
from mmgem.training.data.open_source import open_source
from mmgem.training.data.skipped import SkippedLog
from mmgem.training.recipes.recipe import Stage, parse_recipe
from mmgem.training.recipes.stage import stage_arguments, stage_trainer
from mmgem.training.recipes.stage_kinds import stage_kind
from mmgem.training.recipes.validation import check_sections, check_stages
from mmgem.training.self_critical.trainer import SelfCriticalTrainer

SCENES = {"scenes": {"seed": 1, "count": 8}}


def recipe_in(folder, training=None, **options):
    build_model().save_pretrained(folder)
    training = {"use_cpu": True, "max_steps": 1, "logging_steps": 1, "per_device_train_batch_size": 4} | (
        training or {}
    )
    stage = {"name": "criticize", "train_data": [SCENES], "training": training, "self_critical": options}
    return parse_recipe({"model": {"pretrained": str(folder)}, "stages": [stage]})


def test_a_stage_draws_captions_and_weighs_words_by_its_data(tiny_processor, tmp_path):
    recipe = recipe_in(tmp_path, captions_drawn=3, max_new_tokens=4)
    check_sections(recipe)
    check_stages(recipe)
    [stage] = recipe.stages
    arguments = stage_arguments(recipe, stage, tmp_path)
    rows = Mixture([open_source(SCENES)], [1], 0, 4, SkippedLog(None))
    trainer = stage_trainer(recipe, stage, build_model(), tiny_processor, arguments, rows)
    assert isinstance(trainer, SelfCriticalTrainer) and trainer.options.captions_drawn == 3
    assert trainer.reward._images_with[("a",)] > 1
    trainer.train()
    assert trainer.state.log_history[0]["caption_reward"] >= 0


def test_bad_sections_name_the_stage(tmp_path):
    with pytest.raises(ValueError, match="`self_critical` of stage `criticize`.*`reward_weight` is -1"):
        check_sections(recipe_in(tmp_path, reward_weight=-1.0))
    with pytest.raises(ValueError, match="unknown key `samples`"):
        check_sections(recipe_in(tmp_path, samples=3))
    with pytest.raises(ValueError, match="`self_critical` and `grad_cache_chunk_size` of stage `criticize` exclude"):
        check_sections(recipe_in(tmp_path, {"grad_cache_chunk_size": 2}))
    with pytest.raises(ValueError, match="stage `criticize`: nothing that writes trains"):
        check_stages(recipe_in(tmp_path, {"train_only": ["image_projection"]}))


def test_a_stream_is_refused():
    class Stream:
        name = "endless"

    kind = stage_kind(Stage(name="criticize", train_data=[], training={}, kind="self_critical"))
    with pytest.raises(ValueError, match="has the stream endless, whose captions cannot be counted"):
        kind._reward([Stream()])
