"""The samples of a WebDataset shard and where they stand, found once and kept in a cache on disk."""

import hashlib
import json
import os
import re
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from huggingface_hub import constants

from mmgem.training.printable import counted

# The directory and the name up to its first dot are the key of a sample, the rest is the name of its part; see
# https://github.com/webdataset/webdataset, `base_plus_ext` in `tariterators.py`, and `tar_file_iterator` for names
# between double underscores. Files whose name begins with a dot, which macOS adds, are no part of a sample.
_PART_NAME = re.compile(r"((?:.*/|)[^./]+)[.]([^/]*)", re.DOTALL)
_META_NAME = re.compile(r"__[^/]*__($|/)")

_FORMAT = 1  # of the cache
_SETTLED = 2 * 10**9  # nanoseconds after which a change of a file is certain to change its time


@dataclass(frozen=True)
class ShardIndex:
    """The samples of a shard.

    Args:
        starts, ends: (S,) int64, the bytes between which each sample stands.
        damage: The reason if the shard is not whole, else empty.
    """

    starts: np.ndarray
    ends: np.ndarray
    damage: str


def read_shard_index(path: str) -> ShardIndex:
    """Find the samples of a shard: in the cache, or header by header (some 50 µs a sample).

    The cache is the folder `mmgem/shard_indexes` in `HF_HOME`. An index is taken from it only if the file has the
    path, size and time of change that it was made from. A damaged shard is not cached, nor is a file that was changed
    within the last two seconds, since a further change might leave its time as it is. Any number of processes may read
    and write the cache; a damaged file of it is written again, and where it cannot be written there is none.

    Args:
        path: The tar file.
    """
    origin = _origin_of(path)
    cached = Path(constants.HF_HOME, "mmgem", "shard_indexes", f"{_digest(origin['path'].encode())}.index")
    if (index := _read(cached, origin)) is not None:
        return index
    index = _scan(path)
    if not index.damage and _origin_of(path) == origin and time.time_ns() - origin["mtime_ns"] > _SETTLED:
        with suppress(OSError):
            _write(cached, origin, index)
    return index


def is_part(member: tarfile.TarInfo) -> bool:
    """Whether a file of a shard is part of a sample."""
    name = member.name
    return member.isfile() and _PART_NAME.fullmatch(name) is not None and not _META_NAME.match(name)


def split_name(name: str) -> tuple[str, str]:
    """The key of the sample that a part belongs to, and the extension of the part in lower case."""
    match = _PART_NAME.fullmatch(name)
    assert match is not None
    return match[1], match[2].lower()


def _scan(path: str) -> ShardIndex:
    starts: list[int] = []
    ends: list[int] = []
    key, end, damage = None, 0, ""
    try:
        with tarfile.open(path, "r:") as shard:
            for member in _members(shard):
                if is_part(member):
                    if split_name(member.name)[0] != key:
                        key = split_name(member.name)[0]
                        starts.append(member.offset)
                        ends.append(0)
                    ends[-1] = shard.offset  # type: ignore[attr-defined]
                end = shard.offset  # type: ignore[attr-defined]
            # A damaged header ends the loop as the end of the file does, but that is marked by an empty block.
            shard.fileobj.seek(end)  # type: ignore[union-attr]
            if shard.fileobj.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE):  # type: ignore[union-attr]
                return ShardIndex(np.array(starts, np.int64), np.array(ends, np.int64), "")
    except (tarfile.TarError, OSError) as error:
        damage = f": {error}"
    starts, ends = starts[:-1], ends[:-1]  # the last sample may be cut off
    reason = f"is damaged at byte {end}{damage}; {counted(len(starts), 'sample')} before it can be used"
    return ShardIndex(np.array(starts, np.int64), np.array(ends, np.int64), reason)


def _members(shard: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := shard.next()) is not None:
        shard.members = []  # type: ignore[attr-defined]  # which would fill the memory
        yield member


def _origin_of(path: str) -> dict:
    status = os.stat(path)
    return {"path": os.path.abspath(path), "size": status.st_size, "mtime_ns": status.st_mtime_ns, "format": _FORMAT}


def _read(cached: Path, origin: dict) -> ShardIndex | None:
    """The index in a file of the cache; None if it is of another state of the shard, damaged, or not there."""
    try:
        header, _, body = cached.read_bytes().partition(b"\n")
        facts = json.loads(header)
        if facts["origin"] != origin or facts["digest"] != _digest(body):
            return None
        starts, ends = np.frombuffer(body, "<i8").reshape(2, -1)
        return ShardIndex(starts, ends, "")
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(cached: Path, origin: dict, index: ShardIndex) -> None:
    """Write a file of the cache, which is there at once or not at all."""
    cached.parent.mkdir(parents=True, exist_ok=True)
    body = np.stack([index.starts, index.ends]).astype("<i8").tobytes()
    header = json.dumps({"origin": origin, "digest": _digest(body)})
    descriptor, partial = tempfile.mkstemp(dir=cached.parent, suffix=".partial")
    try:
        with open(descriptor, "wb") as file:
            file.write(header.encode() + b"\n" + body)
        os.replace(partial, cached)
    except OSError:
        os.unlink(partial)
        raise


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
