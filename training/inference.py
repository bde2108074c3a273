"""Batches of images, texts and regions through a model: embeddings, memories, and texts written token by token.

An embedding is one vector (D,), or k vectors (k, D) of a model with `embedding_pooling="multi_vector"`.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from threading import Lock
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature, DynamicCache
from transformers.cache_utils import DynamicLayer
from xxhash import xxh3_128_digest

from mmgem.modeling_mmgem import MMGEMModel
from mmgem.processing.token_batches import batches_of_tokens, restore, tokens_at_a_time
from mmgem.training.distributed import is_sharded, reshard
from mmgem.training.progress import progress

Box = Sequence[float]
BOXES_AT_A_TIME = 256  # of all images of a batch together
CAPTION_TOKENS, ANSWER_TOKENS = 128, 32  # at which they are cut; regions get captions as short as answers


@dataclass
class _Mode:
    """How many threads run a model in evaluation mode, whether it trains after the last of them, and how often one
    found it in training mode."""

    threads: int = 0
    was_training: bool | None = None
    interruptions: int = 0


_modes: WeakKeyDictionary[torch.nn.Module, _Mode] = WeakKeyDictionary()
_modes_lock = Lock()


@contextmanager
def inference(model) -> Iterator[None]:
    """Runs what is within without gradients and in evaluation mode; the model's former mode comes back after it, or
    after the last thread that runs it in this way.

    Raises:
        RuntimeError: If it was set to training mode meanwhile, in which dropout changes what comes out.
    """
    is_in_shards = is_sharded(model)
    with _modes_lock:
        mode = _modes.setdefault(model, _Mode())
        if any(module.training for module in model.modules()):  # setting it takes longer than a small batch
            mode.was_training = model.training
            mode.interruptions += 1
            model.eval()
        mode.threads += 1
        before = mode.interruptions
    try:
        # FSDP keeps the tensors that it gathers parameters into, and could not train with those of inference mode.
        with torch.no_grad() if is_in_shards else torch.inference_mode():
            yield
            if mode.interruptions != before or any(module.training for module in model.modules()):
                raise RuntimeError(
                    "`model` was set to training mode by another thread while it embeds or writes; expected `train()` "
                    "before or after that."
                )
    finally:
        with _modes_lock:
            mode.threads -= 1
            if not mode.threads:
                del _modes[model]
                if mode.was_training is not None:
                    model.train(mode.was_training)
        if is_in_shards:
            reshard(model)


@contextmanager
def uncalibrated(model) -> Iterator[None]:
    """Leaves out the model's calibrator, if it has one, from the embeddings within."""
    with nullcontext() if model.calibrator is None else model.calibrator.set_aside():
        yield


def to_model(model, inputs) -> dict[str, torch.Tensor]:
    """Returns the tensors on the model's device; pixels in its precision (boxes and ids stay as they are)."""
    tensors = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    if "pixel_values" in tensors:
        tensors["pixel_values"] = tensors["pixel_values"].to(model.dtype)
    return tensors


def unit(embeddings: torch.Tensor) -> torch.Tensor:
    """Returns embeddings of any shape (..., D) with vectors of unit length, float32, on the CPU."""
    return normalize(embeddings.float(), dim=-1).cpu()


def as_list(values: Iterable[Any], name: str) -> list[Any]:
    """Several things, in whatever holds them.

    Args:
        values: The things.
        name: What error messages call them.

    Raises:
        TypeError: If it is one thing, such as a text, whose letters would be taken for texts.
    """
    one = str, bytes, bytearray, memoryview, Mapping
    if isinstance(values, one) or not isinstance(values, Iterable) or getattr(values, "ndim", 1) in (0, 2, 3):
        raise TypeError(f"`{name}` is a {type(values).__name__}; expected a list.")
    return list(values)


def embed_images(model, processor, images: Sequence[Any]) -> torch.Tensor:
    """Embeds one batch of images.

    Args:
        model: An `MMGEMModel`.
        processor: Its `MMGEMProcessor`.
        images: B images.

    Returns:
        (B, D) or (B, k, D), normalised, float32, on the CPU.
    """
    inputs = to_model(model, processor(images=as_list(images, "images"), return_tensors="pt"))
    with inference(model):
        return unit(model.get_image_features(**inputs).pooler_output)


