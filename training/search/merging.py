"""The rows of earlier runs, the one that finished and those that were killed since, merged into one index."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmgem.training.data.image_files import FoundImages
from mmgem.training.search.storage import IndexFacts, IndexRows, StoredIndex, chunks, read_parts
from mmgem.training.search.vector_codec import VectorCodec

ROWS_AT_A_TIME = 1024  # that are rewritten


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


class Place(NamedTuple):
    """Where the row of an image is: the number of an earlier run, and of a row of it; and the version of its file."""

    run: int
    row: int
    version: str


def finished_run(stored: StoredIndex | None) -> list[EarlierRun]:
    """The run that finished, if one did; all of it is read, for rows that are damaged."""
    if stored is None or stored.rows is None:
        return []
    return [EarlierRun(stored.rows, stored.facts.codec, stored.rows.damaged())]


def runs_of_parts(place: Path, facts: IndexFacts) -> list[EarlierRun]:
    """The parts that were written since, whose vectors are exact, as a run each."""
    return [EarlierRun(rows, VectorCodec("float32", facts.settings.dimensions)) for rows in read_parts(place)]


def current_rows(runs: list[EarlierRun], found: FoundImages) -> dict[str, Place]:
    """Finds the rows of images whose files are as they were, or cannot be seen, by file name."""
    places = {}
    for number, run in enumerate(runs):
        columns = zip(run.rows["file_name"], run.rows["version"], run.is_damaged, strict=True)
        for row, (file_name, version, is_damaged) in enumerate(columns):
            if not is_damaged and (
                found.versions.get(file_name) == version or found.hiding_place(file_name) is not None
            ):
                places[file_name] = Place(number, row, version)
    return places


def rows_by_content(runs: list[EarlierRun]) -> dict[str, Place]:
    """Finds the rows by the content of their files, whatever these are called and wherever they are now."""
    return {
        content: Place(number, row, "")
        for number, run in enumerate(runs)
        for row, (content, is_damaged) in enumerate(zip(run.rows["content"], run.is_damaged, strict=True))
        if content and not is_damaged
    }


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


def merge(runs: list[EarlierRun], places: Mapping[str, Place], codec: VectorCodec) -> Iterator[dict[str, Any]]:
    """Yields batches of the rows at these places, by file name, with all vectors stored by one codec."""
    kept = {column: [run.rows[column] for run in runs] for column in ("width", "height", "content")}
    items = list(places.items())
    for part in chunks(len(items), ROWS_AT_A_TIME):
        file_names, batch = zip(*items[part], strict=True)
        columns: dict[str, Any] = {"file_name": list(file_names), "version": [place.version for place in batch]}
        columns |= {name: [values[place.run][place.row] for place in batch] for name, values in kept.items()}
        for name in runs[0].rows.arrays:
            columns[name] = _gather(runs, batch, name, codec)
        yield columns


def _gather(runs: list[EarlierRun], places, name: str, codec: VectorCodec) -> np.ndarray:
    """The array of the rows at these places, (P, ...); vectors as codes."""
    positions_of: dict[int, list[int]] = defaultdict(list)
    for position, place in enumerate(places):
        positions_of[place.run].append(position)
    values: dict[int, np.ndarray] = {}
    for number, positions in positions_of.items():
        run = runs[number]
        part = run.rows.arrays[name][[places[position].row for position in positions]]
        if name == "embedding":
            part = codec.encode(run.codec.decode(part))
        values.update(zip(positions, part, strict=True))
    return np.stack([values[position] for position in range(len(places))])
