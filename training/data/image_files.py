"""Image files below a folder: finding them, and reading them in batches without those that cannot be read."""

import errno
import math
import os
import stat
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from threading import Condition
from typing import Any, NamedTuple, Protocol, TypeVar

from PIL import Image

from mmgem.processing.image_loading import MAX_PIXELS, open_picture, read_file
from mmgem.training.data.paths import check_folder
from mmgem.training.printable import is_utf8

# Of all pictures that are decoded ahead, and of one batch; 4 bytes each, or 8 while they are decoded.
PIXELS_IN_MEMORY, PIXELS_TO_A_BATCH = 1 << 27, 1 << 26
# From here on images are decoded one at a time, in one thread: what a thread has had is kept for it by the system.
PIXELS_OF_A_LARGE_IMAGE = 1 << 24

# Extensions of pictures, out of the many that PIL opens (".pdf", ".h5", ".mpg" ...).
HEIF_SUFFIXES = (".heic", ".heics", ".heif", ".heifs", ".hif")
READS_HEIF = find_spec("pillow_heif") is not None
SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"),
    *(HEIF_SUFFIXES if READS_HEIF else ()),
)
# Pictures too, which are counted where they are passed over.
OTHER_SUFFIXES = tuple(
    ".apng .arw .avifs .bw .cr2 .cr3 .cur .dcx .dds .dib .dng .emf .eps .exr .fit .fits .icb .icns .ico .j2c .j2k "
    ".jfi .jif .jpc .jpe .jpf .jpx .jxl .jxr .mpo .nef .orf .palm .pbm .pcd .pcx .pef .pfm .pnm .psd .qoi .raf .ras "
    ".raw .rgb .rgba .rw2 .sgi .srw .svg .tga .vda .vst .wdp .wmf .xbm .xpm".split()
)


class Skipped(NamedTuple):
    """A file that was left out, and why."""

    file_name: str
    reason: str


class ImageFile(NamedTuple):
    """A file that was read.

    Args:
        file_name: Relative to the folder.
        image: The picture, scaled down if the reader may do that.
        size: Its width and height as it is not scaled down, in pixels.
        content: A hash of the file.
        inputs: What the reader's `prepare` made of the picture.
    """

    file_name: str
    image: Image.Image
    size: tuple[int, int]
    content: str
    inputs: Any = None


