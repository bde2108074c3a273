"""Batches by tokens instead of rows: many short texts or few long ones, at the same cost."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import Sampler

from mmgem.training.data.mixture import Mixture
from mmgem.training.data.permutation import hash_numbers

WINDOW_SIZE = 1024


class TokenBudgetBatchSampler(Sampler[list[int]]):
    """
    Batches of rows of about equal length, each of as many rows as a number of tokens allows.

    Rows are taken in order, a window at a time, sorted by their tokens and cut into batches, which then come in random
    order. What does not fill a batch is left to the next window. The texts of a row are read for it ahead of its
    batch, so a source must be one whose rows can be read twice: no stream. It has no length, since that would take
    reading all of the data; the `Trainer` needs `max_steps`.

    It asks for `drop_last`, so that accelerate gives all processes as many batches and leaves out some of the last.

    Args:
        dataset: the rows of the run. Rows with more tokens than a batch may have are noted in its `skipped`.
        max_tokens: of a batch.
        count_tokens: of a row, as read by `Mixture.texts`; such as [`MMGEMCollator.count_tokens`].
        window_size: rows that are sorted together.

    Raises:
        TypeError: if the data set is no `Mixture`, or has a stream among its sources.
        ValueError: for numbers below 1; while iterating, if no row of a window fits into a batch.
    """

    batch_size = None
    drop_last = True

    def __init__(
        self,
        dataset: Mixture,
        max_tokens: int,
        count_tokens: Callable[[Mapping[str, Any]], int],
        window_size: int = WINDOW_SIZE,
    ):
        if not isinstance(dataset, Mixture):
            raise TypeError(f"`dataset` is a {type(dataset).__name__}; expected a Mixture, of one source if need be.")
        if streams := [source.name for source in dataset.sources if not hasattr(source, "__len__")]:
            raise TypeError(f"`dataset` has the stream {streams[0]}; expected sources whose rows can be read twice.")
        for name, value in {"max_tokens": max_tokens, "window_size": window_size}.items():
            if value < 1:
                raise ValueError(f"`{name}` is {value}; expected 1 or more.")
        self.dataset = dataset
        self.max_tokens = max_tokens
        self.count_tokens = count_tokens
        self.window_size = window_size

    def __iter__(self) -> Iterator[list[int]]:
        waiting: list[tuple[int, int]] = []  # tokens and position
        is_empty = True
        for number, start in enumerate(range(0, len(self.dataset), self.window_size)):
            waiting += self._window(range(start, min(start + self.window_size, len(self.dataset))))
            *batches, waiting = self._cut(sorted(waiting))
            generator = torch.Generator().manual_seed(hash_numbers(self.dataset.seed, number))
            for batch in torch.randperm(len(batches), generator=generator).tolist():
                yield [position for _, position in batches[batch]]
                is_empty = False
        if is_empty and waiting:
            yield [position for _, position in waiting]

    def _window(self, positions: range) -> list[tuple[int, int]]:
        rows = []
        for position in positions:
            row = self.dataset.texts(position)
            tokens = self.count_tokens(row)
            if tokens <= self.max_tokens:
                rows.append((tokens, position))
            else:
                source, _, key = row["row_key"].rpartition(":")
                reason = f"has {tokens} tokens, more than `max_tokens_per_batch` {self.max_tokens}"
                self.dataset.skipped.add(source, key, reason)
        if not rows:
            raise ValueError(f"`max_tokens` is {self.max_tokens}; expected more, no row of {len(positions)} fits.")
        return rows

    def _cut(self, rows: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
        """The rows in batches, of which only the last might take more."""
        batches: list[list[tuple[int, int]]] = [[]]
        total = 0
        for tokens, position in rows:
            if total + tokens > self.max_tokens:
                batches.append([])
                total = 0
            batches[-1].append((tokens, position))
            total += tokens
        return batches
