"""Streams as sources: rows that come one after the other, each reader of a run reading its own part of them."""

import json
import logging
import os
import weakref
from collections.abc import Generator, Iterator, Mapping
from copy import copy
from dataclasses import asdict, dataclass
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from mmgem.processing.image_loading import MAX_BYTES
from mmgem.processing.url_fetching import is_url
from mmgem.training.data.permutation import hash_numbers
from mmgem.training.data.rows import ColumnName, check_columns
from mmgem.training.data.sources import Source

if TYPE_CHECKING:  # slow to import, and not needed to check a recipe
    import datasets

BLOCK_SIZE = 512  # rows that are kept in memory, and shuffled, together
BOOKMARK_EVERY = 64 * BLOCK_SIZE  # rows after which a reader notes where it is
_MAX_EMPTY_EPOCHS = 10  # of a part, in succession; with other files in each epoch, one may be empty by chance

logger = logging.getLogger(__name__)


class StreamSource(Source):
    """The rows of a `datasets.IterableDataset`, one epoch after the other without end.

    A stream is split into parts (see `part`), one for each reader of a run, by `split_dataset_by_node`. The files are
    divided among the parts if there are at least as many files as parts; otherwise each part reads all files and
    keeps one row of every so many. In each epoch every row belongs to exactly one part. A part whose files have fewer
    rows begins its next epoch earlier; since the files are dealt anew in each epoch, no row is preferred.

    The rows of a part are read in blocks of `BLOCK_SIZE`, which are shuffled one by one, and the files in a random
    order for each epoch; in data of one file nothing moves further than its block. A row is reached by reading on
    from a bookmark: a `state_dict` of the stream, kept every `BOOKMARK_EVERY` rows, with which `datasets` skips whole
    files. A bookmark is checked by the row after it; without a usable one, the part is read from its beginning.

    Args:
        stream: The data.
        name, columns: As for `Source`.

    Raises:
        ValueError: If its columns are not those meant.
        RuntimeError: While reading, if the stream breaks off or is empty.
    """

    block_size = BLOCK_SIZE

    def __init__(self, stream: "datasets.IterableDataset", name: str, columns: Mapping[str, ColumnName] | None = None):
        super().__init__(name, columns)
        self._features = stream.features
        self._stream = stream.decode(False) if stream.features else stream
        self._part = (0, 1)  # number and count
        self._seed: int | None = None
        self._epoch_end: int | None = None  # row at which the first epoch ends, once it is known
        self._bookmarks = _Bookmarks()
        self._reader: _Reader | None = None
        self._inherited: _Reader | None = None
        if stream.column_names:
            present = list(stream.column_names)
        else:
            present = [column for rows, _ in islice(self._batches(0), 1) for column in rows[0]]
        check_columns(present, self.columns, name)

    def part(self, number: int, count: int, bookmarks: Path | None = None) -> "StreamSource":
        """The part of the stream that one of several readers reads.

        Args:
            number: Of the part, in [0, count).
            count: Of all parts.
            bookmarks: File in which bookmarks are kept; None to keep them in memory.
        """
        part = self._fresh_copy()
        part._part, part._bookmarks = (number, count), _Bookmarks(bookmarks)
        return part

    def order(self, block: int, place: int, seed: int) -> int:
        return block * self.block_size + super().order(block, place, seed)

    def shuffled(self, seed: int) -> "StreamSource":
        source = self._fresh_copy()
        source._seed, source._bookmarks = seed, _Bookmarks()
        return source

    def key(self, index: int) -> str:
        number, count = self._part
        return str(index) if count == 1 else f"{number}-of-{count}/{index}"

    def fields(self, index: int) -> dict[str, Any]:
        number, place = divmod(index, self.block_size)
        if self._reader is not None and self._reader.process != os.getpid():
            # Forked: its files are shared with the first process, and to close them may wait for that one's threads.
            self._reader, self._inherited = None, self._reader
        if self._reader is None or self._reader.number > number:
            self._reader = _Reader(self._rows(number * self.block_size), number, self.block_size)
        return self._reader.block(number)[place]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The rows of one epoch, in order."""
        for index in count():
            row = self[index]
            if self._epoch_end is not None and index >= self._epoch_end:
                return
            yield row

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_reader": None, "_inherited": None}

    def _fresh_copy(self) -> "StreamSource":
        source = copy(self)
        source._reader = source._inherited = source._epoch_end = None
        return source

    def _rows(self, start: int) -> Generator[dict[str, Any], None, None]:
        """Rows of epoch after epoch, from number `start` of them all on."""
        mark = self._bookmarks.before(start)
        is_checked = mark.row == 0
        row, epoch, epoch_start, state = mark.row, mark.epoch, mark.epoch_start, mark.state
        empty = 0
        while True:
            for rows, state in self._batches(epoch, state):
                if not is_checked and _digest(rows[0]) != mark.digest:
                    logger.warning("the bookmark of %s at row %d does not hold: reading from row 0", self.name, row)
                    self._bookmarks.clear()
                    yield from self._rows(start)
                    return
                is_checked = True
                if row >= self._bookmarks.last + BOOKMARK_EVERY:
                    self._bookmarks.add(_Bookmark(row, epoch, epoch_start, state, _digest(rows[0])))
                yield from rows[max(0, start - row) :]
                row += len(rows)
            empty = empty + 1 if row == epoch_start else 0
            if empty == (1 if self._part == (0, 1) else _MAX_EMPTY_EPOCHS):
                number, count = self._part
                raise RuntimeError(f"{self.name} has no rows for reader {number} of {count}; expected at least one.")
            epoch, epoch_start, state = epoch + 1, row, None
            if epoch == 1:
                self._epoch_end = row

    def _batches(
        self, epoch: int, state: dict[str, Any] | None = None
    ) -> Iterator[tuple[list[dict[str, Any]], dict[str, Any] | None]]:
        """Rows of an epoch of this part, `BLOCK_SIZE` at a time, each time with the state from which they follow.

        Args:
            epoch: From 0 on.
            state: Of the stream, from which to go on; None for the beginning.
        """
        from datasets.distributed import split_dataset_by_node

        number, count = self._part
        strategy = "shards" if self._stream.num_shards >= count else "examples"
        stream = split_dataset_by_node(self._stream, number, count, strategy=strategy)  # a copy in any case
        if self._seed is not None:  # which puts the files, and nothing else, in another order
            stream.set_epoch(1 + hash_numbers(self._seed, epoch) % (2**31 - 1))
        if state is not None:
            stream.load_state_dict(state)
        try:
            # Not by iterating over the stream itself, which in a worker would give only some of its files.
            for batch in stream.iter(self.block_size):
                rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
                if rows:
                    yield [named_classes(row, self._features) for row in rows], state
                state = stream.state_dict()
        except Exception as error:
            raise RuntimeError(f"{self.name} broke off in epoch {epoch}: {error}") from error

    def _load_image(self, image: Any, index: int, shorter_side: int | None) -> Image.Image:
        path = str(image.get("path")) if isinstance(image, Mapping) and image.get("bytes") is None else ""
        if "://" in path and not any(is_url(part) for part in path.split("::")):
            image = self._read_remote(path, f"image of {self._row_name(index)}")
        return super()._load_image(image, index, shorter_side)

    def _read_remote(self, path: str, name: str) -> bytes:
        """A file on the Hub, or in an archive, by its path as `datasets` writes it."""
        from datasets.utils.file_utils import xopen

        if not (path.split("::")[-1].startswith("hf://") or self.allow_outside_paths):
            raise ValueError(
                f"{name} is {path!r:.200}, which may lead out of the data; expected a file of the Hub, or "
                "`allow_outside_paths`."
            )
        with xopen(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ValueError(f"{name}, {path!r:.200}, has more than {MAX_BYTES:,} bytes; expected an image file.")
        return data


class _Reader:
    """Blocks of endless rows, one after the other."""

    def __init__(self, rows: Generator[dict[str, Any], None, None], number: int, block_size: int):
        self.process = os.getpid()
        self.number = number - 1  # of the block that was read last
        self._rows = rows
        self._block_size = block_size
        self._block: list[dict[str, Any]] = []
        weakref.finalize(self, rows.close)  # before the interpreter takes down what an open file needs

    def block(self, number: int) -> list[dict[str, Any]]:
        for _ in range(number - self.number):
            self._block = list(islice(self._rows, self._block_size))
            self.number += 1
        return self._block


@dataclass(frozen=True)
class _Bookmark:
    """A place in a part of a stream.

    Args:
        row: The row that comes next, of all epochs.
        epoch, epoch_start: Its epoch, and the row at which that begins.
        state: Of the stream; None at the beginning of an epoch.
        digest: Of the row that comes next.
        version: Of `datasets`, whose states differ.
    """

    row: int = 0
    epoch: int = 0
    epoch_start: int = 0
    state: dict[str, Any] | None = None
    digest: str = ""
    version: str = ""


class _Bookmarks:
    """Bookmarks of a part in ascending order, in memory and in a file of JSON lines if there is one."""

    def __init__(self, path: Path | None = None):
        self._path = path
        self._marks: list[_Bookmark] | None = None  # of the file they are read when they are needed

    @property
    def last(self) -> int:
        """The row of the last one."""
        return self._all()[-1].row

    def before(self, row: int) -> _Bookmark:
        """The last one at or before a row, be it the beginning."""
        return next(mark for mark in reversed(self._all()) if mark.row <= row)

    def add(self, mark: _Bookmark) -> None:
        import datasets

        try:
            line = json.dumps(asdict(mark) | {"version": datasets.__version__}) + "\n"
        except TypeError:  # a state of other things than numbers and text: the rows are read again instead
            return
        self._all().append(mark)
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(line)

    def clear(self) -> None:
        self._marks = [_Bookmark()]
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _all(self) -> list[_Bookmark]:
        if self._marks is None:
            self._marks = [_Bookmark()]
            if self._path is not None and self._path.is_file():
                self._marks += self._read(self._path)
        return self._marks

    def _read(self, path: Path) -> list[_Bookmark]:
        import datasets

        marks: dict[int, _Bookmark] = {}
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                mark = _Bookmark(**json.loads(line))
            except (ValueError, TypeError):
                continue  # it was cut off while it was written
            if mark.version == datasets.__version__:
                marks[mark.row] = mark
        return [marks[row] for row in sorted(marks)]


def _digest(row: dict[str, Any]) -> str:
    from datasets.fingerprint import Hasher

    return Hasher.hash(row)


def named_classes(fields: dict[str, Any], features: "datasets.Features | None") -> dict[str, Any]:
    """Classes by their names instead of their numbers."""
    import datasets

    for column, feature in (features or {}).items():
        if isinstance(feature, datasets.ClassLabel) and fields.get(column) is not None:
            fields[column] = feature.int2str(fields[column]) if fields[column] >= 0 else None
    return fields
