"""A model that answers requests, and perhaps an index of it: reading, the queue, and the figures of both."""

import asyncio
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.exceptions import HTTPException
from transformers import AsyncTextIteratorStreamer

from mmgem.training.data.image_files import shorter_side_for
from mmgem.training.inference import CAPTION_TOKENS
from mmgem.training.search.conditions import Condition
from mmgem.training.search.index import SearchIndex
from mmgem.training.search.row_search import Hit
from mmgem.training.serving.answers import Answer, ChatSettings, embed, write
from mmgem.training.serving.batching import Job, ModelWorker
from mmgem.training.serving.inputs import InputReader, ModelInput
from mmgem.training.serving.limits import Limits
from mmgem.training.serving.schemas import ChatCompletions, EmbeddingInput, Search

LEAST_TEMPERATURE = 1e-3  # of sampling; by less, logits become infinite
READERS = 2  # threads that decode pictures, each at most one of `max_pixels`
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Server:
    """A model, and perhaps an index, with what answers requests about them.

    Args:
        name: What requests call the model.
        model: An `MMGEMModel`.
        processor: Its `MMGEMProcessor`.
        index: A `SearchIndex` of the same model.
        limits: The limits.
    """

    def __init__(self, name: str, model, processor, index: SearchIndex | None, limits: Limits):
        self.name = name
        self.model = model
        self.processor = processor
        self.index = index
        self.limits = limits
        self.reader = InputReader(processor, limits)
        self.pictures_side = shorter_side_for(processor)  # of queries, which are read as an index reads its images
        self.worker = ModelWorker(self._run, limits)
        self.readers = ThreadPoolExecutor(READERS, "reader")
        self.registry = CollectorRegistry()
        metric: dict[str, Any] = {"namespace": "mmgem", "registry": self.registry}
        self.requests = Counter("requests", "Requests that have ended.", ["route", "status"], **metric)
        self.seconds = Histogram("request_seconds", "Seconds from headers to the last byte.", ["route"], **metric)
        self.batches = Histogram("batch_inputs", "Inputs of a batch.", ["action"], buckets=BATCH_SIZES, **metric)
        self.tokens = Counter("tokens", "Tokens that were read and written.", ["direction"], **metric)
        Gauge("queue_inputs", "Inputs that are in work.", **metric).set_function(lambda: self.worker.in_work)

    def observe(self, route: str, status: int, seconds: float) -> None:
        """Notes a request that has ended."""
        self.requests.labels(route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)

    def check_model(self, name: str | None) -> None:
        """Refuses another model's name, with status 404."""
        if name not in (None, self.name):
            raise HTTPException(404, f"`model` is {name!r}; expected {self.name!r}.")

    async def embed(self, inputs: Sequence[EmbeddingInput], name: str, **options) -> tuple[list[np.ndarray], int]:
        """Embeds the inputs of a request.

        Args:
            inputs: B inputs.
            name: What errors call them.
            options: As for `InputReader.embedding_input`.

        Returns:
            For each (k, D); and how many tokens they had, an image `num_visual_tokens`.

        Raises:
            HTTPException: With status 413 if there are too many, and as `ModelWorker.places`.
            ValueError: If one of them cannot be embedded.
        """
        self._check_count(inputs, name)
        with self.worker.places(len(inputs)):
            read = await self._read_all(
                [
                    partial(self.reader.embedding_input, item, f"{name}[{number}]", **options)
                    for number, item in enumerate(inputs)
                ]
            )
            # Texts of like length are in one batch, which pads them the least.
            order = sorted(range(len(read)), key=lambda row: read[row].num_tokens)
            answers = await self.worker.answer([(("embed", read[row].batch_key), read[row]) for row in order])
        vectors = [vector for _, vector in sorted(zip(order, answers, strict=True), key=lambda pair: pair[0])]
        count = sum(row.num_tokens or self.processor.num_visual_tokens for row in read)
        self.tokens.labels("read").inc(count)
        return vectors, count

    async def search(self, requests: Sequence[Search]) -> list[list[Hit]]:
        """Searches the index for each of some queries; those of texts that are alike in all else go together.

        Raises:
            HTTPException: With status 413 if there are too many, and as `ModelWorker.places`.
            ValueError: As `SearchIndex.search`.
        """
        self._check_count(requests, "queries")
        with self.worker.places(len(requests)):
            jobs = [await self._read_search(request) for request in requests]
            return await self.worker.answer(jobs)

    async def _read_search(self, request: Search) -> tuple[Hashable, dict[str, Any]]:
        """Key and payload of a search."""
        side = None if request.boxes is not None else self.pictures_side
        sources = [request.image] if isinstance(request.image, str) else request.image or []
        reads: list[Callable[[], Any]] = [partial(self.reader.picture, source, "image", side) for source in sources]
        if request.text is not None:  # which is refused if it is too long
            reads.append(partial(self.reader.embedding_input, EmbeddingInput(text=request.text), "text"))
        pictures = (await self._read_all(reads))[: len(sources)]
        limits = {name: getattr(request, name) for name in ("vectors", "query_vectors", "lexical_weight", "top")}
        limits |= {"prompt": request.prompt_name, "kinds": tuple(request.kinds or ())}
        limits["where"] = tuple(Condition.parse(text) for text in request.where or [])
        if request.text is not None and not pictures and request.boxes is None:
            return ("search", tuple(limits.values())), limits | {"text": request.text}
        return ("search", object()), limits | {"text": request.text, "image": pictures or None, "boxes": request.boxes}

    async def read_chat(self, request: ChatCompletions) -> tuple[ModelInput, ChatSettings]:
        """Reads a conversation, and how it is to be answered.

        Raises:
            HTTPException: As `ModelWorker.places`.
            ValueError: If it cannot be read, or there is no room for an answer.
        """
        limits = self.limits
        asked = request.max_completion_tokens or request.max_tokens
        if asked is not None and asked > limits.max_new_tokens:
            raise ValueError(f"`max_tokens` is {asked}; expected at most {limits.max_new_tokens}.")
        with self.worker.places(1):
            [read] = await self._read_all([partial(self.reader.chat_input, request.messages)])
        most = self.model.config.max_sequence_length
        room = limits.max_new_tokens if most is None else most - read.num_tokens
        if room < (asked or 1):
            raise ValueError(
                f"`messages` has {read.num_tokens} tokens, to be answered by {asked or 1}; expected {most} together."
            )
        streamer = None
        if request.stream:
            streamer = AsyncTextIteratorStreamer(
                self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=limits.timeout
            )
        length = asked or min(room, CAPTION_TOKENS, limits.max_new_tokens)
        temperature = request.temperature if request.temperature >= LEAST_TEMPERATURE else 0.0
        return read, ChatSettings(length, temperature, request.top_p, request.seed, tuple(request.stop), streamer)

    async def write(self, read: ModelInput, settings: ChatSettings) -> Answer:
        """Answers a conversation.

        Raises:
            HTTPException: As `ModelWorker.places`.
        """
        alone = object() if settings.is_alone else None
        with self.worker.places(1):
            [answer] = await self.worker.answer([(("chat", settings, read.batch_key, alone), read)])
        self.tokens.labels("read").inc(read.num_tokens)
        self.tokens.labels("written").inc(answer.num_tokens)
        return answer

    def _check_count(self, inputs: Sequence[Any], name: str) -> None:
        limit = self.limits.max_inputs
        if not inputs:
            raise ValueError(f"`{name}` is empty; expected 1 to {limit} inputs.")
        if len(inputs) > limit:
            raise HTTPException(413, f"`{name}` holds {len(inputs):,} inputs; expected at most {limit:,}.")

    async def _read_all(self, reads: Sequence[Callable[[], Any]]) -> list[Any]:
        """Calls all in the threads that read; what is left is not read when one fails."""
        loop = asyncio.get_running_loop()
        futures = [loop.run_in_executor(self.readers, read) for read in reads]
        try:
            return list(await asyncio.gather(*futures))
        finally:
            for future in futures:
                if not future.cancel() and not future.cancelled():
                    future.exception()

    def _run(self, key: Hashable, jobs: list[Job]) -> Sequence[Any]:
        """Answers one batch of jobs, in the thread of the model."""
        assert isinstance(key, tuple)
        self.batches.labels(key[0]).observe(len(jobs))
        if key[0] == "search":
            assert self.index is not None
            if "image" in jobs[0].payload:
                return [self.index.search(**job.payload) for job in jobs]
            limits = {name: value for name, value in jobs[0].payload.items() if name != "text"}
            return self.index.search_texts([job.payload["text"] for job in jobs], **limits)
        if key[0] == "chat":
            return write(self.model, self.processor, jobs, key[1])
        return embed(self.model, self.processor, [job.payload for job in jobs])
