"""One writer at a time: who writes an output holds a lock beside it, which the system takes back with the process."""

import errno
import inspect
import json
import logging
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

from filelock import FileLock, Timeout

# Whose errors do not say of which file they are, where it is open: a disk that is full, fails, or was away.
UNWRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE)

_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # in errors of libraries in Rust

logger = logging.getLogger(__name__)

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
_waits: ContextVar[bool] = ContextVar("waits", default=False)


@contextmanager
def waiting(wait: bool = True) -> Iterator[None]:
    """Lets what is called within wait for an output that another job writes, instead of being refused."""
    token = _waits.set(wait)
    try:
        yield
    finally:
        _waits.reset(token)


@contextmanager
def only_writer(out: str | Path, name: str = "out") -> Iterator[None]:
    """Holds the lock of an output, `OUT.lock` beside it; whoever holds it already may take it again.

    Args:
        out: The file or folder, which need not be there yet.
        name: The argument that names it, for errors.

    Raises:
        BlockingIOError: If another job holds it, unless within `waiting`. A job that is gone holds nothing, however it
            ended.
        OSError: If nothing can be written there, or the file system has no locks.
        ValueError: If `out` is no path, or a link that leads back to itself.
    """
    if not str(out) or "\0" in str(out):
        raise ValueError(f"`out` is {str(out)!r}; expected a path.")
    try:
        out = Path(out).resolve()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"`out` is {str(out)!r}, below the current folder, which is gone.") from error
    except (OSError, RuntimeError) as error:  # the latter before Python 3.13
        raise ValueError(f"`out` is {str(out)!r}, a link that leads back to itself; expected a path.") from error
    if not out.name:
        raise ValueError(f"`out` is {str(out)!r}, where no lock can be beside it; expected a path below it.")
    place = out.with_name(f"{out.name}.lock")
    lock = FileLock(place, is_singleton=True, fallback_to_soft=False)  # a file alone would outlive its process
    if lock.is_locked:
        yield
        return
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        if not os.path.lexists(place):  # where it cannot be, `FileLock` may wait for it
            os.close(os.open(place, os.O_RDWR | os.O_CREAT, 0o644))
        lock.acquire(timeout=0)
    except Timeout:
        if not _waits.get():
            raise BlockingIOError(
                f"`{name}` is {str(out)!r}, which {_holder(place)} is writing; expected no other job at it. Wait for "
                "it to end (`--wait` does)."
            ) from None
        logger.warning("waiting for %s, which %s is writing", out, _holder(place))
        lock.acquire()
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(f"`out` is {str(out)!r}, below a file; expected a path in a folder.") from error
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise type(error)(
                f"`out` is {str(out)!r:.300}, on a file system without locks ({error.strerror}); expected a place on "
                "one with them (`flock`), to which results may be moved from there."
            ) from error
        raise type(error)(
            f"`out` is {str(out)!r:.300}, beside which its lock, {place.name!r}, cannot be written "
            f"({error.strerror}); expected a place that can be written to."
        ) from error
    try:
        with suppress(OSError):  # Windows lets nobody write into a locked file
            place.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}), encoding="utf-8")
        yield
    except OSError as error:
        is_copied = error.filename2 is not None  # what is copied says from where before it says to where
        if error.errno in UNWRITTEN and (is_copied or error.filename is None):
            raise OSError(error.errno, error.strerror, str(out)) from error
        raise
    except Exception as error:  # such as that of safetensors
        if (said := _OS_ERROR.search(str(error))) and int(said[1]) in UNWRITTEN:
            raise OSError(int(said[1]), os.strerror(int(said[1])), str(out)) from error
        raise
    finally:
        with suppress(OSError):  # while it is held: who waits for it sees that it is gone, and makes another
            place.unlink()
        lock.release()


@contextmanager
def not_written(folder: Path, name: str) -> Iterator[None]:
    """Lets no job write a folder while it is read as a whole.

    Args:
        folder: The folder.
        name: The argument that names it, for errors.

    Raises:
        BlockingIOError: If another job writes it, unless within `waiting`.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(only_writer(folder, name))
        except BlockingIOError:
            raise
        except OSError:  # where no lock can be written, no job of ours can write
            logger.debug("%s has no lock", folder)
        yield


def one_writer(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Makes a function hold the lock of its argument `out` while it runs."""
    signature = inspect.signature(function)

    @wraps(function)
    def locked(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        with only_writer(signature.bind(*args, **kwargs).arguments["out"]):
            return function(*args, **kwargs)

    return locked


def _holder(place: Path) -> str:
    try:
        holder = json.loads(place.read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