def embed_regions(model, processor, images: Sequence[Any], boxes: Sequence[Sequence[Box]]) -> torch.Tensor:
    """Embeds the boxes of one batch of images.

    Args:
        model: An `MMGEMModel`.
        processor: Its `MMGEMProcessor`.
        images: B images.
        boxes: For each image at least one box `[x0, y0, x1, y1]`, in its pixels.

    Returns:
        (N, D) or (N, k, D), N the number of all boxes, normalised, float32, on the CPU; image after image.
    """
    images = as_list(images, "images")
    _check_as_many(images, boxes, "lists of boxes")
    embeds: dict[tuple[int, int], torch.Tensor] = {}
    for parts in _in_batches(boxes):
        some, their_boxes = [images[part.image] for part in parts], [part.boxes for part in parts]
        inputs = to_model(model, processor(images=some, boxes=their_boxes, return_tensors="pt"))
        with inference(model):
            embeddings = model.get_image_features(**inputs).pooler_output  # (B, R, D) or (B, R, k, D), padded
        embeds |= {part[:2]: unit(own[: len(part.boxes)]) for part, own in zip(parts, embeddings, strict=True)}
    return torch.cat([embeds[part] for part in sorted(embeds)])


def embed_texts(model, processor, texts: Sequence[str], batch_tokens: int | None = None) -> torch.Tensor:
    """Embeds any number of texts, those of about the same length together, as many as a number of tokens allows.

    Args:
        model: An `MMGEMModel`.
        processor: Its `MMGEMProcessor`.
        texts: T texts.
        batch_tokens: Tokens at a time, padding included; by default as many as suit the model's device. A text that
            is longer is embedded alone.

    Returns:
        (T, D) or (T, k, D), normalised, float32, on the CPU, in the order of `texts`.

    Raises:
        ValueError: If there are no texts.
    """
    texts = as_list(texts, "texts")
    if not texts:
        raise ValueError("`texts` is empty; expected at least one text.")
    batch_tokens = tokens_at_a_time(model.device) if batch_tokens is None else batch_tokens
    ids = processor(text=[processor.plain_text(text) for text in texts], padding=False)["input_ids"]
    batches = list(batches_of_tokens([len(own) for own in ids], batch_tokens))
    parts = []
    with inference(model):
        for batch in batches if len(batches) == 1 else progress(batches, desc="texts", unit="batch", leave=False):
            inputs = padded([ids[row] for row in batch], processor.tokenizer.pad_token_id or 0)
            parts.append(unit(model.get_text_features(**to_model(model, inputs)).pooler_output))
    return restore(parts, batches)


def padded(ids: Sequence[Any], pad_token_id: int = 0) -> dict[str, torch.Tensor]:
    """Returns the token ids of B texts as (B, L), padded on the right, with their mask."""
    rows = [torch.as_tensor(own, dtype=torch.long) for own in ids]
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return {"input_ids": pad_sequence(rows, batch_first=True, padding_value=pad_token_id), "attention_mask": mask}


def embed_fused(
    model,
    processor,
    images: Sequence[Any],
    texts: Sequence[str],
    boxes: Sequence[Sequence[Box]] | None = None,
) -> torch.Tensor:
    """Embeds one batch of images, each together with a text, through the language model.

    Args:
        model: An `MMGEMModel`.
        processor: Its `MMGEMProcessor`.
        images: For each text its image, or a list of its images; they stand before the text.
        texts: B texts, such as instructions after their prompt; an empty one leaves the image alone.
        boxes: For each image, one after the other, at least one box `[x0, y0, x1, y1]` in its pixels. The boxes then
            take the place of the image.

    Returns:
        (B, D) or (B, k, D), normalised, float32, on the CPU.

    Raises:
        ValueError: If there are not as many images as texts, or an image has no box where there are boxes.
    """
    images, texts = as_list(images, "images"), as_list(texts, "texts")
    return unit(_fused_features(model, processor, images, texts, boxes).pooler_output)


