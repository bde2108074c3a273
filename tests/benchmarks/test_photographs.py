"""The benchmark of the parts of a recipe for photographs, in a size for tests."""

import json

import pytest
from gguf_files import write_gguf
from image_folders import write_noise
from transformers import EfficientNetConfig, EfficientNetModel, SiglipImageProcessorPil

from benchmarks import photographs
from benchmarks.photographs import (
    BASE,
    VARIANTS,
    Run,
    Setting,
    recipe_of,
    report,
    result_file,
    run_all,
    write_language_models,
)
from mmgem.training.recipes.recipe import parse_recipe
from mmgem.training.recipes.validation import check_sections, check_stages

LANGUAGES = ("de", "zh", "fr", "cs")


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """Towers and photographs in their places, of a size for tests."""
    folder = tmp_path_factory.mktemp("photographs")
    photos, towers = folder / "photos", folder / "towers"
    for part in ("train", "val"):
        folder = photos / "flickr8k" / part
        rows = []
        for number in range(4):
            write_noise(folder / f"{number}.png", number)
            row = {"file_name": f"{number}.png", "captions": [f"a {number}", f"a {part} {number}"]}
            row |= {f"captions_{name}": [f"{name} {number}"] for name in LANGUAGES}
            rows.append(row | {"boxes": [[0, 0, 20, 20], [20, 0, 40, 30]], "region_captions": ["a", f"b {number}"]})
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (photos / "captions.txt").write_text("a line\nanother line\n")
    vision = EfficientNetModel(
        EfficientNetConfig(image_size=64, width_coefficient=0.01, depth_coefficient=1.0, hidden_dim=16)
    )
    for name in ("efficientnet-lite0", "efficientnet-lite2"):
        vision.save_pretrained(towers / name)
        SiglipImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(towers / name)
    (towers / "smollm2").mkdir()
    write_gguf(towers / "smollm2" / photographs.GGUF_FILE, num_layers=photographs.NUM_LAYERS)
    return Setting(photos, towers, folder / "out", steps=2, batch_size=3, loader_workers=0, bf16=False)


@pytest.fixture(scope="module")
def language_models(setting):
    write_language_models(setting, [1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_a_recipe_of_the_same_steps_and_photographs(variant, setting, language_models):
    recipe = parse_recipe(recipe_of(Run(variant, 1), setting._replace(steps=300, batch_size=96)))
    check_sections(recipe)
    check_stages(recipe)
    assert recipe.seed == 1
    assert sum(stage.training["max_steps"] for stage in recipe.stages) == 300
    for stage in recipe.stages:
        photographs, *others = (section.get("weight", 1) for section in stage.train_data)
        share = photographs / (photographs + sum(others))
        assert share * stage.training["per_device_train_batch_size"] == 96
        trains_tower = "tower" in variant and "trained" in variant
        assert (stage.cache_features is None) == trains_tower
        assert (stage.training.get("freeze") == ["vision_tower"]) != trains_tower


@pytest.mark.slow
def test_runs_are_measured_once_and_one_that_fails_leaves_the_others(setting, tmp_path, monkeypatch, capfd):
    setting = setting._replace(out=tmp_path)
    monkeypatch.setattr(photographs, "NUM_LAYERS", 1)
    calls = []
    execute = photographs.execute

    def execute_here(run, setting):
        calls.append(run)
        if run.variant == "1 visual token":
            raise OSError("No space left on device")
        execute(run, setting)

    class InThisProcess:
        def __init__(self, jobs, mp_context):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def submit(self, function, *arguments):
            result = function(*arguments)
            return type("Future", (), {"result": lambda self: result})()

    monkeypatch.setattr(photographs, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(photographs, "execute", execute_here)
    monkeypatch.setattr(photographs.logging, "disable", lambda level: None)
    small = {"trim_vocabulary": None, "num_hidden_layers": 1, "num_visual_tokens": 4}
    monkeypatch.setitem(VARIANTS, BASE, {"model": small})
    monkeypatch.setitem(VARIANTS, "fresh language model", {"model": small | {"text": "fresh"}})
    runs = [Run(name, 0) for name in (BASE, "1 visual token", "fresh language model")]
    run_all(runs, setting, 1)
    assert calls == runs
    assert "1 visual token, seed 0: OSError: No space left on device" in capfd.readouterr().out
    figures = [json.loads(result_file(run, setting).read_text()) for run in (runs[0], runs[2])]
    assert all(set(photographs.METRICS) - set(one) <= {"cider"} for one in figures)
    assert not any((setting.out / "runs").glob("*/"))  # weights are not kept
    run_all(runs, setting, 1)
    assert calls[3:] == [runs[1]]  # what is left


def test_differences_are_paired_by_seed(setting, tmp_path):
    setting = setting._replace(out=tmp_path)
    values = {BASE: (0.1, 0.3, 0.2), "no regions": (0.2, 0.4, 0.3)}
    (setting.out / "results").mkdir(parents=True)
    for variant, own in values.items():
        for seed, value in enumerate(own):
            result_file(Run(variant, seed), setting).write_text(json.dumps({"cider": value}))
    runs = [Run(variant, seed) for variant in (*values, "English alone") for seed in range(3)]
    *_, base, changed, chance = report(runs, setting).splitlines()
    assert "0.200" in base and "±" not in base
    assert "0.300 (+0.100 ± 0.000)" in changed and changed.endswith("| 3 |")
    assert "± 0.608" in chance  # 0.1 between the seeds of the base, times the root of 2, times 4.303 of Student's t
