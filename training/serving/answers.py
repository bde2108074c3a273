"""What the model makes of batches of inputs: vectors, and texts that are written token by token."""

from collections.abc import AsyncIterable, AsyncIterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from transformers import AsyncTextIteratorStreamer, StoppingCriteria, StoppingCriteriaList

from mmgem.configuration_mmgem import EMBEDDING_METHODS
from mmgem.training.inference import inference, to_model, unit
from mmgem.training.serving.batching import Job
from mmgem.training.serving.inputs import ModelInput, collate


class ChatSettings(NamedTuple):
    """How an answer is written.

    Args:
        max_new_tokens: At how many tokens it is cut.
        temperature: 0 for the likeliest token each time.
        top_p: As for `generate`.
        seed: Of the sampling.
        stop: Texts before the first of which it ends.
        streamer: Takes the pieces of the answer, which go on after that.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    streamer: AsyncTextIteratorStreamer | None = None

    @property
    def is_alone(self) -> bool:
        """Whether it is written in a batch of its own: random numbers and streams are of one answer."""
        return self.temperature > 0 or self.streamer is not None


class Answer(NamedTuple):
    """A text that was written.

    Args:
        text: The text.
        num_tokens: Its tokens, with the one that ended it.
        is_cut: Whether the limit of tokens ended it.
    """

    text: str
    num_tokens: int
    is_cut: bool


def embed(model, processor, rows: Sequence[ModelInput]) -> list[np.ndarray]:
    """Embeds one batch of texts, images, or images with texts.

    Returns:
        For each (k, D), of unit length, float32; k is 1 where the model has one vector.
    """
    batch = to_model(model, collate(rows, processor.tokenizer.pad_token_id))
    with inference(model):
        vectors = unit(getattr(model, EMBEDDING_METHODS[rows[0].kind])(**batch).pooler_output)
    if rows[0].kind == "image" and "boxes" in batch:
        vectors = vectors[:, 0]  # (B, 1, ...), a region each
    return list((vectors if model.config.is_multi_vector else vectors[:, None]).numpy())  # (B, k, D)


def write(model, processor, jobs: Sequence[Job], settings: ChatSettings) -> list[Answer]:
    """Answers one batch of conversations; ends early when nobody waits for any of the answers."""
    batch = collate([job.payload for job in jobs], processor.tokenizer.pad_token_id)
    length = batch["input_ids"].shape[1]
    options: dict = {"do_sample": False}
    if settings.temperature > 0:
        options = {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
        if settings.seed is not None:
            torch.manual_seed(settings.seed)
    if settings.streamer is not None:
        options["num_beams"] = 1  # whose words are known one by one
    criteria: list[StoppingCriteria] = [_GivenUp(jobs)]
    if settings.stop:
        criteria.append(_Stopped(processor.tokenizer, length, settings.stop))
    with inference(model):
        ids = model.generate(
            **to_model(model, batch),
            **options,
            max_new_tokens=settings.max_new_tokens,
            stopping_criteria=StoppingCriteriaList(criteria),
            streamer=settings.streamer,
        )
    ends = model.generation_config.eos_token_id
    return [_answer(row, processor, ends, settings.stop) for row in ids[:, length:].tolist()]


def _answer(ids: list[int], processor, end_ids: int | list[int] | None, stop: Sequence[str]) -> Answer:
    ends = [] if end_ids is None else [end_ids] if isinstance(end_ids, int) else end_ids
    count = next((number for number, token in enumerate(ids, 1) if token in ends), None)
    text = processor.tokenizer.decode(ids[:count], skip_special_tokens=True)
    if (end := first_stop(text, stop)) is not None:
        beginnings = (processor.tokenizer.decode(ids[:n], skip_special_tokens=True) for n in range(1, len(ids) + 1))
        count = next(n for n, beginning in enumerate(beginnings, 1) if first_stop(beginning, stop) is not None)
        text = text[:end]
    return Answer(text.strip(), count or len(ids), count is None)


def first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the first of some texts begins in a text."""
    return min((text.index(one) for one in stop if one in text), default=None)


async def until_stop(pieces: AsyncIterable[str], stop: Sequence[str]) -> AsyncIterator[str]:
    """The pieces of a text before the first of some texts; what one of these may begin with waits for what follows."""
    held, most = "", max(map(len, stop), default=1) - 1
    async for piece in pieces:
        held += piece
        if (end := first_stop(held, stop)) is not None:
            yield held[:end]
            return
        ready = max(0, len(held) - most)
        yield held[:ready]
        held = held[ready:]
    yield held


class _Stopped(StoppingCriteria):
    """Of answers alone: `stop_strings` of `generate` may begin in the prompt."""

    def __init__(self, tokenizer, length: int, stop: Sequence[str]):
        self.tokenizer = tokenizer
        self.length = length
        self.stop = stop

    def __call__(self, input_ids, scores, **kwargs) -> torch.Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.length :], skip_special_tokens=True)
        return torch.tensor([first_stop(text, self.stop) is not None for text in texts], device=input_ids.device)


class _GivenUp(StoppingCriteria):
    def __init__(self, jobs: Sequence[Job]):
        self.jobs = jobs

    def __call__(self, input_ids, scores, **kwargs) -> torch.Tensor:
        over = all(job.is_given_up for job in self.jobs)
        return torch.full(input_ids.shape[:1], over, device=input_ids.device)
