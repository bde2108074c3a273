"""How a contestant of the experiment is trained, and what is measured of it."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, get_cosine_schedule_with_warmup

from benchmarks.experiment_data import HeldOut, Setting, to_pixels
from benchmarks.peers import Batch, CLIPContestant, Contestant, MMGEMContestant
from mmgem.training.evaluation.metrics import recall_at, retrieval_ranks
from mmgem.training.evaluation.scene_metrics import SCENE_JUDGE
from mmgem.training.inference import inference
from mmgem.training.scenes.caption_parser import parse_caption

LOG_EVERY = 25
EVAL_BATCH = 100


class Trainable(Protocol):
    """What can be trained: `losses` gives the scalars of a batch, by name."""

    @property
    def model(self) -> nn.Module: ...

    def losses(self, batch: Batch) -> dict[str, torch.Tensor]: ...


class Schedule(Protocol):
    """Peak of the learning rate, and the steps up to it."""

    @property
    def learning_rate(self) -> float: ...

    @property
    def warmup(self) -> int: ...


def train(
    contestant: Trainable,
    batches: Sequence[Batch],
    schedule: Schedule,
    progress: str = "",
    position: int = 0,
    bf16: bool = True,
) -> dict:
    """A plain loop: AdamW, linear warm-up and a cosine to zero, the sum of the losses there are.

    Args:
        contestant: Trained in place.
        batches: In the order of the steps.
        schedule: Of the learning rate.
        progress, position: Name and line of the progress bar.
        bf16: Whether under autocast to bfloat16.

    Returns:
        `losses`, their means over every `LOG_EVERY` steps, by name.
    """
    model = contestant.model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=schedule.learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    scheduler = get_cosine_schedule_with_warmup(optimizer, schedule.warmup, len(batches))
    logged: dict[str, list[float]] = {}
    for batch in tqdm(batches, desc=progress, unit="step", leave=False, position=position, mininterval=2):
        batch = to_pixels({name: tensor.to(model.device) for name, tensor in batch.items()})
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            losses = contestant.losses(batch)
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        for name, loss in losses.items():
            logged.setdefault(name, []).append(loss.item())
    curves = {name: _means(values) for name, values in logged.items()}
    return {"losses": curves}


def _means(values: list[float]) -> list[float]:
    parts = [values[start : start + LOG_EVERY] for start in range(0, len(values), LOG_EVERY)]
    return [sum(part) / len(part) for part in parts]


def evaluate(
    contestant: Contestant, tokenizer: PreTrainedTokenizerBase, held_out: HeldOut, setting: Setting
) -> dict[str, float]:
    """Measures on the held-out scenes what a contestant can do, in float32.

    Returns:
        | metric | what it is |
        |---|---|
        | `text_to_image`, `image_to_text`, `long_text` | recall@1; all short captions, all images, all long captions |
        | `fidelity` | share of the generated captions that speak of exactly the right objects |
        | `facts` | F1 of the facts (the shape, color, fill, size at a place) that generated captions tell |
        | `caption_nll` | nats per token of a held-out caption |
    """
    device = contestant.model.device
    batch = {name: tensor.to(device) for name, tensor in held_out.batch.items()}
    images = batch["pixel_values"].split(EVAL_BATCH)
    metrics = {}
    with inference(contestant.model):
        if contestant.embeds:
            image_embeds = torch.cat([contestant.embed_images(part) for part in images]).cpu()  # (I, D)
            numbers = [number for number, texts in enumerate(held_out.captions) for _ in texts]
            captions = _embed(contestant, tokenizer, [text for texts in held_out.captions for text in texts])
            long_captions = _embed(contestant, tokenizer, held_out.long_captions)
            texts_of_image: list[set[int]] = [set() for _ in held_out.captions]
            for row, number in enumerate(numbers):
                texts_of_image[number].add(row)
            own = [{number} for number in range(len(image_embeds))]
            metrics["text_to_image"] = recall_at(retrieval_ranks(captions, image_embeds, [own[n] for n in numbers]), 1)
            metrics["image_to_text"] = recall_at(retrieval_ranks(image_embeds, captions, texts_of_image), 1)
            metrics["long_text"] = recall_at(retrieval_ranks(long_captions, image_embeds, own), 1)
        if contestant.writes:
            written = []
            for part in images:
                tokens = contestant.write(part, setting.max_new_tokens)
                written += [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]
            references = [texts[0] for texts in held_out.captions]
            metrics["fidelity"] = SCENE_JUDGE.caption_fidelity(written, references) or 0.0
            metrics["facts"] = fact_score(written, references)
            metrics["caption_nll"] = contestant.losses(batch)["caption_loss"].item()
    return metrics


def fact_score(captions: list[str], references: list[str]) -> float:
    """F1 between the facts of generated captions and those of their references, over all captions together. A fact is
    the value of one attribute (shape, color, fill, size) at one place; a caption that cannot be read tells none.
    """
    told, true, right = 0, 0, 0
    for caption, reference in zip(captions, references, strict=True):
        facts, expected = _facts(caption), _facts(reference)
        told, true, right = told + len(facts), true + len(expected), right + len(facts & expected)
    return 2 * right / max(told + true, 1)


def _facts(caption: str) -> set[tuple[str, str, str]]:
    objects = parse_caption(caption) or ()
    return {(item.place, name, value) for item in objects for name, value in item.look._asdict().items()}


def _embed(contestant: MMGEMContestant | CLIPContestant, tokenizer, texts: list[str]) -> torch.Tensor:
    parts = []
    for start in range(0, len(texts), EVAL_BATCH):
        inputs = tokenizer(
            texts[start : start + EVAL_BATCH], padding=True, padding_side="right", truncation=True, return_tensors="pt"
        ).to(contestant.model.device)
        parts.append(contestant.embed_texts(inputs["input_ids"], inputs["attention_mask"]).cpu())
    return torch.cat(parts)
