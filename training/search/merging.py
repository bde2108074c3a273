"""The rows of earlier runs, the one that finished and those that were killed since, merged into one index."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmgem.training.search.inverted_lists import is_large
from mmgem.training.search.items import WHOLE_IMAGES, Item, RowKey
from mmgem.training.search.storage import IndexFacts, IndexRows, StoredIndex, chunks, read_parts
from mmgem.training.search.vector_codec import VectorCodec

ROWS_AT_A_TIME = 1024  # that are rewritten
_KEY = ("file_name", "kind", "part")


class EarlierRun:
    """The rows of an earlier run, and how their vectors are stored.

    Args:
        rows: The rows.
        codec: How the vectors are stored.
        is_damaged: (N,) Rows that are not what was written; by default none.
    """

    def __init__(self, rows: IndexRows, codec: VectorCodec, is_damaged: np.ndarray | None = None):
        self.rows, self.codec = rows, codec
        self.is_damaged = np.zeros(len(rows), bool) if is_damaged is None else is_damaged

    def places(self, number: int) -> Iterator[tuple[RowKey, str, "Place"]]:
        """Yields the key, the content and the place of each row that is as it was written; `number` is of this run."""
        columns = [self.rows[name] for name in (*_KEY, "content", "version")]
        for row, (file_name, kind, part, content, version) in enumerate(zip(*columns, strict=True)):
            if not self.is_damaged[row]:
                yield (file_name, kind, part), content, Place(number, row, version)


class Place(NamedTuple):
    """Where a row is.

    Args:
        run, row: The number of an earlier run, and of a row of it.
        version: Of the item.
        item: The item, where something else is said of it than the row says.
    """

    run: int
    row: int
    version: str
    item: Item | None = None


def finished_run(stored: StoredIndex | None) -> list[EarlierRun]:
    """The run that finished, if one did; all of it is read, for rows that are damaged."""
    if stored is None or stored.rows is None:
        return []
    return [EarlierRun(stored.rows, stored.facts.codec, stored.rows.damaged())]


def runs_of_parts(place: Path, facts: IndexFacts) -> list[EarlierRun]:
    """The parts that were written since, whose vectors are exact, as a run each."""
    return [EarlierRun(rows, VectorCodec("float32", facts.settings.dimensions)) for rows in read_parts(place)]


class EarlierRows:
    """The rows of all earlier runs, of which later ones count.

    Args:
        runs: The runs, the first one first.
    """

    def __init__(self, runs: Sequence[EarlierRun]):
        self.by_key: dict[RowKey, Place] = {}
        self._by_content: dict[str, Place] = {}
        for number, run in enumerate(runs):
            for key, content, place in run.places(number):
                self.by_key[key] = place
                if content:
                    self._by_content[content] = place

    def unchanged(self, item: Item) -> Place | None:
        """The row of an item that is as it was."""
        place = self.by_key.get(item.key)
        return place if place is not None and place.version == item.version else None

    def same(self, item: Item, content: str) -> Place | None:
        """A row with this content, whatever its item was called, for the item."""
        place = self._by_content.get(content)
        return None if place is None else place._replace(version=item.version, item=item)


def is_current(stored: StoredIndex | None, facts: IndexFacts, rows: Mapping[RowKey, Place]) -> bool:
    """Whether the index that is there has these rows as they are, and no others, of the same folder."""
    if stored is None or stored.rows is None or stored.version == 0:
        return False
    known, lists = stored.facts, stored.lists
    if (known.folder, known.model, known.settings) != (facts.folder, facts.model, facts.settings):
        return False
    if is_large(len(stored.rows), facts.settings.vectors) != (lists is not None):
        return False
    if lists is not None and lists.file.damaged_blocks():
        return False
    is_in_place = all(place.run == 0 and place.item is None for place in rows.values())  # the run that finished
    return is_in_place and len(rows) == len(stored.rows)


def common_bound(runs: list[EarlierRun]) -> float:
    """Returns the largest value of all vectors; no smaller than it was, so that what is kept is kept as it is."""
    bounds = []
    for run in runs:
        if run.codec.precision == "int8":
            bounds.append(run.codec.bound)
        else:
            parts = chunks(len(run.rows), ROWS_AT_A_TIME)
            bounds += [float(np.abs(run.rows.arrays["embedding"][part]).max()) for part in parts]
    return max(bounds)


def sort_rows(rows: Mapping[RowKey, Place]) -> dict[RowKey, Place]:
    """Sorts rows by file, those of whole images first."""
    return dict(sorted(rows.items(), key=lambda row: (row[0][1] not in WHOLE_IMAGES, row[0])))


def whole_images(rows: Mapping[RowKey, Place]) -> int:
    """The number of rows that are of whole images."""
    return sum(kind in WHOLE_IMAGES for _, kind, _ in rows)


def merge(runs: list[EarlierRun], rows: Mapping[RowKey, Place], codec: VectorCodec) -> Iterator[dict[str, Any]]:
    """Yields batches of rows that `sort_rows` has sorted, with all vectors stored by one codec."""
    items, remembered = list(rows.items()), whole_images(rows)
    has_memory = any("memory" in run.rows.arrays for run in runs)
    for part in chunks(len(items), ROWS_AT_A_TIME):
        keys, places = zip(*items[part], strict=True)
        columns: dict[str, Any] = dict(zip(_KEY, map(list, zip(*keys, strict=True)), strict=True))
        columns["version"] = [place.version for place in places]
        for name in ("text", "metadata", "box", "width", "height", "content"):
            columns[name] = _gather(places, lambda number, numbers, name=name: _cells(runs[number], name, numbers))
        for name in ("text", "metadata"):
            own = [place.item and getattr(place.item, name) for place in places]
            columns[name] = [old if new is None else new for old, new in zip(columns[name], own, strict=True)]
        vectors = _gather(
            places, lambda number, numbers: codec.encode(runs[number].codec.decode(_array(runs[number], numbers)))
        )
        columns["embedding"] = np.stack(vectors)
        if has_memory and part.start < remembered:
            with_memory = places[: remembered - part.start]
            memories = _gather(with_memory, lambda number, numbers: _array(runs[number], numbers, "memory"))
            columns["memory"] = np.stack(memories)
        yield columns


def _cells(run: EarlierRun, name: str, rows: list[int]) -> list:
    return run.rows.table[name].take(rows).to_pylist()


def _array(run: EarlierRun, rows: list[int], name: str = "embedding") -> np.ndarray:
    return run.rows.arrays[name][rows]


def _gather(places: Sequence[Place], read) -> list:
    """What `read(run, rows)` gives of the rows at these places, in their order; each run is read once."""
    positions_of: dict[int, list[int]] = defaultdict(list)
    for position, place in enumerate(places):
        positions_of[place.run].append(position)
    values: dict[int, Any] = {}
    for number, positions in positions_of.items():
        values.update(zip(positions, read(number, [places[position].row for position in positions]), strict=True))
    return [values[position] for position in range(len(places))]
