"""WebDataset shards: tar files in which files of one name make up a sample. Any sample is read by where it stands."""

import json
import re
import tarfile
from array import array
from bisect import bisect_right
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from mmgem.training.data.paths import expand_paths
from mmgem.training.data.rows import check_columns
from mmgem.training.data.sources import Source

# The directory and the name up to its first dot are the key of a sample, the rest is the name of its part; see
# https://github.com/webdataset/webdataset, `base_plus_ext` in `tariterators.py`, and `tar_file_iterator` for names
# between double underscores. Files whose name begins with a dot, which macOS adds, are no part of a sample.
_PART_NAME = re.compile(r"((?:.*/|)[^./]+)[.]([^/]*)", re.DOTALL)
_META_NAME = re.compile(r"__[^/]*__($|/)")
_TEXT_SUFFIXES = ("txt", "text", "caption", "cls")
_IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "jp2", "avif")
_SAMPLES_CHECKED = 10  # at most, to see the columns


class ShardSource(Source):
    """
    The samples of local tar files in WebDataset's format (https://github.com/webdataset/webdataset).

    Of a sample, the first image is `image`, `.txt` is `text`, and the fields of `.json` are columns; any part is also
    a column by the name of its extension. The shards are gone through once, header by header, when the source opens
    (some 50 µs a sample), and 16 bytes a sample kept; afterwards a sample costs one read. A shard that is cut off or
    damaged is named in `damaged`, and what stands before the damage is used.

    Args:
        patterns: the files, see `expand_paths`.
        columns: as for `Source`.

    Raises:
        FileNotFoundError: if there are none.
        ValueError: if no sample can be read, or the columns of the first are not those meant.
    """

    def __init__(self, patterns: str | list[str], columns: Mapping[str, str | None] | None = None):
        self.paths = expand_paths(patterns, "`webdataset`")
        super().__init__(patterns if isinstance(patterns, str) else ",".join(patterns), columns)
        self._starts, self._ends = array("q"), array("q")  # of each sample, in its shard
        self._firsts: list[int] = []  # sample of each shard
        self._last: tuple[int, list[tuple[str, bytes]]] | None = None
        for path in self.paths:
            self._firsts.append(len(self._starts))
            if damage := self._index(path):
                self.damaged.append((Path(path).name, damage))
        if not self._starts:
            reasons = "; ".join(f"{key}: {reason}" for key, reason in self.damaged)
            raise ValueError(f"{self.name} has no samples; expected some in {len(self.paths)} tar files. {reasons}")
        present = self._first_columns() - ({"txt", *_IMAGE_SUFFIXES} - set(self.columns.values()))
        check_columns(present, self.columns, self.name)

    def __len__(self) -> int:
        return len(self._starts)

    def key(self, index: int) -> str:
        """Shard and key of the sample."""
        shard = bisect_right(self._firsts, index) - 1
        try:
            name = _split_name(self._parts(index)[0][0])[0]
        except (OSError, ValueError):
            name = str(index - self._firsts[shard])
        return f"{Path(self.paths[shard]).name}/{name}"

    def fields(self, index: int) -> dict[str, Any]:
        content: dict[str, Any] = {}
        fields: dict[str, Any] = {}
        for name, data in self._parts(index):
            extension = _split_name(name)[1]
            suffix = extension.rpartition(".")[2]
            if suffix == "json":
                content = json.loads(data)
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

    def _parts(self, index: int) -> list[tuple[str, bytes]]:
        """Names and contents of the files of a sample."""
        if self._last is None or self._last[0] != index:
            path = self.paths[bisect_right(self._firsts, index) - 1]
            start, end = self._starts[index], self._ends[index]
            # Opened anew each time: an open file would be shared with the processes that are forked from this one.
            with open(path, "rb") as shard:
                shard.seek(start)
                data = shard.read(end - start)
            try:
                with tarfile.open(fileobj=BytesIO(data), mode="r:") as sample:
                    files = [(part.name, sample.extractfile(part)) for part in sample if _is_part(part)]
                    parts = [(name, file.read()) for name, file in files if file is not None]
            except tarfile.TarError as error:
                raise ValueError(f"{path} cannot be read at byte {start}: {error}") from error
            self._last = index, parts
        return self._last[1]

    def _first_columns(self) -> set[str]:
        for index in range(min(len(self), _SAMPLES_CHECKED)):
            try:
                return set(self.fields(index))
            except ValueError as error:
                reason = error
        raise ValueError(f"{self.name} cannot be read: its first samples failed, the last one with: {reason}")

    def _index(self, path: str) -> str | None:
        """Note where the samples of a shard stand; what is wrong with it, if anything."""
        first, key, end, damage = len(self._starts), None, 0, ""
        try:
            with tarfile.open(path, "r:") as shard:
                while (member := shard.next()) is not None:
                    shard.members = []  # type: ignore[attr-defined]  # which would fill the memory
                    if _is_part(member):
                        if _split_name(member.name)[0] != key:
                            key = _split_name(member.name)[0]
                            self._starts.append(member.offset)
                            self._ends.append(0)
                        self._ends[-1] = shard.offset
                    end = shard.offset
                # A damaged header ends the loop as the end of the file does, but that is marked by an empty block.
                shard.fileobj.seek(end)
                if shard.fileobj.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE):
                    return None
        except (tarfile.TarError, OSError) as error:
            damage = f": {error}"
        if len(self._starts) > first:  # the last sample may be cut off
            self._starts.pop()
            self._ends.pop()
        return f"is damaged at byte {end}{damage}; {len(self._starts) - first} samples before it are used"


def _is_part(member: tarfile.TarInfo) -> bool:
    name = member.name
    return member.isfile() and _PART_NAME.fullmatch(name) is not None and not _META_NAME.match(name)


def _split_name(name: str) -> tuple[str, str]:
    """Key of the sample and name of the part."""
    match = _PART_NAME.fullmatch(name)
    assert match is not None
    return match[1], match[2].lower()
