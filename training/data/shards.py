"""WebDataset shards: tar files in which files of one name make up a sample. Any sample is read by where it stands."""

import tarfile
from bisect import bisect_right
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmgem.training.data.paths import expand_paths
from mmgem.training.data.rows import ColumnName, check_columns
from mmgem.training.data.shard_index import is_part, read_shard_index, split_name
from mmgem.training.data.skipped import UNREADABLE
from mmgem.training.data.sources import Source
from mmgem.training.json_text import from_json

_TEXT_SUFFIXES = ("txt", "text", "caption", "cls")
_IMAGE_SUFFIXES = tuple("jpg jpeg png webp bmp gif tif tiff ppm pgm jp2 avif heic heif".split())
_SAMPLES_CHECKED = 10  # at most, to see the columns
_MAX_SAMPLE_BYTES = 2**30  # a sparse file of a few bytes in the shard may say that it has any number of them


class ShardSource(Source):
    """The samples of local tar files in WebDataset's format (https://github.com/webdataset/webdataset).

    The first image of a sample is `image`, `.txt` is `text`, and the fields of `.json` are columns; any part is also
    a column by the name of its extension. The place of each sample is found when the source first opens, and cached
    (see [`mmgem.training.data.shard_index.read_shard_index`]): 16 bytes a sample, which then costs one read. A shard
    that is cut off or damaged is named in `damaged`, and the samples before the damage are used.

    Args:
        patterns: The files, see `expand_paths`.
        columns: As for `Source`.

    Raises:
        FileNotFoundError: If there are none.
        ValueError: If no sample can be read, or the columns of the first are not those meant.
    """

    def __init__(self, patterns: str | list[str], columns: Mapping[str, ColumnName] | None = None):
        self.paths = expand_paths(patterns, "`webdataset`")
        super().__init__(patterns if isinstance(patterns, str) else ",".join(patterns), columns)
        self._last: tuple[int, list[tuple[str, bytes]]] | None = None
        indexes = [read_shard_index(path) for path in self.paths]
        self._starts = np.concatenate([index.starts for index in indexes])  # (S,) of each sample, in its shard
        self._ends = np.concatenate([index.ends for index in indexes])  # (S,)
        self._firsts = np.cumsum([0, *(len(index.starts) for index in indexes)])[:-1].tolist()  # sample of each shard
        self.damaged += [
            (Path(path).name, index.damage) for path, index in zip(self.paths, indexes, strict=True) if index.damage
        ]
        if not len(self._starts):
            reasons = "; ".join(f"{key}: {reason}" for key, reason in self.damaged)
            raise ValueError(f"{self.name} has no samples; expected some in {len(self.paths)} tar files. {reasons}")
        present = self._first_columns() - ({"txt", *_IMAGE_SUFFIXES} - set(self.columns.values()))
        check_columns(present, self.columns, self.name)

    def __len__(self) -> int:
        return len(self._starts)

    def key(self, index: int) -> str:
        """The shard and the key of the sample."""
        shard = bisect_right(self._firsts, index) - 1
        try:
            name = split_name(self._parts(index)[0][0])[0]
        except (OSError, ValueError):
            name = str(index - self._firsts[shard])
        return f"{Path(self.paths[shard]).name}/{name}"

    def fields(self, index: int) -> dict[str, Any]:
        content: dict[str, Any] = {}
        fields: dict[str, Any] = {}
        for name, data in self._parts(index):
            extension = split_name(name)[1]
            suffix = extension.rpartition(".")[2]
            if suffix == "json":
                content = from_json(data)
                if not isinstance(content, dict):
                    raise ValueError(f"{name} holds {content!r:.80}; expected a JSON object.")
            elif suffix in _TEXT_SUFFIXES:
                fields[extension] = data.decode()
                if extension == "txt":
                    fields["text"] = fields[extension]
            else:
                fields[extension] = data
                if suffix in _IMAGE_SUFFIXES:
                    fields.setdefault("image", data)
        return content | fields

    def _load_image(self, image: Any, index: int, shorter_side: int | None) -> Image.Image:
        if isinstance(image, str) and not image.startswith("data:"):
            raise ValueError(
                f"image of {self._row_name(index)} is {image!r:.200}, outside the shard; expected a file in it."
            )
        return super()._load_image(image, index, shorter_side)

    def _parts(self, index: int) -> list[tuple[str, bytes]]:
        """Names and contents of the files of a sample."""
        if self._last is None or self._last[0] != index:
            path = self.paths[bisect_right(self._firsts, index) - 1]
            start, end = int(self._starts[index]), int(self._ends[index])
            _check_size(end - start, path, start)
            # Opened anew each time: an open file would be shared with the processes that are forked from this one.
            with open(path, "rb") as shard:
                shard.seek(start)
                data = shard.read(end - start)
            try:
                with tarfile.open(fileobj=BytesIO(data), mode="r:") as sample:
                    members = [part for part in sample if is_part(part)]
                    _check_size(sum(part.size for part in members), path, start)
                    files = [(part.name, sample.extractfile(part)) for part in members]
                    parts = [(name, file.read()) for name, file in files if file is not None]
            except tarfile.TarError as error:
                raise ValueError(f"{path} cannot be read at byte {start}: {error}") from error
            self._last = index, parts
        return self._last[1]

    def _first_columns(self) -> set[str]:
        for index in range(min(len(self), _SAMPLES_CHECKED)):
            try:
                return set(self.fields(index))
            except UNREADABLE as error:
                reason = error
        raise ValueError(f"{self.name} cannot be read: its first samples failed, the last one with: {reason}")


def _check_size(size: int, path: str, start: int) -> None:
    if size > _MAX_SAMPLE_BYTES:
        raise ValueError(
            f"{path} has a sample of {size:,} bytes at byte {start}; expected at most {_MAX_SAMPLE_BYTES:,}."
        )


def open_webdataset(webdataset: str | list[str], columns: Mapping[str, ColumnName] | None = None) -> ShardSource:
    """Open the data section `webdataset: PATTERN`; see [`ShardSource`]."""
    return ShardSource(webdataset, columns)
