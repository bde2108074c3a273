"""Where rows come from: image folders, tables, shards, streams, scenes, all read alike and named by a recipe."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from mmgem.processing.boxes import check_boxes
from mmgem.processing.image_loading import load_image
from mmgem.training.data.image_folder import columns_of, find_metadata, read_image_folder, read_metadata
from mmgem.training.data.permutation import hash_numbers, permute
from mmgem.training.data.rows import (
    CAPTION_COLUMNS,
    COLUMNS,
    captions_of,
    check_columns,
    check_row,
    edited_file_of,
    images_of,
    map_columns,
)
from mmgem.training.data.scene_dataset import SceneDataset
from mmgem.training.sections import check_arguments, check_keys, check_type

# For each kind of data the keys that may stand beside it.
KINDS: dict[str, tuple[str, ...]] = {
    "scenes": (),
    "folder": (),
    "parquet": (),
    "dataset": ("name", "split", "streaming"),
    "webdataset": (),
}
_TYPES: dict[str, Any] = {
    "folder": str,
    "parquet": str | list[str],
    "dataset": str,
    "webdataset": str | list[str],
    "name": str | None,
    "split": str,
    "streaming": bool,
    "weight": float,
}


class Source(Dataset):
    """
    Rows of one kind of data, any of which can be read at any time; each is read and checked when it is asked for.

    A row has the columns of [`MMGEMCollator`], and no others: captions always as a list in `captions`, images as PIL
    images, RGB and upright, in `image` (or `images`) and `edited_image`. An image may be stored as whatever
    `load_image` takes, as `{"bytes", "path"}`, or only as the path in `file_name`.

    Args:
        name: what logs call it.
        columns: for a column of ours the name it has in the data, or None to say that there is none.
        folder: what paths of images are relative to.

    Attributes:
        damaged: parts of the data that cannot be read at all, each with the reason.
    """

    def __init__(self, name: str, columns: Mapping[str, str | None] | None = None, folder: str | Path = ""):
        self.name = name
        self.columns = dict(columns or {})
        self.folder = Path(folder)
        self.damaged: list[tuple[str, str]] = []

    def fields(self, index: int) -> dict[str, Any]:
        """A row as it is stored."""
        raise NotImplementedError

    def key(self, index: int) -> str:
        """What logs call a row."""
        return str(index)

    @property
    def block_size(self) -> int:
        """How many rows are shuffled together: all."""
        return len(self)  # type: ignore[arg-type]

    def order(self, block: int, place: int, seed: int) -> int:
        """The row at a place, in [0, block_size), of the given round through the data, which are in random order."""
        return permute(place, self.block_size, hash_numbers(seed, block))

    def shuffled(self, seed: int) -> "Source":
        """The source with what `order` cannot shuffle in random order: itself."""
        return self

    def texts(self, index: int) -> dict[str, Any]:
        """
        A row whose images are not loaded yet.

        Raises:
            ValueError: if it is damaged, lacks a column that was named, or cannot be trained (see `check_row`).
        """
        name = self._row_name(index)
        row = map_columns(self.fields(index), self.columns, name)
        if row.get("image") is None and not row.get("images") and "image" not in self.columns:
            row["image"] = row.get("file_name")
        check_row(row, name)
        row["captions"] = captions_of(row) or None
        kept = [column for column in COLUMNS if column == "captions" or column not in CAPTION_COLUMNS]
        return {column: row[column] for column in kept if row.get(column) is not None}

    def __getitem__(self, index: int) -> dict[str, Any]:
        """
        A row with its images.

        Raises:
            FileNotFoundError, ValueError: as for `texts`, and if an image cannot be read or a box is not in it.
        """
        row = self.texts(index)
        images = [self._load_image(image, index) for image in images_of(row)]
        if row.get("boxes"):
            check_boxes([row["boxes"]], [images[0].size])
        if row.get("images"):
            row["images"] = images
        elif images:
            row["image"] = images[0]
        if "edited_image" in row:
            row["edited_image"] = self._load_image(row["edited_image"], index)
        return row

    def folder_of(self, index: int) -> Path:
        """What the paths of images in a row are relative to."""
        return self.folder

    def _row_name(self, index: int) -> str:
        return f"row {f'{self.name}:{self.key(index)}'!r}"

    def _load_image(self, image: Any, index: int) -> Image.Image:
        name = f"image of {self._row_name(index)}"
        if isinstance(image, Mapping):
            path = image.get("path")
            image, name = (path, name) if image.get("bytes") is None else (image["bytes"], f"{name} ({path})")
        if isinstance(image, str) and "://" not in image and not image.startswith("data:"):
            image = self.folder_of(index) / image
        return load_image(image, name)


class DatasetSource(Source):
    """
    Any data set whose rows are mappings, and can be asked for by number, as a source.

    Args:
        dataset: such as a `SceneDataset` or a list.
        name, columns, folder: as for `Source`.
    """

    def __init__(self, dataset, name: str = "data", columns: Mapping[str, str | None] | None = None, folder=""):
        super().__init__(name, columns, folder)
        self.dataset = dataset
        if not len(dataset):
            raise ValueError(f"{name} has no rows; expected at least one.")
        check_columns(dataset[0], self.columns, name)

    def __len__(self) -> int:
        return len(self.dataset)

    def fields(self, index: int) -> dict[str, Any]:
        return self.dataset[index]


class FolderSource(Source):
    """
    An image folder, as for [`read_image_folder`], of which single lines may be wrong; they are when they are read.
    A row with an `edit` has the image of its `file_name` as `edited_image`, unless `columns` says there is none.

    Args:
        path: the folder.
        columns: as for `Source`.

    Raises:
        FileNotFoundError, ValueError: if there is no folder with metadata, or its columns are not those meant.
    """

    def __init__(self, path: str, columns: Mapping[str, str | None] | None = None):
        super().__init__(str(path), columns, path)
        self._lines = list(read_metadata(find_metadata(path)))
        check_columns(columns_of(self._lines), self.columns, self.name)

    def __len__(self) -> int:
        return len(self._lines)

    def key(self, index: int) -> str:
        where, _ = self._lines[index]
        return where.partition(" of ")[0]

    def fields(self, index: int) -> dict[str, Any]:
        _, fields = self._lines[index]
        if isinstance(fields, str):
            raise ValueError(fields)
        return fields

    def texts(self, index: int) -> dict[str, Any]:
        row = super().texts(index)
        if "edited_image" not in {*row, *self.columns} and (file := edited_file_of(row)) is not None:
            row["edited_image"] = file
        return row


def check_section(section: object, where: str) -> None:
    """
    Refuse a data section that cannot be used, before anything is read.

    Args:
        section: as read from the recipe.
        where: what error messages call it.

    Raises:
        ValueError: for an unknown key (the nearest known one is named), more or less than one kind of data, a value of
            a wrong type, a weight below 0, or a column that nothing reads.
    """
    shared = ("weight", "columns")
    check_keys(section, [*KINDS, *{key for keys in KINDS.values() for key in keys}, *shared], where)
    assert isinstance(section, Mapping)
    kinds = [kind for kind in KINDS if kind in section]
    if len(kinds) != 1:
        raise ValueError(f"{where} is {dict(section)!r:.200}; expected one of {', '.join(KINDS)}.")
    check_keys(section, [kinds[0], *KINDS[kinds[0]], *shared], where)
    for key, annotation in _TYPES.items():
        if key in section:
            check_type(section[key], annotation, f"`{key}` in {where}")
    if kinds[0] == "scenes":
        check_arguments(section["scenes"], SceneDataset, f"`scenes` in {where}")
    weight = section.get("weight", 1)
    if not 0 <= weight < math.inf:
        raise ValueError(f"`weight` in {where} is {weight}; expected 0 or more.")
    if "columns" in section:
        check_keys(section["columns"], COLUMNS, f"`columns` in {where}")
        check_type(section["columns"], dict[str, str | None], f"`columns` in {where}")


def open_source(section: Mapping[str, Any]) -> Source:
    """
    The data of a section of a recipe: one kind of data, and `columns`, for a column of ours the name it has there.

    | kind | what it is |
    |---|---|
    | `scenes: {seed: ..., count: ...}` | arguments of [`SceneDataset`] |
    | `folder: PATH` | an image folder, see [`mmgem.training.data.image_folder.read_image_folder`] |
    | `parquet: PATTERN` | tables, see [`mmgem.training.data.tables.open_parquet`] |
    | `dataset: NAME`, `name`, `split`, `streaming` | see [`mmgem.training.data.tables.open_dataset`] |
    | `webdataset: PATTERN` | tar files, see [`mmgem.training.data.shards.ShardSource`] |

    Returns:
        A source with a length, unless it is a stream.

    Raises:
        FileNotFoundError, ValueError: if the section or the data cannot be used, or its columns are not those meant.
    """
    check_section(section, "data section")
    columns = section.get("columns")
    if "scenes" in section:
        return DatasetSource(SceneDataset(**section["scenes"]), f"scenes-{section['scenes']['seed']}", columns)
    if "folder" in section:
        return FolderSource(section["folder"], columns)
    if "webdataset" in section:
        from mmgem.training.data.shards import ShardSource

        return ShardSource(section["webdataset"], columns)
    from mmgem.training.data.tables import open_dataset, open_parquet  # slow to import

    if "parquet" in section:
        return open_parquet(section["parquet"], columns)
    options = {key: section[key] for key in KINDS["dataset"] if key in section}
    return open_dataset(section["dataset"], columns=columns, **options)


def load_rows(section: Mapping[str, Any]) -> Dataset:
    """
    The rows of a section in order, each once, for evaluation: nothing is skipped.

    Returns:
        Rows by number; of a stream, an iterable of rows. A row that cannot be used raises when it is read, those of an
        image folder all at once here.

    Raises:
        FileNotFoundError, ValueError: as for `open_source`.
    """
    check_section(section, "data section")
    if "folder" in section:
        return read_image_folder(section["folder"], section.get("columns"))
    return open_source(section)