class EmbeddingMode(NamedTuple):
    """How inputs of one kind are embedded.

    Args:
        inputs: The inputs in words, plural.
        takes: Which of `"images"` and `"texts"` an input consists of.
        embed: The embeddings of one batch, from the model, its processor, and what `takes` names.
    """

    inputs: str
    takes: tuple[str, ...]
    embed: Callable[..., torch.Tensor]


# For each kind that models embed (`EMBEDDING_METHODS` in the configuration), how it is embedded. Calibration, an index
# and its fingerprint go by this table.
EMBEDDING_MODES = {
    "text": EmbeddingMode("texts", ("texts",), embed_texts),
    "image": EmbeddingMode("images", ("images",), embed_images),
    "fused": EmbeddingMode("images with texts", ("images", "texts"), embed_fused),
}


def remember(model, processor, images: Sequence[Any]) -> torch.Tensor:
    """Computes the memories of one batch of images: the states of the model's k [EMB] vectors after each image.

    They are enough to caption the image and to answer questions about it, see [`answer_from_memory`]. A calibrator,
    which is about embeddings, has no part in them.

    Returns:
        (B, k, H), float32, on the CPU; H is the width of the language model.
    """
    with uncalibrated(model):
        output = _fused_features(model, processor, images, [""] * len(images))
    return output.last_hidden_state.float().cpu()


class ImageStates(NamedTuple):
    """Outputs of `embed_and_remember` for B images, float32, on the CPU.

    Args:
        image_embeds: As `embed_images` gives them.
        fused_embeds: As `embed_fused` gives them for the images alone; None where the model is calibrated for images,
            but not for images with texts.
        memory: As `remember` gives it.
    """

    image_embeds: torch.Tensor
    fused_embeds: torch.Tensor | None
    memory: torch.Tensor


def embed_and_remember(model, processor, images: Sequence[Any]) -> ImageStates:
    """Embeds and remembers one batch of images, by one pass of the vision tower; arguments as for `embed_images`."""
    can_fuse = "fused" in model.config.embedded_kinds
    calibrated = nullcontext() if can_fuse else uncalibrated(model)
    if model.vlm is not None:  # which sees images in prompts in its own way
        inputs = to_model(model, processor(images=list(images), return_tensors="pt"))
        with inference(model):
            image = model.get_image_features(**inputs)
        with calibrated:
            fused = _fused_features(model, processor, images, [""] * len(images))
    else:
        prompts, options = [processor.prompt()] * len(images), {"padding": True, "return_tensors": "pt"}
        inputs = processor(images=list(images), text=prompts, **options, **processor.prompt_kwargs)
        inputs = to_model(model, inputs)
        with inference(model):
            pictures = {name: inputs.pop(name) for name in ("pixel_values", "spatial_shapes") if name in inputs}
            image = model.get_image_features(**pictures)
            with calibrated:
                fused = model.get_multimodal_features(**inputs, visual_tokens=image.last_hidden_state)
    fused_embeds = unit(fused.pooler_output) if can_fuse else None
    return ImageStates(unit(image.pooler_output), fused_embeds, fused.last_hidden_state.float().cpu())


def generate_captions(model, processor, images: Sequence[Any], max_new_tokens: int = CAPTION_TOKENS) -> list[str]:
    """Writes the caption of each image of one batch, as the generation configuration of the model says."""
    return generate_answers(model, processor, images, [""] * len(images), max_new_tokens)


