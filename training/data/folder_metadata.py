"""The file of metadata in an image folder, and its lines."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from mmgem.training.data.records import read_records

METADATA_NAME = "metadata.jsonl"
METADATA_NAMES = (METADATA_NAME, "metadata.csv")


def find_metadata(path: str | Path) -> Path:
    """The metadata file of an image folder.

    Args:
        path: The folder.

    Raises:
        FileNotFoundError, ValueError: As for `read_image_folder`.
    """
    folder = Path(path)
    if not folder.exists():
        raise FileNotFoundError(f"`path` is {str(folder)!r}, where there is nothing; expected an image folder.")
    if not folder.is_dir():
        raise ValueError(f"`path` is {str(folder)!r}, a file; expected an image folder.")
    there = [folder / name for name in METADATA_NAMES if (folder / name).is_file()]
    if len(there) > 1:
        raise ValueError(f"`path` is {str(folder)!r}, which has {' and '.join(METADATA_NAMES)}; expected one of them.")
    if there:
        return there[0]
    known = Image.registered_extensions()
    count = sum(file.suffix.lower() in known for file in folder.rglob("*"))
    if not count:
        raise ValueError(f"`path` is {str(folder)!r}, where there are no images; expected an image folder.")
    raise FileNotFoundError(
        f"`path` is {str(folder)!r} with {count} images; expected a {' or '.join(METADATA_NAMES)}, with a JSON object "
        'a line, such as {"file_name": "a.png", "captions": ["..."]}.'
    )


def read_metadata(metadata: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """The lines of a metadata file.

    Args:
        metadata: The file.

    Yields:
        The name of the line in errors, and its fields, or the error if it cannot be used.

    Raises:
        ValueError: If the file has no lines, or as a whole cannot be read.
    """
    is_empty = True
    for number, fields in read_records(metadata):
        is_empty = False
        where = f"line {number} of {metadata}"
        yield where, f"{where} {fields}" if isinstance(fields, str) else fields
    if is_empty:
        raise ValueError(f"`path` has the file {metadata}, which names no images; expected at least one.")


def columns_of(lines: list[tuple[str, dict[str, Any] | str]]) -> set[str]:
    """All columns that occur in the lines of `read_metadata`."""
    return {column for _, fields in lines if isinstance(fields, dict) for column in fields}
