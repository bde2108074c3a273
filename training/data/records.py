"""Files of records: JSON lines, CSV, and Parquet, read one record at a time."""

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from mmgem.training.json_text import from_json

RECORD_SUFFIXES = (".csv", ".jsonl", ".parquet")
LONGEST_LINE = 1 << 26  # bytes that are read into memory as one record

Record = tuple[int, dict[str, Any] | str]  # its line, or in Parquet its row, from 1; its fields, or why it has none


def read_records(file: Path) -> Iterator[Record]:
    """Read a file of records as a stream, by its ending; a line that is broken is an error of its own.

    Args:
        file: A `.jsonl`, a `.csv` with a line of column names (lists in its cells are JSON; what stands in a column
            without a name is left out), or a `.parquet`.

    Yields:
        The number of the record, and its fields, or the error as the end of a sentence that begins with its name.

    Raises:
        OSError: If the file cannot be read; it names the file.
        ValueError: If it as a whole is not what its ending says.
    """
    readers = {".csv": _read_csv, ".jsonl": _read_json_lines, ".parquet": _read_parquet}
    if file.suffix.lower() not in readers:
        raise ValueError(f"{file} ends in {file.suffix!r}; expected one of {', '.join(RECORD_SUFFIXES)}.")
    return _naming(file, readers[file.suffix.lower()](file))


def _naming(file: Path, records: Iterator[Record]) -> Iterator[Record]:
    """The records; an error of the system while the file is open, which does not name it, does."""
    try:
        yield from records
    except OSError as error:
        error.filename = error.filename or str(file)
        raise


def _read_json_lines(file: Path) -> Iterator[Record]:
    with open(file, "rb") as lines:
        for number, line in enumerate(_lines(lines), start=1):
            if line is None:
                yield number, f"has more than {LONGEST_LINE:,} bytes; expected a JSON object."
                continue
            if not line.strip():
                continue
            try:
                fields = from_json(line.decode("utf-8-sig"))
            except json.JSONDecodeError as error:  # whose own line is 1
                yield number, f"is no JSON object; expected one: {error.msg}, at column {error.colno}"
                continue
            except ValueError as error:
                yield number, f"is no JSON object; expected one: {error}"
                continue
            if isinstance(fields, dict):
                yield number, fields
            else:
                yield number, f"is {line.strip()[:80]!r}; expected a JSON object."


def _lines(file: BinaryIO) -> Iterator[bytes | None]:
    """The lines of a file; None for one that is too long to be kept in memory."""
    while line := file.readline(LONGEST_LINE + 1):
        is_too_long = len(line) > LONGEST_LINE
        while is_too_long and line and not line.endswith(b"\n"):
            line = file.readline(LONGEST_LINE)
        yield None if is_too_long else line


def _read_csv(file: Path) -> Iterator[Record]:
    csv.field_size_limit(LONGEST_LINE)  # by default 128 KiB, which texts may exceed
    with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        reader = csv.DictReader(_csv_lines(lines), strict=True)  # a quotation that has no end would take all lines
        try:
            names = list(reader.fieldnames or ())
            if reader.fieldnames is not None and not any(names):
                raise ValueError(f"{file} has no names of columns in its first line; expected one or more.")
            if not _is_utf8(names):
                raise ValueError(f"{file} has the columns {ascii(names):.80}; expected UTF-8 text.")
            if twice := [name for name in names if name and names.count(name) > 1]:
                raise ValueError(f"{file} has the column {twice[0]!r} twice; expected names of their own.")
            for fields in reader:
                extra = list(fields.pop(None, ()))  # type: ignore[call-overload]
                cells = [cell for cell in fields.values() if cell is not None] + extra
                if extra or len(cells) < len(fields):
                    yield reader.line_num, f"has the cells {cells!r:.200}; expected {len(names)}."
                elif not _is_utf8(cells):
                    yield reader.line_num, f"has the cells {ascii(cells):.200}; expected UTF-8 text."
                else:  # pandas writes the numbers of its rows into a column without a name
                    yield reader.line_num, {name: _read_cell(cell) for name, cell in fields.items() if name and cell}
        except csv.Error as error:
            raise ValueError(
                f"{file} cannot be read from line {reader.line_num} on; expected comma-separated text: {error}."
            ) from error


def _csv_lines(file: TextIO) -> Iterator[str]:
    while line := file.readline(LONGEST_LINE + 1):
        if len(line) > LONGEST_LINE:
            raise csv.Error(f"the next line has more than {LONGEST_LINE:,} characters")
        yield line


def _is_utf8(texts: Iterable[str]) -> bool:
    """Whether texts that were read with "surrogateescape" have no bytes that are no UTF-8."""
    try:
        return all(text.encode() is not None for text in texts)
    except UnicodeEncodeError:
        return False


def _read_parquet(file: Path) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            names = table.schema_arrow.names
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"{file} has the column {twice[0]!r} twice; expected names of their own.")
            # Pictures and other binary data, which may be large, are no fields of a record.
            names = [field.name for field in table.schema_arrow if not _is_binary(field.type)]
            number = 0
            for batch in table.iter_batches(batch_size=1024, columns=names):
                for fields in _fields_of(batch):
                    number += 1
                    yield number, fields
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # it cannot be read now, and is not said to be damaged
            raise
        raise ValueError(f"{file} cannot be read; expected a Parquet file: {error}") from error


def _fields_of(batch) -> list[dict[str, Any] | str]:
    """The rows of a batch; one that has what Python cannot have, such as a day after the year 9999, costs itself."""
    try:
        return batch.to_pylist()
    except (ArithmeticError, LookupError, ValueError) as error:
        if len(batch) == 1:
            return [f"cannot be read: {type(error).__name__}, {error}."]
        return [fields for row in range(len(batch)) for fields in _fields_of(batch.slice(row, 1))]


def _is_binary(kind) -> bool:
    import pyarrow as pa

    if isinstance(kind, pa.BaseExtensionType):
        return _is_binary(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return _is_binary(kind.value_type)
    if pa.types.is_nested(kind):
        return any(_is_binary(kind.field(number).type) for number in range(kind.num_fields))
    are = pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_binary_view
    return any(is_such(kind) for is_such in are)


def _read_cell(cell: str) -> Any:
    """A list or mapping where a cell holds one as JSON, else its text."""
    if cell[0] in "[{":
        try:
            return from_json(cell)
        except ValueError:
            pass
    return cell
