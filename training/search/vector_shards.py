"""Vectors of images in Parquet files, which many processes or machines write, and of which an index is made.

A folder of shards has the manifest of an index without rows, which says by which model and with which settings they
are made. Each row of each shard names it by a hash, so that shards of another model among them are noticed.
"""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save

from mmgem.processing.image_loading import open_picture
from mmgem.training.data.descriptions import metadata_of
from mmgem.training.data.image_files import Skipped, content_hash, shorter_side_for
from mmgem.training.data.rows import CAPTION_COLUMNS, checked_captions
from mmgem.training.json_text import to_json
from mmgem.training.loading import load_checkpoint
from mmgem.training.output_lock import one_writer
from mmgem.training.printable import counted
from mmgem.training.search.fingerprint import Fingerprint
from mmgem.training.search.index_report import IndexReport
from mmgem.training.search.item_embedder import ItemEmbedder, ReadItem
from mmgem.training.search.items import Item
from mmgem.training.search.list_making import make_lists
from mmgem.training.search.settings import IndexSettings
from mmgem.training.search.storage import IndexFacts, is_free, is_index, read_index, write_index

ROWS_AT_A_TIME = 4096
_TYPES = {
    "kind": pa.string(),
    "part": pa.int64(),
    "version": pa.string(),
    "text": pa.string(),
    "metadata": pa.string(),
    "box": pa.list_(pa.float64()),
    "width": pa.int64(),
    "height": pa.int64(),
    "content": pa.string(),
}


def begin_shards(shards: str | Path, model, processor, folder: str | Path, **settings) -> None:
    """Begins a folder of shards, or goes on with one.

    Args:
        shards: The folder: a new or empty one, or one that was begun by the same model in the same way.
        model: An `MMGEMModel`, which was loaded from where each worker can load it.
        processor: Its `MMGEMProcessor`.
        folder: Where the images are; names below it are kept relative to it.
        settings: `vectors`, `dimensions`, `precision` and `image_mode`, as for `build_index`.

    Raises:
        ValueError: If `shards` is something else already, or the model does not give what is asked for.
    """
    shards = Path(shards)
    given: dict[str, Any] = {"vectors": None, "dimensions": None, "precision": "float32", "memory": False} | settings
    name = model.name_or_path
    facts = IndexFacts(
        folder=str(Path(folder).resolve()),
        model=str(Path(name).resolve()) if name and Path(name).is_dir() else name,
        settings=IndexSettings.settle(model, **given),
        fingerprint=Fingerprint.take(model, processor, ["weights", *model.config.embedded_kinds]),
    )
    if not is_index(shards):
        if not is_free(shards):
            raise ValueError(f"`shards` is {str(shards)!r}, where other files are; expected a new or an empty folder.")
        write_index(shards, facts, 1)
        return
    there = _read_facts(shards)
    _check_same(there, facts.fingerprint, facts.model, shards)
    if (there.folder, there.settings) != (facts.folder, facts.settings):
        raise ValueError(
            f"`shards` is {str(shards)!r}, of the folder {there.folder!r} with {there.settings}; expected "
            f"{facts.folder!r} with {facts.settings}, as is asked for now."
        )


