"""Processes that experiments run in, each with one thread and a line of its own for its progress bar."""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

import torch
from tqdm.auto import tqdm
from transformers.utils import logging

_slot = 0  # which of the workers this process is


def progress_line() -> int:
    """The `position` of this process's progress bar; line 0 is the main process's."""
    return 1 + _slot


@contextmanager
def worker_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """So many processes."""
    context = multiprocessing.get_context("spawn")
    tqdm.set_lock(context.RLock())  # the default one belongs to another way of starting processes
    slots = context.Queue()
    for slot in range(workers):
        slots.put(slot)
    with ProcessPoolExecutor(workers, context, _start_worker, (slots, tqdm.get_lock())) as pool:
        yield pool


def _start_worker(slots, lock) -> None:
    global _slot
    _slot = slots.get()
    tqdm.set_lock(lock)
    torch.set_num_threads(1)
    logging.disable_progress_bar()  # of loading weights, which would cross the others
