"""What the tests of both encoders share: folders of models of every kind, and what their encoders must answer."""

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from tiny_models import build_model

from mmgem.modeling_mmgem import MMGEMModel

NUM_VECTORS = 4
PROMPTS = {"query": "find ", "edit": "the same, but "}


def picture(seed: int, width: int = 60, height: int = 40) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def multi_vector_model(**config) -> MMGEMModel:
    """k different vectors of a text and of an image."""
    several = {"num_embedding_tokens": NUM_VECTORS, "embedding_pooling": "multi_vector", "prompts": PROMPTS}
    model = build_model(**several | config)
    torch.manual_seed(1)
    for parameter in (model.embedding_tokens, *model.image_vectors.parameters()):
        torch.nn.init.normal_(parameter)
    return model


def calibrated_model() -> MMGEMModel:
    modalities = ["image", "text", "fused"]
    model = build_model(calibrated_modalities=modalities)
    generator = torch.Generator().manual_seed(3)
    model.calibrator.fit({name: torch.randn(20, 16, generator=generator) + 0.5 for name in modalities})
    return model


def prompted_model() -> MMGEMModel:
    """Without any training, embeddings are the last state of a prompt."""
    return build_model(embedding_prompt_ids=[17, 5, 40])


@torch.no_grad()
def unit_features(model, processor, modality: str = "text", **inputs) -> torch.Tensor:
    """Unit embeddings straight from the model."""
    method = {"text": "get_text_features", "image": "get_image_features", "fused": "get_multimodal_features"}[modality]
    embeddings = getattr(model, method)(**processor(**inputs, return_tensors="pt")).pooler_output
    return torch.nn.functional.normalize(embeddings, dim=-1)


def close(embeddings, expected: torch.Tensor) -> bool:
    if isinstance(embeddings, list):  # of `MultiVectorEncoder`
        embeddings = torch.stack(embeddings)
    embeddings = torch.as_tensor(embeddings)
    return embeddings.shape == expected.shape and torch.allclose(embeddings, expected, atol=1e-5)


def learns_pairs(encoder, trainer_class, arguments_class, loss, folder) -> bool:
    """Whether a trainer of sentence-transformers brings four images nearest to their texts."""
    images = [Image.new("RGB", (32, 32), color) for color in ("red", "green", "blue", "white")]
    pairs = Dataset.from_dict({"image": images, "text": ["a red star", "green", "a large circle", ""]})
    arguments = arguments_class(
        str(folder),
        max_steps=30,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer_class(model=encoder, args=arguments, train_dataset=pairs, loss=loss).train()
    scores = encoder.similarity(encoder.encode(images), encoder.encode(pairs["text"]))
    return scores.argmax(dim=1).tolist() == [0, 1, 2, 3]
