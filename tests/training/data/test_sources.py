"""Data sections and their sources: what rows look like, and what is refused before training begins."""

import json

import pytest
from image_bytes import png

from mmgem.training.data import open_source as kinds
from mmgem.training.data.image_folder import ImageFolderDataset
from mmgem.training.data.open_source import check_section, load_rows, open_source
from mmgem.training.data.sources import DatasetSource


def write_folder(folder, *lines):
    folder.joinpath("a.png").write_bytes(png("red"))
    folder.joinpath("metadata.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"folders": "x"}, "`train_data` has the unknown key `folders`.*Did you mean `folder`"),
        ({"folder": "x", "parquet": "y"}, "expected one of scenes, folder, parquet, dataset, webdataset"),
        ({"weight": 2}, "expected one of scenes, folder, parquet, dataset, webdataset"),
        ({"folder": "x", "split": "train"}, "unknown key `split`"),
        ({"folder": "x", "weight": -0.5}, "`weight` in `train_data` is -0.5; expected 0 or more"),
        ({"folder": "x", "weight": "much"}, "`weight` in `train_data` is 'much'; expected float"),
        ({"folder": "x", "weight": float("nan")}, "`weight` in `train_data` is nan; expected 0 or more"),
        ({"folder": "x", "columns": {"captoins": "text"}}, "unknown key `captoins`.*Did you mean `captions`"),
        ({"folder": "x", "columns": {"captions": 3}}, "`columns` in `train_data` is"),
        ({"folder": 3}, "`folder` in `train_data` is 3; expected str"),
        ({"scenes": {"seed": 1, "cuont": 3}}, "unknown key `cuont`.*Did you mean `count`"),
        ({"dataset": "x", "streaming": "yes"}, "`streaming` in `train_data` is 'yes'; expected bool"),
        ("photos", "`train_data` is 'photos'; expected a mapping"),
    ],
)
def test_sections_are_checked_before_anything_is_read(section, message):
    with pytest.raises(ValueError, match=message):
        check_section(section, "`train_data`")


def test_scenes_and_folders_give_rows_alike(tmp_path):
    folder = write_folder(tmp_path, {"file_name": "a.png", "text": "a cat"})
    photos = open_source({"folder": folder, "weight": 2})
    assert (photos.name, len(photos), photos.key(0)) == (folder, 1, "line 1")
    row = photos[0]
    assert row["captions"] == ["a cat"] and row["image"].getpixel((0, 0)) == (255, 0, 0)
    assert set(row) == {"image", "captions", "file_name"}

    scenes = open_source({"scenes": {"seed": 3, "count": 5}})
    assert (scenes.name, len(scenes), scenes.key(4)) == ("scenes-3", 5, "4")
    assert scenes[4]["captions"] == scenes.dataset[4]["captions"]
    assert scenes[4]["image"].tobytes() == scenes.dataset[4]["image"].tobytes()


def test_columns_are_mapped(tmp_path):
    line = {"path": "a.png", "words": ["a cat", "a pet"], "caption": "not meant", "junk": 1, "id": 7}
    section = {
        "folder": write_folder(tmp_path, line),
        "columns": {"image": "path", "captions": "words", "image_id": "id"},
    }
    row = open_source(section)[0]
    assert row["captions"] == ["a cat", "a pet"] and row["image"].size == (8, 8) and row["image_id"] == 7
    assert set(row) == {"image", "captions", "image_id"}
    rows = load_rows(section)
    assert isinstance(rows, ImageFolderDataset)
    assert rows[0]["captions"] == ["a cat", "a pet"] and rows[0]["image"].size == (8, 8)


def test_lists_of_several_columns_are_joined(tmp_path):
    line = {"file_name": "a.png", "captions": ["a cat"], "de": ["eine Katze", "ein Tier"], "fr": "un chat"}
    section = {"folder": write_folder(tmp_path, line), "columns": {"queries": ["de", "fr"]}}
    assert open_source(section)[0]["queries"] == ["eine Katze", "ein Tier", "un chat"]
    assert load_rows(section)[0]["queries"] == ["eine Katze", "ein Tier", "un chat"]
    assert set(open_source(section)[0]) == {"image", "file_name", "captions", "queries"}
    with pytest.raises(ValueError, match="no column `zh`, which `columns` gives for `queries`"):
        open_source(section | {"columns": {"queries": ["de", "zh"]}})


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"captions": "text"}, "no column `text`, which `columns` gives for `captions`; it has file_name, words"),
        ({}, "no column `captions`; it has file_name, words.*columns: {captions: NAME}.*columns: {captions: null}"),
    ],
)
def test_missing_columns_are_named_with_those_there_are(tmp_path, columns, message):
    folder = write_folder(tmp_path, {"file_name": "a.png", "words": "a cat"})
    with pytest.raises(ValueError, match=message):
        open_source({"folder": folder, "columns": columns})
    if columns:
        with pytest.raises(ValueError, match=message):
            load_rows({"folder": folder, "columns": columns})


