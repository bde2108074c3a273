"""Whole checkpoints of a run, told from half-written and damaged ones: a marker, written last, knows each file."""

import errno
import hashlib
import json
import os
import platform
import re
import warnings
from pathlib import Path

import torch.distributed as dist
from xxhash import xxh3_64

MARKER_NAME = "complete.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def mark_complete(folder: str | Path) -> None:
    """Mark a checkpoint as whole.

    Every process of a distributed run calls this after its own files are written; it waits for all of them. The marker
    holds the name, size and checksum of every file, and is there at once or not at all.

    Args:
        folder: The folder of the checkpoint, shared by the processes or one per machine.

    Raises:
        FileNotFoundError: If there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"`folder` is {str(folder)!r}, which is not there; expected a written checkpoint.")
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
    # One process of each machine: where the folder is shared, they write the same.
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    files = {}
    for path in _files_of(folder):
        _flush(path)
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "xxh3": _checksum(path)}
    unfinished = folder / f"{MARKER_NAME}.{platform.node()}.{os.getpid()}"
    unfinished.write_text(json.dumps(files, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    _flush(unfinished)
    unfinished.replace(folder / MARKER_NAME)
    _flush(folder)


def mark_unfinished(folder: str | Path) -> None:
    """Take the marker away before a checkpoint of that name is written again; nothing is done where there is none."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        (Path(folder) / MARKER_NAME).unlink(missing_ok=True)


def is_complete(folder: str | Path) -> bool:
    """Tell whether a checkpoint has its marker, and every file that the marker lists, as it was written.

    All of it is read. A warning names a file that is damaged.
    """
    folder = Path(folder)
    if not (folder / MARKER_NAME).is_file():
        return False
    name = MARKER_NAME
    try:
        files = json.loads((folder / MARKER_NAME).read_text(encoding="utf-8"))
        for name, facts in files.items():
            # Of the first versions, the size alone is known.
            size, checksum = (facts, None) if isinstance(facts, int) else (facts["bytes"], facts["xxh3"])
            path = folder / name
            if path.stat().st_size != size or checksum not in (None, _checksum(path)):
                raise ValueError("it is not what was written")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        warnings.warn(f"{str(folder)!r} is not whole: {name} is damaged or missing ({error})", stacklevel=2)
        return False
    return True


def last_complete_checkpoint(folder: str | Path) -> str | None:
    """Find the checkpoint to resume from.

    Args:
        folder: The `output_dir` of the training arguments; it need not be there yet.

    Returns:
        The path of the whole `checkpoint-N` of the highest N, or None. A warning names the half-written ones with a
        higher N, which a kill or a full disk left.
    """
    numbered = [(int(match[1]), path) for path in Path(folder).glob("*") if (match := _NAME.fullmatch(path.name))]
    half_written, whole = [], None
    for _, path in sorted(numbered, reverse=True):
        if is_complete(path):
            whole = str(path)
            break
        half_written.append(str(path))
    if half_written:
        warnings.warn(f"ignoring checkpoints that are not whole: {', '.join(half_written)}", stacklevel=2)
    return whole


def is_disk_full(error: BaseException) -> bool:
    """Tell whether an error that came up while a checkpoint was written means that there was no room for it."""
    text = str(error)
    # safetensors hands the system's words on; torch.save only finds that its stream has not moved.
    is_short_write = "inline_container" in text and "unexpected pos" in text
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text or is_short_write


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, xxh3_64).hexdigest()  # type: ignore[arg-type]


def _files_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(MARKER_NAME)]


def _flush(path: Path) -> None:
    """To the disk, so that a marker that outlives a power cut is true."""
    if os.name != "posix":  # which cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
