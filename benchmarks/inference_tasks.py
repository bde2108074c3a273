"""What `benchmarks.inference` measures: tasks, each done by MM-GEM and by what one would use in its place."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from transformers import CLIPModel, DynamicCache, LlavaForConditionalGeneration

from benchmarks.setting import FIRST_WORD_ID, IMAGE_TOKEN_ID, Setting, build_batch, build_model
from benchmarks.two_model_stack import build_clip, build_llava, clip_inputs
from mmgem import MMGEMModel
from mmgem.processing.token_batches import batches_of_tokens, restore, tokens_at_a_time
from mmgem.training.inference import read_prefix

OURS, OURS_16 = "MM-GEM", "MM-GEM, 16 vectors of each"
CLIP, LLAVA = "CLIPModel", "LlavaForConditionalGeneration"
EMBEDDER = "embedder on the language model"  # that of LLaVA, without its vocabulary, read at the last token
BARE = "its towers in a bare loop"  # of forward passes: what no way of writing with them falls below
TEXTS = 128
BATCHES = {"a batch": 32, "a large batch": 128}  # of images; 32 is what `encode` and `mmgem index` take by default
NEW_TOKENS = 20
PER_IMAGE = 4  # regions, and questions
QUESTION_TOKENS = 10


class Contestants(NamedTuple):
    """Models with random weights around the same towers, in evaluation mode."""

    ours: MMGEMModel
    ours_16: MMGEMModel
    clip: CLIPModel
    llava: LlavaForConditionalGeneration


class Task(NamedTuple):
    """Something to do, and the steps of those who do it; a step does it `count` times."""

    name: str
    count: int
    of: str
    steps: dict[str, Callable[[], Any]]


def build_contestants(setting: Setting, device: str, dtype: torch.dtype) -> Contestants:
    several = {"num_embedding_tokens": 16, "embedding_pooling": "multi_vector"}
    models = build_model(setting), build_model(setting, **several), build_clip(setting), build_llava(setting)
    return Contestants(*(model.eval().to(device, dtype) for model in models))


def build_tasks(contestants: Contestants, setting: Setting) -> list[Task]:
    """All tasks on ready tensors: preprocessing and tokenizing are not in them."""
    ours, ours_16, clip, llava = contestants
    images, words = setting.num_images, setting.text["vocab_size"]
    to = {"device": ours.device, "dtype": ours.dtype}
    pixels = build_batch(setting)["pixel_values"].to(**to)
    batch = build_batch(replace(setting, num_images=TEXTS))
    clip_texts = {
        name: tensor.to(ours.device) for name, tensor in clip_inputs(batch).items() if name != "pixel_values"
    }
    texts = {name: batch[name].to(ours.device) for name in ("input_ids", "attention_mask")}
    asked = max(1, images // PER_IMAGE)
    generator = torch.Generator().manual_seed(1)
    questions = torch.randint(FIRST_WORD_ID, words, (asked * PER_IMAGE, QUESTION_TOKENS), generator=generator)
    questions = questions.to(ours.device)
    boxes = torch.tensor([[0.1, 0.1, 0.6, 0.5], [0.4, 0.2, 0.9, 0.9], [0.0, 0.0, 0.5, 1.0], [0.3, 0.6, 0.8, 1.0]])
    boxes = boxes.to(ours.device).expand(asked, -1, -1)  # (I, 4, 4)
    crops = pixels[:asked].repeat_interleave(PER_IMAGE, dim=0)  # what they show makes no difference
    visual, patches = setting.num_visual_tokens, setting.num_patches

    def prompts(text: torch.Tensor, length: int) -> dict[str, torch.Tensor]:
        """(B, L) tokens after the placeholders of an image."""
        placeholders = text.new_full((len(text), length), IMAGE_TOKEN_ID)
        input_ids = torch.cat([placeholders, text], dim=1)  # (B, n + L)
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}

    def write(model, text: torch.Tensor, length: int, **images: Any) -> torch.Tensor:
        lengths = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
        return model.generate(**prompts(text, length), **images, **lengths, do_sample=False)

    def read(text: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        return llava.model(**prompts(text, patches), pixel_values=pixel_values, use_cache=False).last_hidden_state[
            :, -1
        ]

    def answer() -> torch.Tensor:
        tokens = ours.get_image_features(pixels[:asked]).last_hidden_state
        numbers = [image for image in range(asked) for _ in range(PER_IMAGE)]
        shared = read_prefix(ours, prompts(questions, visual), tokens, numbers)
        return write(ours, questions, visual, **shared)

    def embed_batch(name: str, count: int) -> Task:
        """Of a batch as users have it, whose tensors are large."""
        many = build_batch(replace(setting, num_images=count))["pixel_values"].to(**to)
        models = {OURS: ours, CLIP: clip}
        steps = {by: lambda model=model: model.get_image_features(many).pooler_output for by, model in models.items()}
        return Task(f"image vectors of {name}", count, "images", steps)

    nothing = questions.new_zeros(images, 0)
    text = batch["input_ids"][:images].clamp(min=FIRST_WORD_ID).to(ours.device)  # all as long as the longest
    units = asked * PER_IMAGE
    return [
        Task(
            "image vectors",
            images,
            "images",
            {
                OURS: lambda: ours.get_image_features(pixels).pooler_output,
                OURS_16: lambda: ours_16.get_image_features(pixels).pooler_output,
                CLIP: lambda: clip.get_image_features(pixels).pooler_output,
                EMBEDDER: lambda: read(nothing, pixels),
            },
        ),
        *(embed_batch(name, count) for name, count in BATCHES.items() if count > images),
        Task(
            "text vectors",
            TEXTS,
            "texts",
            {
                OURS: lambda: embed_texts(ours, texts),
                OURS_16: lambda: embed_texts(ours_16, texts),
                f"{CLIP}, padded": lambda: clip.get_text_features(**clip_texts).pooler_output,
                f"{EMBEDDER}, padded": lambda: read_texts(llava, texts),
            },
        ),
        Task(
            "fused vectors",
            images,
            "images with texts",
            {
                OURS: lambda: ours.get_multimodal_features(**prompts(text, visual), pixel_values=pixels).pooler_output,
                OURS_16: lambda: ours_16.get_multimodal_features(**prompts(text, visual), pixel_values=pixels),
                EMBEDDER: lambda: read(text, pixels),
            },
        ),
        Task(
            f"captions of {NEW_TOKENS} tokens",
            images,
            "images",
            {
                OURS: lambda: write(ours, nothing, visual, pixel_values=pixels),
                LLAVA: lambda: write(llava, nothing, patches, pixel_values=pixels),
                BARE: lambda: write_bare(ours, pixels),
            },
        ),
        Task(
            f"captions of {PER_IMAGE} regions of an image",
            units,
            "regions",
            {
                OURS: lambda: write(ours, questions[:, :0], visual, pixel_values=pixels[:asked], boxes=boxes),
                f"{LLAVA}, a crop each": lambda: write(llava, questions[:, :0], patches, pixel_values=crops),
            },
        ),
        Task(
            f"answers to {PER_IMAGE} questions about an image",
            units,
            "questions",
            {
                OURS: answer,
                LLAVA: lambda: write(llava, questions, patches, pixel_values=crops),
            },
        ),
    ]


def write_bare(model: MMGEMModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """The vision tower, and `NEW_TOKENS` forward passes of the language model, with nothing around them."""
    tokens = model.get_image_features(pixel_values).last_hidden_state  # (I, n, C)
    reads: dict[str, torch.Tensor] = {"inputs_embeds": model.token_projection(tokens)}  # (I, n, H)
    cache, written = DynamicCache(config=model.config.text_config), []
    for _ in range(NEW_TOKENS):
        logits = model.language_model(**reads, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        written.append(logits[:, -1].argmax(-1, keepdim=True))  # (I, 1)
        reads = {"input_ids": written[-1]}
    return torch.cat(written, dim=1)


def embed_texts(model: MMGEMModel, texts: dict[str, torch.Tensor]) -> torch.Tensor:
    """As `mmgem.training.inference.embed_texts` does it, without tokenizing; texts are padded on the right."""
    lengths = texts["attention_mask"].sum(-1).tolist()
    batches = list(batches_of_tokens(lengths, tokens_at_a_time(model.device)))
    parts = []
    for batch in batches:
        inputs = {name: tensor[batch, : lengths[batch[0]]] for name, tensor in texts.items()}
        parts.append(model.get_text_features(**inputs).pooler_output)
    return restore(parts, batches)


def read_texts(llava: LlavaForConditionalGeneration, texts: dict[str, torch.Tensor]) -> torch.Tensor:
    """All texts as one padded batch, read at their last tokens."""
    states = llava.model.language_model(**texts, use_cache=False).last_hidden_state  # (T, L, H)
    last = texts["attention_mask"].sum(-1) - 1  # (T,)
    return states[torch.arange(len(states), device=states.device), last]
