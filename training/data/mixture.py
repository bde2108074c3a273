"""Several sources as one data set of fixed order, in which each has its share: what a run sees, from first to last."""

import heapq
from collections.abc import Callable, Mapping, Sequence, Sized
from fractions import Fraction
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from mmgem.training.data.permutation import hash_numbers
from mmgem.training.data.rows import ID_COLUMNS, edited_file_of, images_of
from mmgem.training.data.skipped import UNREADABLE, SkippedLog
from mmgem.training.data.sources import Source

MAX_FAILURES = 100  # rows in a row that may be unreadable


class Mixture(Dataset):
    """The rows of a whole training run. Read it in order: it is shuffled, by source and epoch, as it is.

    A row follows from `seed` and its position alone, whoever reads it and whatever was read before. So any number of
    workers and processes see the same run, and an interrupted run goes on at a position. It takes no memory: sources
    take turns by a fixed pattern in which, from the start of the run up to anywhere, each has its share to within a
    row; within a source the order of an epoch is a permutation that is computed row by row.

    With a stream among the sources this is true of a given number of readers, see `split_streams`.

    A row has `row_key` ("source:key"), `draw_seed`, which decides what the collator draws from it, and `image_id`,
    made unique across sources, besides its columns. A row that cannot be read, or trained, is noted in `skipped`, and
    another row of its source takes its place.

    Args:
        sources: With a length, or streams; see [`mmgem.training.data.open_source.open_source`].
        weights: Share of each source, in any unit; 0 leaves it out. By default all are equal.
        seed: Of all orders and draws.
        num_samples: Rows of the run.
        skipped: Where to note what cannot be read.

    Attributes:
        check: Raises a ValueError for a row of which no batch can be made; None to take all.

    Raises:
        ValueError: If there are no sources, a weight is below 0, or the number of weights is not that of the sources;
            while reading, if `MAX_FAILURES` rows of a source in succession cannot be read.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float] | None,
        seed: int,
        num_samples: int,
        skipped: SkippedLog | None = None,
    ):
        weights = [1.0] * len(sources) if weights is None else list(weights)
        if len(weights) != len(sources):
            raise ValueError(f"`weights` has {len(weights)} numbers; expected one for each of {len(sources)} sources.")
        if num_samples < 1:
            raise ValueError(f"`num_samples` is {num_samples}; expected 1 or more.")
        self.seed = seed
        self.num_samples = num_samples
        self.skipped = SkippedLog() if skipped is None else skipped
        self.check: Callable[[Mapping[str, Any]], object] | None = None
        self._turns = Turns(weights)
        self._seeds = [hash_numbers(seed, number) for number in range(len(sources))]
        self.sources = [source.shuffled(own) for source, own in zip(sources, self._seeds, strict=True)]
        self._batch_size = 1
        self._parts: list[list[Source]] = [self.sources]  # for each reader its part of each source
        for source in self.sources:
            for key, reason in source.damaged:
                self.skipped.add(source.name, key, reason)

    @property
    def has_streams(self) -> bool:
        """Whether any source is a stream."""
        return not all(isinstance(source, Sized) for source in self.sources)

    def split_streams(self, batch_size: int, num_readers: int, bookmarks: Path | None = None) -> None:
        """Let each of several readers read its own part of every stream. Without streams nothing changes.

        Reader r of R has the batches r, r + R, r + 2R, ...: those that the DataLoader gives to one worker of one
        process. Its rows are a mixture of their own, in which each source has its share. So with streams a row
        follows from the seed, its position, the batch size and the number of readers; a run keeps these two, and
        then it is the same run whoever reads it. A process that asks for batches of other readers gets the same rows,
        but reads the parts of those as well.

        Args:
            batch_size: Rows of a batch, on one process.
            num_readers: Workers of all processes.
            bookmarks: Folder in which each part of a stream notes how far it is read, to go on there; by default
                what was read before is read again.

        Raises:
            ValueError: If a number is below 1.
        """
        for name, value in {"batch_size": batch_size, "num_readers": num_readers}.items():
            if value < 1:
                raise ValueError(f"`{name}` is {value}; expected 1 or more.")
        if not self.has_streams:
            return
        self._batch_size = batch_size
        self._parts = [
            [
                source.part(
                    reader, num_readers, bookmarks and bookmarks / f"source-{number}-{reader}-of-{num_readers}.jsonl"
                )
                for number, source in enumerate(self.sources)
            ]
            for reader in range(num_readers)
        ]

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, position: int) -> dict[str, Any]:
        """The row at a position.

        Raises:
            IndexError: If there is no such position.
            ValueError: If neither the row nor any of those that might take its place can be read.
        """
        return self._read(position, with_images=True)

    def texts(self, position: int) -> dict[str, Any]:
        """The row at a position without loading its images, so that one that cannot be loaded is not noticed."""
        return self._read(position, with_images=False)

    def _read(self, position: int, with_images: bool) -> dict[str, Any]:
        if not 0 <= position < self.num_samples:
            raise IndexError(f"`position` is {position}; expected 0 to {self.num_samples - 1}.")
        batch, place = divmod(position, self._batch_size)
        batch, reader = divmod(batch, len(self._parts))
        number, draw = self._turns.at(batch * self._batch_size + place)
        source = self._parts[reader][number]
        if isinstance(source, Sized):  # and so no part: readers take turns at its rows
            draw = draw * len(self._parts) + reader
        block, place = divmod(draw, source.block_size)
        for attempt in range(MAX_FAILURES):
            if attempt:
                place = hash_numbers(self.seed, number, draw, attempt) % source.block_size
            index = source.order(block, place, self._seeds[number])
            try:
                row = source[index] if with_images else source.texts(index)
                if self.check is not None:
                    self.check(row)
            except UNREADABLE as error:
                reason = str(error) or type(error).__name__
                self.skipped.add(source.name, source.key(index), reason)
                continue
            if images_of(row):
                column = next((column for column in ID_COLUMNS if row.get(column) is not None), None)
                row["image_id"] = f"{source.name}:{source.key(index) if column is None else row[column]}"
                if column == "file_name" and (edited_file := edited_file_of(row)) is not None:
                    row["edited_image_id"] = f"{source.name}:{edited_file}"
            row["row_key"] = f"{source.name}:{source.key(index)}"
            row["draw_seed"] = hash_numbers(self.seed, position)
            return row
        raise ValueError(
            f"{source.name} cannot be read: {MAX_FAILURES} of its rows failed in succession, the last with: {reason}"
        )


class Turns:
    """Who has which turn, where each of several parties has turns in proportion to its weight, evenly spread.

    The parties are the leaves of a binary tree with the heavy ones near the root. Of the first m turns that come to a
    node, the left branch gets m * p rounded, where p is its share, and the right one the rest.

    Args:
        weights: 0 or more, not all 0.

    Raises:
        ValueError: If there are other weights.
    """

    def __init__(self, weights: Sequence[float]):
        for number, weight in enumerate(weights):
            if not 0 <= weight < float("inf"):
                raise ValueError(f"`weights[{number}]` is {weight}; expected 0 or more.")
        # Ties go by number, so that the tree is the same everywhere.
        heap = [(Fraction(weight), number, number) for number, weight in enumerate(weights) if weight]
        if not heap:
            raise ValueError(f"`weights` are {list(weights)}; expected at least one above 0.")
        heapq.heapify(heap)
        nodes = len(weights)
        while len(heap) > 1:
            light, _, right = heapq.heappop(heap)
            heavy, _, left = heapq.heappop(heap)
            share = heavy / (heavy + light)
            node = (share.numerator, share.denominator, left, right)
            heapq.heappush(heap, (heavy + light, nodes, node))  # type: ignore[misc]
            nodes += 1
        self._root = heap[0][2]

    def at(self, turn: int) -> tuple[int, int]:
        """The party that has a turn, and how many turns it had before."""
        node: Any = self._root
        while not isinstance(node, int):
            numerator, denominator, left, right = node
            before = _round(turn * numerator, denominator)
            if _round((turn + 1) * numerator, denominator) > before:
                node, turn = left, before
            else:
                node, turn = right, turn - before
        return node, turn


def _round(numerator: int, denominator: int) -> int:
    return (2 * numerator + denominator) // (2 * denominator)
