"""Streams as sources: rows that come one after the other, read so that a run can still be gone on with anywhere."""

import os
import weakref
from collections.abc import Generator, Iterator, Mapping
from copy import copy
from itertools import count, islice
from typing import Any

import datasets
from PIL import Image

from mmgem.training.data.permutation import hash_numbers
from mmgem.training.data.rows import check_columns
from mmgem.training.data.sources import Source

BLOCK_SIZE = 512  # rows that are kept in memory, and shuffled, together


class StreamSource(Source):
    """
    The rows of a `datasets.IterableDataset`, one epoch after the other without end.

    Rows are read in blocks of `BLOCK_SIZE`, which are shuffled one by one, and the files of the data in a random order
    for each epoch; in data of one file nothing moves further than its block. A row is reached by reading on, or, where
    it lies behind, by skipping to it from the start of its epoch. So each worker of each process reads all of the
    stream and uses its share: what is read from disk or network grows with their number; images are decoded once.

    Args:
        stream: the data.
        name, columns: as for `Source`.

    Raises:
        ValueError: if its columns are not those meant.
        RuntimeError: while reading, if the stream breaks off or is empty.
    """

    block_size = BLOCK_SIZE

    def __init__(self, stream: datasets.IterableDataset, name: str, columns: Mapping[str, str | None] | None = None):
        super().__init__(name, columns)
        self._features = stream.features
        self._stream = stream.decode(False) if stream.features else stream
        self._seed: int | None = None
        self._length: int | None = None  # of an epoch, once it is known
        self._reader: _Reader | None = None
        self._inherited: _Reader | None = None
        check_columns(stream.column_names or next(self._epoch(0, 0), {}), self.columns, name)

    def order(self, block: int, place: int, seed: int) -> int:
        return block * BLOCK_SIZE + super().order(block, place, seed)

    def shuffled(self, seed: int) -> "StreamSource":
        source = copy(self)
        source._seed, source._reader = seed, None
        return source

    def fields(self, index: int) -> dict[str, Any]:
        number, place = divmod(index, BLOCK_SIZE)
        if self._reader is not None and self._reader.process != os.getpid():
            # Forked: its files are shared with the first process, and to close them may wait for that one's threads.
            self._reader, self._inherited = None, self._reader
        if self._reader is None or self._reader.number > number:
            self._reader = _Reader(self._rows(number * BLOCK_SIZE), number)
        return self._reader.block(number)[place]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The rows of one epoch, in order."""
        for index in count():
            row = self[index]
            if self._length is not None and index >= self._length:
                return
            yield row

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_reader": None, "_inherited": None}

    def _rows(self, start: int) -> Generator[dict[str, Any], None, None]:
        """Rows of epoch after epoch, from number `start` of them all on."""
        epoch, skipped = divmod(start, self._length) if self._length else (0, start)
        while True:
            rows = 0
            for row in self._epoch(epoch, skipped):
                rows += 1
                yield row
            if rows:
                self._length = skipped + rows
                epoch, skipped = epoch + 1, 0
                continue
            # There are fewer rows than were to be skipped.
            self._length = sum(1 for _ in self._epoch(epoch, 0))
            if not self._length:
                raise RuntimeError(f"{self.name} has no rows; expected at least one.")
            epoch, skipped = divmod(start, self._length)

    def _epoch(self, epoch: int, skipped: int) -> Iterator[dict[str, Any]]:
        stream = self._stream
        if self._seed is not None:  # for the order of the files; with a buffer of one row, rows stay in place
            seed = hash_numbers(self._seed, epoch)
            stream = stream.shuffle(seed=seed, buffer_size=1, max_buffer_input_shards=1)
        # Not by iterating over the stream itself, which in a worker would give only this worker's files.
        batches = (stream.skip(skipped) if skipped else stream).iter(BLOCK_SIZE)
        try:
            for batch in batches:
                for values in zip(*batch.values(), strict=True):
                    yield named_classes(dict(zip(batch, values, strict=True)), self._features)
        except Exception as error:
            raise RuntimeError(f"{self.name} broke off in epoch {epoch}: {error}") from error

    def _load_image(self, image: Any, index: int) -> Image.Image:
        if isinstance(image, Mapping) and image.get("bytes") is None and "://" in str(image.get("path")):
            image = datasets.Image().decode_example(dict(image))  # a file on the Hub or in an archive
        return super()._load_image(image, index)


class _Reader:
    """Blocks of endless rows, one after the other."""

    def __init__(self, rows: Generator[dict[str, Any], None, None], number: int):
        self.process = os.getpid()
        self.number = number - 1  # of the block that was read last
        self._rows = rows
        self._block: list[dict[str, Any]] = []
        weakref.finalize(self, rows.close)  # before the interpreter takes down what an open file needs

    def block(self, number: int) -> list[dict[str, Any]]:
        for _ in range(number - self.number):
            self._block = list(islice(self._rows, BLOCK_SIZE))
            self.number += 1
        return self._block


def named_classes(fields: dict[str, Any], features: datasets.Features | None) -> dict[str, Any]:
    """Classes by their names instead of their numbers."""
    for column, feature in (features or {}).items():
        if isinstance(feature, datasets.ClassLabel) and fields.get(column) is not None:
            fields[column] = feature.int2str(fields[column]) if fields[column] >= 0 else None
    return fields