def generate_region_captions(
    model, processor, images: Sequence[Any], boxes: Sequence[Sequence[Box]], max_new_tokens: int = ANSWER_TOKENS
) -> list[str]:
    """Writes the caption of each box of one batch of images, as `generate_captions` does; `boxes` and order as in
    `embed_regions`.

    The model's prompt "region_caption" asks for it, if there is one.
    """
    _check_as_many(images, boxes, "lists of boxes")
    question = (model.config.prompts or {}).get("region_caption", "")
    captions: dict[tuple[int, int], list[str]] = {}
    for parts in _in_batches(boxes):
        some, their_boxes = [images[part.image] for part in parts], [part.boxes for part in parts]
        prompts = [processor.prompt(question)] * sum(map(len, their_boxes))
        options = {"return_tensors": "pt", **processor.prompt_kwargs}
        inputs = processor(images=some, boxes=their_boxes, text=prompts, **options)
        written = iter(_generate(model, inputs, processor, max_new_tokens))
        captions |= {part[:2]: list(islice(written, len(part.boxes))) for part in parts}
    return [caption for part in sorted(captions) for caption in captions[part]]


def generate_answers(
    model, processor, images: Sequence[Any], questions: Sequence[str], max_new_tokens: int = CAPTION_TOKENS
) -> list[str]:
    """Writes the answers to one batch of questions, each about its image; to an empty one, a caption. The generation
    configuration of the model says how.

    An image that comes several times, as the same object, is prepared once, and the vision tower runs over it once.
    So does the language model where it keeps keys and values of all tokens, over the image and what stands before it.

    Raises:
        ValueError: If there are not as many images as questions.
    """
    _check_as_many(images, questions, "questions")
    prompts = [processor.prompt(question) for question in questions]
    options = {"padding": True, "return_tensors": "pt", **processor.prompt_kwargs}
    inputs = processor(images=list(images), text=prompts, **options)
    rows: dict[int, int] = {}  # the first of each image
    first = [rows.setdefault(id(image), row) for row, image in enumerate(images)]
    if model.vlm is None and len(rows) < len(images):
        pictures = {name: inputs.pop(name) for name in ("pixel_values", "spatial_shapes") if name in inputs}
        pictures = {name: tensor[list(rows.values())] for name, tensor in pictures.items()}
        with inference(model):
            tokens = model.get_image_features(**to_model(model, pictures)).last_hidden_state  # (I, n, C)
        places = {row: place for place, row in enumerate(rows.values())}
        numbers = [places[row] for row in first]
        if shared := read_prefix(model, inputs, tokens, numbers):
            return _generate(model, inputs, processor, max_new_tokens, **shared)
        inputs["visual_tokens"] = tokens[numbers]  # (B, n, C)
    return _generate(model, inputs, processor, max_new_tokens)


