"""Image folders of users: what is read, and what is refused with what words."""

import gc
import json

import pytest
from PIL import Image

from mmgem.training.data.image_folder import FolderSource, read_image_folder
from mmgem.training.data.open_source import load_rows, open_source


def _write(folder, *lines):
    Image.new("RGBA", (6, 4)).save(folder / "a.png")
    folder.joinpath("metadata.jsonl").write_text("\n".join(map(str, lines)), encoding="utf-8")


def test_text_stands_for_captions_and_other_fields_stay(tmp_path):
    _write(
        tmp_path,
        json.dumps({"file_name": "a.png", "text": "a cat", "label": "cat"}),
        "",
        json.dumps({"file_name": "a.png", "captions": ["a cat", "ein Käfer"]}),
    )
    rows = read_image_folder(str(tmp_path))
    assert len(rows) == 2
    assert rows[0]["image"].mode == "RGB" and rows[0]["image"].size == (6, 4)
    assert rows[0]["captions"] == ["a cat"] and rows[0]["label"] == "cat"
    assert rows[1]["captions"] == ["a cat", "ein Käfer"]


def test_the_edited_image_is_the_file_that_the_edit_names(tmp_path):
    Image.new("RGB", (8, 5)).save(tmp_path / "b.png")
    line = {"file_name": "a.png", "text": "a cat"}
    _write(
        tmp_path,
        json.dumps(line | {"edit": {"instruction": "turn it", "file_name": "b.png"}}),
        json.dumps(line | {"edit": {"instruction": None, "file_name": None}}),
        json.dumps(line | {"edit": {"instruction": "turn it"}, "edited_image": "b.png"}),
        json.dumps(line | {"edit": {"instruction": "turn it"}}),
        json.dumps(line),
    )
    rows = list(read_image_folder(tmp_path))
    sizes = [row["edited_image"] and row["edited_image"].size for row in rows[:4]]
    assert sizes == [(8, 5), None, (8, 5), None] and "edited_image" not in rows[4]
    assert [row["edit"] is None for row in rows[:4]] == [False, True, False, False]
    without = read_image_folder(tmp_path, columns={"edited_image": None})
    assert not any("edited_image" in row for row in without)


def test_missing_folder_file_images_and_metadata(tmp_path):
    with pytest.raises(FileNotFoundError, match="`path` is .*nowhere', where there is nothing; expected"):
        read_image_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="where there are no images"):
        read_image_folder(tmp_path)
    Image.new("RGB", (6, 4)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="a.png', a file; expected an image folder"):
        read_image_folder(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError, match="with 1 images; expected a metadata.jsonl or metadata.csv"):
        read_image_folder(tmp_path)
    for name in ("metadata.jsonl", "metadata.csv"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="which has metadata.jsonl and metadata.csv; expected one of them"):
        read_image_folder(tmp_path)


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        ("{", ValueError, "line 2 of .* is no JSON object"),
        ("[1]", ValueError, "line 2 of .* is .*; expected a JSON object"),
        ('{"text": "a"}', ValueError, "line 2 of .* is .*; expected a JSON object with a `file_name`"),
        ('{"file_name": "b.png", "text": "a"}', FileNotFoundError, "line 2 of .* names b.png, which is not in"),
        ('{"file_name": "a.png"}', ValueError, "line 2 of .* has `captions` .*; expected a list"),
        (
            '{"file_name": "a.png", "text": "a", "edit": "flip"}',
            ValueError,
            "line 2 of .* has `edit` 'flip'; expected an object",
        ),
        (
            '{"file_name": "a.png", "text": "a", "edit": {"instruction": "flip", "file_name": "b.png"}}',
            FileNotFoundError,
            "line 2 of .* names b.png, which is not in",
        ),
        (
            '{"file_name": "a.png", "captions": [1]}',
            ValueError,
            "line 2 of .* has `captions` .*; expected a list",
        ),
    ],
)
def test_bad_lines_are_named(tmp_path, line, error, message):
    _write(tmp_path, '{"file_name": "a.png", "text": "fine"}', line)
    with pytest.raises(error, match=message):
        read_image_folder(tmp_path)


