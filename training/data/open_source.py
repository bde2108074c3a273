"""The data of a section of a recipe: one kind of data, checked and opened."""

import inspect
import math
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, get_type_hints

from torch.utils.data import Dataset

from mmgem.training.argument_checks import check_arguments, check_keys, check_type
from mmgem.training.data.rows import COLUMNS
from mmgem.training.data.sources import Source

# For each kind of data the function that opens it, in a module that is imported only when it is needed. Its parameters
# are the keys of a section: that of the kind, its options, and `columns`, which every kind has.
KINDS = {
    "scenes": "mmgem.training.scenes.dataset:open_scenes",
    "folder": "mmgem.training.data.image_folder:open_folder",
    "parquet": "mmgem.training.data.tables:open_parquet",
    "dataset": "mmgem.training.data.tables:open_dataset",
    "webdataset": "mmgem.training.data.shards:open_webdataset",
}


# What rows, which others may have written, are allowed beside the files of the data.
SAFETY = ("allow_urls", "allow_outside_paths")


def check_section(section: object, where: str) -> None:
    """Refuse a data section that cannot be used, before anything is read.

    Args:
        section: The section as read from the recipe.
        where: The name of the section in error messages.

    Raises:
        ValueError: If a key is unknown (the nearest known one is named), there is more or less than one kind of data,
            a value has a wrong type, a weight is below 0, or nothing reads a column.
    """
    if not isinstance(section, Mapping):
        check_keys(section, KINDS, where)
    assert isinstance(section, Mapping)
    kinds = [kind for kind in KINDS if kind in section]
    keys = [key for kind in kinds or KINDS for key in inspect.signature(_opener(kind)).parameters]
    check_keys(section, dict.fromkeys([*keys, "prompt_name", "weight", *SAFETY]), where)
    if len(kinds) != 1:
        raise ValueError(f"{where} is {dict(section)!r:.200}; expected one of {', '.join(KINDS)}.")
    arguments, opener = dict(section), _opener(kinds[0])
    if arguments[kinds[0]] == "":
        raise ValueError(f"`{kinds[0]}` in {where} is ''; expected where the data are.")
    weight, columns = arguments.pop("weight", 1), arguments.pop("columns", {})
    check_type(arguments.pop("allow_urls", False), bool | list[str], f"`allow_urls` in {where}")
    check_type(arguments.pop("allow_outside_paths", False), bool, f"`allow_outside_paths` in {where}")
    check_type(arguments.pop("prompt_name", None), str | None, f"`prompt_name` in {where}")
    check_type(weight, float, f"`weight` in {where}")
    if not 0 <= weight < math.inf:
        raise ValueError(f"`weight` in {where} is {weight}; expected 0 or more.")
    check_keys(columns, COLUMNS, f"`columns` in {where}")
    check_type(columns, dict[str, str | list[str] | None], f"`columns` in {where}")
    given = ["columns"]
    if (made := _class_of(opener, kinds[0])) is not None:
        check_arguments(arguments.pop(kinds[0]), made, f"`{kinds[0]}` in {where}")
        given.append(kinds[0])
    check_arguments(arguments, opener, where, given)


def open_source(section: Mapping[str, Any]) -> Source:
    """Open the data of a section of a recipe.

    A section has one kind of data. It may have `columns`, for a column of ours the name it has there, or a list of
    several (`queries: [captions_de, captions_zh]`), and `prompt_name`, the model's prompt that stands before the texts
    of its rows where they are embedded. Images are fetched from URLs only with `allow_urls: true` or a list of hosts,
    and read out of the folder of the data only with `allow_outside_paths: true`.

    | kind | data |
    |---|---|
    | `scenes: {seed: ..., count: ...}` | arguments of [`mmgem.training.scenes.dataset.SceneDataset`] |
    | `folder: PATH`, `subset: [0, 0.9]` | see [`mmgem.training.data.image_folder.FolderSource`] |
    | `parquet: PATTERN` | tables, see [`mmgem.training.data.tables.open_parquet`] |
    | `dataset: NAME`, `name`, `split`, `streaming`, `data_files` | see [`mmgem.training.data.tables.open_dataset`] |
    | `webdataset: PATTERN` | tar files, see [`mmgem.training.data.shards.ShardSource`] |

    Args:
        section: The section as read from the recipe.

    Returns:
        A source with a length, unless it is a stream.

    Raises:
        FileNotFoundError, ValueError: If the section or the data cannot be used, or its columns are not those meant.
    """
    check_section(section, "data section")
    kind = next(kind for kind in KINDS if kind in section)
    arguments = {key: value for key, value in section.items() if key not in ("prompt_name", "weight", *SAFETY)}
    opener = _opener(kind)
    if (made := _class_of(opener, kind)) is not None:
        arguments[kind] = made(**arguments[kind])
    source = opener(**arguments)
    source.prompt_name = section.get("prompt_name")
    for name in SAFETY:
        setattr(source, name, section.get(name, getattr(source, name)))
    return source


def load_rows(section: Mapping[str, Any]) -> Dataset:
    """Open the rows of a section in order, each once, for evaluation: nothing is skipped.

    Args:
        section: As for `open_source`.

    Returns:
        Rows by number; of a stream, an iterable of rows. A row that cannot be used raises when it is read, those of an
        image folder all at once here.

    Raises:
        FileNotFoundError, ValueError: As for `open_source`.
    """
    return open_source(section).checked()


def _opener(kind: str) -> Callable[..., Source]:
    module, _, name = KINDS[kind].partition(":")
    return getattr(import_module(module), name)


def _class_of(opener: Callable, kind: str) -> type | None:
    """The class that an opener takes for its kind, of which the section then has the arguments; None for a value."""
    annotation = get_type_hints(opener)[kind]
    return annotation if inspect.isclass(annotation) and annotation.__module__ != "builtins" else None
