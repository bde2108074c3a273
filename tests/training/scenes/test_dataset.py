"""Scenes as data: the same rows as a torch dataset and as files."""

import json
import pickle

import datasets
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from mmgem.training.data.image_folder import read_image_folder
from mmgem.training.scenes import dataset as scene_dataset_module
from mmgem.training.scenes.caption_parser import parse_caption
from mmgem.training.scenes.captions import write_edit
from mmgem.training.scenes.dataset import COLUMNS, SceneDataset, write_scene_folder
from mmgem.training.scenes.drawing import draw_scene


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_scene_folder(tmp_path_factory.mktemp("written") / "scenes", seed=4, count=12, image_size=48)


def _without_images(row):
    return {name: value for name, value in row.items() if name not in ("image", "edited_image")}


def _pixels(image):
    return image and image.tobytes()


def assert_same(got, expected):
    """Rows whose images may be of different classes."""
    assert got.keys() == expected.keys()
    assert _without_images(got) == _without_images(expected)
    assert got["image"].tobytes() == expected["image"].tobytes()
    assert _pixels(got["edited_image"]) == _pixels(expected["edited_image"])


def test_rows_have_the_schema():
    scenes = SceneDataset(4, 12)
    assert len(scenes) == 12
    for row in scenes:
        assert tuple(row) == COLUMNS
        assert row["image"].size == (96, 96)
        assert len(row["boxes"]) == len(row["region_captions"]) == len(parse_caption(row["captions"][0]))
    assert scenes[-1]["scene_id"] == "4-11"
    with pytest.raises(IndexError):
        scenes[12]


def test_the_edited_image_is_what_follows_from_the_edit():
    scenes = SceneDataset(4, 12, image_size=48)
    for number, row in enumerate(scenes):
        edit = write_edit(scenes.scene(number))
        assert (row["edited_image"] is None) == (row["edit"] is None) == (edit is None)
        if edit:
            assert row["edited_image"].tobytes() == draw_scene(edit.twin, 48).tobytes() != row["image"].tobytes()
    assert {row["edit"] is None for row in scenes} == {True, False}


def test_rows_of_a_seed_do_not_depend_on_the_count():
    assert [_without_images(row) for row in SceneDataset(4, 3)] == [
        _without_images(SceneDataset(4, 9)[i]) for i in range(3)
    ]


def test_columns_left_out_are_not_computed(monkeypatch):
    def fail(*_):
        raise AssertionError("drawn")

    monkeypatch.setitem(scene_dataset_module._COLUMNS, "image", fail)
    (row,) = SceneDataset(4, 1, columns=("captions", "label"))
    assert tuple(row) == ("captions", "label")


def test_unique_scenes_share_no_objects_with_any_other_image():
    plain = SceneDataset(4, 1500)
    assert len({frozenset(plain.scene(row).objects) for row in range(1500)}) < 1500  # the test has something to find
    unique = SceneDataset(4, 1500, unique=True)
    images = []
    for row in range(1500):
        scene = unique.scene(row)
        edit = write_edit(scene)
        images += [scene.objects] if edit is None else [scene.objects, edit.twin.objects]
    assert len(set(map(frozenset, images))) == len(images)


def test_data_loader_with_workers():
    scenes = pickle.loads(pickle.dumps(SceneDataset(4, 6, columns=("scene_id", "image"))))
    rows = list(DataLoader(scenes, batch_size=None, num_workers=1))
    assert [row["scene_id"] for row in rows] == [f"4-{index}" for index in range(6)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, "`count` is 0; expected 1 or more"),
        ({"count": 1, "image_size": 20}, "`image_size` is 20; expected 48 to 2048 pixels"),
        ({"count": 1, "columns": ("image", "caption")}, "`columns` holds \\['caption'\\]; expected some of"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SceneDataset(0, **arguments)


def test_written_folder_has_the_rows_and_the_twins(folder):
    scenes = SceneDataset(4, 12, 48, unique=True)
    names = {"metadata.jsonl"}
    with open(folder / "metadata.jsonl") as lines:
        metadata = [json.loads(line) for line in lines]
    for row, (line, expected) in enumerate(zip(metadata, scenes, strict=True)):
        image, edit = expected["image"], write_edit(scenes.scene(row))
        expected = _without_images(expected)
        expected["edit"] = expected["edit"] or {"instruction": None, "file_name": None}
        assert line == expected
        assert Image.open(folder / line["file_name"]).tobytes() == image.tobytes()
        names.add(line["file_name"])
        if edit:
            twin = Image.open(folder / line["edit"]["file_name"])
            assert twin.tobytes() == draw_scene(edit.twin, 48).tobytes() != image.tobytes()
            names.add(line["edit"]["file_name"])
    assert {path.name for path in folder.iterdir()} == names
    assert len(names) > 13  # there are twins, and a row without one:
    assert any(line["edit"]["instruction"] is None for line in metadata)


def test_written_folder_reads_back_as_it_was(folder):
    for got, expected in zip(read_image_folder(folder), SceneDataset(4, 12, 48, unique=True), strict=True):
        assert_same(got, expected)


def test_imagefolder_of_datasets_reads_it(folder):
    loaded = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")
    scenes = SceneDataset(4, 12, 48, unique=True)
    for row, (got, expected) in enumerate(zip(loaded, scenes, strict=True)):
        edit, expected_edit = got.pop("edit"), expected.pop("edit")
        assert got.pop("image").tobytes() == expected["image"].tobytes()
        expected = _without_images(expected)
        del expected["file_name"]  # imagefolder turns it into the image, in `edit` too
        assert got == expected
        if expected_edit is None:
            assert edit == {"instruction": None, "image": None}
        else:
            assert edit["instruction"] == expected_edit["instruction"]
            assert edit["image"].tobytes() == draw_scene(write_edit(scenes.scene(row)).twin, 48).tobytes()


def test_writing_spares_what_is_there(tmp_path):
    (tmp_path / "photo.png").write_bytes(b"dear")
    with pytest.raises(FileExistsError, match="`out` is .*; expected a new or empty folder"):
        write_scene_folder(tmp_path, 0, 2)
    with pytest.raises(FileExistsError, match="`out` is .*; expected a new or empty folder"):
        write_scene_folder(tmp_path / "photo.png", 0, 2)
    assert (tmp_path / "photo.png").read_bytes() == b"dear"
    assert len(list(tmp_path.iterdir())) == 1


def test_interrupted_writing_leaves_nothing_under_the_name_and_can_be_repeated(tmp_path, monkeypatch):
    out = tmp_path / "scenes"

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(scene_dataset_module.json, "dumps", interrupt)
        write_scene_folder(out, 0, 2)
    assert not out.exists()
    out.mkdir()  # an empty folder is as good as none
    assert write_scene_folder(str(out), 0, 2) == out
    assert len(read_image_folder(out)) == 2
    assert list(tmp_path.iterdir()) == [out]