def read_prefix(model, inputs, visual_tokens: torch.Tensor, numbers: Sequence[int]) -> dict[str, Any]:
    """Runs the language model once over each image and the tokens that all prompts begin with alike.

    Args:
        model: An `MMGEMModel` that began with two towers.
        inputs: `input_ids` and `attention_mask` (B, L) of prompts with one image each, padded on the left.
        visual_tokens: (I, n, C) of the images.
        numbers: For each prompt the number of its image.

    Returns:
        What `generate` takes beside `inputs`: keys and values of the first columns, and vectors of all tokens. Nothing
        where prompts begin differently, or the language model keeps something else of its past.
    """
    settings = model.generation_config
    if settings.use_cache is False or settings.cache_implementation is not None:
        return {}
    cache = DynamicCache(config=model.config.text_config)
    if any(type(layer) is not DynamicLayer for layer in cache.layers):  # windows, and states
        return {}
    ids, mask = inputs["input_ids"].to(model.device), inputs["attention_mask"].to(model.device)  # (B, L)
    start, place = ids.shape[1] - mask.sum(-1, keepdim=True), torch.arange(ids.shape[1], device=ids.device)
    own = ids.gather(1, start + place[: int(mask.sum(-1).min()) - 1])  # (B, s), none with its last token
    length = int((own == own[0]).all(0).cumprod(0).sum())
    prefix = own[: len(visual_tokens), :length]  # (I, p), all rows alike
    if (prefix[0] == model.config.image_token_id).sum() != visual_tokens.shape[1]:
        return {}
    with inference(model):
        model(input_ids=prefix, visual_tokens=visual_tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        # As if each prompt had been read by itself: its beginning stands after its padding, which nothing looks at.
        rows = torch.tensor(numbers, device=ids.device)[:, None]  # (B, 1)
        columns = (place[:length] - start).clamp(min=0)  # (B, p)
        rows, columns = (index.repeat_interleave(settings.num_beams or 1, dim=0) for index in (rows, columns))
        for layer in cache.layers:
            layer.keys = layer.keys[rows, :, columns].transpose(1, 2)  # (B * beams, heads, p, width)
            layer.values = layer.values[rows, :, columns].transpose(1, 2)
        inputs_embeds = model.embed_prompt(ids, visual_tokens=visual_tokens[list(numbers)])  # (B, L, H)
    return {"past_key_values": cache, "inputs_embeds": inputs_embeds}


def classify(model, processor, images: Sequence[Any], texts: Sequence[str]) -> torch.Tensor:
    """Computes how probable each of some texts is for each image of one batch, if one of them is right.

    Returns:
        (I, T), whose rows sum to 1, float32, on the CPU.
    """
    plain = [processor.plain_text(text) for text in texts]
    inputs = processor(images=list(images), text=plain, padding=True, return_tensors="pt")
    with inference(model):
        return model(**to_model(model, inputs)).logits_per_image.float().softmax(dim=-1).cpu()


def answer_from_memory(
    model,
    processor,
    memory: torch.Tensor,
    questions: Sequence[str] | None = None,
    max_new_tokens: int = CAPTION_TOKENS,
) -> list[str]:
    """Writes the answers to one batch of questions about images of which only memories are left.

    Args:
        model: An `MMGEMModel`; its vision tower does not run.
        processor: Its `MMGEMProcessor`.
        memory: (B, j, H) as `remember` gives it, j from 1 to k; a memory for each question.
        questions: B questions, an empty one for a caption; by default each image is captioned.
        max_new_tokens: The length at which an answer is cut.

    Raises:
        ValueError: If there are not as many memories as questions, or the memory does not fit the model.
    """
    questions = [""] * len(memory) if questions is None else list(questions)
    if len(memory) != len(questions):
        raise ValueError(
            f"`memory` holds {len(memory)} memories; expected {len(questions)}, one for each of the questions."
        )
    if processor.is_plain:
        inputs = processor(text=[processor.plain_text(text) for text in questions], padding=True, return_tensors="pt")
    else:  # the memory takes the place of the image
        prompts = [processor.prompt_ids(question, is_vlm_view=False) for question in questions]
        inputs = processor.tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
    return _generate(model, inputs, processor, max_new_tokens, embedding_tokens=memory.to(model.device, model.dtype))


class _Part(NamedTuple):
    """Boxes of one image, by the number of the image and of the first of them."""

    image: int
    first: int
    boxes: Sequence[Box]


def _in_batches(boxes: Sequence[Sequence[Box]]) -> Iterator[list[_Part]]:
    """The boxes of all images, `BOXES_AT_A_TIME` with the padding of a batch, which images with as many boxes lack;
    an image with more than that comes several times."""
    if odd := [own for own in boxes if not isinstance(own, Sized)]:
        raise TypeError(f"`boxes` holds {odd[0]!r:.80} for an image; expected a list of [x0, y0, x1, y1] in pixels.")
    starts = [(image, first) for image, own in enumerate(boxes) for first in range(0, len(own), BOXES_AT_A_TIME)]
    parts = [_Part(image, first, boxes[image][first : first + BOXES_AT_A_TIME]) for image, first in starts]
    parts = parts or [_Part(image, 0, own) for image, own in enumerate(boxes)]  # which the processor refuses
    batch: list[_Part] = []
    for part in sorted(parts, key=lambda part: len(part.boxes)):
        if batch and (len(batch) + 1) * len(part.boxes) > BOXES_AT_A_TIME:
            yield batch
            batch = []
        batch.append(part)
    if batch:
        yield batch


def _fused_features(model, processor, images, texts, boxes=None):
    """The features of texts after their images."""
    _check_as_many(images, texts, "texts")
    own_images = [list(own) if isinstance(own, list | tuple) else [own] for own in images]
    if boxes is not None and (bare := [number for number, own in enumerate(boxes) if len(own) == 0]):
        raise ValueError(f"`boxes` is empty for image {bare[0]}; expected at least one box of each image.")
    inputs = processor(
        images=[image for own in own_images for image in own],
        boxes=boxes,
        text=[processor.prompt(text, len(own)) for own, text in zip(own_images, texts, strict=True)],
        padding=True,
        return_tensors="pt",
        **processor.prompt_kwargs,
    )
    with inference(model):
        return model.get_multimodal_features(**to_model(model, inputs))


def _generate(model, inputs, processor, max_new_tokens: int, **given: Any) -> list[str]:
    with inference(model):
        ids = model.generate(**to_model(model, inputs), **given, max_new_tokens=max_new_tokens, do_sample=False)
    # Of a memory the model returns only what is new.
    new_ids = ids if "embedding_tokens" in given else ids[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.tokenizer.batch_decode(new_ids, skip_special_tokens=True)]


def _check_as_many(images: Sequence[Any], texts: Sequence[Any], name: str):
    if len(images) != len(texts):
        raise ValueError(f"`images` holds {len(images)} entries; expected {len(texts)}, one for each of the {name}.")


@contextmanager
def tower_runs_once(model) -> Iterator[None]:
    """Within it, the vision tower runs once for each image, however often and in whatever company it is asked about.

    Args:
        model: An `MMGEMModel`, perhaps wrapped. The grids of all images are held until the end.
    """
    owner = next((module for module in model.modules() if isinstance(module, MMGEMModel)), None)
    if owner is None:
        yield
        return
    run = owner._patch_grid
    grids: dict[bytes, torch.Tensor] = {}

    def patch_grid(pixel_values: torch.Tensor, spatial_shapes: torch.Tensor | None = None) -> torch.Tensor:
        if spatial_shapes is not None:
            return run(pixel_values, spatial_shapes)
        keys = [hashlib.blake2b(image.numpy().tobytes()).digest() for image in pixel_values.float().cpu()]
        if new := {key: number for number, key in enumerate(keys) if key not in grids}:
            grids.update(zip(new, run(pixel_values[list(new.values())]), strict=True))
        return torch.stack([grids[key] for key in keys])

    owner._patch_grid = patch_grid  # type: ignore[method-assign]
    try:
        yield
    finally:
        owner.__dict__.pop("_patch_grid", None)  # which another thread may have done


@contextmanager
def pictures_prepared_once(processor) -> Iterator[None]:
    """Within it, a picture is resized and normalised once, however often and in whatever company it comes.

    Args:
        processor: An `MMGEMProcessor`. That of a VLM prepares its own at each call, and so does each where pictures
            of a call differ in shape: it may depend on the others what becomes of one.
    """
    prepare = getattr(getattr(processor, "image_processor", None), "preprocess", None)
    if prepare is None or processor.vlm_processor is not None:
        yield
        return
    prepared: dict[tuple, Mapping[str, torch.Tensor]] = {}

    def preprocess(images: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("return_tensors") != "pt":
            return prepare(images, *args, **kwargs)
        keys = [(xxh3_128_digest(image.tobytes()), image.size, repr((args, kwargs))) for image in images]
        for key, image in zip(keys, images, strict=True):
            if key not in prepared:
                prepared[key] = prepare([image], *args, **kwargs)
        batch = batch_of([prepared[key] for key in keys])
        return prepare(images, *args, **kwargs) if batch is None else BatchFeature(batch)

    processor.image_processor.preprocess = preprocess
    try:
        yield
    finally:
        processor.image_processor.__dict__.pop("preprocess", None)  # which another thread may have done


def batch_of(parts: Sequence[Mapping[str, torch.Tensor] | None]) -> dict[str, torch.Tensor] | None:
    """Returns inputs of single images as those of a batch, if there are all, of the same names and shapes."""
    shapes = {None if part is None else tuple((name, part[name].shape) for name in sorted(part)) for part in parts}
    if None in shapes or len(shapes) != 1:
        return None
    first, *_ = parts
    return {name: torch.cat([part[name] for part in parts]) for name in first}  # type: ignore[index, union-attr]
