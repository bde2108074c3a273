"""Parquet files and saved data sets: any row, its image decoded only then, damaged files left out."""

import tarfile
from io import BytesIO

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_bytes import png
from torch.utils.data import DataLoader

from mmgem.training.data.open_source import load_rows, open_source
from mmgem.training.data.tables import TableSource


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_table(path, first=0, count=5, image=lambda i: png((i, 0, 0)), **columns):
    path.parent.mkdir(exist_ok=True)
    numbers = range(first, first + count)
    table = {"image": [image(i) for i in numbers], "caption": [f"about {i}" for i in numbers]} | columns
    pq.write_table(pa.table(table), path, row_group_size=2)
    return str(path)


def red_of(source):
    return [source[i]["image"].getpixel((0, 0))[0] for i in range(len(source))]


@pytest.mark.parametrize(
    "image",
    [
        lambda i: png((i, 0, 0)),
        lambda i: {"bytes": png((i, 0, 0)), "path": None},
        lambda i: {"bytes": None, "path": f"images/{i}.png"},
        lambda i: f"images/{i}.png",
    ],
    ids=["bytes", "struct", "path in struct", "path"],
)
def test_images_of_every_form(tmp_path, image):
    for folder, first in (("x", 0), ("y", 5)):
        write_table(tmp_path / folder / "t.parquet", first, image=image)
        (tmp_path / folder / "images").mkdir()
        for i in range(first, first + 5):  # paths are relative to the file they stand in
            (tmp_path / folder / "images" / f"{i}.png").write_bytes(png((i, 0, 0)))
    source = open_source({"parquet": str(tmp_path / "*" / "t.parquet")})
    assert len(source) == 10 and red_of(source) == list(range(10))
    assert source[7]["captions"] == ["about 7"] and source.key(7) == "t.parquet/2"
    assert isinstance(source, TableSource) and source.damaged == []


def test_lists_and_boxes_come_as_they_were(tmp_path):
    qa = [{"question": "who?", "answer": "me"}]
    boxes = [[0.0, 0.0, 4.0, 4.0], [1.0, 1.0, 8.0, 8.0]]
    columns = {"captions": [["a", "b"]], "boxes": [boxes], "region_captions": [["c", "d"]], "qa": [qa], "junk": [1]}
    row = open_source({"parquet": write_table(tmp_path / "t.parquet", count=1, **columns)})[0]
    assert (row["captions"], row["boxes"], row["region_captions"], row["qa"]) == (["a", "b"], boxes, ["c", "d"], qa)
    assert "junk" not in row


def test_missing_columns_are_named(tmp_path):
    path = write_table(tmp_path / "t.parquet", words=["x"] * 5)
    with pytest.raises(
        ValueError, match="no column `text`, which `columns` gives for `captions`; it has caption, image"
    ):
        open_source({"parquet": path, "columns": {"captions": "text"}})
    assert open_source({"parquet": path, "columns": {"captions": "words"}})[0]["captions"] == ["x"]


def test_damaged_files_are_left_out(tmp_path):
    for number in range(4):
        write_table(tmp_path / f"{number}.parquet", number * 5)
    (tmp_path / "0.parquet").write_bytes((tmp_path / "0.parquet").read_bytes()[:-20])  # found by its footer
    data = bytearray((tmp_path / "2.parquet").read_bytes())
    data[4:60] = bytes(56)  # found when it is read
    (tmp_path / "2.parquet").write_bytes(data)
    source = open_source({"parquet": str(tmp_path / "*.parquet")})
    assert [key for key, _ in source.damaged] == ["0.parquet", "2.parquet"]
    assert red_of(source) == [*range(5, 10), *range(15, 20)]
    assert source.key(6) == "3.parquet/1"
    with pytest.raises(ValueError, match="cannot be read: 0.parquet: "):
        open_source({"parquet": str(tmp_path / "0.parquet")})


def test_files_without_rows_are_passed_over(tmp_path):
    for number, count in enumerate([0, 5, 0, 5]):
        write_table(tmp_path / f"{number}.parquet", number, count)
    source = open_source({"parquet": str(tmp_path / "*.parquet")})
    assert source.damaged == [] and red_of(source) == [*range(1, 6), *range(3, 8)]
    assert source.key(6) == "3.parquet/1"
    with pytest.raises(ValueError, match=r"0.parquet has no rows; expected some"):
        open_source({"parquet": str(tmp_path / "0.parquet")})


def test_damaged_rows_fail_when_they_are_read(tmp_path):
    path = write_table(tmp_path / "t.parquet", image=lambda i: png((i, 0, 0)) if i else b"no image")
    source = open_source({"parquet": path})
    assert source[1]["captions"]
    with pytest.raises(ValueError, match="image of row '.*t.parquet:t.parquet/0'.* no image"):
        source[0]
    path = write_table(tmp_path / "u.parquet", caption=["fine", None, "", "fine", "fine"])
    source = open_source({"parquet": path})
    assert "captions" not in source[1]
    with pytest.raises(ValueError, match="u.parquet/2' has `caption` .*expected text"):
        source[2]


def test_saved_datasets(tmp_path):
    names = ["star", "moon"]
    features = datasets.Features(
        {
            "img": datasets.Image(),
            "label": datasets.ClassLabel(names=names),
            "texts": datasets.List(datasets.Value("string")),
        }
    )
    rows = {"img": [{"bytes": png((i, 0, 0))} for i in range(4)], "label": [0, 1, -1, 1], "texts": [["a", "b"]] * 4}
    data = datasets.Dataset.from_dict(rows, features)
    data.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict({"train": data, "test": data.select([2, 3])}).save_to_disk(tmp_path / "splits")
    columns = {"image": "img", "captions": "texts"}
    for section in ({"dataset": str(tmp_path / "plain")}, {"dataset": str(tmp_path / "splits")}):
        source = open_source(section | {"columns": columns})
        assert red_of(source) == [0, 1, 2, 3] and source[0]["captions"] == ["a", "b"]
        assert [source[i].get("label") for i in range(4)] == ["star", "moon", None, "moon"]
    rows = load_rows({"dataset": str(tmp_path / "splits"), "split": "test", "columns": columns})
    assert [row["image"].getpixel((0, 0))[0] for row in rows] == [2, 3]
    with pytest.raises(ValueError, match="`split` of .*splits is 'dev'; expected one of train, test"):
        open_source({"dataset": str(tmp_path / "splits"), "split": "dev", "columns": columns})
    with pytest.raises(ValueError, match="no column `image`; it has img, label, texts"):
        open_source({"dataset": str(tmp_path / "plain")})


def test_folders_that_datasets_can_load(tmp_path):
    write_table(tmp_path / "data" / "train.parquet")
    source = open_source({"dataset": str(tmp_path / "data")})
    assert red_of(source) == list(range(5))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_source({"dataset": str(tmp_path / "nowhere")})


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_workers_read_the_same_files(tmp_path, kind):
    if kind == "parquet":
        path = write_table(tmp_path / "t.parquet", count=40)
    else:
        path = str(tmp_path / "x.tar")
        with tarfile.open(path, "w") as shard:
            for i in range(40):
                for name, data in ((f"{i}.png", png((i, 0, 0))), (f"{i}.txt", b"text")):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    shard.addfile(member, BytesIO(data))
    source = open_source({kind: path})
    source[3]  # opened before the workers are forked
    loader = DataLoader(source, batch_size=4, num_workers=2, collate_fn=list)
    assert [row["image"].getpixel((0, 0))[0] for batch in loader for row in batch] == list(range(40))
