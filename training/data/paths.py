"""The files that patterns in a recipe mean, and paths that others wrote into data."""

import glob
import re
from pathlib import Path, PurePosixPath, PureWindowsPath

_NUMBERS = re.compile(r"\{(\d+)\.\.(\d+)\}")


def check_folder(folder: str | Path) -> None:
    """Refuse what is no folder of images; `find_images` says with which errors."""
    if not str(folder):
        raise ValueError("`folder` is ''; expected a folder of images.")
    if not Path(folder).exists():
        raise FileNotFoundError(f"`folder` is {str(folder)!r}, which is not there; expected a folder of images.")
    if not Path(folder).is_dir():
        raise ValueError(f"`folder` is {str(folder)!r}, a file; expected a folder of images.")


def no_checkpoint(name: str | Path) -> FileNotFoundError:
    """Makes the error for a name by which there is no checkpoint."""
    return FileNotFoundError(
        f"`model` is {str(name)!r}, neither a folder with a config.json nor a model on the Hub that can be reached; "
        "expected one of them."
    )


def expand_paths(patterns: str | list[str], where: str) -> list[str]:
    """Find the files that patterns mean, in order: `*`, `**` and `?` as in a shell, and `{000..099}` for numbers.

    Args:
        patterns: One pattern, or several.
        where: The name of the patterns in error messages.

    Raises:
        FileNotFoundError: If there is no file for a pattern.
    """
    paths: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        expanded = [pattern]
        while match := _NUMBERS.search(expanded[0]):
            numbers = range(int(match[1]), int(match[2]) + 1)
            texts = [f"{number:0{len(match[1])}d}" for number in numbers]
            expanded = [_NUMBERS.sub(text, path, count=1) for path in expanded for text in texts]
        for path in expanded:
            found = sorted(glob.glob(path, recursive=True))
            if not found:
                raise FileNotFoundError(f"{where} is {path!r}, where there is no file; expected one or more.")
            paths += found
    return paths


def inside(path: str, name: str) -> str:
    """Return a path that data name, if it stays below the folder that it is relative to.

    Args:
        path: The path.
        name: The name of the image in errors.

    Raises:
        ValueError: If it is absolute, on any system, or has `..` in it.
    """
    kinds = PurePosixPath(path), PureWindowsPath(path)
    if any(kind.is_absolute() or kind.drive or ".." in kind.parts for kind in kinds):
        raise ValueError(
            f"{name} is {path!r:.200}, which may lead out of the folder; expected a path below it, or "
            "`allow_outside_paths`."
        )
    return path
