"""Files and folders that appear under their names only once they are whole, whatever happens meanwhile."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_writable(file: Path, argument: str) -> None:
    """Refuse a file that cannot be written, before any work is done for it.

    Args:
        file: The file; it is left as it is.
        argument: What names it, in errors.

    Raises:
        OSError: If it cannot.
    """
    is_new = not file.exists()
    try:
        open(file, "ab").close()
    except OSError as error:
        raise type(error)(
            f"`{argument}` is {str(file)!r:.300}, which cannot be written ({error.strerror}); expected a "
            "place that can."
        ) from error
    if is_new:
        file.resolve().unlink()  # not the link to it


@contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """Gives a file to write into, which takes the place of `file`, or of a link, at the end.

    Nothing is left of it after an error, which names it if it names no file.
    """
    partial = file.with_name(f"{file.name}.partial")
    try:
        yield partial
        os.replace(partial, file)
    except OSError as error:
        error.filename = error.filename or str(file)
        raise
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(out: str | Path) -> Iterator[Path]:
    """Gives an empty folder to write into, and moves what is in it to `out` at the end.

    If what is within fails, for lack of room for instance, nothing of it is left, and `out` is as it was.

    Args:
        out: A folder, which need not be there yet. Files and folders of the same names are replaced in it.
    """
    out = Path(out)
    partial = out / ".partial" if out.is_dir() and any(out.iterdir()) else out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if not out.exists():
        partial.rename(out)
        return
    for path in partial.iterdir():
        place = out / path.name
        if place.is_dir():
            shutil.rmtree(place)
        path.replace(place)
    partial.rmdir()