def test_edited_images_are_read_with_their_rows(tmp_path):
    edit = {"instruction": "turn it", "file_name": "b.png"}
    line = {"file_name": "a.png", "text": "a cat", "edit": edit, "instructions": [{"text": "it", "box": 0}]}
    line |= {"boxes": [[0, 0, 4, 4]], "region_captions": ["a cat"]}
    folder = write_folder(tmp_path, line, {"file_name": "a.png", "text": "a dog", "edit": {"instruction": None}})
    tmp_path.joinpath("b.png").write_bytes(png("blue"))
    source = open_source({"folder": folder})
    assert source.texts(0)["edited_image"] == "b.png"
    assert source[0]["edited_image"].getpixel((0, 0)) == (0, 0, 255) and source[0]["instructions"]
    assert "edited_image" not in source[1]
    assert "edited_image" not in open_source({"folder": folder, "columns": {"edited_image": None}})[0]
    tmp_path.joinpath("b.png").unlink()
    with pytest.raises(FileNotFoundError, match="image of row '.*:line 1'.*b.png.* is not there"):
        source[0]

    row = {"image": png("red"), "text": "a", "edit": edit, "after": {"bytes": png("blue"), "path": None}}
    source = DatasetSource([row], columns={"edited_image": "after"})
    assert source[0]["edited_image"].getpixel((0, 0)) == (0, 0, 255)
    assert "edited_image" not in DatasetSource([row])[0]


def test_images_alone_and_texts_alone(tmp_path):
    line = {"file_name": "a.png", "words": "a cat"}
    folder = write_folder(tmp_path, line)
    assert set(open_source({"folder": folder, "columns": {"captions": None}})[0]) == {"image", "file_name"}
    texts = open_source({"folder": folder, "columns": {"image": None, "captions": "words"}})
    assert texts[0] == {"captions": ["a cat"], "file_name": "a.png"}

    source = DatasetSource([{"image": png("red")}, {"text": "words"}])
    assert source[0]["image"].size == (8, 8) and source[1]["captions"] == ["words"]
    write_folder(tmp_path, {"file_name": "a.png"}, {"text": "words"}, line | {"caption": "a pair"})
    mixed = open_source({"folder": folder})
    assert [sorted(mixed[i].keys() & {"image", "captions"}) for i in range(3)] == [
        ["image"],
        ["captions"],
        ["captions", "image"],
    ]


def test_bad_lines_of_a_folder_fail_when_they_are_read(tmp_path):
    folder = write_folder(tmp_path, {"file_name": "a.png", "text": "fine"}, {"file_name": "b.png", "text": "gone"})
    with open(tmp_path / "metadata.jsonl", "a") as file:
        file.write('\n{"file_name": \n{"file_name": "a.png", "text": ""}')
    source = open_source({"folder": folder})
    assert len(source) == 4 and source[0]["captions"] == ["fine"]
    with pytest.raises(FileNotFoundError, match="image of row '.*:line 2'.*b.png.* is not there"):
        source[1]
    with pytest.raises(ValueError, match="line 3 of .* is no JSON object"):
        source[2]
    with pytest.raises(ValueError, match="row '.*:line 4' has `text` .*; expected text that is not empty"):
        source[3]
    with pytest.raises(FileNotFoundError, match="line 2 of .* names b.png"):
        load_rows({"folder": folder})


def test_a_box_outside_its_image_is_refused_with_its_row():
    rows = [{"image": png("red"), "text": "a", "boxes": [[9, 0, 12, 4]], "region_captions": ["b"]}]
    with pytest.raises(ValueError, match="lies outside its image"):
        DatasetSource(rows)[0]


def test_empty_data_is_refused():
    with pytest.raises(ValueError, match="data has no rows"):
        DatasetSource([])


def test_the_rows_of_a_source_have_its_prompt_where_they_name_none(tmp_path):
    row = {"file_name": "a.png", "text": "a star"}
    write_folder(tmp_path, row, row | {"prompt_name": "document"})
    source = open_source({"folder": str(tmp_path), "prompt_name": "query"})
    assert [source[number]["prompt_name"] for number in range(2)] == ["query", "document"]
    with pytest.raises(ValueError, match="`prompt_name` in data section is 3; expected"):
        open_source({"folder": str(tmp_path), "prompt_name": 3})


def test_a_kind_of_data_is_one_file_and_one_line(tmp_path, monkeypatch):
    tmp_path.joinpath("numbers_source.py").write_text(
        "from mmgem.training.data.sources import DatasetSource\n"
        "def open_numbers(numbers: int, first: int = 0, columns=None):\n"
        "    return DatasetSource([{'text': str(first + i)} for i in range(numbers)], 'numbers', columns)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(kinds.KINDS, "numbers", "numbers_source:open_numbers")
    source = open_source({"numbers": 3, "first": 5, "weight": 2})
    assert [source[i]["captions"] for i in range(3)] == [["5"], ["6"], ["7"]]
    for section, message in (
        ({"numbers": "three"}, "`numbers` in `x` is 'three'; expected int"),
        ({"numbers": 3, "frist": 5}, "unknown key `frist`.*Did you mean `first`"),
        ({"numbres": 3}, "unknown key `numbres`.* Did you mean `numbers`"),
    ):
        with pytest.raises(ValueError, match=message):
            check_section(section, "`x`")
