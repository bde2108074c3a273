"""Batches of images, texts and regions through a model: embeddings, and captions written token by token."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import normalize
from tqdm.auto import tqdm

from mmgem.training.sharded import is_sharded, reshard

Box = Sequence[float]


@contextmanager
def inference(model) -> Iterator[None]:
    """No gradients and evaluation mode within, the model's former mode after."""
    was_training, is_in_shards = model.training, is_sharded(model)
    model.eval()
    try:
        # FSDP keeps the tensors that it gathers parameters into, and could not train with those of inference mode.
        with torch.no_grad() if is_in_shards else torch.inference_mode():
            yield
    finally:
        model.train(was_training)
        if is_in_shards:
            reshard(model)


def embed_images(model, processor, images: Sequence[Any]) -> torch.Tensor:
    """Embeddings of one batch of images.

    Returns:
        (B, D), normalised, float32, on the CPU.
    """
    inputs = _to_model(model, processor(images=list(images), return_tensors="pt"))
    with inference(model):
        return _unit(model.get_image_features(**inputs).pooler_output)


def embed_regions(model, processor, images: Sequence[Any], boxes: Sequence[Sequence[Box]]) -> torch.Tensor:
    """Embeddings of the boxes of one batch of images.

    Args:
        images: B images.
        boxes: For each image at least one box `[x0, y0, x1, y1]`, in its pixels.

    Returns:
        (sum of the numbers of boxes, D), normalised, float32, on the CPU; image after image.
    """
    inputs = _to_model(model, processor(images=list(images), boxes=list(boxes), return_tensors="pt"))
    with inference(model):
        embeddings = model.get_image_features(**inputs).pooler_output  # (B, R, D), padded
    return _unit(torch.cat([row[: len(own)] for row, own in zip(embeddings, boxes, strict=True)]))


def embed_texts(model, processor, texts: Sequence[str], batch_size: int = 64) -> torch.Tensor:
    """Embeddings of any number of texts, batched by length so that little padding is computed.

    Returns:
        (T, D), normalised, float32, on the CPU, in the order of `texts`.
    """
    if not texts:
        raise ValueError("texts must not be empty")
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]), reverse=True)
    parts = []
    with inference(model):
        for start in tqdm(
            range(0, len(order), batch_size), desc="texts", unit="batch", leave=False, disable=len(order) <= batch_size
        ):
            batch = [texts[row] for row in order[start : start + batch_size]]
            inputs = _to_model(model, processor(text=batch, padding=True, return_tensors="pt"))
            parts.append(_unit(model.get_text_features(**inputs).pooler_output))
    embeddings = torch.cat(parts)
    restored = torch.empty_like(embeddings)
    restored[torch.tensor(order)] = embeddings
    return restored


def generate_captions(model, processor, images: Sequence[Any], max_new_tokens: int = 128) -> list[str]:
    """The caption of each image of one batch, greedily."""
    prompts = [processor.image_token] * len(images)
    return _generate(
        model, processor(images=list(images), text=prompts, return_tensors="pt"), processor, max_new_tokens
    )


def generate_region_captions(
    model, processor, images: Sequence[Any], boxes: Sequence[Sequence[Box]], max_new_tokens: int = 32
) -> list[str]:
    """The caption of each box of one batch of images, greedily; image after image. `boxes` as in `embed_regions`."""
    prompts = [processor.image_token] * sum(map(len, boxes))
    inputs = processor(images=list(images), boxes=list(boxes), text=prompts, return_tensors="pt")
    return _generate(model, inputs, processor, max_new_tokens)


def _generate(model, inputs, processor, max_new_tokens: int) -> list[str]:
    with inference(model):
        ids = model.generate(**_to_model(model, inputs), max_new_tokens=max_new_tokens, do_sample=False)
    new_ids = ids[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.tokenizer.batch_decode(new_ids, skip_special_tokens=True)]


def _to_model(model, inputs) -> dict[str, torch.Tensor]:
    """The tensors on the model's device; pixels in its precision (boxes and ids stay as they are)."""
    tensors = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    if "pixel_values" in tensors:
        tensors["pixel_values"] = tensors["pixel_values"].to(model.dtype)
    return tensors


def _unit(embeddings: torch.Tensor) -> torch.Tensor:
    return normalize(embeddings.float(), dim=-1).cpu()
