"""Tables as sources: parquet files, and whatever `datasets` can load."""

import os
from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmgem.training.data.paths import expand_paths
from mmgem.training.data.rows import ColumnName, check_columns
from mmgem.training.data.sources import Source
from mmgem.training.data.streams import StreamSource, named_classes

if TYPE_CHECKING:  # slow to import, and not needed to check a recipe
    import datasets


class TableSource(Source):
    """The rows of a `datasets.Dataset`, which stays on disk; images are decoded when their row is read.

    Args:
        table: The data.
        name, columns: As for `Source`.
        files: The files that the table comes from, each with its number of rows, in order; paths of images are
            relative to the file of their row.

    Raises:
        ValueError: If it is empty, or its columns are not those meant.
    """

    def __init__(
        self,
        table: "datasets.Dataset",
        name: str,
        columns: Mapping[str, ColumnName] | None = None,
        files: Mapping[str, int] | None = None,
    ):
        super().__init__(name, columns)
        if not len(table):
            raise ValueError(f"{name} has no rows; expected at least one.")
        check_columns(table.column_names, self.columns, name)
        self._features = table.features
        self._table = table.with_format("arrow")
        self._paths = list(files or {})
        self._firsts = list(accumulate((files or {}).values(), initial=0))[:-1]

    def __len__(self) -> int:
        return len(self._table)

    def key(self, index: int) -> str:
        if not self._paths:
            return str(index)
        file = bisect_right(self._firsts, index) - 1
        return f"{Path(self._paths[file]).name}/{index - self._firsts[file]}"

    def fields(self, index: int) -> dict[str, Any]:
        (fields,) = self._table[index].to_pylist()
        return named_classes(fields, self._features)

    def folder_of(self, index: int) -> Path:
        if not self._paths:
            return self.folder
        return Path(self._paths[bisect_right(self._firsts, index) - 1]).parent


def open_parquet(parquet: str | list[str], columns: Mapping[str, ColumnName] | None = None) -> TableSource:
    """The rows of parquet files, which `datasets` first writes to its cache in a form of which any row can be read.

    Images are bytes, `{"bytes", "path"}`, or paths relative to their file. A damaged file is named in `damaged`.

    Args:
        parquet: The files, see `expand_paths`.
        columns: As for `Source`.

    Raises:
        FileNotFoundError: If there are none.
        ValueError: If none can be read or has rows, they do not have the same columns, or not those meant.
    """
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    name = parquet if isinstance(parquet, str) else ",".join(parquet)
    files: dict[str, int] = {}
    damaged: list[tuple[str, str]] = []

    def check(path: str, whole: bool) -> None:
        try:
            with pq.ParquetFile(path) as file:
                if file.metadata.num_rows:  # of others, which jobs of many parts write, `datasets` makes an error
                    files[path] = file.metadata.num_rows
                for _ in file.iter_batches() if whole else ():
                    pass
        except (pa.ArrowException, OSError) as error:
            files.pop(path, None)
            damaged.append((Path(path).name, str(error)))

    def load() -> datasets.Dataset:
        if not files and not damaged:
            raise ValueError(f"{name} has no rows; expected some.")
        if not files:
            raise ValueError(f"{name} cannot be read: {'; '.join(f'{file}: {reason}' for file, reason in damaged)}")
        paths = [os.path.abspath(path) for path in files]
        return datasets.load_dataset("parquet", data_files=paths, split="train")

    for path in expand_paths(parquet, "`parquet`"):
        check(path, whole=False)
    try:
        table = load()
    except datasets.exceptions.DatasetGenerationError:
        for path in list(files):
            check(path, whole=True)
        try:
            table = load()
        except datasets.exceptions.DatasetGenerationError as error:
            raise ValueError(f"{name} cannot be read: {error.__cause__ or error}") from error
    source = TableSource(table, name, columns, files)
    source.damaged += damaged
    return source


def open_dataset(
    dataset: str,
    name: str | None = None,
    split: str = "train",
    streaming: bool = False,
    data_files: str | list[str] | None = None,
    columns: Mapping[str, ColumnName] | None = None,
) -> Source:
    """The rows that `datasets.load_dataset` loads, or `save_to_disk` has written.

    Args:
        dataset: Name on the Hub, or folder.
        name: Of the configuration.
        split: Of the data.
        streaming: Whether to read rows as they come, instead of preparing all of them first; see [`StreamSource`].
        data_files: The files to read where `dataset` is a format, such as `text`, whose lines are rows.
        columns: As for `Source`.

    Raises:
        FileNotFoundError, ValueError: If there is no such data, or its columns are not those meant.
    """
    import datasets

    if any(os.path.isfile(os.path.join(dataset, file)) for file in ("state.json", "dataset_dict.json")):
        data = datasets.load_from_disk(dataset)
        if isinstance(data, datasets.DatasetDict):
            if split not in data:
                raise ValueError(f"`split` of {dataset} is {split!r}; expected one of {', '.join(data)}.")
            data = data[split]
        if streaming:
            data = data.to_iterable_dataset()
    else:
        data = datasets.load_dataset(dataset, name, data_files=data_files, split=split, streaming=streaming)
    source = StreamSource(data, dataset, columns) if streaming else TableSource(data, dataset, columns)
    source.allow_outside_paths = True  # the library has prepared them, and gives files by absolute paths
    return source
