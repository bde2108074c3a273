"""Memory that a process shares with the workers of its loaders, which start as copies of it."""

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def shared_with_workers() -> Iterator[None]:
    """Keeps pages of memory shared with workers that start inside: one that either side writes into is copied.

    A collection of garbage writes into every object, so those that are there already are left out. Memory that was
    freed before, such as by another training, goes back to the system: a worker would keep it, while this process
    fills it again.
    """
    free_memory()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def free_memory() -> None:
    """Collects garbage, and gives freed memory back to the system.

    glibc keeps everything below the last block that is in use, which may be gigabytes.
    """
    gc.collect()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)
