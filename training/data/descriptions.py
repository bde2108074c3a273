"""What the metadata of an image folder say of each image: captions, boxes, and other facts."""

from collections.abc import Mapping, Sequence
from datetime import date, time
from decimal import Decimal
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from mmgem.training.data.folder_metadata import METADATA_NAMES, find_metadata
from mmgem.training.data.image_files import FoundImages, Skipped
from mmgem.training.data.records import read_records
from mmgem.training.data.rows import CAPTION_COLUMNS, check_texts, checked_captions, is_box
from mmgem.training.json_text import to_json
from mmgem.training.printable import counted

_SHOWN = 3  # records that are left out of a file and named
_EXPECTED = {"boxes": "[[x0, y0, x1, y1], ...] in pixels", "captions": "`captions`, `caption` or `text`"}


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
        regions = list(zip(self.boxes, self.region_captions, strict=True))
        regions += [one for one in zip(other.boxes, other.region_captions, strict=True) if one not in regions]
        return Description(captions, [box for box, _ in regions], [text for _, text in regions], self.metadata)


def read_descriptions(
    folder: Path, found: FoundImages, skipped: list[Skipped], needed: Mapping[str, str]
) -> dict[str, Description]:
    """Reads the metadata of an image folder, see `read_image_folder`; a line that cannot be used costs itself.

    Args:
        folder: The folder, which may have none, unless they are needed.
        found: The files of the folder.
        skipped: Receives the lines that cannot be used.
        needed: What at least one line must have, `"captions"` or `"boxes"`, and for errors what asks for it.

    Returns:
        What is said of each image, by its `file_name`; several lines about one are joined.

    Raises:
        FileNotFoundError: If there are no metadata, and something is needed.
        OSError: If the metadata cannot be read.
        ValueError: If something is needed that no line has, or they are not what their name says.
    """
    if not needed and not any((folder / name).is_file() for name in METADATA_NAMES):
        return {}
    metadata = find_metadata(folder)
    descriptions: dict[str, Description] = {}
    left_out = LeftOut(metadata.name)
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
        if needed:
            raise
        skipped.append(Skipped(metadata.name, str(error)))
    said = left_out.report()
    skipped += said
    for column, asked in needed.items():
        if not any(getattr(description, column) for description in descriptions.values()):
            such = f" Left out: {said[0].reason}" if said else ""
            raise ValueError(f"{asked}, but no line of {str(metadata)!r} has any; expected {_EXPECTED[column]}.{such}")
    return descriptions


def metadata_of(fields: Mapping[str, Any], without: Sequence[str]) -> str:
    """The fields that are text, a number, a date or a truth value, or a list of such."""
    kept: dict[str, Any] = {}
    for name, value in fields.items():
        values = value if isinstance(value, list) else [value]
        values = [str(one) if isinstance(one, date | time | Decimal) else one for one in values]
        if name not in without and values and all(isinstance(one, str | int | float) for one in values):
            kept[name] = values if isinstance(value, list) else values[0]
    return to_json(kept) if kept else ""


class LeftOut:
    """The records of a file that are left out: how many, and why the first of them.

    Args:
        file_name: The file.
    """

    def __init__(self, file_name: str):
        self.file_name = file_name
        self.count = 0
        self._shown: list[str] = []

    def add(self, number: int, reason: str) -> None:
        """Notes a record by its number, with what is wrong with it."""
        self.count += 1
        if len(self._shown) < _SHOWN:
            self._shown.append(f"{number} {' '.join(reason.split()).removesuffix('.')}.")

    def report(self) -> list[Skipped]:
        """Returns what is to be said of them, if there are any."""
        if not self.count:
            return []
        more = "" if self.count <= _SHOWN else f" And {self.count - _SHOWN} more."
        return [Skipped(self.file_name, f"{counted(self.count, 'line')}: {' '.join(self._shown)}{more}")]


def _describe(fields: Mapping[str, Any] | str) -> tuple[str, Description]:
    """The image that a line of metadata is about, and what it says."""
    if isinstance(fields, str):
        raise ValueError(fields)
    name = fields.get("image") if fields.get("file_name") is None else fields["file_name"]
    if name is None:
        raise ValueError(f"has no `file_name`; it has {', '.join(sorted(fields)) or 'nothing':.200}.")
    if not isinstance(name, str) or not name:
        raise ValueError(f"has `file_name` {name!r:.80}; expected the name of an image.")
    captions = checked_captions(fields)
    boxes, region_captions = fields.get("boxes") or [], fields.get("region_captions") or []
    odd = [box for box in boxes if not is_box(box)] if isinstance(boxes, list) else [boxes]
    if odd:
        raise ValueError(f"has `boxes` with {odd[0]!r:.80}; expected a list of [x0, y0, x1, y1] in pixels.")
    if not isinstance(region_captions, list) or len(region_captions) not in (0, len(boxes)):
        raise ValueError(
            f"has {len(boxes)} `boxes`, and `region_captions` {region_captions!r:.80}; expected one each."
        )
    if region_captions:
        check_texts(region_captions, "has `region_captions`")
    without = ("file_name", "image", "boxes", "region_captions", *CAPTION_COLUMNS)
    boxes = [[float(edge) for edge in box] for box in boxes]
    description = Description(captions, boxes, region_captions or [""] * len(boxes), metadata_of(fields, without))
    return PurePosixPath(name).as_posix(), description
