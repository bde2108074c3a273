"""The items below a folder: of its images, of what its metadata say of them, and of its texts."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from pathlib import Path

from mmgem.training.data.descriptions import read_descriptions
from mmgem.training.data.folder_metadata import METADATA_NAMES
from mmgem.training.data.image_files import Skipped, find_images
from mmgem.training.printable import counted
from mmgem.training.search.items import TEXT_SUFFIXES, Item, RowKey, is_text_file, items_of_image, read_texts
from mmgem.training.search.settings import IndexSettings


class FolderItems:
    """The items below a folder, as far as an index with some settings has rows of them.

    Args:
        folder: Where the files are, at any depth.
        settings: The settings of the index.
        names: The only files, relative to `folder`, with forward slashes; by default all below it.

    Attributes:
        found: The files, without those of metadata.
        skipped: What is left out, and why; it grows as texts are read.

    Raises:
        FileNotFoundError, OSError, ValueError: As `find_images` and `read_descriptions`.
    """

    def __init__(self, folder: str | Path, settings: IndexSettings, names: Sequence[str] | None = None):
        self.found = find_images(folder, TEXT_SUFFIXES if settings.texts is not None else (), names)
        for metadata in METADATA_NAMES:  # which say something of the others
            self.found.versions.pop(metadata, None)
        self.folder, self.settings = Path(folder).resolve(), settings
        self.skipped: list[Skipped] = []
        needed = {} if settings.captions is None else {"captions": f"`captions` is {settings.captions!r}"}
        needed |= {"boxes": "`regions` is 'boxes'"} if settings.regions == "boxes" else {}
        self._descriptions = read_descriptions(self.folder, self.found, self.skipped, needed)
        self._known_skipped = len(self.skipped)

    def unread(self) -> "FolderItems":
        """Returns the same items, to be read by somebody else, without another look at the folder."""
        items = copy(self)
        items.skipped = self.skipped[: self._known_skipped]
        return items

    def images(self) -> Iterator[tuple[str, list[Item]]]:
        """Yields each image file with its items, without captions of their own."""
        for file_name in self.found.versions:
            if not is_text_file(file_name):
                yield file_name, [item for item in self._of_image(file_name) if item.kind != "caption"]

    def texts(self) -> Iterator[Item]:
        """Yields the items that are embedded as texts, reading them."""
        for file_name in list(self.found.versions):
            if is_text_file(file_name):
                yield from self._read_texts(file_name)
            elif self.settings.captions == "beside":
                yield from (item for item in self._of_image(file_name) if item.kind == "caption")

    def _of_image(self, file_name: str) -> list[Item]:
        version = self.found.versions[file_name]
        return items_of_image(file_name, version, self._descriptions.get(file_name), self.settings)

    def _read_texts(self, file_name: str) -> Iterator[Item]:
        """Reads the texts of a file; what cannot be read now is noted as unseen, what is broken as left out."""
        try:
            file_name.encode()  # a name that is not valid UTF-8 can be neither stored nor printed
            yield from read_texts(self.folder, file_name, self.settings.texts or "", self.skipped)
        except OSError as error:
            self.found.unseen[file_name] = f"it cannot be read: {error.strerror or error}"
            del self.found.versions[file_name]
        except ValueError as error:
            shown = os.fsencode(file_name).decode(errors="replace")
            self.skipped.append(Skipped(shown, " ".join(str(error).split())))

    def hides(self, file_name: str) -> bool:
        """Whether a file was not found, but may be there."""
        return file_name not in self.found.versions and self.found.hiding_place(file_name) is not None

    def left_out(self, rows: Iterable[RowKey]) -> list[Skipped]:
        """Returns what cannot be seen, and how many of the rows are kept of it; and what is skipped."""
        kept = Counter(self.found.hiding_place(name) for name, _, _ in rows if name not in self.found.versions)
        report = []
        for place in sorted({*self.found.unseen, *filter(None, kept)}):
            reason = self.found.unseen.get(place, "it is empty, as if its disk were away")
            if kept[place]:
                reason += f"; what the index has of it, {counted(kept[place], 'row')}, is kept until it is gone"
            report.append(Skipped(place, reason))
        return report + self.skipped
