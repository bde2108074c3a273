"""Writes the folders of a release, which every later one has to load: `make old-folders RELEASE=VERSION`."""

import json
import shutil
import sys
from contextlib import chdir
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from tiny_models import TEXTS
from transformers import LlamaConfig, SiglipImageProcessorPil, SiglipVisionConfig

from mmgem.configuration_mmgem import MMGEMConfig
from mmgem.modeling_mmgem import MMGEMModel
from mmgem.processing.processing_mmgem import MMGEMProcessor
from mmgem.training.inference import embed_fused, embed_images, embed_texts, generate_captions
from mmgem.training.recipes.run import train
from mmgem.training.recipes.tokenizer import train_tokenizer
from mmgem.training.search.building import build_index
from mmgem.training.search.index import SearchIndex
from mmgem.training.trainer.checkpoints import mark_complete

FIXTURES = Path(__file__).parent / "fixtures"
SIZES = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TRAINING = {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 3, "learning_rate": 0.01}
RECIPE = {
    "model": {
        "vision_config": {"model_type": "siglip_vision_model", "image_size": 16, "patch_size": 8, **SIZES},
        "text_config": {"model_type": "llama", "max_position_embeddings": 64, "tie_word_embeddings": True, **SIZES},
        "projection_dim": 8,
        "num_visual_tokens": 4,
    },
    "image_processor": {"size": {"height": 16, "width": 16}},
    "tokenizer": {"vocab_size": 258, "model_max_length": 48},
    "stages": [
        {
            "name": "only",
            "train_data": {"folder": "images"},
            # A step is smooth in its gradient, also where that is almost nothing.
            "training": TRAINING | {"adam_epsilon": 0.1, "use_cpu": True, "disable_tqdm": True},
        }
    ],
}


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


def write_images(folder: Path) -> None:
    folder.mkdir(parents=True)
    for number, picture in enumerate(pictures()):
        picture.save(folder / f"{number}.png")


def write_run(folder: Path) -> None:
    """A run that was killed after its first step, and `expected.safetensors`, where it would have ended."""
    write_images(folder / "images")
    lines = [json.dumps({"file_name": f"{number}.png", "caption": TEXTS[number % 2]}) for number in range(3)]
    (folder / "images" / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    with chdir(folder):
        train("recipe.yaml", "whole")
    checkpoint = Path("out", "checkpoints", "only", "checkpoint-1")
    shutil.copytree(folder / "whole" / checkpoint.relative_to("out"), folder / checkpoint)
    shutil.copy(folder / "recipe.yaml", folder / "out")
    shutil.move(folder / "whole" / "model.safetensors", folder / "expected.safetensors")
    shutil.rmtree(folder / "whole")
    delete_code(folder / checkpoint)
    mark_complete(folder / checkpoint)


def delete_code(folder: Path) -> None:
    """Of which every commit has its own."""
    for code in folder.glob("*.py"):
        code.unlink()


def write(version: str) -> None:
    tokens = {"vocab_size": 258, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    torch.manual_seed(0)
    model = MMGEMModel(
        MMGEMConfig(
            vision_config=SiglipVisionConfig(**SIZES, image_size=16, patch_size=8),
            text_config=LlamaConfig(**SIZES, **tokens, max_position_embeddings=64, tie_word_embeddings=True),
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
    delete_code(folder / "checkpoint")
    write_images(folder / "images")
    build_index(folder / "images", model, processor, folder / "index", memory=True)
    expected = results(model, processor) | {"hits": hits(SearchIndex.load(folder / "index", model, processor))}
    (folder / "expected.json").write_text(json.dumps(expected), encoding="utf-8")
    write_run(folder / "run")
    shutil.move(folder, FIXTURES / version)


if __name__ == "__main__":
    write(sys.argv[1])
