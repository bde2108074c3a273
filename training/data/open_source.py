"""The data of a section of a recipe: one kind of data, checked and opened."""

import math
from collections.abc import Mapping
from typing import Any

from torch.utils.data import Dataset

from mmgem.training.argument_checks import check_arguments, check_keys, check_type
from mmgem.training.data.image_folder import FolderSource, read_image_folder
from mmgem.training.data.rows import COLUMNS
from mmgem.training.data.sources import DatasetSource, Source
from mmgem.training.scenes.dataset import SceneDataset

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
