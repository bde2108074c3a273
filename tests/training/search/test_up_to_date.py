"""That an index is up to date is known without its model, and only if it is."""

import json
import os
import shutil
from types import SimpleNamespace

import fresh_process
import pytest
from image_folders import NAMES, write_folder, write_noise
from tiny_models import build_model

from mmgem.training import loading
from mmgem.training.data.image_files import find_images
from mmgem.training.search import folder_items, up_to_date
from mmgem.training.search.building import build_index
from mmgem.training.search.storage import MANIFEST, UNFINISHED, read_index, write_checked_json
from mmgem.training.search.up_to_date import stamp_of, update_index

LINES = [{"file_name": NAMES[0], "captions": ["a red star", "one star"], "boxes": [[0, 0, 20, 15]]}]
OF_VECTORS = {"vectors": None, "dimensions": None, "precision": "float32", "memory": True, "image_mode": "image"}
SETTINGS = OF_VECTORS | {"captions": "beside", "regions": "boxes", "texts": "body"}
WITHOUT_TORCH = """import sys
sys.modules["torch"] = sys.modules["transformers"] = None
from mmgem.training.cli import app
app()
"""


def write_manifest(index, **changes):
    manifest = json.loads((index / MANIFEST).read_text())
    del manifest["checksum"]
    write_checked_json(index / MANIFEST, manifest | changes)


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_processor):
    """A folder with files of all kinds, the checkpoint of a model, and an index of the one by the other."""
    place = tmp_path_factory.mktemp("made")
    folder = write_folder(place / "images")
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    (folder / "note.txt").write_text("notes about stars")
    (folder / "records.jsonl").write_text('{"body": "record 1"}\n{"body": "record 2"}\n')
    build_model().save_pretrained(place / "model")
    tiny_processor.save_pretrained(place / "model")
    update_index(folder, place / "model", place / "index", **SETTINGS)
    return place, loading.load_checkpoint(place / "model")


@pytest.fixture
def made_here(made, monkeypatch, tmp_path):
    """A copy of the folder and its index; `update` says what a report says, and `loads` how often it took a model."""
    (place, checkpoint), loads = made, []
    monkeypatch.setattr(loading, "load_checkpoint", lambda name: loads.append(name) or checkpoint)
    folder, index = tmp_path / "images", tmp_path / "index"
    shutil.copytree(place / "images", folder)
    shutil.copytree(place / "index", index)
    write_manifest(index, folder=str(folder))

    def update(names=None, **settings):
        return update_index(folder, place / "model", index, names, **SETTINGS | settings)

    return SimpleNamespace(
        folder=folder, index=index, model=place / "model", checkpoint=checkpoint, update=update, loads=loads
    )


def test_what_is_as_it_was_needs_no_model_and_is_reported_alike(made_here, caplog):
    report = made_here.update()
    assert made_here.loads == [] and "is not calibrated" in caplog.text
    assert report.rows == {"caption": 2, "image": 7, "region": 1, "text": 3}
    assert report == build_index(made_here.folder, *made_here.checkpoint, made_here.index, **SETTINGS)


def test_the_command_needs_no_torch(made_here):
    settings = ["--captions", "beside", "--regions", "boxes", "--texts", "--text-column", "body", "--with-memory"]
    paths = ["index", made_here.folder, "--model", made_here.model, "--out", made_here.index]
    said = fresh_process.run(WITHOUT_TORCH, *paths, *settings, cwd=made_here.folder, installed=True)
    assert said.startswith(f"2 captions, 7 images, 1 region, 3 texts in {made_here.index}, 0 new; 0 files")