class FoundImages(NamedTuple):
    """The image files below a folder, and files of texts where they were asked for.

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

    def hiding_place(self, file_name: str) -> str | None:
        """What cannot be seen, or is empty, so that a file may be there although it was not found; None if nothing."""
        places = (file_name, *map(str, PurePosixPath(file_name).parents))
        return next((place for place in places if place in self.unseen or place in self.empty), None)


def find_images(
    folder: str | Path, text_suffixes: tuple[str, ...] = (), names: Sequence[str] | None = None
) -> FoundImages:
    """Find the image files below a folder, by extension; hidden files and folders are passed over.

    Args:
        folder: The folder. Links to folders are not followed.
        text_suffixes: Extensions of other files to find, such as `.txt`.
        names: The only files to look at, relative to the folder, with forward slashes; by default all.

    Raises:
        FileNotFoundError: If there is no such folder.
        OSError: If it cannot be listed.
        ValueError: If it is a file, or there are no images, and no such other files, below it.
    """
    check_folder(folder)
    if sys.getfilesystemencoding() != "utf-8":  # every other name would seem to be gone
        raise ValueError(
            f"The names of files are read as {sys.getfilesystemencoding()} here; expected utf-8. Set PYTHONUTF8=1, or "
            "a locale such as C.UTF-8."
        )
    suffixes = (*SUFFIXES, *text_suffixes)
    folder = Path(folder)
    found = FoundImages({}, {}, set(), Counter())
    for name in names or ():
        _look_at_named(folder / name, name, suffixes, found)
    remaining = [""] if names is None else []
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
                try:
                    is_folder = entry.is_dir(follow_symlinks=False)
                except OSError as error:  # of file systems whose lists do not say what is a folder
                    found.unseen[name] = f"it cannot be looked at: {error.strerror or error}"
                    continue
                if is_folder:
                    remaining.append(name)
                else:
                    _look_at(entry, name, suffixes, found)
    if not found.versions and not found.unseen:
        raise ValueError(
            f"`folder` is {str(folder)!r}, without images{' or texts' * bool(text_suffixes)}; expected "
            f"files with {', '.join(suffixes)}."
        )
    return found._replace(
        versions=dict(sorted(found.versions.items())), passed_over=dict(sorted(found.passed_over.items()))
    )


def _look_at_named(path: Path, name: str, suffixes: tuple[str, ...], found: FoundImages) -> None:
    """Adds a file that was asked for, or counts it whatever it is."""
    suffix = os.path.splitext(name)[1].lower()
    if not os.path.lexists(path):
        found.passed_over["names of no file"] += 1
    elif path.is_dir():
        found.passed_over["folders"] += 1
    elif suffix not in (*suffixes, *HEIF_SUFFIXES, *OTHER_SUFFIXES):
        found.passed_over[f"{suffix} files" if suffix else "files without a suffix"] += 1
    else:
        _look_at(path, name, suffixes, found)


def _look_at(entry: os.DirEntry | Path, name: str, suffixes: tuple[str, ...], found: FoundImages) -> None:
    """Adds a file or a link to what was found."""
    suffix = os.path.splitext(name)[1].lower()
    try:
        status = entry.stat()
    except OSError as error:  # also of a link to what is not there at the moment
        if suffix in suffixes:
            found.unseen[name] = f"it cannot be looked at: {error.strerror or error}"
        return
    if stat.S_ISDIR(status.st_mode):
        found.passed_over["links to folders"] += 1
    elif suffix in HEIF_SUFFIXES and not READS_HEIF:
        found.passed_over[f"{suffix} files, which need pillow-heif"] += 1
    elif suffix in OTHER_SUFFIXES:
        found.passed_over[f"{suffix} files"] += 1
    elif suffix in suffixes and not stat.S_ISREG(status.st_mode):
        found.passed_over["pipes and devices"] += 1
    elif suffix in suffixes:
        found.versions[name] = f"{status.st_size}-{status.st_mtime_ns}"


class _PixelBudget:
    """Lets threads have pictures in memory only as far as all of them together do not exceed a limit.

    The file that is needed next may exceed it: others wait for that one.

    Args:
        limit: Pixels.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._condition = Condition()
        self._used = 0
        self._needed = 0

    def take(self, number: int, pixels: int) -> None:
        """Waits until there is room for the pixels of a file, by its number."""
        with self._condition:
            self._condition.wait_for(lambda: self._used + pixels <= self.limit or number <= self._needed)
            self._used += pixels

    def give(self, pixels: int, needed: int = 0) -> None:
        """Gives room back, and says which file is needed next."""
        with self._condition:
            self._used -= pixels
            self._needed = max(self._needed, needed)
            self._condition.notify_all()


