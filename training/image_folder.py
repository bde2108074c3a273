"""Image folders with a `metadata.jsonl`: the data of users, and scenes once they are written."""

import json
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from mmgem.processing.image_loading import load_image

METADATA_NAME = "metadata.jsonl"


class ImageFolderDataset(Dataset):
    """Rows of an image folder; an image is opened when its row is asked for. Made by `read_image_folder`.

    Args:
        folder: Where the images are.
        rows: For each row its fields, `file_name` among them.
    """

    def __init__(self, folder: Path, rows: list[dict[str, Any]]):
        self.folder = folder
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        fields = self.rows[row]
        return {"image": load_image(self.folder / fields["file_name"], fields["file_name"]), **fields}


def read_image_folder(path: str | Path) -> ImageFolderDataset:
    """Reads an image folder in the layout of `datasets`' imagefolder.

    Its `metadata.jsonl` has one JSON object a line: `file_name`, relative to the folder, and `captions` (a list) or
    `text` (one caption), besides any other columns of `SceneDataset`.

    Args:
        path: The folder.

    Returns:
        Rows with `image` (PIL, RGB, upright), the fields of the line, and `captions` in any case.

    Raises:
        FileNotFoundError: If the folder, its `metadata.jsonl`, or an image that is named there is not there.
        ValueError: If `path` is no folder, has no images, or a line of the metadata cannot be used.
    """
    folder = Path(path)
    if not folder.exists():
        raise FileNotFoundError(f"path must be an image folder, but there is nothing at {folder}")
    if not folder.is_dir():
        raise ValueError(f"path must be an image folder, got the file {folder}")
    metadata = folder / METADATA_NAME
    if not metadata.is_file():
        known = Image.registered_extensions()
        count = sum(file.suffix.lower() in known for file in folder.rglob("*"))
        if not count:
            raise ValueError(f"path must be an image folder, but there are no images in {folder}")
        raise FileNotFoundError(
            f"{folder} has {count} images but no {METADATA_NAME}; expected one with a JSON object a line, such as "
            '{"file_name": "a.png", "captions": ["..."]}'
        )
    rows = []
    with open(metadata, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                rows.append(_read_fields(line, folder, f"line {number} of {metadata}"))
    if not rows:
        raise ValueError(f"path must be an image folder with images, but {metadata} names none")
    return ImageFolderDataset(folder, rows)


def _read_fields(line: str, folder: Path, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} must be a JSON object: {error}") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("file_name"), str):
        raise ValueError(f"{where} must be a JSON object with a `file_name`, got {line.strip()[:80]}")
    if not (folder / fields["file_name"]).is_file():
        raise FileNotFoundError(f"{where} names {fields['file_name']}, which is not in {folder}")
    captions = fields.pop("captions", None) or fields.pop("text", None)
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"{where} must have `captions`, a list of strings, or `text`, a string; got {captions!r:.80}")
    if isinstance(fields.get("edit"), dict) and fields["edit"].get("instruction") is None:
        fields["edit"] = None  # see `write_scene_folder`
    return {**fields, "captions": captions}
