"""Requests that come at the same time, in batches: a queue, and the one thread that owns the model."""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from starlette.exceptions import HTTPException

from mmgem.training.serving.limits import BUSY, Limits

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Job:
    """One input in the queue.

    Args:
        key: Jobs with equal keys may be in one batch.
        payload: What the model is given.
        future: Of the event loop of its request, which cancels it when nobody waits any more.
    """

    key: Hashable
    payload: Any
    future: asyncio.Future

    @property
    def is_given_up(self) -> bool:
        """Whether nobody waits for the answer."""
        return self.future.cancelled()

    def settle(self, result: Any) -> None:
        """Answers, from any thread; an exception is raised where the answer is awaited."""

        def settle() -> None:
            if not self.future.done():
                set_it = self.future.set_exception if isinstance(result, BaseException) else self.future.set_result
                set_it(result)

        try:
            self.future.get_loop().call_soon_threadsafe(settle)
        except RuntimeError:  # the loop is closed: so is whoever waited
            pass


class ModelWorker:
    """Batches jobs for a model, which only its own thread ever calls.

    A batch begins with the oldest job and takes what has the same key, up to `max_batch`. While there are fewer, it
    waits up to `max_wait` for more. A batch that fails is tried again job by job, so that no job fails for another.

    Args:
        run: Called with the key and the jobs of a batch, returns a result for each.
        limits: Of batch, wait and queue.
    """

    def __init__(self, run: Callable[[Hashable, list[Job]], Sequence[Any]], limits: Limits):
        self.run_batch = run
        self.limits = limits
        self.in_work = 0  # inputs between the beginning of their request and its answer
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def close(self) -> None:
        """Ends the thread, after the batch it is at."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether jobs are answered."""
        return self._thread.is_alive()

    @contextmanager
    def places(self, count: int) -> Iterator[None]:
        """Keeps places in the queue for the inputs of one request, before any of them is read.

        Raises:
            HTTPException: With status 429, if there are not as many.
        """
        limit = self.limits.max_queue
        if self.in_work + count > limit:
            raise HTTPException(
                429, f"{self.in_work} inputs are in work and {count} came; expected at most {limit} in all.", BUSY
            )
        self.in_work += count
        try:
            yield
        finally:
            self.in_work -= count

    async def answer(self, payloads: Sequence[tuple[Hashable, Any]]) -> list[Any]:
        """Waits for the results of jobs, given as key and payload, in their order.

        Raises:
            Exception: What the model has raised for one of them.
        """
        loop = asyncio.get_running_loop()
        jobs = [Job(key, payload, loop.create_future()) for key, payload in payloads]
        with self._changed:
            self._waiting.extend(jobs)
            self._changed.notify()
        try:
            return await asyncio.gather(*(job.future for job in jobs))
        finally:
            for job in jobs:
                if not job.future.cancel() and not job.future.cancelled():
                    job.future.exception()  # of a second job that failed, which nobody would ask for

    def _work(self) -> None:
        while batch := self._next_batch():
            results: Sequence[Any]
            try:
                results = self.run_batch(batch[0].key, batch)
            except Exception as error:
                results = [error] if len(batch) == 1 else [self._run_alone(job) for job in batch]
            for job, result in zip(batch, results, strict=True):
                job.settle(result)

    def _run_alone(self, job: Job) -> Any:
        try:
            return self.run_batch(job.key, [job])[0]
        except Exception as error:
            return error

    def _next_batch(self) -> list[Job]:
        """The jobs to run next; none once the worker is closed."""
        with self._changed:
            while not self._is_closed:
                self._changed.wait_for(lambda: self._waiting or self._is_closed)
                end = time.monotonic() + self.limits.max_wait
                while len(self._waiting) < self.limits.max_batch and not self._is_closed:
                    if not self._changed.wait(max(0, end - time.monotonic())):
                        break
                if batch := self._take():
                    return batch
            return []

    def _take(self) -> list[Job]:
        """Takes the oldest job that someone waits for, and those that go with it, out of the queue."""
        batch: list[Job] = []
        others: deque[Job] = deque()
        while self._waiting and len(batch) < self.limits.max_batch:
            job = self._waiting.popleft()
            if not job.is_given_up:
                (batch if not batch or job.key == batch[0].key else others).append(job)
        self._waiting.extendleft(reversed(others))
        return batch
