"""The checkpoint in the repository: complete, small, of the code beside it, and as good as it says."""

import json
from pathlib import Path

import fresh_process
import pytest

from mmgem.processing.hub_code import code_files
from mmgem.training.evaluation.evaluate import evaluate_model
from mmgem.training.evaluation.scene_metrics import SCENE_JUDGE
from mmgem.training.loading import load_checkpoint
from mmgem.training.scenes.dataset import SceneDataset

ROOT = Path(__file__).parent.parent
TINY = ROOT / "model_cards" / "mmgem-tiny"
AIMS = {
    "text_to_image_recall@1": 0.85,
    "image_to_text_recall@1": 0.85,
    "long_text_to_image_recall@1": 0.90,
    "caption_fidelity": 0.80,
    "region_caption_fidelity": 0.90,
    "region_recall@1": 0.80,
    "zero_shot_accuracy": 0.95,
    "fused_text_to_image_recall@1": 0.90,
    "memory_caption_fidelity": 0.80,
    "memory_answer_accuracy": 0.75,
    "instructed_region_accuracy": 0.95,
    "composed_recall@1": 0.60,
}


def test_its_code_is_the_code_of_the_package():
    files = code_files()
    assert sorted(copy.name for copy in TINY.glob("*.py")) == [file.name for file in files], "run `make hub-code`"
    for file in files:
        assert (TINY / file.name).read_text() == file.read_text(), f"{file.name} differs: run `make hub-code`"


@pytest.mark.slow
def test_it_loads_without_a_warning(tmp_path):
    code = f"""
import os, warnings
from mmgem.training.loading import load_checkpoint

warnings.simplefilter("error")
os.dup2(1, 2)  # what is logged is returned, too
load_checkpoint({str(TINY)!r})
"""
    assert "[transformers]" not in fresh_process.run(code, cwd=tmp_path, installed=True)


def test_its_weights_are_small():
    assert (TINY / "model.safetensors").stat().st_size <= 16e6


def test_its_results_are_what_was_aimed_at():
    results = json.loads((TINY / "results.json").read_text())
    assert {name: results[name] >= aim for name, aim in AIMS.items()} == dict.fromkeys(AIMS, True)


@pytest.mark.slow
@pytest.mark.pages
def test_it_is_that_good_on_scenes_of_another_seed():
    model, processor = load_checkpoint(TINY)
    scenes = SceneDataset(seed=3_141_592, count=60, unique=True)
    metrics = evaluate_model(model, processor, scenes, caption_judge=SCENE_JUDGE)
    assert {name: metrics[name] >= aim for name, aim in AIMS.items()} == dict.fromkeys(AIMS, True), metrics


@pytest.mark.slow
def test_with_the_package_imported_nobody_is_asked_to_trust_a_copy_of_it(tmp_path):
    code = f"""
from mmgem import MMGEMModel, MMGEMProcessor
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

MMGEMProcessor.from_pretrained({str(TINY)!r})
assert type(AutoProcessor.from_pretrained({str(TINY)!r})) is MMGEMProcessor
assert type(AutoModel.from_pretrained({str(TINY)!r})) is MMGEMModel
assert type(AutoModelForImageTextToText.from_pretrained({str(TINY)!r})) is MMGEMModel

from sentence_transformers import SentenceTransformer

assert SentenceTransformer({str(TINY)!r}, trust_remote_code=True).encode(["a red star"]).shape == (1, 192)
"""
    fresh_process.run(code, cwd=tmp_path, installed=True)  # where nothing can be asked
