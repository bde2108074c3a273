"""The rows of earlier runs, the one that finished and those that were killed since, merged into one index."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from mmgem.training.search.storage import ROWS_FILE, ArrayColumn, IndexFacts, chunks, is_index, read_rows
from mmgem.training.search.vector_codec import VectorCodec

ROWS_AT_A_TIME = 1024  # that are rewritten
Place = tuple[int, int]  # the number of an earlier run, and of a row of it


class EarlierRun:
    """The rows of an earlier run, and how their vectors are stored.

    Args:
        rows: As `read_rows` gives them.
        codec: How the vectors are stored.
    """

    def __init__(self, rows: Dataset, codec: VectorCodec):
        self.rows, self.codec = rows, codec
        self.vectors = ArrayColumn(rows, "embedding")


def read_earlier_runs(out: Path, partial: Path, facts: IndexFacts) -> list[EarlierRun]:
    """Reads the run that finished, if one did, and the parts that were written since, if any, as another.

    Args:
        out: The folder of the index.
        partial: The folder of the parts, whose vectors are exact.
        facts: What is known of the index.
    """
    runs = []
    if is_index(out):
        runs.append(EarlierRun(read_rows(out / ROWS_FILE), IndexFacts.read(out, "out").codec))
    if parts := [read_rows(path) for path in sorted(partial.glob("part-*.arrow"))]:
        runs.append(EarlierRun(concatenate_datasets(parts), VectorCodec("float32", facts.settings.dimensions)))
    return runs


def current_rows(runs: list[EarlierRun], versions: dict[str, str]) -> dict[str, Place]:
    """Finds the rows of images whose files are as they were, by file name."""
    return {
        file_name: (number, row)
        for number, run in enumerate(runs)
        for row, (file_name, version) in enumerate(zip(run.rows["file_name"][:], run.rows["version"][:], strict=True))
        if versions.get(file_name) == version
    }


def common_bound(runs: list[EarlierRun]) -> float:
    """Returns the largest value of all vectors; no smaller than it was, so that what is kept is kept as it is."""
    bounds = []
    for run in runs:
        if run.codec.precision == "int8":
            bounds.append(run.codec.bound)
        else:
            parts = chunks(len(run.vectors), ROWS_AT_A_TIME)
            bounds += [float(np.abs(run.vectors[part]).max()) for part in parts]
    return max(bounds)


def merge(runs: list[EarlierRun], places: list[Place], codec: VectorCodec) -> Iterator[dict[str, Any]]:
    """Yields batches of the rows at these places, with all vectors stored by one codec."""
    starts = np.cumsum([0, *(len(run.rows) for run in runs)])
    others = concatenate_datasets([run.rows.remove_columns("embedding") for run in runs])
    others = others.select([int(starts[number]) + row for number, row in places])
    memory = ArrayColumn(others, "memory") if "memory" in others.column_names else None
    plain = others.select_columns([name for name in others.column_names if name != "memory"])
    for part in chunks(len(places), ROWS_AT_A_TIME):
        columns: dict[str, Any] = {**plain[part], "embedding": _encode(runs, places[part], codec)}
        if memory is not None:
            columns["memory"] = memory[part]
        yield columns


def _encode(runs: list[EarlierRun], places: list[Place], codec: VectorCodec) -> np.ndarray:
    """The codes of the vectors at these places, (P, W) or (P, R, W)."""
    positions_of: dict[int, list[int]] = defaultdict(list)
    for position, (number, _) in enumerate(places):
        positions_of[number].append(position)
    codes: dict[int, np.ndarray] = {}
    for number, positions in positions_of.items():
        run = runs[number]
        vectors = run.codec.decode(run.vectors[[places[position][1] for position in positions]])
        codes.update(zip(positions, codec.encode(vectors), strict=True))
    return np.stack([codes[position] for position in range(len(places))])
