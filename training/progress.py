"""How far long work is: a bar on a terminal and in a notebook, and where nobody sees it move a line a minute."""

import os
import sys
import time
from collections.abc import Iterator
from typing import Any

from mmgem.training.printable import counted

SECONDS = 60.0  # between lines, and before the first
shown: dict[str, str | None] = {"as": None}  # "bar", "lines", "nothing", or, by the place that it goes to, None


def progress(iterable: Any = None, **options: Any) -> Any:
    """Makes what tqdm makes of the same arguments, or in its place `Lines`; either is updated, iterated or closed.

    Of the processes of a distributed run the first one alone says how far it is.
    """
    from tqdm.auto import tqdm

    style = shown["as"] or ("bar" if sys.stderr.isatty() or "notebook" in tqdm.__module__ else "lines")
    if os.environ.get("RANK", "0") != "0":
        style = "nothing"
    if style == "bar":
        return tqdm(iterable, **options)
    return Lines(iterable, options.get("total"), options.get("initial", 0), options["desc"], style == "nothing")


class Lines:
    """Writes a line a minute to stderr; of what takes less, none.

    Args:
        iterable: What is iterated over, if anything is.
        total: Its length, where it does not know it.
        initial: How many of these are done.
        desc: The name of what is done, in the plural.
        is_silent: Whether no line is written.
    """

    def __init__(self, iterable: Any, total: int | None, initial: int, desc: str, is_silent: bool = False):
        self._iterable, self._initial, self._desc, self._is_silent = iterable, initial, desc, is_silent
        self._total = len(iterable) if total is None and hasattr(iterable, "__len__") else total
        self._done, self._start = initial, time.monotonic()
        self._last = self._start

    def __iter__(self) -> Iterator:
        for one in self._iterable:
            yield one
            self.update()

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self, count: int = 1) -> None:
        """Notes that further ones are done."""
        self._done += count
        now = time.monotonic()
        if self._is_silent or now < self._last + SECONDS:
            return
        self._last, rate = now, (self._done - self._initial) / (now - self._start)
        line = f"{self._desc}: {self._done:,}"
        if self._total is not None:
            line += f" of {self._total:,}"
        line += f", {rate:.3g} a second"
        if self._total is not None and rate:
            minutes = round((self._total - self._done) / rate / 60)
            line += f", {counted(minutes, 'minute') if minutes else 'less than a minute'} left"
        print(line, file=sys.stderr, flush=True)
