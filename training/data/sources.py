"""Sources of rows: the base of all kinds of data, and any data set as a source."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from mmgem.processing.boxes import check_boxes
from mmgem.processing.image_loading import load_image
from mmgem.processing.url_fetching import AllowedURLs, is_url
from mmgem.training.data.paths import inside
from mmgem.training.data.permutation import hash_numbers, permute
from mmgem.training.data.rows import (
    CAPTION_COLUMNS,
    COLUMNS,
    ColumnName,
    captions_of,
    check_columns,
    check_row,
    images_of,
    map_columns,
)


class Source(Dataset):
    """Rows of one kind of data, any of which can be read at any time; each is read and checked when it is asked for.

    A row has the columns of [`MMGEMCollator`], and no others: captions always as a list in `captions`, images as PIL
    images, RGB and upright, in `image` (or `images`) and `edited_image`. An image may be stored as whatever
    `load_image` takes, as `{"bytes", "path"}`, or only as the path in `file_name`.

    Args:
        name: What logs call it.
        columns: For a column of ours the name it has in the data, or None to say that there is none.
        folder: What paths of images are relative to.

    Attributes:
        damaged: Parts of the data that cannot be read at all, each with the reason.
        prompt_name: Name of the model's prompt that the rows have where they name none themselves, or None.
        shorter_side: How far images of rows without boxes may be scaled down, see `load_image`.
        allow_urls: Whether images are fetched from URLs, see `load_image`.
        allow_outside_paths: Whether paths of images may lead out of the folder that they are relative to.
    """

    shorter_side: int | None = None
    allow_urls: AllowedURLs = False
    allow_outside_paths: bool = False

    def __init__(self, name: str, columns: Mapping[str, ColumnName] | None = None, folder: str | Path = ""):
        self.name = name
        self.columns = dict(columns or {})
        self.folder = Path(folder)
        self.damaged: list[tuple[str, str]] = []
        self.prompt_name: str | None = None

    def fields(self, index: int) -> dict[str, Any]:
        """A row as it is stored."""
        raise NotImplementedError

    def key(self, index: int) -> str:
        """The name of a row in logs."""
        return str(index)

    @property
    def block_size(self) -> int:
        """Rows that are shuffled together: all."""
        return len(self)  # type: ignore[arg-type]

    def order(self, block: int, place: int, seed: int) -> int:
        """The row at a place, in [0, block_size), of a block of rows in random order, here of an epoch."""
        return permute(place, self.block_size, hash_numbers(seed, block))

    def shuffled(self, seed: int) -> "Source":
        """The source with everything in random order that `order` cannot shuffle: itself."""
        return self

    def part(self, number: int, count: int, bookmarks: Path | None = None) -> "Source":
        """The rows of one of several readers, see [`StreamSource`]: all, since any row can be read at any time."""
        return self

    def checked(self) -> Dataset:
        """The rows for evaluation, of which none may be left out: by default as they are, each checked when read.

        Raises:
            FileNotFoundError, ValueError: If a row that can be checked now cannot be used.
        """
        return self

    def texts(self, index: int) -> dict[str, Any]:
        """A row whose images are not loaded yet.

        Raises:
            ValueError: If it is damaged, lacks a column that was named, or cannot be trained (see `check_row`).
        """
        name = self._row_name(index)
        row = map_columns(self.fields(index), self.columns, name)
        if row.get("image") is None and not row.get("images") and "image" not in self.columns:
            row["image"] = row.get("file_name")
        check_row(row, name)
        row["captions"] = captions_of(row) or None
        if row.get("prompt_name") is None:
            row["prompt_name"] = self.prompt_name
        kept = [column for column in COLUMNS if column == "captions" or column not in CAPTION_COLUMNS]
        return {column: row[column] for column in kept if row.get(column) is not None}

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A row with its images.

        Raises:
            FileNotFoundError, ValueError: As for `texts`, and if an image cannot be read or a box is not in it.
        """
        row = self.texts(index)
        shorter_side = None if row.get("boxes") else self.shorter_side
        images = [self._load_image(image, index, shorter_side) for image in images_of(row)]
        if row.get("boxes"):
            check_boxes([row["boxes"]], [images[0].size])
        if row.get("images"):
            row["images"] = images
        elif images:
            row["image"] = images[0]
        if "edited_image" in row:
            row["edited_image"] = self._load_image(row["edited_image"], index, shorter_side)
        return row

    def folder_of(self, index: int) -> Path:
        """The folder that the paths of images in a row are relative to."""
        return self.folder

    def _row_name(self, index: int) -> str:
        return f"row {f'{self.name}:{self.key(index)}'!r}"

    def _load_image(self, image: Any, index: int, shorter_side: int | None) -> Image.Image:
        name = f"image of {self._row_name(index)}"
        if isinstance(image, Mapping):
            path = image.get("path")
            image, name = (path, name) if image.get("bytes") is None else (image["bytes"], f"{name} ({path})")
        if isinstance(image, str) and not is_url(image) and not image.startswith("data:"):
            image = self.folder_of(index) / (image if self.allow_outside_paths else inside(image, name))
        return load_image(image, name, shorter_side=shorter_side, allow_urls=self.allow_urls)


class DatasetSource(Source):
    """Any data set whose rows are mappings, and can be asked for by number, as a source.

    The rows are the caller's own: their paths may lead anywhere.

    Args:
        dataset: Rows by number, such as a list.
        name, columns, folder: As for `Source`.

    Raises:
        ValueError: If there are no rows, or their columns are not those meant.
    """

    allow_outside_paths = True

    def __init__(self, dataset, name: str = "data", columns: Mapping[str, ColumnName] | None = None, folder=""):
        super().__init__(name, columns, folder)
        self.dataset = dataset
        if not len(dataset):
            raise ValueError(f"{name} has no rows; expected at least one.")
        check_columns(dataset[0], self.columns, name)

    def __len__(self) -> int:
        return len(self.dataset)

    def fields(self, index: int) -> dict[str, Any]:
        return self.dataset[index]