class ImageReader:
    """Reads image files of a folder.

    Args:
        folder: The folder that names are relative to.
        shorter_side: As for `load_image`, see [`shorter_side_for`].
        max_pixels: As for `load_image`.
        is_known: Whether a file need not be decoded, by its name and content; by default none.
        prepare: Makes something of each picture, in the thread that has decoded it, such as the inputs of a model. A
            picture that it raises a `ValueError` for goes without.
    """

    def __init__(
        self,
        folder: str | Path,
        shorter_side: int | None = None,
        max_pixels: int = MAX_PIXELS,
        is_known: Callable[[str, str], bool] = lambda file_name, content: False,
        prepare: Callable[[Image.Image], Any] = lambda image: None,
    ):
        self.folder, self.shorter_side, self.max_pixels = Path(folder), shorter_side, max_pixels
        self.is_known, self.prepare = is_known, prepare
        self.recognized: dict[str, str] = {}  # the contents of known files that were met, by name
        self._budget = _PixelBudget(PIXELS_IN_MEMORY)
        self._for_large = ThreadPoolExecutor(1)

    def read_batches(
        self, file_names: Sequence[str], batch_size: int, skipped: list[Skipped]
    ) -> Iterator[list[ImageFile]]:
        """Read images ahead of the caller, so that decoding goes on while a model works.

        Args:
            file_names: The images, as `find_images` names them.
            batch_size: Files to a batch; a batch has fewer images where some cannot be read, possibly none, and where
                they have more than `PIXELS_TO_A_BATCH`.
            skipped: Receives the files that cannot be read.

        Raises:
            ValueError: If `batch_size` is below 1.
        """
        if batch_size < 1:
            raise ValueError(f"`batch_size` is {batch_size}; expected 1 or more.")
        pool = ThreadPoolExecutor()
        try:
            waiting: deque[Future] = deque()
            submitted = 0
            batch: list[ImageFile] = []
            files = held = 0
            for number in range(len(file_names)):
                while submitted < min(len(file_names), number - files + 2 * batch_size):
                    waiting.append(pool.submit(self._read, submitted, file_names[submitted]))
                    submitted += 1
                self._budget.give(0, needed=number)
                file = waiting.popleft().result()
                files += 1
                if isinstance(file, Skipped):
                    skipped.append(file)
                elif file is not None:
                    batch.append(file)
                    held += _pixels(file.image)
                if files == batch_size or held >= PIXELS_TO_A_BATCH or number == len(file_names) - 1:
                    yield batch
                    self._budget.give(held)
                    batch, files, held = [], 0, 0
        finally:
            self._budget.give(0, needed=len(file_names))  # nobody waits any more
            pool.shutdown(cancel_futures=True)

    def _read(self, number: int, file_name: str) -> ImageFile | Skipped | None:
        shown = os.fsencode(file_name).decode(errors="backslashreplace")
        try:
            if not is_utf8(file_name):
                raise ValueError("its name is not UTF-8, and cannot be kept; expected another name")
            data = read_file(self.folder / file_name)
            content = content_hash(data)
            if self.is_known(file_name, content):
                self.recognized[file_name] = content
                return None
            picture = open_picture(data, "the file", self.max_pixels, self.shorter_side)
            self._budget.take(number, picture.pixels)
            kept = 0
            try:
                if picture.pixels > PIXELS_OF_A_LARGE_IMAGE:
                    image = self._for_large.submit(picture.decode).result()
                else:
                    image = picture.decode()
                kept = _pixels(image)
            finally:
                self._budget.give(picture.pixels - kept)
            inputs = None
            with suppress(ValueError):  # who asks for them says why
                inputs = self.prepare(image)
            return ImageFile(file_name, image, picture.upright_size, content, inputs)
        except Exception as error:  # whatever a broken file makes a decoder raise, the others shall still be read
            if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
                raise  # it is not of this file that there are too many
            return Skipped(shown, _reason(error))


# By class and settings of an image processor: a picture as large as that asked about takes a tenth of a second.
_sides_of_views: dict[tuple[type, str] | None, int] = {}


def shorter_side_for(processor, share: float = 1.0) -> int:
    """How many pixels the shorter side of a picture needs, so that the model sees all that it would: twice as many as
    a square with the pixels that it sees, of all tiles together where a VLM cuts pictures into such.

    The rule holds wherever files are embedded, captioned, measured or trained on as a whole; regions are cut from
    pictures in full.

    Args:
        processor: An `MMGEMProcessor`, which is asked for its view of a large picture.
        share: How much of each side of the picture is in the view.
    """
    kind = None
    if processor.vlm_processor is None and hasattr(processor.image_processor, "to_json_string"):
        kind = type(processor.image_processor), processor.image_processor.to_json_string()
    side = _sides_of_views.get(kind)
    if side is None:
        images = [Image.new("RGB", (2048, 2048))]
        views = [processor(images=images, return_tensors="pt")]
        if processor.vlm_processor is not None:
            views.append(
                processor(images=images, text=[processor.prompt()], return_tensors="pt", **processor.prompt_kwargs)
            )
        side = max(math.isqrt(view["pixel_values"].numel() // 3) for view in views)
    if kind is not None:
        _sides_of_views[kind] = side
    return math.ceil(2 * side / share)


def content_hash(data: bytes) -> str:
    """Returns a hash of what is in a file, 32 digits."""
    return blake2b(data, digest_size=16).hexdigest()


def _pixels(image: Image.Image) -> int:
    return image.width * image.height


class Named(Protocol):
    """What has the name of a file, such as `ImageFile`."""

    @property
    def file_name(self) -> str:
        """The name in reports."""


_File = TypeVar("_File", bound=Named)


def apply_to_batch(
    function: Callable[[list[_File]], Sequence[Any]], batch: list[_File], skipped: list[Skipped]
) -> list[tuple[_File, Any]]:
    """Pair each file with its result; the files that make `function` fail are skipped, not the batch they are in.

    Args:
        function: Gives one result for each file of a batch.
        batch: The files, possibly none.
        skipped: Receives the files for which `function` raises a `ValueError` even alone.
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
