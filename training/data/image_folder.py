"""Image folders with a `metadata.jsonl` or `.csv`: the data of users, and scenes once they are written."""

import hashlib
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from mmgem.processing.image_loading import load_image
from mmgem.training.data.folder_metadata import columns_of, find_metadata, read_metadata
from mmgem.training.data.paths import inside
from mmgem.training.data.rows import (
    CAPTION_COLUMNS,
    ID_COLUMNS,
    TEXT_COLUMNS,
    ColumnName,
    check_columns,
    edited_file_of,
    map_columns,
    names_of,
)
from mmgem.training.data.sources import Source


class ImageFolderDataset(Dataset):
    """Rows of an image folder; an image is opened when its row is asked for. Made by `read_image_folder`.

    Args:
        folder: Where the images are.
        rows: For each row its fields, `file_name` among them.

    Attributes:
        shorter_side: How far images of rows without boxes may be scaled down, see `load_image`.
    """

    shorter_side: int | None = None

    def __init__(self, folder: Path, rows: list[dict[str, Any]]):
        self.folder = folder
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        fields = self.rows[row]
        files = {"image": fields["file_name"], "edited_image": fields.get("edited_image")}
        side = None if fields.get("boxes") else self.shorter_side
        images = {
            name: load_image(self.folder / file, file, shorter_side=side) for name, file in files.items() if file
        }
        return fields | images


def read_image_folder(
    path: str | Path,
    columns: Mapping[str, ColumnName] | None = None,
    allow_outside_paths: bool = False,
    subset: Sequence[float] | None = None,
) -> ImageFolderDataset:
    """Read an image folder in the layout of `datasets`' imagefolder, and checks all of it.

    Its `metadata.jsonl` has one JSON object a line: `file_name`, relative to the folder, and `captions` (a list) or
    `caption` or `text` (one caption), or texts of another kind (`TEXT_COLUMNS`), besides any other columns of
    `SceneDataset`. Or it is a `metadata.csv` with a line of column names; lists in its cells are JSON.

    Args:
        path: The folder.
        columns: For a column of ours the name it has in the metadata.
        allow_outside_paths: Whether `file_name` may lead out of the folder.
        subset: The lines to read, see [`FolderSource`]; by default all.

    Returns:
        Rows with `image` (PIL, RGB, upright), the fields of the line, and `captions` in any case, of which there may
        be none. Beside an `edit`, `edited_image` is the image of its `file_name`, or None.

    Raises:
        FileNotFoundError: If the folder, its metadata, or an image that is named there, an edited one included, is not
            there.
        ValueError: If `path` is no folder, has no images, or a line of the metadata cannot be used; for a `subset`
            that [`FolderSource`] refuses.
    """
    metadata = find_metadata(path)
    lines = _in_subset(list(read_metadata(metadata)), subset, columns or {})
    if columns:
        check_columns(columns_of(lines), columns, str(metadata))
    rows = []
    for where, fields in lines:
        if isinstance(fields, str):
            raise ValueError(fields)
        fields = _check_fields(fields, columns or {}, where)
        for file in (fields["file_name"], fields.get("edited_image")):
            if (
                file is not None
                and not (metadata.parent / (file if allow_outside_paths else inside(file, where))).is_file()
            ):
                raise FileNotFoundError(
                    f"{where} names {file}, which is not in {metadata.parent}; expected an image file."
                )
        rows.append(fields)
    return ImageFolderDataset(metadata.parent, rows)


def _in_subset(
    lines: list[tuple[str, dict[str, Any] | str]], subset: Sequence[float] | None, columns: Mapping[str, ColumnName]
) -> list[tuple[str, dict[str, Any] | str]]:
    """Those lines whose id hashes to a number in the subset; see [`FolderSource`]."""
    if subset is None:
        return lines
    if len(subset) != 2 or not 0 <= subset[0] < subset[1] <= 1:
        raise ValueError(f"`subset` is {list(subset)}; expected two rising numbers from 0 to 1.")
    low, high = subset
    names = [*(theirs for name in ID_COLUMNS for theirs in names_of(columns.get(name, name))), "image"]

    def number_of(where: str, fields: dict[str, Any] | str) -> float:
        ids = [] if isinstance(fields, str) else [fields[name] for name in names if fields.get(name) is not None]
        name = str(ids[0] if ids else where.partition(" of ")[0])
        digest = hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=6).digest()
        return int.from_bytes(digest, "big") / 2**48  # exactly, and below 1

    kept = [line for line in lines if low <= number_of(*line) < high]
    if not kept:
        raise ValueError(f"`subset` is {list(subset)}, in which none of {len(lines)} rows lies; expected a wider one.")
    return kept


