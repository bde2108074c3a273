"""Folders of small pictures of noise, and models that embed them in several vectors."""

import numpy as np
from PIL import Image
from tiny_models import build_model

NAMES = [f"{'deep/er/' if number % 2 else ''}{number}.png" for number in range(7)]


def write_noise(path, seed, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (size[1] // 10, size[0] // 10, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(size).save(path)


def write_folder(folder):
    """The pictures `NAMES`, all different."""
    for number, name in enumerate(NAMES):
        write_noise(folder / name, number)
    return folder


def build_multi_vector_model(num_embedding_tokens=4, **config_kwargs):
    return build_model(num_embedding_tokens=num_embedding_tokens, embedding_pooling="multi_vector", **config_kwargs)
