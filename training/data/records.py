"""Files of records: JSON lines, CSV, and Parquet, read one record at a time."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmgem.training.json_text import from_json

RECORD_SUFFIXES = (".csv", ".jsonl", ".parquet")

Record = tuple[int, dict[str, Any] | str]  # its line, or in Parquet its row, from 1; its fields, or why it has none


def read_records(file: Path) -> Iterator[Record]:
    """Read a file of records as a stream, by its ending; a line that is broken is an error of its own.

    Args:
        file: A `.jsonl`, a `.csv` with a line of column names (lists in its cells are JSON), or a `.parquet`.

    Yields:
        The number of the record, and its fields, or the error as the end of a sentence that begins with its name.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it as a whole is not what its ending says.
    """
    readers = {".csv": _read_csv, ".jsonl": _read_json_lines, ".parquet": _read_parquet}
    if file.suffix.lower() not in readers:
        raise ValueError(f"{file} ends in {file.suffix!r}; expected one of {', '.join(RECORD_SUFFIXES)}.")
    return readers[file.suffix.lower()](file)


def _read_json_lines(file: Path) -> Iterator[Record]:
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                fields = from_json(line.decode("utf-8-sig"))
            except ValueError as error:
                yield number, f"is no JSON object; expected one: {error}"
                continue
            if isinstance(fields, dict):
                yield number, fields
            else:
                yield number, f"is {line.strip()[:80]!r}; expected a JSON object."


def _read_csv(file: Path) -> Iterator[Record]:
    with open(file, encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, restkey="", strict=True)  # a quotation that has no end would take all lines
        try:
            names = reader.fieldnames or ()
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"{file} has the column {twice[0]!r} twice; expected names of their own.")
            for fields in reader:
                if "" in fields or None in fields.values():
                    yield (
                        reader.line_num,
                        f"has the cells {list(fields.values())}; expected {len(reader.fieldnames or ())}.",
                    )
                else:
                    yield reader.line_num, {name: _read_cell(cell) for name, cell in fields.items() if cell}
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{file} cannot be read; expected comma-separated UTF-8 text: {error}") from error


def _read_parquet(file: Path) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            # Pictures and other binary data, which may be large, are no fields of a record.
            names = [field.name for field in table.schema_arrow if not _is_binary(field.type)]
            number = 0
            for batch in table.iter_batches(batch_size=1024, columns=names):
                for fields in batch.to_pylist():
                    number += 1
                    yield number, fields
    except pa.ArrowException as error:
        raise ValueError(f"{file} cannot be read; expected a Parquet file: {error}") from error


def _is_binary(kind) -> bool:
    import pyarrow as pa

    if pa.types.is_nested(kind):
        return any(_is_binary(kind.field(number).type) for number in range(kind.num_fields))
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)


def _read_cell(cell: str) -> Any:
    """A list or mapping where a cell holds one as JSON, else its text."""
    if cell[0] in "[{":
        try:
            return from_json(cell)
        except ValueError:
            pass
    return cell