def _check_fields(fields: dict[str, Any], columns: Mapping[str, ColumnName], where: str) -> dict[str, Any]:
    fields = map_columns(fields, columns, where)
    if isinstance(fields.get("image"), str):
        fields["file_name"] = fields.pop("image")
    if not isinstance(fields.get("file_name"), str):
        raise ValueError(f"{where} is {fields!r:.80}; expected a JSON object with a `file_name`.")
    if fields.get("edit") is not None and not isinstance(fields["edit"], dict):
        raise ValueError(f"{where} has `edit` {fields['edit']!r:.80}; expected an object with an `instruction`.")
    if "edit" in fields and "edited_image" not in {*fields, *columns}:
        fields["edited_image"] = edited_file_of(fields)
    if not isinstance(fields.get("edited_image"), str | None):
        raise ValueError(f"{where} has `edited_image` {fields['edited_image']!r:.80}; expected the name of a file.")
    captions = next((fields[column] for column in CAPTION_COLUMNS if fields.get(column)), None)
    captions = [captions] if isinstance(captions, str) else captions
    if captions is None and any(fields.get(column) for column in TEXT_COLUMNS):
        captions = []
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"{where} has `captions` {captions!r:.80}; expected a list of strings, or `text`, a string.")
    fields = {column: value for column, value in fields.items() if column not in CAPTION_COLUMNS}
    if fields.get("edit") and fields["edit"].get("instruction") is None:
        fields["edit"] = None  # see `write_scene_folder`
    return {**fields, "captions": captions}


class FolderSource(Source):
    """An image folder, as for [`read_image_folder`], in which single lines may be wrong: reading those raises.

    A row with an `edit` has the image of its `file_name` as `edited_image`, unless `columns` says there is none.

    A subset holds out images: `[0, 0.9]` has those whose id (`image_id`, or `scene_id` or `file_name`) hashes to a
    number of the first nine tenths, `[0.9, 1]` all others. Rows of one id are never apart, and nothing else decides.

    Args:
        path: The folder.
        columns: As for `Source`.
        subset: Where the numbers begin and where they end, 0 to 1; by default all rows are there.

    Raises:
        FileNotFoundError, ValueError: If there is no folder with metadata, or its columns are not those meant; if
            `subset` is not two rising numbers, or nothing lies in it.
    """

    def __init__(
        self, path: str, columns: Mapping[str, ColumnName] | None = None, subset: Sequence[float] | None = None
    ):
        super().__init__(str(path), columns, path)
        import pyarrow as pa

        self.subset = subset
        lines = _in_subset(list(read_metadata(find_metadata(path))), subset, self.columns)
        check_columns(columns_of(lines), self.columns, self.name)
        # One object: to look at one of many copies the page that it lies in, of the memory that workers share.
        self._lines = pa.array(map(pickle.dumps, lines), pa.large_binary())

    def __len__(self) -> int:
        return len(self._lines)

    def checked(self) -> ImageFolderDataset:
        return read_image_folder(self.folder, self.columns, self.allow_outside_paths, self.subset)

    def _line(self, index: int) -> tuple[str, dict[str, Any] | str]:
        return pickle.loads(self._lines[index].as_buffer())

    def key(self, index: int) -> str:
        where, _ = self._line(index)
        return where.partition(" of ")[0]

    def fields(self, index: int) -> dict[str, Any]:
        _, fields = self._line(index)
        if isinstance(fields, str):
            raise ValueError(fields)
        return fields

    def texts(self, index: int) -> dict[str, Any]:
        row = super().texts(index)
        if "edited_image" not in {*row, *self.columns} and (file := edited_file_of(row)) is not None:
            row["edited_image"] = file
        return row


def open_folder(
    folder: str, columns: Mapping[str, ColumnName] | None = None, subset: list[float | int] | None = None
) -> FolderSource:
    """Open the data section `folder: PATH`; see [`FolderSource`]."""
    return FolderSource(folder, columns, subset)
