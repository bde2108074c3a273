"""Image files below a folder: finding them, and reading them in batches without those that cannot be read."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from mmgem.processing.image_loading import load_image

# Extensions of pictures, out of the many that PIL opens (".pdf", ".h5", ".mpg" ...).
SUFFIXES = (
    ".avif",
    ".bmp",
    ".gif",
    ".jfif",
    ".jp2",
    ".jpeg",
    ".jpg",
    ".pgm",
    ".png",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
)


class Skipped(NamedTuple):
    """A file that was left out, and why."""

    file_name: str
    reason: str


class ImageFile(NamedTuple):
    """A picture that was read; `file_name` is relative to the folder."""

    file_name: str
    image: Image.Image


def find_images(folder: str | Path) -> list[str]:
    """Find the image files below a folder, by extension; hidden files and folders are passed over.

    Args:
        folder: The folder.

    Returns:
        Paths relative to `folder`, with forward slashes, sorted.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it is a file, or there are no images below it.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"`folder` is {str(folder)!r}, which is not there; expected a folder of images.")
    if not folder.is_dir():
        raise ValueError(f"`folder` is {str(folder)!r}, a file; expected a folder of images.")
    found = []
    for parent, children, files in os.walk(folder):
        children[:] = [child for child in children if not child.startswith(".")]
        found += [
            Path(parent, name).relative_to(folder).as_posix()
            for name in files
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES
        ]
    if not found:
        raise ValueError(f"`folder` is {str(folder)!r}, without images; expected files with {', '.join(SUFFIXES)}.")
    return sorted(found)


def read_batches(
    folder: str | Path, file_names: Sequence[str], batch_size: int, skipped: list[Skipped]
) -> Iterator[list[ImageFile]]:
    """Read images, one batch ahead of the caller so that decoding goes on while a model works.

    Args:
        folder: The folder that the names are relative to.
        file_names: The images, as `find_images` names them.
        batch_size: Files to a batch; a batch has fewer images where some cannot be read, possibly none.
        skipped: Receives the files that cannot be read.

    Raises:
        ValueError: If `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size}; expected 1 or more.")
    folder = Path(folder)

    def read(file_name: str) -> ImageFile | Skipped:
        try:
            file_name.encode()  # a name that is not valid UTF-8 can be neither stored nor printed
            return ImageFile(file_name, load_image(folder / file_name))
        except Exception as error:  # whatever a broken file makes a decoder raise, the others shall still be read
            return Skipped(os.fsencode(file_name).decode(errors="replace"), _reason(error))

    with ThreadPoolExecutor() as pool:
        starts = range(0, len(file_names), batch_size)
        batches = ([pool.submit(read, name) for name in file_names[start : start + batch_size]] for start in starts)
        ahead = next(batches, None)
        while ahead is not None:
            current, ahead = ahead, next(batches, None)
            files = [future.result() for future in current]
            skipped += [file for file in files if isinstance(file, Skipped)]
            yield [file for file in files if isinstance(file, ImageFile)]


def apply_to_batch(
    function: Callable[[list[ImageFile]], Sequence[Any]], batch: list[ImageFile], skipped: list[Skipped]
) -> list[tuple[ImageFile, Any]]:
    """Pair each image with its result; the images that make `function` fail are skipped, not the batch they are in.

    Args:
        function: Gives one result for each image of a batch.
        batch: The images, possibly none.
        skipped: Receives the images for which `function` raises a `ValueError` even alone.
    """
    if not batch:
        return []
    try:
        return list(zip(batch, function(batch), strict=True))
    except ValueError as error:
        if len(batch) > 1:
            return [pair for file in batch for pair in apply_to_batch(function, [file], skipped)]
        skipped.append(Skipped(batch[0].file_name, _reason(error)))
        return []


def _reason(error: Exception) -> str:
    """One line."""
    return " ".join(str(error).split()) or type(error).__name__
