"""A log of the rows that could not be read during a run, so that it says at its end what it left out."""

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmgem.processing.boxes import check_boxes
from mmgem.processing.image_loading import load_image
from mmgem.training.data.image_files import shorter_side_for
from mmgem.training.data.rows import images_of

if TYPE_CHECKING:
    from mmgem.training.data.sources import Source
    from mmgem.training.distributed import Share  # whose module takes seconds to import

logger = logging.getLogger(__name__)

# What a row may raise that is read, or made part of a batch, whatever libraries do with it.
UNREADABLE = (OSError, ValueError, TypeError, LookupError, ArithmeticError, RecursionError, MemoryError, EOFError)
_PICTURES = ("image", "edited_image")


class SkippedLog:
    """A file of JSON lines `{"source", "key", "reason"}` to which any worker of any process may add.

    Each addition is one write to a file opened for appending, so lines never mix. The same row may be met again, by
    another process or in the next epoch; it counts once.

    Args:
        path: The file, made when there is something to write; None to keep none, so that only the rows that this
            process adds count.
        rows_name: The source of rows that have none, as those of an evaluation.
    """

    def __init__(self, path: str | Path | None = None, rows_name: str = "rows"):
        self.path = None if path is None else Path(path)
        self.rows_name = rows_name
        self._added: set[tuple[str, str]] = set()

    def add(self, source: str, key: str, reason: str) -> None:
        """Note a row, or a whole shard, that was skipped; once a process.

        Args:
            source, key: The name of its source, and its own.
            reason: The error.
        """
        if (source, key) in self._added:
            return
        self._added.add((source, key))
        logger.warning("skipped %s:%s: %s", source, key, reason)
        if self.path is None:
            return
        line = json.dumps({"source": source, "key": key, "reason": reason}) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)

    def counts(self) -> dict[str, int]:
        """The number of rows and shards skipped, by source, over all processes and earlier parts of the run."""
        skipped = set(self._added)
        if self.path is not None and self.path.is_file():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    continue  # the machine went down while it was written
                skipped.add((entry["source"], entry["key"]))
        return dict(Counter(source for source, _ in sorted(skipped)))


def readable_texts(source: "Source", places: Iterable[int] | None = None) -> Iterator[dict[str, Any]]:
    """Yields rows of a source, by their numbers, without images and without those that cannot be read.

    Those are not noted: the mixture does, and takes other ones, once they are to be trained.

    Args:
        source: A source with a length.
        places: The numbers of the rows; by default those of all.
    """
    for index in range(len(source)) if places is None else places:  # type: ignore[arg-type]
        try:
            yield source.texts(index)
        except UNREADABLE:
            continue


def readable_rows(
    dataset: Iterable[Mapping[str, Any]],
    processor,
    skipped: SkippedLog,
    check: Callable[[Mapping[str, Any], int], object] = lambda row, number: None,
    share: "Share | None" = None,
) -> Iterator[Mapping[str, Any] | None]:
    """Read rows for evaluation as training does: one that cannot be used is left out, and noted by its number.

    Args:
        dataset: The rows; with a length and an index, or an iterable that itself does not fail.
        processor: An `MMGEMProcessor`, for whose view images of rows without boxes are scaled down, as for an index.
        skipped: Where to note those that are left out.
        check: Raises an error for a row, given with its number, that cannot be used.
        share: Which of the rows are read; by default all.

    Yields:
        A row, its images decoded; None for one that is left out.
    """
    shorter_side = shorter_side_for(processor)
    if isinstance(dataset, Sized) and hasattr(dataset, "shorter_side"):  # and so decodes images at reduced scale
        dataset = copy(dataset)
        dataset.shorter_side = shorter_side  # type: ignore[attr-defined]
    rows = dataset if share is None else share.of(dataset)
    has_index = isinstance(rows, Sized) and hasattr(rows, "__getitem__")
    items: Iterable[Any] = range(len(rows)) if has_index else rows  # type: ignore[arg-type]
    for place, item in enumerate(items):
        number = getattr(rows, "indices", range(place + 1))[place]  # a subset has those of all rows
        try:
            row = dict(rows[place] if has_index else item)  # type: ignore[index]
            check(row, number)
            options: dict[str, Any] = {
                "shorter_side": None if row.get("boxes") else shorter_side,
                "allow_urls": processor.allow_urls,
            }
            for column in _PICTURES:
                if row.get(column) is not None:
                    row[column] = load_image(row[column], f"{column} of row {number}", **options)
            if row.get("images"):
                row["images"] = [load_image(image, f"image of row {number}", **options) for image in row["images"]]
            for image in filter(None, [*images_of(row), row.get("edited_image")]):
                processor.check_proportions(image.size, f"image of row {number}")
            if row.get("boxes") and len(images_of(row)) == 1:
                check_boxes([row["boxes"]], [images_of(row)[0].size])
        except UNREADABLE as error:
            skipped.add(skipped.rows_name, str(number), " ".join(str(error).split()) or type(error).__name__)
            yield None
        else:
            yield row
