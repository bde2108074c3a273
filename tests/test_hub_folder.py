"""Towers of several families: composed by name, saved, and loaded in a fresh process that has no mmgem installed."""

import json

import fresh_process
import pytest
import torch
from PIL import Image
from tiny_models import IMAGE_SIZE, VISION_CONFIGS, build_towers
from transformers import (
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipTextConfig,
    ViTImageProcessorPil,
)

from mmgem.modeling_mmgem import MMGEMModel
from mmgem.processing.processing_mmgem import MMGEMProcessor
from mmgem.processing.sentence_transformers_export import save_sentence_transformer
from mmgem.training.recipes.tokenizer import train_tokenizer

SIZE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
CROP = {"size": {"shortest_edge": IMAGE_SIZE}, "crop_size": SIZE}
_TEXT_SIDE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


def dual_encoder(kind: str):
    """A whole CLIP or SigLIP, of which only the vision half is wanted."""
    torch.manual_seed(0)
    vision = VISION_CONFIGS[kind]().to_dict()
    if kind == "clip":
        return CLIPModel(CLIPConfig(text_config=CLIPTextConfig(**_TEXT_SIDE).to_dict(), vision_config=vision))
    return SiglipModel(SiglipConfig(text_config=SiglipTextConfig(**_TEXT_SIDE).to_dict(), vision_config=vision))


FAMILIES = {
    "siglip+qwen3": (lambda: dual_encoder("siglip"), SiglipImageProcessorPil(size=SIZE), "qwen3"),
    "clip+llama": (lambda: dual_encoder("clip"), CLIPImageProcessorPil(**CROP), "llama"),
    "dinov2+gemma3": (lambda: build_towers("dinov2")[0], BitImageProcessorPil(**CROP), "gemma3"),
    "vit+gpt2": (lambda: build_towers("vit")[0], ViTImageProcessorPil(size=SIZE), "gpt2"),
}

LOADER = """
import json, sys
import torch
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

answers = {}
for folder in sys.argv[1:]:
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor(images=[f"{folder}/image.png"], text=["a red star", ""], return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    writer = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    prompt = processor(images=[f"{folder}/image.png"], text=["<image>what is it?"], return_tensors="pt")
    generated = writer.generate(**prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    answers[folder] = [outputs.image_embeds.tolist(), outputs.text_embeds.tolist(), generated.tolist()]
print(json.dumps(answers))
"""


def compose(family, folder):
    """Save the towers as their makers would, then compose them by name."""
    make_vision, image_processor, text = FAMILIES[family]
    vision_folder, text_folder = str(folder / "vision"), str(folder / "text")
    make_vision().save_pretrained(vision_folder)
    image_processor.save_pretrained(vision_folder)
    build_towers(text=text)[1].save_pretrained(text_folder)
    tokenizer = train_tokenizer(["a red star", "what is it?"], vocab_size=280, model_max_length=100)
    tokenizer._special_tokens_map["pad_token"] = None
    tokenizer.save_pretrained(text_folder)

    torch.manual_seed(0)
    model = MMGEMModel.from_towers(vision_folder, text_folder, projection_dim=16, num_visual_tokens=4)
    processor = MMGEMProcessor.from_towers(vision_folder, text_folder, num_visual_tokens=4)
    assert processor.image_token_id == model.config.image_token_id
    return model, processor


@pytest.mark.slow
def test_composed_towers_embed_and_caption_in_a_process_without_the_package(tmp_path):
    expected = {}
    for family in FAMILIES:
        model, processor = compose(family, tmp_path / family)
        folder = tmp_path / family / "hub"
        save_sentence_transformer(model, processor, folder)
        Image.linear_gradient("L").resize((50, 40)).save(folder / "image.png")
        image = str(folder / "image.png")
        with torch.no_grad():
            outputs = model(**processor(images=[image], text=["a red star", ""], return_tensors="pt"))
        prompt = processor(images=[image], text=["<image>what is it?"], return_tensors="pt")
        generated = model.generate(**prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        expected[str(folder)] = (outputs.image_embeds, outputs.text_embeds, generated)

    output = fresh_process.run(LOADER, *expected, cwd=tmp_path, installed=False)
    answers = json.loads(output.splitlines()[-1])
    for folder, tensors in expected.items():
        for actual, tensor in zip(answers[folder], tensors, strict=True):
            torch.testing.assert_close(torch.tensor(actual), tensor, rtol=0, atol=1e-5)