class ImageEmbedder:
    """Embeds tables of image files, for shards: what Ray Data maps over batches, an instance on each device.

    Args:
        shards: The folder, which `begin_shards` has begun.
        image: The column of the files: their bytes, or structs with such a field, as `datasets` writes.
        name: The column of their paths, or of other names, each of which is there once.
        threads: That decode.

    Raises:
        ValueError: If the model is not the one that the shards were begun by, any more.
    """

    def __init__(self, shards: str | Path, image: str = "bytes", name: str = "path", threads: int = 1):
        self._facts = _read_facts(Path(shards))
        self._image, self._name, self._hash = image, name, model_hash(self._facts)
        model, processor = load_checkpoint(self._facts.model)
        kinds = list(self._facts.fingerprint.probes)
        _check_same(self._facts, Fingerprint.take(model, processor, kinds), self._facts.model, Path(shards))
        self._skipped: list[Skipped] = []
        self._embedder = ItemEmbedder(model, processor, self._facts.settings, Path(shards), self._skipped)
        self._shorter_side = shorter_side_for(processor)
        self._pool = ThreadPoolExecutor(threads)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Embeds a batch.

        Args:
            batch: B rows. Captions, and other columns with texts and numbers, are kept as an index keeps them.

        Returns:
            B rows: the column `name`, those of the rows of an index with the `embedding`, `model`, and `error`, the
            reason why an image could not be read, without an embedding then.

        Raises:
            ValueError: If it has no such columns.
        """
        for argument, column in [("image", self._image), ("name", self._name)]:
            if column not in batch.column_names:
                raise ValueError(f"`{argument}` is {column!r}; expected one of {', '.join(batch.column_names)}.")
        fields = batch.to_pylist()
        self._skipped.clear()
        items = [item for item in self._pool.map(self._read, fields) if item is not None]
        rows = {row["file_name"]: row for row in self._embedder.embed_rows(items)}
        errors = {skipped.file_name: skipped.reason for skipped in self._skipped}
        names = [self._file_name(one[self._name]) for one in fields]
        columns: dict[str, Any] = {self._name: batch[self._name], "file_name": pa.array(names, pa.string())}
        for column, kind in _TYPES.items():
            columns[column] = pa.array([rows[name][column] if name in rows else None for name in names], kind)
        width = self._facts.settings.dimensions * (self._facts.settings.vectors or 1)
        embeddings = [rows[name]["embedding"].reshape(-1) if name in rows else None for name in names]
        columns["embedding"] = pa.array(embeddings, pa.list_(pa.float32(), width))
        columns["error"] = pa.array([None if name in rows else errors[name] for name in names], pa.string())
        columns["model"] = pa.array([self._hash] * len(names), pa.string())
        return pa.table(columns)

    def _read(self, fields: dict[str, Any]) -> ReadItem | None:
        file_name = self._file_name(fields[self._name])
        data = fields[self._image]
        data = data.get("bytes") if isinstance(data, dict) else data
        try:
            if not isinstance(data, bytes):
                raise ValueError(f"`{self._image}` is {data!r:.80}; expected the bytes of an image file.")
            picture = open_picture(data, "the file", shorter_side=self._shorter_side)
            image, size = picture.decode(), picture.upright_size
            text = "\n".join(checked_captions(fields))
            metadata = metadata_of(fields, without=(self._image, self._name, *CAPTION_COLUMNS))
        except Exception as error:  # whatever a broken file makes a decoder raise, the others shall still be read
            self._skipped.append(Skipped(file_name, " ".join(str(error).split()) or type(error).__name__))
            return None
        return ReadItem(Item(file_name, "image", 0, "", text, metadata), content_hash(data), image, size)

    def _file_name(self, name: Any) -> str:
        path, folder = Path(str(name)), self._facts.folder
        return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(name)


@one_writer
def index_shards(shards: str | Path, model, processor, out: str | Path) -> IndexReport:
    """Makes an index of shards, in the place of the one that is there.

    A later `build_index` of the folder of the images brings it up to date, and embeds only what is new.

    Args:
        shards: The folder of the shards.
        model: The `MMGEMModel` that made them.
        processor: Its `MMGEMProcessor`.
        out: The folder of the index: a new or empty one, or one that was made of the same folder by the same model.

    Returns:
        The report; what was left out are images that could not be read, and shards that are no whole Parquet files.

    Raises:
        BlockingIOError: If another job writes `out`.
        ValueError: If there are no vectors, or some of another model, or `out` is something else already.
    """
    shards, out = Path(shards), Path(out).resolve()
    facts = _read_facts(shards)
    fingerprint = Fingerprint.take(model, processor, list(facts.fingerprint.probes))
    _check_same(facts, fingerprint, model.name_or_path, shards)
    version = 1
    if not is_free(out):
        stored = read_index(out, "out")
        _check_same(stored.facts, fingerprint, model.name_or_path, out)
        if stored.facts.folder != facts.folder:
            raise ValueError(
                f"`out` is {str(out)!r}, an index of the folder {stored.facts.folder!r}; expected one of "
                f"{facts.folder!r}. Choose another place, or delete it."
            )
        version = stored.version + 1
    skipped: list[Skipped] = []
    kept = _choose_rows(shards, model_hash(facts), skipped)
    count = sum(int(shard.rows.sum()) for shard in kept.values())
    if not count:
        raise ValueError(f"`shards` is {str(shards)!r}, where no vector is; expected some Parquet files with vectors.")
    if facts.settings.precision == "int8":
        bounds = (float(np.abs(batch["embedding"]).max()) for batch in _batches(kept, facts))
        facts = replace(facts, bound=max(bounds))
    encoded = (batch | {"embedding": facts.codec.encode(batch["embedding"])} for batch in _batches(kept, facts))
    write_index(out, facts, version, count, encoded, 0, lambda rows: make_lists(rows, facts, model, processor))
    written = read_index(out, "out")
    recall = {} if written.lists is None else written.lists.recall
    return IndexReport(count, count, skipped, written.bytes_per_row, {}, {"image": count}, recall)


def model_hash(facts: IndexFacts) -> str:
    """The hash of a model's fingerprint, and of the settings, by which shards name them."""
    settings = to_json([facts.fingerprint.settings, asdict(facts.settings)])
    return content_hash(settings.encode() + save(facts.fingerprint.probes))


