"""Folders that appear under their names only once they are whole, whatever happens while they are written."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
