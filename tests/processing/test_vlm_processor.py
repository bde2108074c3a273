"""The processor of a model that began as a VLM: the VLM's own inputs for its prompts, whole images to embed."""

import json
from importlib.util import find_spec

import fresh_process
import pytest
import torch
from PIL import Image
from transformers.utils import is_torchvision_available
from vlms import build_vlm, build_vlm_processor

from mmgem.modeling_mmgem import MMGEMModel
from mmgem.processing.processing_mmgem import MMGEMProcessor
from mmgem.processing.sentence_transformers_export import save_sentence_transformer

# Their processors take videos, and with them torchvision; that of SmolVLM also num2words.
of_videos = pytest.mark.skipif(
    not (is_torchvision_available() and find_spec("num2words")), reason="takes torchvision and num2words"
)
FAMILIES = ["llava", "idefics3", "paligemma", "gemma3"]
FAMILIES += [pytest.param(family, marks=of_videos) for family in ("internvl", "smolvlm")]
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


@pytest.fixture
def images() -> list[Image.Image]:
    torch.manual_seed(0)
    return [Image.effect_noise(size, 90).convert("RGB") for size in ((70, 40), (30, 90))]


def conversation(image: Image.Image, question: str) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]


def assert_equal(inputs, expected):
    assert dict(inputs).keys() == dict(expected).keys()
    for name, value in expected.items():
        assert torch.equal(inputs[name], value), name


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_become_what_the_vlm_makes_of_them(family, images):
    own = build_vlm_processor(family)
    processor = MMGEMProcessor.from_vlm(build_vlm_processor(family), num_visual_tokens=4)
    options = {"return_tensors": "pt"}
    expected = own(images=[[images[0]]], text=[f"{own.image_token}what?"], **options)
    expected.pop("labels", None)
    assert_equal(processor(images=[images[0]], text=[f"{own.image_token}what?"], **options), expected)
    if own.chat_template is not None:
        options |= {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
        expected = own.apply_chat_template(conversation(images[0], "what is it?"), **options)
        assert_equal(processor.apply_chat_template(conversation(images[0], "what is it?"), **options), expected)
        written = own.apply_chat_template(conversation(images[0], "what is it?"), add_generation_prompt=True)
        assert_equal(processor(images=images[:1], text=[written], return_tensors="pt"), expected)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_model_and_processor_write_what_the_vlm_writes(family, images):
    vlm = build_vlm(family)
    model = MMGEMModel.from_vlm(vlm, projection_dim=16, num_visual_tokens=4)
    processor = MMGEMProcessor.from_vlm(build_vlm_processor(family), num_visual_tokens=4)
    texts = [f"{processor.image_token}what is it?", processor.image_token]
    inputs = processor(images=images, text=texts, return_tensors="pt")
    assert torch.equal(model.generate(**inputs, **GREEDY), vlm.generate(**inputs, **GREEDY))
    embeds = model.get_multimodal_features(**inputs).pooler_output
    for number, (image, text) in enumerate(zip(images, texts, strict=True)):
        alone = processor(images=[image], text=[text], return_tensors="pt")
        alone = model.get_multimodal_features(**alone).pooler_output[0]
        torch.testing.assert_close(alone, embeds[number], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_images_are_embedded_whole_and_boxes_lie_in_them(family, images):
    model = MMGEMModel.from_vlm(build_vlm(family), projection_dim=16, num_visual_tokens=4)
    processor = MMGEMProcessor.from_vlm(build_vlm_processor(family), num_visual_tokens=4)
    inputs = processor(images=images, text=["a", "b"], return_tensors="pt")
    assert sorted(inputs) == ["attention_mask", "input_ids", "pixel_values"]
    assert inputs["pixel_values"].shape == (2, 3, 32, 32)
    whole = [[[0, 0, *image.size]] for image in images]
    boxed = processor(images=images, boxes=whole, return_tensors="pt")
    regions = model.get_image_features(**boxed).pooler_output[:, 0]
    expected = model.get_image_features(inputs["pixel_values"]).pooler_output
    if family != "llava":  # which crops the center
        assert boxed["boxes"].flatten().tolist() == [0, 0, 1, 1] * 2
    torch.testing.assert_close(regions, expected, rtol=0, atol=1e-5)
    prompts = processor(images=images, boxes=whole, text=[processor.image_token + "what?"] * 2, return_tensors="pt")
    assert (prompts["input_ids"] == model.config.image_token_id).sum() == 2 * 4
    assert model.generate(**prompts, **GREEDY)[:, -6:].shape == (2, 6)


LOADER = """
import json, sys
sys.modules["mmgem"] = None  # not installed
import torch
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor
from sentence_transformers import SentenceTransformer

answers = {}
for folder in sys.argv[1:]:
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    image, prompt = f"{folder}/image.png", processor.image_token + "what?"
    with torch.no_grad():
        outputs = model(**processor(images=[image], text=["a red star", ""], return_tensors="pt"))
        inputs = processor(images=[image], text=[prompt], return_tensors="pt")
        logits = model(**inputs).logits
    writer = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    written = writer.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    encoder = SentenceTransformer(folder, trust_remote_code=True)
    fused = encoder.encode([{"image": image, "text": prompt}])
    tensors = outputs.image_embeds, outputs.text_embeds, logits, written, torch.tensor(fused)
    answers[folder] = [tensor.tolist() for tensor in tensors]
print(json.dumps(answers))
"""


@pytest.mark.slow
def test_saved_and_loaded_in_a_process_without_the_package(tmp_path, images):
    expected = {}
    for family in "llava", "idefics3", "gemma3":
        torch.manual_seed(0)
        model = MMGEMModel.from_vlm(build_vlm(family), projection_dim=16, num_visual_tokens=4)
        processor = MMGEMProcessor.from_vlm(build_vlm_processor(family), num_visual_tokens=4)
        folder = str(tmp_path / family)
        save_sentence_transformer(model, processor, folder)
        images[0].save(f"{folder}/image.png")
        prompts = processor(images=images[:1], text=[processor.image_token + "what?"], return_tensors="pt")
        with torch.no_grad():
            outputs = model(**processor(images=images[:1], text=["a red star", ""], return_tensors="pt"))
            logits = model(**prompts).logits
            fused = torch.nn.functional.normalize(model.get_multimodal_features(**prompts).pooler_output, dim=-1)
        written = model.generate(**prompts, **GREEDY)
        expected[folder] = [outputs.image_embeds, outputs.text_embeds, logits, written, fused]
    output = fresh_process.run(LOADER, *expected, cwd=tmp_path, installed=False)
    for folder, answers in json.loads(output.splitlines()[-1]).items():
        for found, wanted in zip(answers, expected[folder], strict=True):
            torch.testing.assert_close(torch.tensor(found), wanted, rtol=0, atol=1e-5)
