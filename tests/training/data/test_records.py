"""Files of records that tools and people have written: each record is read, or costs itself by its number."""

import errno
import io
import json
from datetime import date

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmgem.training.data import records
from mmgem.training.data.records import read_records


def read(tmp_path, suffix, content):
    file = tmp_path / f"file{suffix}"
    file.write_bytes(content)
    return list(read_records(file))


NO_OBJECT = "is no JSON object; expected one: "


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"a": 1}\r\n\r\n{"a": 2}\r\n', [(1, {"a": 1}), (3, {"a": 2})]),
        (b'\xef\xbb\xbf{"a": 1}\n\xef\xbb\xbf{"a": 2}', [(1, {"a": 1}), (2, {"a": 2})]),  # two files in one
        (b'{"a": 1}\n{"a": 1, "a": 2}', [(1, {"a": 1}), (2, "an object has the key 'a' twice; expected it once.")]),
        (b'{"a": {"b": 1, "b": 1}}', [(1, "an object has the key 'b' twice; expected it once.")]),
        (b'[\n{"a": 1},\n', [(1, "Expecting value, at column 1"), (2, "Extra data, at column 9")]),
        (b'{"a": 1}{"a": 2}', [(1, "Extra data, at column 9")]),
        (b"[1]", [(1, "is b'[1]'; expected a JSON object.")]),
        (b'\xff\xfe{\0}\0\n\0{\0}\0', [(1, "'utf-8' codec can't decode byte 0xff"), (2, "'utf-8' codec|Expecting")]),
        (b"", []),
    ],
)  # fmt: skip
def test_json_lines(tmp_path, content, expected):
    found = read(tmp_path, ".jsonl", content)
    assert [number for number, _ in found] == [number for number, _ in expected]
    for (_, fields), (_, outcome) in zip(found, expected, strict=True):
        if isinstance(outcome, dict):
            assert fields == outcome
        else:
            assert isinstance(fields, str) and any(part in fields for part in outcome.split("|"))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("\ufeffa,b\r\n1,2\r\n", [(2, {"a": "1", "b": "2"})]),
        ("a,b\n\n1,\n", [(3, {"a": "1"})]),
        (",a\n0,x\n1,y\n", [(2, {"a": "x"}), (3, {"a": "y"})]),  # as pandas writes them
        ("a,b\n1\n1,2,3\n4,5\n", [(2, "has the cells ['1']; expected 2."), (3, "has the cells ['1', '2', '3']; exp"),
                                  (4, {"a": "4", "b": "5"})]),
        (b"a,b\n\xff,2\n3,4", [(2, "the cells ['\\udcff', '2']; expected UTF-8 text."), (3, {"a": "3", "b": "4"})]),
        (f"a\n{'x' * 200_000}\n", [(2, {"a": "x" * 200_000})]),
    ],
    ids=str,
)  # fmt: skip
def test_csv(tmp_path, content, expected):
    found = read(tmp_path, ".csv", content if isinstance(content, bytes) else content.encode())
    assert [number for number, _ in found] == [number for number, _ in expected]
    for (_, fields), (_, outcome) in zip(found, expected, strict=True):
        assert fields == outcome if isinstance(outcome, dict) else outcome in fields


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b,a\n1,2,3", "has the column 'a' twice; expected names of their own"),
        ("\n\na,b\n1,2", "has no names of columns in its first line; expected one or more"),
        ('a,b\n1,2\n3,"4', "cannot be read from line 2 on; expected comma-separated text: unexpected end of data"),
        ("a,b\n1,2".encode("utf-16"), r"has the columns \['.udcff.*; expected UTF-8 text"),
    ],
    ids=str,
)
def test_a_csv_that_is_none_is_refused(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, ".csv", content if isinstance(content, bytes) else content.encode())


def test_a_line_without_an_end_is_not_kept_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "LONGEST_LINE", 50)
    lines = [json.dumps({"a": "x" * length}) for length in (1, 40, 41, 500, 2)]
    found = read(tmp_path, ".jsonl", "\n".join(lines).encode())
    assert [number for number, _ in found] == [1, 2, 3, 4, 5]
    texts = [fields["a"] for number, fields in found if isinstance(fields, dict)]
    assert texts == ["x", "x" * 40, "xx"] and found[3][1] == "has more than 50 bytes; expected a JSON object."
    with pytest.raises(ValueError, match="from line 1 on; expected .* the next line has more than 50 characters"):
        read(tmp_path, ".csv", f"a\n{'x' * 100}\n".encode())


def text_of_bytes(*values: bytes) -> pa.Array:
    """Strings as a writer that checks nothing leaves them."""
    binary = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(values), binary.buffers())


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array(["x", None]).dictionary_encode(), ["x", None]),
        (pa.array(["x"], pa.large_string()), ["x"]),
        (pa.nulls(1), [None]),
        (pa.array([[{"b": ["x"]}]]), [[{"b": ["x"]}]]),
        (pa.array([], pa.string()), []),
        (text_of_bytes(b"\xff", b"ok"), ["UnicodeDecodeError", "ok"]),
        (pa.array([0, 10**8], pa.int32()).cast(pa.date32()), [date(1970, 1, 1), "Ove"]),
        (pa.array([1], pa.timestamp("us", tz="Mars/Olympus")), ["Mars/Olympus"]),
    ],
    ids=lambda value: str(getattr(value, "type", ""))[:30],
)  # fmt: skip
def test_a_value_that_python_cannot_have_costs_its_row(tmp_path, column, expected):
    pq.write_table(pa.table({"a": column}), tmp_path / "file.parquet")
    found = list(read_records(tmp_path / "file.parquet"))
    assert [number for number, _ in found] == [*range(1, 1 + len(expected))]
    for (_, fields), value in zip(found, expected, strict=True):
        assert fields == {"a": value} if isinstance(fields, dict) else f"{value}" in fields


@pytest.mark.parametrize(
    "column",
    [pa.array([b"x"]), pa.array([b"x"]).dictionary_encode(), pa.array([b"x"], pa.binary_view()), pa.array([[b"x"]])],
    ids=lambda column: str(column.type)[:30],
)
def test_pictures_are_no_fields(tmp_path, column):
    pq.write_table(pa.table({"image": column, "a": [1]}), tmp_path / "file.parquet")
    assert list(read_records(tmp_path / "file.parquet")) == [(1, {"a": 1})]


def test_a_damaged_table_is_refused_by_name(tmp_path):
    file = tmp_path / "file.parquet"
    pq.write_table(pa.table({"a": [f"{number:050}" for number in range(9999)]}), file, row_group_size=1000)
    whole = file.read_bytes()
    for content in (b"", whole[:-8], whole[:-1] + b"x", whole[:9000] + b"\xaa" * 999 + whole[9999:]):
        with pytest.raises(ValueError, match=r"file\.parquet cannot be read; expected a Parquet file"):
            read(tmp_path, ".parquet", content)
    twice = pa.table([pa.array([1]), pa.array([2])], names=["a", "a"])
    pq.write_table(twice, file)
    with pytest.raises(ValueError, match=r"file\.parquet has the column 'a' twice; expected names of their own"):
        list(read_records(file))


class FailingFile(io.BytesIO):
    """A file on a disk that fails."""

    def readline(self, *_):
        raise OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch, name):
    monkeypatch.setattr(records, "open", lambda *args, **kwargs: FailingFile(), raising=False)
    with pytest.raises(OSError, match=rf"Input/output error: '.*{name}'"):
        list(read_records(tmp_path / name))