def test_questions_need_no_captions(tmp_path):
    qa = [{"question": "what is it?", "answer": "a cat"}]
    _write(tmp_path, json.dumps({"file_name": "a.png", "qa": qa}))
    [row] = read_image_folder(tmp_path)
    assert row["captions"] == [] and row["qa"] == qa


def test_subsets_take_all_rows_of_an_image_and_each_row_once(tmp_path):
    fields = [{"file_name": "a.png", "image_id": f"i{number // 2}", "text": str(number)} for number in range(400)]
    _write(tmp_path, *map(json.dumps, fields))
    texts = lambda *subset: [row["captions"][0] for row in read_image_folder(tmp_path, subset=subset).rows]  # noqa: E731
    train, held_out = texts(0, 0.8), texts(0.8, 1)
    assert sorted(train + held_out, key=int) == [row["text"] for row in fields] and 40 < len(held_out) < 120
    assert not {int(text) // 2 for text in train} & {int(text) // 2 for text in held_out}
    section = {"folder": str(tmp_path), "subset": [0.8, 1]}
    assert [row["captions"][0] for row in load_rows(section).rows] == held_out
    assert [row["captions"][0] for row in map(open_source(section).texts, range(len(held_out)))] == held_out
    for wrong in ([0.5], [0.5, 0.5], [-0.1, 1], [0, 1.1]):
        with pytest.raises(ValueError, match="`subset` is .*expected two rising numbers from 0 to 1"):
            open_source({"folder": str(tmp_path), "subset": wrong})
    with pytest.raises(ValueError, match="in which none of 400 rows lies"):
        open_source({"folder": str(tmp_path), "subset": [0, 1e-9]})


def test_csv_says_the_same(tmp_path):
    Image.new("RGB", (6, 4)).save(tmp_path / "a.png")
    tmp_path.joinpath("metadata.csv").write_text(
        "file_name,text,boxes,label\n"
        'a.png,"a cat, asleep","[[0, 0, 3, 4]]",\n'
        'a.png,"[sic] ein Käfer",,bug\n'
        'a.png,"[""one"", ""two""]",,\n',
        encoding="utf-8-sig",
    )
    rows = read_image_folder(tmp_path)
    assert [row["captions"] for row in rows] == [["a cat, asleep"], ["[sic] ein Käfer"], ["one", "two"]]
    assert rows[0]["boxes"] == [[0, 0, 3, 4]] and "boxes" not in rows[1]
    assert rows[1]["label"] == "bug" and "label" not in rows[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"file_name,text\na.png\n", "line 2 of .*csv has the cells .*a.png.*; expected 2"),
        (b"file_name,text\na.png,a cat, asleep\n", "line 2 of .*csv has the cells .*asleep.*; expected 2"),
        (b"file_name,text\na.png,K\xe4fer\n", "line 2 of .*csv has the cells .*K.udce4fer.*; expected UTF-8 text"),
        (b"file_name,text\n", "csv, which names no images"),
        (
            b'file_name,text\na.png,"a cat\nb.png,a dog\n',
            "csv cannot be read from line 1 on; .*unexpected end of data",
        ),  # was cut
        (b"file_name,text,text\na.png,a cat,a dog\n", "csv has the column 'text' twice; expected names of their own"),
    ],
)
def test_bad_csv_is_named(tmp_path, content, message):
    Image.new("RGB", (6, 4)).save(tmp_path / "a.png")
    tmp_path.joinpath("metadata.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_image_folder(tmp_path)


def test_empty_metadata(tmp_path):
    _write(tmp_path, "")
    with pytest.raises(ValueError, match="metadata.jsonl, which names no images"):
        read_image_folder(tmp_path)


def test_lines_are_one_object_which_workers_do_not_copy(tmp_path):
    """A worker that looks at an object writes into it, and so copies the page that it lies in."""
    _write(tmp_path, *(json.dumps({"file_name": f"{n}.png", "captions": ["a", "b"]}) for n in range(1000)))
    FolderSource(str(tmp_path))  # imports what it needs
    gc.collect()
    before = len(gc.get_objects())
    source = FolderSource(str(tmp_path))
    assert len(gc.get_objects()) - before < 100
    assert source.key(7) == "line 8" and source.fields(7) == {"file_name": "7.png", "captions": ["a", "b"]}
