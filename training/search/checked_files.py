"""Files that are known by checksums: what is read from one is what was written, or an error that names it."""

import errno
import json
import os
import stat
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from xxhash import xxh3_64, xxh3_64_hexdigest

BLOCK = 1 << 20  # bytes to a checksum
REPLACING_ATTEMPTS, REPLACING_PAUSE = 40, 0.05  # seconds; Windows replaces no file that somebody reads at the moment


class DamagedFileError(ValueError):
    """A file that is not what was written."""


class CheckedWriter:
    """Writes into a file, and takes the checksum of each block of it. Made by `write_checked`.

    Args:
        file: The file, which is empty.
    """

    def __init__(self, file: BinaryIO):
        self.file = file
        self.size = 0
        self.checksums: list[str] = []
        self._hash = xxh3_64()

    def write(self, data) -> None:
        """Writes bytes, or what has a buffer of them."""
        rest = memoryview(data).cast("B")
        self.file.write(rest)
        while rest:
            part, rest = rest[: BLOCK - self.size % BLOCK], rest[BLOCK - self.size % BLOCK :]
            self._hash.update(part)
            self.size += len(part)
            if self.size % BLOCK == 0:
                self.checksums.append(self._hash.hexdigest())
                self._hash.reset()

    @property
    def facts(self) -> dict[str, Any]:
        """What `CheckedFile` knows the file by: its name, its bytes, and the checksum of each block of them."""
        last = [self._hash.hexdigest()] if self.size % BLOCK else []
        return {"name": Path(self.file.name).name, "bytes": self.size, "checksums": self.checksums + last}


@contextmanager
def write_checked(path: Path) -> Iterator[CheckedWriter]:
    """Writes a file, which is on the disk, and not only in its cache, after this."""
    with open(path, "wb") as file:
        yield CheckedWriter(file)
        file.flush()
        os.fsync(file.fileno())


class CheckedFile:
    """A file that `write_checked` wrote.

    Args:
        folder: Where it is.
        facts: Its `CheckedWriter.facts`.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any]):
        self.path = folder / facts["name"]
        self.size: int = facts["bytes"]
        self.checksums: list[str] = facts["checksums"]
        self._held: BinaryIO | None = None
        self._lock = threading.Lock()
        self._is_compared = bytearray(len(self.checksums))  # blocks of a held file, which nobody writes into

    def hold(self) -> None:
        """Keeps the file open, so that it can be read even if it is deleted meanwhile, and each block is compared with
        its checksum once.

        Raises:
            FileNotFoundError: If it is not there.
        """
        self._held = open(self.path, "rb", opener=_open_regular)  # noqa: SIM115

    def read(self, start: int = 0, stop: int | None = None) -> memoryview:
        """Reads the bytes from `start` to `stop`, by default all.

        Raises:
            DamagedFileError: If they are not what was written.
        """
        stop = self.size if stop is None else stop
        first, last = start // BLOCK, -(-stop // BLOCK)
        if 0 < last - first == sum(self._is_compared[first:last]):
            data = memoryview(self._read(start, stop))
            if len(data) == stop - start:
                return data  # otherwise the file was cut since
        data = memoryview(self._read(first * BLOCK, last * BLOCK))
        for number in range(first, last):
            block = data[(number - first) * BLOCK : (number - first + 1) * BLOCK]
            if xxh3_64_hexdigest(block) != self.checksums[number]:
                raise DamagedFileError(
                    f"{str(self.path)!r} is damaged in bytes {number * BLOCK:,} to {number * BLOCK + len(block):,}; "
                    "expected what was written."
                )
        if self._held is not None:
            self._is_compared[first:last] = bytes([1]) * (last - first)
        return data[start - first * BLOCK : stop - first * BLOCK]

    def damaged_blocks(self) -> list[int]:
        """Returns the numbers of the blocks that are not what was written; all of them if the file is not there."""
        damaged = []
        self._is_compared = bytearray(len(self.checksums))
        for number in range(len(self.checksums)):
            try:
                self.read(number * BLOCK, min((number + 1) * BLOCK, self.size))
            except DamagedFileError:
                damaged.append(number)
        return damaged

    def _read(self, start: int, stop: int) -> bytes:
        try:
            if self._held is None:
                with open(self.path, "rb", opener=_open_regular) as file:
                    return self._read_from(file, start, stop)
            with self._lock:
                return self._read_from(self._held, start, stop)
        except OSError as error:
            raise DamagedFileError(f"{str(self.path)!r} cannot be read: {error}; expected a whole file.") from error

    def _read_from(self, file: BinaryIO, start: int, stop: int) -> bytes:
        size = os.fstat(file.fileno()).st_size
        if size > self.size:
            raise DamagedFileError(f"{str(self.path)!r} has {size:,} bytes; expected {self.size:,}.")
        file.seek(start)
        return file.read(stop - start)


def write_checked_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON with its own checksum into a file: there is the old content or the new one, whatever happens."""
    unfinished = path.with_suffix(".tmp")
    with open(unfinished, "w", encoding="utf-8") as file:
        json.dump({**content, "checksum": _checksum(content)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)  # the names of the files that it speaks of
    for attempt in range(REPLACING_ATTEMPTS):
        try:
            os.replace(unfinished, path)
            break
        except PermissionError:
            if attempt == REPLACING_ATTEMPTS - 1:
                raise
            time.sleep(REPLACING_PAUSE)
    sync_folder(path.parent)


def read_checked_json(path: Path) -> dict[str, Any]:
    """Reads what `write_checked_json` wrote.

    Raises:
        DamagedFileError: If it is something else.
        OSError: If it is not there, or cannot be read; it names the file.
    """
    try:
        content = json.loads(path.read_bytes())
        is_whole = content.pop("checksum") == _checksum(content)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError):
        is_whole = False
    if not is_whole:
        raise DamagedFileError(f"{str(path)!r} is damaged; expected what was written.")
    return content


def _open_regular(path: str, flags: int) -> int:
    """What `open` opens a file with, without waiting for what is none: the other end of a pipe may never come."""
    number = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError(errno.EINVAL, "no regular file, but a folder, a pipe or a device", path)
    return number


def sync_folder(folder: Path) -> None:
    """Brings the names of a folder's files to the disk, where the system can do that."""
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _checksum(content: Mapping[str, Any]) -> str:
    return xxh3_64_hexdigest(json.dumps(content, sort_keys=True).encode())
