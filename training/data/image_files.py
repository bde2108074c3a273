"""Image files below a folder: finding them, and reading them in batches without those that cannot be read."""

import os
import stat
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b, file_digest
from pathlib import Path, PurePosixPath
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
# Pictures too, which are counted where they are passed over.
OTHER_SUFFIXES = (
    ".apng",
    ".arw",
    ".cr2",
    ".cr3",
    ".dng",
    ".exr",
    ".heic",
    ".heif",
    ".ico",
    ".j2k",
    ".jpe",
    ".jpx",
    ".jxl",
    ".nef",
    ".pbm",
    ".pnm",
    ".psd",
    ".raw",
    ".svg",
    ".tga",
)


class Skipped(NamedTuple):
    """A file that was left out, and why."""

    file_name: str
    reason: str


class ImageFile(NamedTuple):
    """A file that was read.

    Args:
        file_name: Relative to the folder.
        image: The picture.
        content: A hash of the file.
    """

    file_name: str
    image: Image.Image
    content: str


class FoundImages(NamedTuple):
    """The image files below a folder.

    Args:
        versions: For each file, by its path relative to the folder, with forward slashes and sorted, what changes when
            the file does: its size and time.
        unseen: Folders that cannot be listed and files that cannot be looked at, and why. What was known of them may
            still be so.
        empty: Folders without anything in them, as a mount point is when its disk is away.
        passed_over: How many files and links there are that are not read, by kind.
    """

    versions: dict[str, str]
    unseen: dict[str, str]
    empty: set[str]
    passed_over: dict[str, int]

    def hides(self, file_name: str) -> bool:
        """Whether a file may be there although it was not found."""
        hidden = self.unseen.keys() | self.empty if self.unseen or self.empty else ()
        return bool(hidden) and any(str(path) in hidden for path in (file_name, *PurePosixPath(file_name).parents))


def find_images(folder: str | Path) -> FoundImages:
    """Find the image files below a folder, by extension; hidden files and folders are passed over.

    Args:
        folder: The folder. Links to folders are not followed.

    Raises:
        FileNotFoundError: If there is no such folder.
        OSError: If it cannot be listed.
        ValueError: If it is a file, or there are no images below it.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"`folder` is {str(folder)!r}, which is not there; expected a folder of images.")
    if not folder.is_dir():
        raise ValueError(f"`folder` is {str(folder)!r}, a file; expected a folder of images.")
    found = FoundImages({}, {}, set(), Counter())
    remaining = [""]
    while remaining:
        parent = remaining.pop()
        try:
            with os.scandir(folder / parent) as listing:
                entries = list(listing)
        except OSError as error:
            if not parent:
                raise
            found.unseen[parent] = f"it cannot be listed: {error.strerror or error}"
            continue
        if not entries:
            found.empty.add(parent)
        for entry in entries:
            if not entry.name.startswith("."):
                name = f"{parent}/{entry.name}" if parent else entry.name
                if entry.is_dir(follow_symlinks=False):
                    remaining.append(name)
                else:
                    _look_at(entry, name, found)
    if not found.versions and not found.unseen:
        raise ValueError(f"`folder` is {str(folder)!r}, without images; expected files with {', '.join(SUFFIXES)}.")
    return found._replace(
        versions=dict(sorted(found.versions.items())), passed_over=dict(sorted(found.passed_over.items()))
    )


def _look_at(entry: os.DirEntry, name: str, found: FoundImages) -> None:
    """Adds a file or a link to what was found."""
    suffix = os.path.splitext(name)[1].lower()
    try:
        status = entry.stat()
    except OSError as error:  # also of a link to what is not there at the moment
        if suffix in SUFFIXES:
            found.unseen[name] = f"it cannot be looked at: {error.strerror or error}"
        return
    if stat.S_ISDIR(status.st_mode):
        found.passed_over["links to folders"] += 1
    elif suffix in OTHER_SUFFIXES:
        found.passed_over[f"{suffix} files"] += 1
    elif suffix in SUFFIXES and not stat.S_ISREG(status.st_mode):
        found.passed_over["pipes and devices"] += 1
    elif suffix in SUFFIXES:
        found.versions[name] = f"{status.st_size}-{status.st_mtime_ns}"


def read_batches(
    folder: str | Path,
    file_names: Sequence[str],
    batch_size: int,
    skipped: list[Skipped],
    known: Container[str] = (),
    recognized: dict[str, str] | None = None,
) -> Iterator[list[ImageFile]]:
    """Read images, one batch ahead of the caller so that decoding goes on while a model works.

    Args:
        folder: The folder that the names are relative to.
        file_names: The images, as `find_images` names them.
        batch_size: Files to a batch; a batch has fewer images where some cannot be read, possibly none.
        skipped: Receives the files that cannot be read.
        known: Contents of files that need not be decoded.
        recognized: Receives the contents of those, by name.

    Raises:
        ValueError: If `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size}; expected 1 or more.")
    folder = Path(folder)

    def read(file_name: str) -> ImageFile | Skipped | None:
        try:
            file_name.encode()  # a name that is not valid UTF-8 can be neither stored nor printed
            content = content_hash(folder / file_name)
            if recognized is not None and content in known:
                recognized[file_name] = content
                return None
            return ImageFile(file_name, load_image(folder / file_name), content)
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


def content_hash(path: Path) -> str:
    """Returns a hash of what is in a file, 32 digits."""
    with open(path, "rb") as file:
        return file_digest(file, lambda: blake2b(digest_size=16)).hexdigest()


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
