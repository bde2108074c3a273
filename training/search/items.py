"""The items that a search index has a row of: images, their captions and regions, and texts."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mmgem.processing.image_loading import read_file
from mmgem.training.data.descriptions import Description, LeftOut, metadata_of
from mmgem.training.data.image_files import SUFFIXES, Skipped, content_hash
from mmgem.training.data.records import RECORD_SUFFIXES, read_records
from mmgem.training.data.rows import check_texts
from mmgem.training.search.settings import IndexSettings, Kind

WHOLE_IMAGES: tuple[Kind, ...] = ("image", "fused")  # of which there may be a memory
# The kind of `EMBEDDING_METHODS` that a calibrator takes each for.
EMBEDDED_AS = {"image": "image", "fused": "fused", "region": "image", "caption": "text", "text": "text"}
TEXT_SUFFIXES = (".md", ".txt", *RECORD_SUFFIXES)

RowKey = tuple[str, str, int]


class Item(NamedTuple):
    """What one row of an index is about.

    Args:
        file_name: The file, relative to the folder of the index.
        kind: `"image"`; `"fused"`, an image with its caption in one vector; `"region"` of an image; `"caption"` of an
            image; `"text"`.
        part: The number of the caption or region of its image, or of the record in its file; 0 for a whole file.
        version: What changes when the item may have changed.
        text: The text or caption; of an image, its captions.
        metadata: Other facts, a JSON object, or "".
        box: Of a region `[x0, y0, x1, y1]` in pixels; None for a cell of a grid until its image is read.
    """

    file_name: str
    kind: str
    part: int
    version: str
    text: str = ""
    metadata: str = ""
    box: list[float] | None = None

    @property
    def key(self) -> RowKey:
        """What distinguishes the row from others of its index."""
        return self.file_name, self.kind, self.part

    @property
    def name(self) -> str:
        """The name of the item in reports."""
        if self.kind in ("region", "caption"):
            return f"{self.file_name}, {self.kind} {self.part}"
        return f"{self.file_name}:{self.part}" if self.part else self.file_name


def items_of_image(
    file_name: str, version: str, description: Description | None, settings: IndexSettings
) -> list[Item]:
    """The items of an image file.

    Args:
        file_name: The file.
        version: Its version.
        description: What the metadata say of it.
        settings: The settings of the index.
    """
    captions, boxes, region_captions, metadata = description or Description([], [], [], "")
    if description is not None:
        version = f"{version}-{content_hash(repr(description).encode())[:16]}"
    if settings.captions == "fused" and captions:
        items = [Item(file_name, "fused", 0, version, captions[0], metadata)]
    else:
        items = [Item(file_name, "image", 0, version, "\n".join(captions), metadata)]
    if settings.captions == "beside":
        items += [Item(file_name, "caption", part, version, text, metadata) for part, text in enumerate(captions)]
    if settings.regions == "boxes":
        items += [
            Item(file_name, "region", part, version, text, metadata, box)
            for part, (text, box) in enumerate(zip(region_captions, boxes, strict=True))
        ]
    elif settings.regions is not None:
        cells = range(int(settings.regions) ** 2)
        items += [Item(file_name, "region", part, version, "", metadata) for part in cells]
    return items


def is_text_file(file_name: str) -> bool:
    """Whether a file that was found holds texts, and is no image."""
    return not file_name.lower().endswith(SUFFIXES)


def read_texts(folder: Path, file_name: str, column: str, skipped: list[Skipped]) -> Iterator[Item]:
    """Reads the texts of a file as a stream: of `.txt` and `.md` all of it, of other files a column of the records.

    Args:
        folder: The folder that names are relative to.
        file_name: The file.
        column: The column; the others are metadata.
        skipped: Receives the records without a text, once the file ends.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not what its ending says, or no record has a text.
    """
    file = folder / file_name
    if file.suffix.lower() not in RECORD_SUFFIXES:
        text = read_file(file).decode("utf-8-sig")
        check_texts([text], "is")
        yield _text_item(file_name, 0, text, "")
        return
    left_out, is_empty = LeftOut(file_name), True
    for number, fields in read_records(file):
        try:
            if isinstance(fields, str):
                raise ValueError(fields)
            if column not in fields:
                raise ValueError(f"has nothing in column {column!r}, only in {', '.join(sorted(fields)) or 'none'}.")
            check_texts([fields[column]], f"has `{column}`")
            item = _text_item(file_name, number, fields[column], metadata_of(fields, without=(column,)))
        except ValueError as error:
            left_out.add(number, str(error))
            continue
        is_empty = False
        yield item
    skipped += left_out.report()
    if is_empty and not left_out.count:
        raise ValueError("it has no records; expected at least one.")


def content_of(item: Item, settings: IndexSettings, file_content: str = "") -> str:
    """A hash of all that the vector of an item depends on.

    Args:
        item: The item.
        settings: The settings of the index.
        file_content: A hash of its file, where that is an image.
    """
    if item.kind == "image":
        return file_content
    if item.kind == "region":
        place = item.box if settings.regions == "boxes" else f"cell {item.part} of {settings.regions}"
        return content_hash(f"{file_content} {place}".encode())
    return content_hash(f"{file_content if item.kind == 'fused' else ''} {item.text}".encode())


def cell_of_grid(part: int, cells: int, size: tuple[int, int]) -> list[float]:
    """The box of a cell of a grid over an image, row after row.

    Args:
        part: The number of the cell.
        cells: The number of cells across, and down.
        size: Width and height of the image, in pixels.
    """
    row, column = divmod(part, cells)
    (width, height) = size
    edges = (column * width, row * height, (column + 1) * width, (row + 1) * height)
    return [float(round(edge / cells)) for edge in edges]


def _text_item(file_name: str, part: int, text: str, metadata: str) -> Item:
    return Item(file_name, "text", part, content_hash(f"{metadata} {text}".encode()), text, metadata)