def keep_time(path, content):
    status = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def damage(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


CHANGES = {
    "a new image": (lambda here: write_noise(here.folder / "new.png", 99), 1, 0),
    "an edited image": (lambda here: write_noise(here.folder / NAMES[1], 99), 1, 0),
    "a touched image": (lambda here: (here.folder / NAMES[1]).touch(), 0, 0),
    "a deleted image": (lambda here: (here.folder / NAMES[2]).unlink(), 0, 0),
    "an image that cannot be read": (lambda here: (here.folder / "bad.png").write_bytes(b"no image"), 0, 1),
    "a text of the same size and time": (lambda here: keep_time(here.folder / "note.txt", b"notes about moons"), 1, 0),
    "a record that is no text": (lambda here: (here.folder / "records.jsonl").write_text('{"body": 3}\n'), 0, 1),
    "another caption": (
        lambda here: (here.folder / "metadata.jsonl").write_text(json.dumps(LINES[0] | {"captions": ["a moon"]})),
        1,
        0,
    ),
    "a folder that is empty": (lambda here: shutil.rmtree(here.folder / "deep" / "er") or _mkdir(here), 0, 1),
    "a damaged vector": (lambda here: damage(here.index / "embedding-1.npy"), 13, 0),
    "something unfinished": (lambda here: (here.index / UNFINISHED).mkdir(), 0, 0),
    "an index without a stamp": (lambda here: write_manifest(here.index, stamp=None), 0, 0),
}


def _mkdir(here):
    (here.folder / "deep" / "er").mkdir()


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changed_goes_the_usual_way(made_here, change, monkeypatch):
    make_it, embedded, skipped = CHANGES[change]
    make_it(made_here)
    walks = []
    monkeypatch.setattr(folder_items, "find_images", lambda *args: walks.append(args) or find_images(*args))
    report = made_here.update()
    assert (made_here.loads, report.embedded, len(report.skipped)) == ([made_here.model], embedded, skipped)
    assert len(walks) == 1  # the folder is looked through once
    rows = read_index(made_here.index, "out").rows
    assert len(rows) == sum(report.rows.values()) and not rows.damaged().any()
    assert made_here.update()._replace(embedded=embedded) == report
    assert len(made_here.loads) == 1 + bool(skipped)  # what is left out is tried again


def test_other_settings_and_other_places_go_the_usual_way(made_here, tmp_path):
    for settings, match in [
        ({"captions": "fused"}, "with captions beside; expected fused"),
        ({"dimensions": 4}, "with dimensions 16; expected 4"),
        ({"memory": False}, "with memory 1; expected None"),
        ({"texts": "title"}, "with texts body; expected title"),
    ]:
        with pytest.raises(ValueError, match=match):
            made_here.update(**settings)
    assert len(made_here.loads) == 4
    shutil.copytree(made_here.folder, tmp_path / "moved")
    with pytest.raises(ValueError, match="If the images have moved"):
        update_index(tmp_path / "moved", made_here.model, made_here.index, **SETTINGS)
    report = update_index(tmp_path / "moved", made_here.model, made_here.index, moved=True, **SETTINGS)
    assert len(made_here.loads) == 6 and report.embedded == 0
    assert read_index(made_here.index, "out").facts.folder == str(tmp_path / "moved")


def test_only_the_files_that_are_named_are_in_the_index(made_here):
    assert made_here.update(names=[NAMES[0]]).rows == {"caption": 2, "image": 1, "region": 1}
    assert len(made_here.loads) == 1
    assert made_here.update(names=[NAMES[0]]).images == 1 and len(made_here.loads) == 1
    assert made_here.update().images == 7 and len(made_here.loads) == 2


def test_a_model_that_changed_goes_the_usual_way(made_here, monkeypatch):
    shutil.copytree(made_here.model, made_here.folder.with_name("model"))
    with monkeypatch.context() as patch:
        patch.setattr(made_here.checkpoint[0].config, "prompts", {"query": "find "})
        with pytest.raises(ValueError, match="whose prompts is"):  # by its fingerprint, as it is looked at
            update_index(made_here.folder, made_here.folder.with_name("model"), made_here.index, **SETTINGS)
    with monkeypatch.context() as patch:
        patch.setattr(up_to_date, "version", lambda library: "another")
        made_here.update()
    made_here.update()
    assert len(made_here.loads) == 3


def test_a_stamp_is_of_all_that_a_model_is_made_of(tmp_path, monkeypatch):
    model, settings = tmp_path / "model", {"dimensions": None}
    (model / "vlm_processor").mkdir(parents=True)
    names = ["config.json", "model.safetensors", "vlm_processor/tokenizer.json"]
    for name in names:
        (model / name).write_bytes(b"content")
    for package in ("mmgem", "mmgem.processing", "mmgem.training"):
        monkeypatch.setattr(f"{package}.__path__", [])
    stamps = [stamp_of(model, settings)]
    assert stamps[0] == stamp_of(str(model), {"dimensions": None}) is not None
    for name in names:
        keep_time(model / name, b"another")
        stamps.append(stamp_of(model, settings))
    shutil.copytree(model, tmp_path / "copy")
    stamps += [stamp_of(tmp_path / "copy", settings), stamp_of(model, {"dimensions": 4})]
    (model / "model.safetensors").replace(model / "moved.safetensors")
    stamps.append(stamp_of(model, settings))
    for library in ("torch", "transformers", "tokenizers", "pillow", "timm"):
        with monkeypatch.context() as patch:
            patch.setattr(up_to_date, "version", lambda name, library=library: "0" if name == library else "1")
            stamps.append(stamp_of(model, settings))
    monkeypatch.setattr("mmgem.training.__path__", [str(tmp_path / "copy")])
    stamps.append(stamp_of(model, settings))
    assert len({*stamps}) == len(stamps)


def test_what_has_no_files_of_its_own_has_no_stamp(tmp_path):
    assert stamp_of("someone/a-model", {}) is None
    (tmp_path / "adapter_config.json").write_text("{}")
    assert stamp_of(tmp_path, {}) is None
