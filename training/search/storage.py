"""The files of a search index.

An index is a folder of three files:

- `rows.arrow`, which `datasets.Dataset.from_file` reads: a row for each image, with `file_name` relative to the
  images' folder, `width`, `height`, `version` (size and time of the file), the codes of its vectors, `embedding`, and,
  if it is kept, its `memory`, float16;
- `search_index.json`: of what folder, by which model, with which settings;
- `probes.safetensors`: what the model made of the probes of its fingerprint.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from mmgem.training.search.fingerprint import Fingerprint
from mmgem.training.search.settings import IndexSettings
from mmgem.training.search.vector_codec import VectorCodec

FACTS_FILE, PROBES_FILE, ROWS_FILE = "search_index.json", "probes.safetensors", "rows.arrow"
_DAMAGE = (UnicodeDecodeError, json.JSONDecodeError, AttributeError, KeyError, TypeError, OSError, SafetensorError)
UNFINISHED_FACTS = "facts.tmp"
BEFORE_FACTS = {PROBES_FILE, UNFINISHED_FACTS}  # what there may be if a run is killed while it writes them
FORMAT = 2
PARTIAL, WRITING = ".partial", "writing"


def partial_place(out: Path) -> Path:
    """Returns the folder of an index while it is made."""
    return out.with_name(out.name + PARTIAL)


@dataclass(frozen=True)
class IndexFacts:
    """The facts of an index beside its rows.

    Args:
        folder: The folder of the images.
        model: The folder or name of the model that embedded them.
        settings: The parts that are kept of each image.
        fingerprint: The fingerprint of the model.
        bound: The largest value of the vectors, see `VectorCodec`.
    """

    folder: str
    model: str
    settings: IndexSettings
    fingerprint: Fingerprint
    bound: float = 1.0

    @property
    def codec(self) -> VectorCodec:
        """How the vectors are stored."""
        return VectorCodec(self.settings.precision, self.settings.dimensions, self.bound)

    def write(self, place: Path) -> None:
        """Writes into an existing folder, which is an index's from then on."""
        facts = {
            "format": FORMAT,
            "folder": self.folder,
            "model": self.model,
            "settings": asdict(self.settings),
            "model_settings": self.fingerprint.settings,
            "bound": self.bound,
        }
        probes = {kind: probe.contiguous() for kind, probe in self.fingerprint.probes.items()}
        (place / PROBES_FILE).write_bytes(save(probes))  # `save_file` lets nobody else read it
        unfinished = place / UNFINISHED_FACTS
        unfinished.write_text(json.dumps(facts, indent=2, ensure_ascii=False), encoding="utf-8")
        unfinished.rename(place / FACTS_FILE)

    @classmethod
    def read(cls, place: Path, name: str) -> "IndexFacts":
        """Reads the facts of an index.

        Args:
            place: The folder of the index.
            name: The argument that names it, for errors.

        Raises:
            ValueError: If the folder is not an index, or one of another format.
        """
        if not is_index(place):
            raise ValueError(f"`{name}` is {str(place)!r}, which is no index; expected a folder with {FACTS_FILE}.")
        try:
            facts = json.loads((place / FACTS_FILE).read_text(encoding="utf-8"))
            if facts.get("format") != FORMAT:
                raise ValueError(
                    f"`{name}` is {str(place)!r}, an index of format {facts.get('format', 1)}; expected format "
                    f"{FORMAT}. Delete it, and make it anew with `mmgem index`."
                )
            return cls(
                folder=facts["folder"],
                model=facts["model"],
                settings=IndexSettings(**facts["settings"]),
                fingerprint=Fingerprint(facts["model_settings"], load_file(place / PROBES_FILE)),
                bound=facts["bound"],
            )
        except _DAMAGE as error:
            raise ValueError(
                f"`{name}` is {str(place)!r}, an index whose {FACTS_FILE} or {PROBES_FILE} is damaged; expected a "
                "whole one. Delete it, and make it anew with `mmgem index`."
            ) from error


def is_index(place: Path) -> bool:
    """Tells whether a folder is an index, of any format, complete or not."""
    return (place / FACTS_FILE).is_file()


def read_rows(path: Path) -> Dataset:
    """Reads the rows of a file, which stay on disk.

    Raises:
        ValueError: If the file is not there, or damaged.
    """
    try:
        return Dataset.from_file(str(path))
    except (OSError, pa.ArrowException) as error:
        raise ValueError(
            f"{str(path)!r} is missing or damaged; expected the rows of an index. Delete the index that it belongs "
            "to, and make it anew with `mmgem index`."
        ) from error


def write_rows(path: Path, batches: Iterable[Mapping[str, Any]]) -> None:
    """Writes batches of rows, columns by name, into a file, which appears whole.

    Args:
        path: The file.
        batches: Columns are lists, or arrays (B, ...), which become lists of fixed lengths; at least one batch.
    """
    unfinished = path.with_suffix(".tmp")
    batches = iter(batches)
    first = next(batches)
    schema = Features({name: _feature(column) for name, column in first.items()}).arrow_schema
    with pa.OSFile(str(unfinished), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for batch in chain([first], batches):
            arrays = [_to_arrow(batch[field.name], field.type) for field in schema]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
    unfinished.rename(path)


class ArrayColumn:
    """A column of lists of fixed lengths, of which it reads arrays (N, ...) in their own precision: `column[rows]`."""

    def __init__(self, rows: Dataset, name: str):
        self.name = name
        self.rows = rows.select_columns([name]).with_format("arrow")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: slice | range | list[int]) -> np.ndarray:
        parts = self.rows[rows].column(self.name).chunks
        return _to_numpy(parts[0] if len(parts) == 1 else pa.concat_arrays(parts))


def chunks(length: int, size: int) -> Iterator[slice]:
    """Yields the slices of at most `size` that `length` consists of."""
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _to_arrow(column: Any, type_: pa.DataType) -> pa.Array:
    if not isinstance(column, np.ndarray):
        return pa.array(column, type_)
    values = pa.array(column.reshape(-1))
    for length in reversed(column.shape[1:]):
        values = pa.FixedSizeListArray.from_arrays(values, length)
    return values


def _to_numpy(values: pa.Array) -> np.ndarray:
    shape = [len(values)]
    while pa.types.is_fixed_size_list(values.type):
        shape.append(values.type.list_size)
        values = values.flatten()
    return values.to_numpy().reshape(shape)


def _feature(column: Any):
    if not isinstance(column, np.ndarray):
        return Value("string" if isinstance(column[0], str) else "int32")
    feature = Value(str(column.dtype))
    for length in reversed(column.shape[1:]):
        feature = List(feature, length=length)
    return feature
