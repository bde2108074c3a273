"""The weights of mmgem-photo, on photographs that scikit-image and matplotlib install."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors import safe_open

from mmgem.training.demo.photographs import copy_free_photographs
from mmgem.training.inference import embed_images, embed_texts, generate_answers, generate_captions
from mmgem.training.loading import load_checkpoint

FOLDER = Path(__file__).parents[1] / "model_cards" / "mmgem-photo"
SEARCHES = {
    "a person with a camera": "camera.png",
    "a man in a black hat": "grace_hopper.jpg",
    "a cup of coffee": "coffee.png",
    "a rocket": "rocket.jpg",
    "a red motorcycle": "motorcycle_left.png",
    "ein Motorrad": "motorcycle_left.png",
    "\u6469\u6258\u8f66": "motorcycle_left.png",
}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def loaded():
    return load_checkpoint(FOLDER, device="cpu")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """By name; 16 of them."""
    folder = tmp_path_factory.mktemp("photographs")
    assert copy_free_photographs(folder) == 16
    return {path.name: Image.open(path).convert("RGB") for path in sorted(folder.iterdir())}


def test_the_weights_are_small_and_run_in_float32(loaded):
    path = FOLDER / "model.safetensors"
    assert path.stat().st_size < 60e6
    with safe_open(path, framework="pt") as file:
        types = {file.get_slice(name).get_dtype() for name in file.keys()}
    assert types <= {"F16", "I64"}
    assert {parameter.dtype for parameter in loaded[0].parameters()} == {torch.float32}


def test_lora_for_answers_leaves_embeddings_of_images_alone(loaded, photographs):
    path = FOLDER / "answers" / "adapter_model.safetensors"
    with safe_open(path, framework="pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}
    assert path.stat().st_size < 4e6
    answering, pictures = load_checkpoint(FOLDER / "answers", device="cpu"), list(photographs.values())[:4]
    assert torch.equal(embed_images(*answering, pictures), embed_images(*loaded, pictures))
    questions = ["what color is it ?"] * 4
    with_lora, without = (generate_answers(*pair, pictures, questions) for pair in (answering, loaded))
    assert with_lora != without and all(0 < len(answer.split()) <= 3 for answer in with_lora)


def test_the_card_has_the_figures_of_the_results_and_the_terms_of_the_data():
    card = ModelCard.load(FOLDER / "README.md")
    results = json.loads((FOLDER / "results.json").read_text())
    assert len(card.data.eval_results) == 10
    for figure in card.data.eval_results:
        assert figure.metric_value == round(results[figure.metric_type], 4)
        assert f"{figure.metric_value:.3f}" in card.text
    assert card.data.license == "other" and (FOLDER / card.data.license_link).is_file()


def test_it_finds_photographs_by_words_of_three_languages(loaded, photographs):
    scores = embed_texts(*loaded, list(SEARCHES)) @ embed_images(*loaded, list(photographs.values())).T
    found = [list(photographs)[best] for best in scores.argmax(dim=1).tolist()]
    assert dict(zip(SEARCHES, found, strict=True)) == SEARCHES


def test_it_writes_sentences(loaded, photographs):
    [caption] = generate_captions(*loaded, [photographs["motorcycle_left.png"]])
    assert "motorcycle" in caption and len(caption.split()) > 4
