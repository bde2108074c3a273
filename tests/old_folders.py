"""Writes the folders of a release, which every later one has to load: `python tests/old_folders.py VERSION`."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tiny_models import TEXTS
from transformers import LlamaConfig, SiglipImageProcessorPil, SiglipVisionConfig

from mmgem.configuration_mmgem import MMGEMConfig
from mmgem.modeling_mmgem import MMGEMModel
from mmgem.processing.processing_mmgem import MMGEMProcessor
from mmgem.training.inference import embed_fused, embed_images, embed_texts, generate_captions
from mmgem.training.recipes.tokenizer import train_tokenizer
from mmgem.training.search.building import build_index
from mmgem.training.search.index import SearchIndex

FIXTURES = Path(__file__).parent / "fixtures"


def pictures() -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    return [Image.fromarray(pixels) for pixels in noise]


def results(model, processor) -> dict:
    """What a model makes of pictures and texts."""
    return {
        "images": embed_images(model, processor, pictures()).tolist(),
        "texts": embed_texts(model, processor, TEXTS).tolist(),
        "fused": embed_fused(model, processor, pictures()[:2], TEXTS).tolist(),
        "captions": generate_captions(model, processor, pictures(), max_new_tokens=4),
    }


def hits(index: SearchIndex) -> list:
    return [[hit.path.name, hit.score] for hit in index.search(TEXTS[0])]


def write(version: str) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"vocab_size": 258, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    torch.manual_seed(0)
    model = MMGEMModel(
        MMGEMConfig(
            vision_config=SiglipVisionConfig(**sizes, image_size=16, patch_size=8),
            text_config=LlamaConfig(**sizes, **tokens, max_position_embeddings=64, tie_word_embeddings=True),
            projection_dim=8,
            num_visual_tokens=4,
            image_token_id=1,
        )
    ).eval()
    tokenizer = train_tokenizer(TEXTS, vocab_size=258, model_max_length=48)
    image_processor = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    processor = MMGEMProcessor(image_processor, tokenizer, num_visual_tokens=4)
    folder = Path("/tmp", f"mmgem-{version}")  # an index says where its images were
    model.save_pretrained(folder / "checkpoint")
    processor.save_pretrained(folder / "checkpoint")
    for code in (folder / "checkpoint").glob("*.py"):  # of which every commit has its own
        code.unlink()
    images = folder / "images"
    images.mkdir()
    for number, picture in enumerate(pictures()):
        picture.save(images / f"{number}.png")
    build_index(images, model, processor, folder / "index", memory=True)
    expected = results(model, processor) | {"hits": hits(SearchIndex.load(folder / "index", model, processor))}
    (folder / "expected.json").write_text(json.dumps(expected), encoding="utf-8")
    shutil.move(folder, FIXTURES / version)


if __name__ == "__main__":
    write(sys.argv[1])
