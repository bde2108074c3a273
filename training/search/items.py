"""The items that a search index has a row of: images, their captions and regions, and texts."""

import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, time
from decimal import Decimal
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from mmgem.processing.image_loading import read_file
from mmgem.training.data.image_files import SUFFIXES, FoundImages, Skipped, content_hash
from mmgem.training.data.image_folder import METADATA_NAMES, find_metadata
from mmgem.training.data.records import RECORD_SUFFIXES, read_records
from mmgem.training.data.rows import CAPTION_COLUMNS, captions_of
from mmgem.training.json_text import to_json
from mmgem.training.search.settings import IndexSettings, Kind

WHOLE_IMAGES: tuple[Kind, ...] = ("image", "fused")  # of which there may be a memory
# The kind of `EMBEDDING_METHODS` that a calibrator takes each for.
EMBEDDED_AS = {"image": "image", "fused": "fused", "region": "image", "caption": "text", "text": "text"}
TEXT_SUFFIXES = (".md", ".txt", *RECORD_SUFFIXES)
_SHOWN = 3  # records that are left out of a file and named

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


class Description(NamedTuple):
    """What the metadata of a folder say of one image.

    Args:
        captions: Its captions.
        boxes: `[x0, y0, x1, y1]` each, in pixels.
        region_captions: One for each box, which may be empty.
        metadata: As in `Item`.
    """

    captions: list[str]
    boxes: list[list[float]]
    region_captions: list[str]
    metadata: str

    def join(self, other: "Description") -> "Description":
        """What two lines about one image say together; other facts are those of the first."""
        captions = self.captions + [caption for caption in other.captions if caption not in self.captions]
        boxes, region_captions = self.boxes + other.boxes, self.region_captions + other.region_captions
        return Description(captions, boxes, region_captions, self.metadata)


def read_descriptions(
    folder: Path, settings: IndexSettings, found: FoundImages, skipped: list[Skipped]
) -> dict[str, Description]:
    """Reads the metadata of an image folder, see `read_image_folder`.

    Args:
        folder: The folder, which may have none, unless captions or boxes are to be indexed.
        settings: The settings of the index.
        found: The files of the folder.
        skipped: Receives the lines that cannot be used.

    Returns:
        What is said of each image, by its `file_name`.

    Raises:
        FileNotFoundError: If there are no metadata, and captions or boxes are to be indexed.
        OSError: If the metadata cannot be read.
        ValueError: If they are not what their name says.
    """
    is_needed = settings.captions is not None or settings.regions == "boxes"
    if not is_needed and not any((folder / name).is_file() for name in METADATA_NAMES):
        return {}
    metadata = find_metadata(folder)
    descriptions: dict[str, Description] = {}
    left_out = _LeftOut(metadata.name)
    try:
        for number, fields in read_records(metadata):
            try:
                file_name, description = _describe(fields)
                if file_name not in found.versions and found.hiding_place(file_name) is None:
                    raise ValueError(f"names {file_name!r:.80}, where there is no image.")
            except (TypeError, ValueError) as error:  # whatever else its fields may be
                left_out.add(number, str(error))
                continue
            if other := descriptions.get(file_name):  # there may be a line for each caption
                description = other.join(description)
            descriptions[file_name] = description
    except ValueError as error:
        if is_needed:
            raise
        skipped.append(Skipped(metadata.name, str(error)))
    skipped += left_out.report()
    if settings.regions == "boxes" and not any(description.boxes for description in descriptions.values()):
        raise ValueError(
            f"`regions` is 'boxes', but no line of {str(metadata)!r} has any; expected [[x0, y0, x1, y1], ...] in "
            "pixels."
        )
    if settings.captions is not None and not any(description.captions for description in descriptions.values()):
        raise ValueError(
            f"`captions` is {settings.captions!r}, but no line of {str(metadata)!r} has any; expected `captions`, "
            "`caption` or `text`."
        )
    return descriptions


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
        yield _text_item(file_name, 0, read_file(file).decode("utf-8-sig"), "")
        return
    left_out, is_empty = _LeftOut(file_name), True
    for number, fields in read_records(file):
        try:
            if isinstance(fields, str):
                raise ValueError(fields)
            if column not in fields:
                raise ValueError(f"has no column {column!r}; it has {', '.join(sorted(fields))}.")
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


class _LeftOut:
    """The records of a file that are left out: how many, and why the first of them.

    Args:
        file_name: The file.
    """

    def __init__(self, file_name: str):
        self.file_name = file_name
        self.count = 0
        self._shown: list[str] = []

    def add(self, number: int, reason: str) -> None:
        self.count += 1
        if len(self._shown) < _SHOWN:
            self._shown.append(f"{number} {' '.join(reason.split())}")

    def report(self) -> list[Skipped]:
        more = "" if self.count <= _SHOWN else f" And {self.count - _SHOWN} more."
        return [Skipped(self.file_name, f"{self.count} lines: {' '.join(self._shown)}{more}")] if self.count else []


def _text_item(file_name: str, part: int, text: Any, metadata: str) -> Item:
    text = _check_text(text)
    return Item(file_name, "text", part, content_hash(f"{metadata} {text}".encode()), text, metadata)


def _check_text(text: Any) -> str:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"is {text!r:.80}; expected a text that is not empty.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"is {ascii(text):.80}; expected text without half a surrogate pair.") from error
    return text


def _describe(fields: Mapping[str, Any] | str) -> tuple[str, Description]:
    """The image that a line of metadata is about, and what it says."""
    if isinstance(fields, str):
        raise ValueError(fields)
    name = fields.get("file_name", fields.get("image"))
    if not isinstance(name, str):
        raise ValueError(f"has `file_name` {name!r:.80}; expected the name of an image.")
    captions, boxes = captions_of(fields), fields.get("boxes") or []
    region_captions = fields.get("region_captions") or []
    for caption in captions:
        _check_text(caption)
    if not isinstance(boxes, list) or not all(map(_is_box, boxes)):
        raise ValueError(f"has `boxes` {boxes!r:.80}; expected a list of [x0, y0, x1, y1] in pixels.")
    if not isinstance(region_captions, list) or len(region_captions) not in (0, len(boxes)):
        raise ValueError(
            f"has {len(boxes)} `boxes`, and `region_captions` {region_captions!r:.80}; expected one each."
        )
    for caption in region_captions:
        _check_text(caption)
    without = ("file_name", "image", "boxes", "region_captions", *CAPTION_COLUMNS)
    boxes = [[float(edge) for edge in box] for box in boxes]
    description = Description(captions, boxes, region_captions or [""] * len(boxes), metadata_of(fields, without))
    return PurePosixPath(name).as_posix(), description


def _is_box(box: Any) -> bool:
    is_list = isinstance(box, list) and len(box) == 4
    return is_list and all(isinstance(edge, int | float) and math.isfinite(edge) for edge in box)


def metadata_of(fields: Mapping[str, Any], without: Sequence[str]) -> str:
    """The fields that are text, a number, a date or a truth value, or a list of such."""
    kept: dict[str, Any] = {}
    for name, value in fields.items():
        values = value if isinstance(value, list) else [value]
        values = [str(one) if isinstance(one, date | time | Decimal) else one for one in values]
        if name not in without and values and all(isinstance(one, str | int | float) for one in values):
            kept[name] = values if isinstance(value, list) else values[0]
    return to_json(kept) if kept else ""
