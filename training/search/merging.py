"""What was embedded so far: by the run that finished and, in parts, since; and how it becomes one index."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from mmgem.training.search.storage import ROWS_FILE, ArrayColumn, IndexFacts, chunks, is_index, read_rows
from mmgem.training.search.vector_codec import VectorCodec

ROWS_AT_A_TIME = 1024  # that are rewritten
Place = tuple[int, int]  # the number of a source, and of a row in it


class Source:
    """Rows of an earlier run, and how their vectors are stored."""

    def __init__(self, rows: Dataset, codec: VectorCodec):
        self.rows, self.codec = rows, codec
        self.vectors = ArrayColumn(rows, "embedding")


def read_sources(out: Path, partial: Path, facts: IndexFacts) -> list[Source]:
    """By the run that finished, and since, in parts, whose vectors are exact: one of each, none or both."""
    sources = []
    if is_index(out):
        sources.append(Source(read_rows(out / ROWS_FILE), IndexFacts.read(out, "out").codec))
    if parts := [read_rows(path) for path in sorted(partial.glob("part-*.arrow"))]:
        sources.append(Source(concatenate_datasets(parts), VectorCodec("float32", facts.settings.dimensions)))
    return sources


def current_rows(sources: list[Source], versions: dict[str, str]) -> dict[str, Place]:
    """By file name the source and row of each image whose file is as it was."""
    return {
        file_name: (number, row)
        for number, source in enumerate(sources)
        for row, (file_name, version) in enumerate(
            zip(source.rows["file_name"][:], source.rows["version"][:], strict=True)
        )
        if versions.get(file_name) == version
    }


def common_bound(sources: list[Source]) -> float:
    """The largest value of all vectors; no smaller than it was, so that what is kept is kept as it is."""
    bounds = []
    for source in sources:
        if source.codec.precision == "int8":
            bounds.append(source.codec.bound)
        else:
            parts = chunks(len(source.vectors), ROWS_AT_A_TIME)
            bounds += [float(np.abs(source.vectors[part]).max()) for part in parts]
    return max(bounds)


def merge(sources: list[Source], places: list[Place], codec: VectorCodec) -> Iterator[dict[str, Any]]:
    """Batches of the rows at these places, sources and rows in them, with all vectors stored alike."""
    starts = np.cumsum([0, *(len(source.rows) for source in sources)])
    others = concatenate_datasets([source.rows.remove_columns("embedding") for source in sources])
    others = others.select([int(starts[number]) + row for number, row in places])
    memory = ArrayColumn(others, "memory") if "memory" in others.column_names else None
    plain = others.select_columns([name for name in others.column_names if name != "memory"])
    for part in chunks(len(places), ROWS_AT_A_TIME):
        columns: dict[str, Any] = {**plain[part], "embedding": _encode(sources, places[part], codec)}
        if memory is not None:
            columns["memory"] = memory[part]
        yield columns


def _encode(sources: list[Source], places: list[Place], codec: VectorCodec) -> np.ndarray:
    """The codes of the vectors at these places."""
    positions_of: dict[int, list[int]] = defaultdict(list)
    for position, (number, _) in enumerate(places):
        positions_of[number].append(position)
    codes: dict[int, np.ndarray] = {}
    for number, positions in positions_of.items():
        source = sources[number]
        vectors = source.codec.decode(source.vectors[[places[position][1] for position in positions]])
        codes.update(zip(positions, codec.encode(vectors), strict=True))
    return np.stack([codes[position] for position in range(len(places))])