def _read_facts(shards: Path) -> IndexFacts:
    stored = read_index(shards, "shards")
    if stored.rows is not None:
        raise ValueError(f"`shards` is {str(shards)!r}, an index; expected a folder that `begin_shards` has begun.")
    return stored.facts


def _check_same(facts: IndexFacts, fingerprint: Fingerprint, model: str, place: Path) -> None:
    if difference := facts.fingerprint.difference(fingerprint):
        raise ValueError(
            f"`model` is {model!r}, {difference}, compared with {facts.model!r} when it made what is in "
            f"{str(place)!r}; expected the same model, or another place."
        )


class _Shard(NamedTuple):
    """Which rows of a shard an index has, and what changes when its file does."""

    rows: np.ndarray
    version: tuple[int, ...]


def _version_of(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _choose_rows(shards: Path, model: str, skipped: list[Skipped]) -> dict[Path, _Shard]:
    """Which rows of each shard an index has: those with a vector, each name once."""
    kept: dict[Path, _Shard] = {}
    names: set[str] = set()
    failed: dict[str, str] = {}
    repeated: Counter[str] = Counter()
    for path in sorted(shards.glob("*.parquet")):
        try:
            version = _version_of(path)
            table = pq.read_table(path, columns=["file_name", "model", "error"])
        except (pa.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())
            skipped.append(Skipped(path.name, f"it is no whole shard: {reason}"))
            continue
        if others := {*table["model"].to_pylist()} - {model}:
            raise ValueError(
                f"`shards` has {path.name}, by a model with the hash {min(map(str, others))}; expected {model}, that "
                "of the model which they were begun by."
            )
        is_kept = np.zeros(len(table), bool)
        rows = zip(table["file_name"].to_pylist(), table["error"].to_pylist(), strict=True)
        for row, (name, failure) in enumerate(rows):
            if failure is not None:
                failed[name] = failure
            elif name in names:
                repeated[path.name] += 1
            else:
                names.add(name)
                is_kept[row] = True
        kept[path] = _Shard(is_kept, version)
    skipped += [Skipped(name, reason) for name, reason in failed.items() if name not in names]
    skipped += [Skipped(name, f"in other rows already: {counted(count, 'image')}") for name, count in repeated.items()]
    return kept


def _batches(kept: dict[Path, _Shard], facts: IndexFacts) -> Iterator[dict[str, Any]]:
    """Batches of rows as for `write_index`, with vectors that are not encoded; a shard that was written since its rows
    were chosen is refused."""
    settings = facts.settings
    shape = (settings.dimensions,) if settings.vectors is None else (settings.vectors, settings.dimensions)
    for path, shard in kept.items():
        _check_unchanged(path, shard)
        start = 0
        for batch in pq.ParquetFile(path).iter_batches(ROWS_AT_A_TIME, columns=[*_TYPES, "file_name", "embedding"]):
            chosen = batch.filter(pa.array(shard.rows[start : start + len(batch)]))
            start += len(batch)
            if len(chosen):
                columns: dict[str, Any] = {name: chosen[name].to_pylist() for name in ("file_name", *_TYPES)}
                values = chosen["embedding"].flatten().to_numpy()
                yield columns | {"embedding": values.reshape(-1, *shape)}
        _check_unchanged(path, shard)


def _check_unchanged(path: Path, shard: _Shard) -> None:
    if not path.exists() or _version_of(path) != shard.version:
        raise ValueError(
            f"`shards` has {path.name}, which was written while it was read; expected shards that nobody writes."
        )
