"""The files of a search index.

An index is a folder. Its manifest, `search_index.json`, says of what folder it is, by which model, with which
settings, and which files belong to it, with a checksum of each MiB of each; and a stamp of the model's own files, by
which it is known without being loaded:

- `rows-V.parquet`: a row for each item, see `items`, with `file_name` relative to the folder, `kind`, `part`, `text`,
  `metadata` and `box`, `width` and `height` (of an image as displayed), `version` (size and time of the file, and what
  is said of it) and `content` (a hash of what was embedded);
- `embedding-V.npy`: the codes of its vectors; `memory-V.npy`, if it is kept, the memory of the first rows, which are
  those of whole images, float16;
- `lists-V.faiss`, of an index with many vectors: the lists that these are in, see `InvertedLists`;
- `probes-V.safetensors`: what the model made of the probes of its fingerprint.

V is the number of an update. An update writes files of its own beside those of the one before it, and then replaces
the manifest, in one step: a reader has the one or the other. Who has files open keeps them, though they are deleted.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError
from safetensors.numpy import load, save

from mmgem.training.search.checked_files import (
    BLOCK,
    CheckedFile,
    DamagedFileError,
    read_checked_json,
    write_checked,
    write_checked_json,
)
from mmgem.training.search.fingerprint import Fingerprint
from mmgem.training.search.inverted_lists import InvertedLists
from mmgem.training.search.settings import IndexSettings
from mmgem.training.search.vector_codec import VectorCodec

MANIFEST = "search_index.json"
UNFINISHED = "unfinished"  # the folder, in that of the index, of what a run has embedded until it ends
FORMAT = 4
_ROW_OF_FORMAT_3 = {"kind": "image", "part": 0, "text": "", "metadata": "", "box": None}  # besides what it has
_FILES_OF_AN_UPDATE = re.compile(
    r"(rows|embedding|memory|lists|probes)-\d+\.(parquet|npy|faiss|safetensors)|search_index\.tmp"
)
_FORMAT_2_FILES = ("rows.arrow", "probes.safetensors")
_READ_ANYWAY, _READ_AT_MOST = 1 << 14, 1 << 24  # bytes between rows that are asked for; and of rows at a time
_DAMAGE = (AttributeError, KeyError, TypeError, ValueError, OSError, SafetensorError, pa.ArrowException)


class ArrayFile:
    """An array (N, ...) in a `.npy` file, of which `array[rows]` reads what is asked for.

    Args:
        folder: Where the file is.
        facts: Those of `CheckedFile`, with `dtype` and `shape`.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any]):
        self.file = CheckedFile(folder, facts)
        self.dtype, self.shape = np.dtype(facts["dtype"]), tuple(facts["shape"])
        self._row_bytes = self.dtype.itemsize * int(np.prod(self.shape[1:]))
        self._start = self.file.size - self._row_bytes * len(self)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | Sequence[int]) -> np.ndarray:
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(len(self))
            return self._read(start, stop)
        numbers = np.asarray(rows, dtype=np.int64)
        try:
            return self._gather(numbers, -(-_READ_ANYWAY // self._row_bytes))
        except DamagedFileError:  # perhaps what lies between them is damaged
            return self._gather(numbers, 1)

    def _gather(self, numbers: np.ndarray, near: int) -> np.ndarray:
        """The rows with these numbers; what lies between such as are at most `near` apart is read, too."""
        array = np.empty((len(numbers), *self.shape[1:]), self.dtype)
        order = np.argsort(numbers, kind="stable")
        far = -(-_READ_AT_MOST // self._row_bytes)
        is_apart = (np.diff(numbers[order]) > near) | (np.diff(numbers[order] // far) > 0)
        for run in np.split(order, np.flatnonzero(is_apart) + 1) if len(order) else []:
            first = int(numbers[run[0]])
            array[run] = self._read(first, int(numbers[run[-1]]) + 1)[numbers[run] - first]
        return array

    def damaged_rows(self) -> np.ndarray:
        """(N,) Whether a row lies in a block that is not what was written."""
        is_damaged = np.zeros(len(self), bool)
        for block in self.file.damaged_blocks():
            first, last = block * BLOCK - self._start, (block + 1) * BLOCK - self._start
            is_damaged[max(0, first // self._row_bytes) : max(0, -(-last // self._row_bytes))] = True
        return is_damaged

    def _read(self, start: int, stop: int) -> np.ndarray:
        try:
            data = self.file.read(self._start + start * self._row_bytes, self._start + stop * self._row_bytes)
        except DamagedFileError as error:
            raise DamagedFileError(f"{error} `mmgem index` embeds anew what is lost.") from error
        return np.frombuffer(data, self.dtype).reshape(-1, *self.shape[1:])


class ListsFile:
    """The lists of an index in a file, which is small beside the vectors and read as a whole.

    Args:
        folder: Where the file is.
        facts: Those of `CheckedFile`, with `vectors`, `effort` and `recall` of `InvertedLists`.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any]):
        self.file, self.facts = CheckedFile(folder, facts), facts

    @property
    def recall(self) -> dict[str, float]:
        """See `InvertedLists`."""
        return self.facts["recall"]

    def read(self) -> InvertedLists:
        """Reads the lists.

        Raises:
            DamagedFileError: If they are not what was written.
        """
        try:
            data = self.file.read()
        except DamagedFileError as error:
            raise DamagedFileError(f"{error} `mmgem index` makes the lists anew.") from error
        return InvertedLists.from_bytes(data, *(self.facts[name] for name in ("vectors", "effort", "recall")))


class IndexRows:
    """The rows of an index, or of a part of one.

    Args:
        table: The columns that are small, which are in memory.
        arrays: `embedding`, and `memory`, of the first rows, if it is kept.
    """

    def __init__(self, table: pa.Table, arrays: Mapping[str, ArrayFile | np.ndarray]):
        self.table, self.arrays = table, arrays

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, column: str) -> list:
        return self.table[column].to_pylist()

    def damaged(self) -> np.ndarray:
        """(N,) Whether the arrays of a row are not what was written; reads all of them."""
        is_damaged = np.zeros(len(self), bool)
        for array in self.arrays.values():
            if isinstance(array, ArrayFile):
                is_damaged[: len(array)] |= array.damaged_rows()
        return is_damaged


@dataclass(frozen=True)
class IndexFacts:
    """The facts of an index beside its rows.

    Args:
        folder: The folder of the images.
        model: The folder or name of the model that embedded them.
        settings: What it holds, and the parts that are kept of each item.
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


@dataclass(frozen=True)
class StoredIndex:
    """An index as it is on the disk.

    Args:
        facts: What is known of its rows.
        rows: The rows; None in a folder that holds parts instead.
        version: The number of the update; 0 for an index of an earlier format.
        lists: The lists of its vectors; None where a search compares all.
        stamp: By what the files of its model are known, see `note_stamp`.
    """

    facts: IndexFacts
    rows: IndexRows | None
    version: int
    lists: ListsFile | None = None
    stamp: str | None = None

    @property
    def bytes_per_row(self) -> int:
        """What the vectors and the memory of one image take."""
        return 0 if self.rows is None else sum(array[:1].nbytes for array in self.rows.arrays.values())


def is_index(place: Path) -> bool:
    """Whether there is an index."""
    return (place / MANIFEST).is_file()


def check_is_index(place: Path, name: str) -> None:
    """Refuses a folder without an index; the argument `name` is it."""
    if not is_index(place):
        raise ValueError(f"`{name}` is {str(place)!r}, which is no index; expected a folder with {MANIFEST}.")


def is_free(place: Path) -> bool:
    """Whether an index may be made there: nobody else's files are there, and no index."""
    if not place.exists():
        return True
    return place.is_dir() and all(
        path.name == UNFINISHED or _FILES_OF_AN_UPDATE.fullmatch(path.name) for path in place.iterdir()
    )


def write_index(
    place: Path,
    facts: IndexFacts,
    version: int,
    count: int = 0,
    batches: Iterable[Mapping[str, Any]] = (),
    memories: int | None = None,
    make_lists: Callable[[IndexRows], InvertedLists | None] = lambda rows: None,
) -> None:
    """Writes an index, which takes the place of the one that is there in one step.

    Args:
        place: The folder.
        facts: What is known of the rows.
        version: The number of the update, another than that of the index that is there.
        count: The number of rows; 0 for none.
        batches, memories: As for `write_rows`.
        make_lists: Makes the lists of the rows, which are on the disk, if they are enough.
    """
    place.mkdir(parents=True, exist_ok=True)
    rows = write_rows(place, str(version), count, batches, memories) if count else None
    lists = None if rows is None else _write_lists(place, version, make_lists(read_rows(place, rows)))
    with write_checked(place / f"probes-{version}.safetensors") as probes:
        probes.write(save(facts.fingerprint.probes))
    manifest = {
        "format": FORMAT,
        "version": version,
        "folder": facts.folder,
        "model": facts.model,
        "settings": asdict(facts.settings),
        "model_settings": facts.fingerprint.settings,
        "bound": facts.bound,
        "probes": probes.facts,
        "rows": rows,
        "lists": lists,
    }
    write_checked_json(place / MANIFEST, manifest)
    own = {file.path.name for file in _files(place, manifest)}
    for path in list(place.iterdir()):  # of earlier updates, and of such as were killed
        if path.name not in own and (_FILES_OF_AN_UPDATE.fullmatch(path.name) or path.name in _FORMAT_2_FILES):
            with suppress(PermissionError):  # of Windows, where somebody reads it; the next update deletes it
                path.unlink()


def note_stamp(place: Path, stamp: str | None) -> None:
    """Notes in the manifest of an index the `stamp_of` the model and the settings with which it is up to date."""
    manifest = read_checked_json(place / MANIFEST)
    if manifest.get("stamp") != stamp:
        write_checked_json(place / MANIFEST, manifest | {"stamp": stamp})


def _write_lists(place: Path, version: int, lists: InvertedLists | None) -> dict[str, Any] | None:
    """What `ListsFile` knows the lists by."""
    if lists is None:
        return None
    with write_checked(place / f"lists-{version}.faiss") as file:
        file.write(lists.to_bytes())
    return file.facts | {"vectors": lists.vectors, "effort": lists.effort, "recall": lists.recall}


def read_index(place: Path, name: str) -> StoredIndex:
    """Reads an index; its arrays stay on the disk, and open.

    Args:
        place: The folder of the index.
        name: The argument that names it, for errors.

    Raises:
        ValueError: If the folder is not an index, one of another format, or damaged in more than its arrays.
    """
    check_is_index(place, name)
    try:
        while True:
            manifest = _read_manifest(place, name)
            try:
                return _open(place, manifest)
            except (FileNotFoundError, DamagedFileError):
                if _read_manifest(place, name) == manifest:  # it was not updated meanwhile
                    raise
    except _ManifestError:
        raise
    except _DAMAGE as error:
        reason = error.__cause__ if isinstance(error, DamagedFileError) and error.__cause__ else error
        if isinstance(reason, OSError) and not isinstance(reason, FileNotFoundError):  # of a disk that may come back
            raise ValueError(
                f"`{name}` is {str(place)!r}, an index that cannot be read ({reason}); expected one that can."
            ) from error
        raise ValueError(
            f"`{name}` is {str(place)!r}, a damaged index ({error}); expected a whole one. Delete it, and make it "
            "anew with `mmgem index`."
        ) from error


def write_rows(
    place: Path, name: str, count: int, batches: Iterable[Mapping[str, Any]], memories: int | None = None
) -> dict[str, Any]:
    """Writes batches of rows into files, which nobody knows of before they are named in a manifest.

    Args:
        place: The folder.
        name: What distinguishes the files from others.
        count: The number of rows of all batches.
        batches: Columns are lists, or arrays (B, ...) of any precision; at least one batch.
        memories: The number of the first rows that have a `memory`; by default all.

    Returns:
        What `read_rows` knows them by.
    """
    tables: list[pa.Table] = []
    writers: dict[str, Any] = {}
    arrays: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        for batch in batches:
            tables.append(pa.table({name: values for name, values in batch.items() if isinstance(values, list)}))
            for column, values in batch.items():
                if isinstance(values, list):
                    continue
                if column not in writers:
                    writers[column] = stack.enter_context(write_checked(place / f"{column}-{name}.npy"))
                    length = memories if column == "memory" and memories is not None else count
                    shape = (length, *values.shape[1:])
                    layout = {"descr": values.dtype.str, "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(writers[column], layout)  # type: ignore[arg-type]
                    arrays[column] = {"dtype": values.dtype.str, "shape": shape}
                writers[column].write(values.tobytes())
    buffer = pa.BufferOutputStream()
    # A column may be without a value in some of the batches.
    pq.write_table(pa.concat_tables(tables, promote_options="default"), buffer)
    with write_checked(place / f"rows-{name}.parquet") as table:
        table.write(buffer.getvalue())
    return {
        "table": table.facts,
        "arrays": {column: facts | writers[column].facts for column, facts in arrays.items()},
    }


def read_rows(place: Path, facts: Mapping[str, Any], hold: bool = False) -> IndexRows:
    """Reads what `write_rows` wrote; arrays stay on the disk.

    Args:
        place: The folder.
        facts: What `write_rows` returned.
        hold: Whether to keep the arrays open, see `CheckedFile.hold`.

    Raises:
        DamagedFileError: If the table is not what was written.
        FileNotFoundError: If an array that is held is not there.
    """
    # Not by `read_table`, which imports pandas. Without threads: one that still holds Python's memory when the
    # interpreter ends aborts the process (apache/arrow#50482).
    data = pa.BufferReader(pa.py_buffer(CheckedFile(place, facts["table"]).read()))
    table = pq.ParquetFile(data).read(use_threads=False)
    arrays = {column: ArrayFile(place, array) for column, array in facts["arrays"].items()}
    if hold:
        for array in arrays.values():
            array.file.hold()
    return IndexRows(_complete(table), arrays)


def write_part(place: Path, number: int, batch: Mapping[str, Any]) -> None:
    """Writes a part of an index, which is there when all of it is on the disk."""
    name = f"part-{number:06d}"
    facts = write_rows(place, name, len(batch["file_name"]), [batch], len(batch.get("memory", ())))
    write_checked_json(place / f"{name}.json", facts)


def read_parts(place: Path) -> Iterator[IndexRows]:
    """Reads the parts that are what was written; what others had is embedded again."""
    for path in sorted(place.glob("part-*.json")):
        with suppress(DamagedFileError):
            rows = read_rows(place, read_checked_json(path))
            if not rows.damaged().any():
                yield rows


def next_part(place: Path) -> int:
    """The number of the next part, after those that are there, damaged ones included."""
    return 1 + max((int(path.stem.removeprefix("part-")) for path in place.glob("part-*.json")), default=-1)


def remove_parts(place: Path) -> None:
    """Deletes the folder of the parts, the file that makes them an index's first: they are nothing without it."""
    (place / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(place, ignore_errors=True)


class IndexCheck(NamedTuple):
    """Result of `verify_index`.

    Args:
        files: The number of files that were read.
        bytes: Their size.
        damaged: What is wrong with those that are not what was written, by name.
    """

    files: int
    bytes: int
    damaged: dict[str, str]


def verify_index(place: str | Path) -> IndexCheck:
    """Reads every file of an index, and of what a run has begun to add to it, and compares the checksums.

    Raises:
        ValueError: If there is no index, or none whose manifest can be read.
    """
    place, damaged = Path(place), {}
    places = [one for one in (place, place / UNFINISHED) if is_index(one)]
    if not places:
        raise ValueError(f"`index` is {str(place)!r}, which is no index; expected a folder with {MANIFEST}.")
    files: list[CheckedFile] = []
    for one in places:
        manifest = _read_manifest(one, "index")
        if manifest["format"] >= 3:
            files += _files(one, manifest)
        else:  # it has no checksums
            read_index(one, "index")
        for path in sorted(one.glob("part-*.json")):
            try:
                files += _row_files(one, read_checked_json(path))
            except DamagedFileError:
                damaged[path.name] = "it is not what was written"
    for file in files:
        if blocks := file.damaged_blocks():
            damaged[file.path.name] = f"not what was written: {len(blocks):,} of {len(file.checksums):,} MiB"
    return IndexCheck(len(files), sum(file.size for file in files), damaged)


def chunks(length: int, size: int) -> Iterator[slice]:
    """Yields the slices of at most `size` that `length` consists of."""
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


class _ManifestError(DamagedFileError):
    """Of a manifest that is damaged or of another format; it says what to do."""


def _read_manifest(place: Path, name: str) -> dict[str, Any]:
    try:
        manifest = read_checked_json(place / MANIFEST)
        known: tuple[int, ...] = (3, FORMAT)
    except DamagedFileError:
        unchecked = _read_without_checksum(place / MANIFEST)
        if unchecked is None or unchecked.get("format") in (3, FORMAT):
            raise _ManifestError(
                f"`{name}` is {str(place)!r}, an index whose {MANIFEST} is damaged; expected a whole one. Delete it, "
                "and make it anew with `mmgem index`."
            ) from None
        manifest, known = unchecked, (2,)
    if manifest.get("format") not in known:
        raise _ManifestError(
            f"`{name}` is {str(place)!r}, an index of format {manifest.get('format', 1)}; expected format {FORMAT}. "
            "Delete it, and make it anew with `mmgem index`."
        )
    return manifest


def _read_without_checksum(path: Path) -> dict[str, Any] | None:
    """As formats before 3 have it."""
    try:
        manifest = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None
    return manifest if isinstance(manifest, dict) else None


def _open(place: Path, manifest: Mapping[str, Any]) -> StoredIndex:
    if manifest["format"] >= 3:
        rows = None if manifest["rows"] is None else read_rows(place, manifest["rows"], hold=True)
        probes = load(bytes(CheckedFile(place, manifest["probes"]).read()))
    else:
        rows, probes = _read_rows_of_format_2(place / "rows.arrow"), load((place / "probes.safetensors").read_bytes())
    facts = IndexFacts(
        folder=manifest["folder"],
        model=manifest["model"],
        settings=IndexSettings(**manifest["settings"]),
        fingerprint=Fingerprint(manifest["model_settings"], probes),
        bound=manifest["bound"],
    )
    lists = ListsFile(place, manifest["lists"]) if manifest.get("lists") else None
    if lists is not None:
        lists.file.hold()
    return StoredIndex(facts, rows, manifest.get("version", 0), lists, manifest.get("stamp"))


def _read_rows_of_format_2(path: Path) -> IndexRows:
    """One file of everything, a stream of Arrow."""
    table = pa.ipc.open_stream(pa.py_buffer(path.read_bytes())).read_all().combine_chunks()
    table.validate(full=True)  # wrong offsets would end the process
    names = [name for name in ("embedding", "memory") if name in table.column_names]
    arrays = {name: _to_numpy(table[name].combine_chunks()) for name in names}
    table = table.drop_columns(names).append_column("content", pa.array([""] * len(table)))
    return IndexRows(_complete(table), arrays)


def _complete(table: pa.Table) -> pa.Table:
    """The table with the columns that formats before 4 do not have: all their rows are whole images."""
    for name, value in _ROW_OF_FORMAT_3.items():
        if name not in table.column_names:
            table = table.append_column(name, pa.array([value] * len(table)))
    return table


def _to_numpy(values: pa.Array) -> np.ndarray:
    shape = [len(values)]
    while pa.types.is_fixed_size_list(values.type):
        shape.append(values.type.list_size)
        values = values.flatten()
    return values.to_numpy().reshape(shape)


def _files(place: Path, manifest: Mapping[str, Any]) -> list[CheckedFile]:
    """All files that a manifest names."""
    rows = [] if manifest["rows"] is None else _row_files(place, manifest["rows"])
    lists = [CheckedFile(place, manifest["lists"])] if manifest.get("lists") else []
    return [CheckedFile(place, manifest["probes"]), *lists, *rows]


def _row_files(place: Path, facts: Mapping[str, Any]) -> list[CheckedFile]:
    return [CheckedFile(place, file) for file in (facts["table"], *facts["arrays"].values())]
