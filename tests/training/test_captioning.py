import json
import os
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from mmgem.training import captioning
from mmgem.training.captioning import caption_folder
from mmgem.training.data.image_files import find_images
from mmgem.training.inference import generate_captions, generate_region_captions, pictures_prepared_once

pytestmark = pytest.mark.usefixtures("short_answers")

NAMES = ["0.png", "1.png", "deep/2.png", "deep/3.png", "deep/4.png"]
BOXES = {"0.png": [[0, 0, 20, 20]], "deep/3.png": [[5, 5, 30, 20], [0, 0, 40, 30], [1, 2, 9, 9]]}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    for number, name in enumerate(NAMES):
        noise = np.random.default_rng(number).integers(0, 256, (3, 4, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((40, 30)).save(folder / name)
    rows = [{"file_name": name, "boxes": boxes} for name, boxes in BOXES.items()]
    rows.append({"file_name": "1.png", "boxes": None})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return folder


@pytest.fixture
def out(tmp_path):
    return tmp_path / "captions.jsonl"


@pytest.fixture
def echo(monkeypatch):
    """Captions without a model: the color of the upper left pixel, and for a box its corners as well. Gives calls."""
    calls = []

    def captions(model, processor, images):
        calls.append(len(images))
        return [f"{image.getpixel((0, 0))}" for image in images]

    def region_captions(model, processor, images, boxes):
        return [f"{image.getpixel((0, 0))} {box}" for image, own in zip(images, boxes) for box in own]

    monkeypatch.setattr(captioning, "generate_captions", captions)
    monkeypatch.setattr(captioning, "generate_region_captions", region_captions)
    monkeypatch.setattr(captioning, "shorter_side_for", lambda processor: 100)
    return calls


def read(out):
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def test_every_image_has_the_caption_the_model_generates_for_it(folder, out, tiny_model, tiny_processor):
    report = caption_folder(folder, tiny_model, tiny_processor, out, batch_size=2)
    assert report == (5, 5, [], {})
    paths = [folder / name for name in NAMES]
    expected = generate_captions(tiny_model, tiny_processor, paths)
    assert [line.pop("version") for line in read(out)] == list(find_images(folder).versions.values())
    assert [(line["file_name"], line["caption"]) for line in read(out)] == list(zip(NAMES, expected, strict=True))


def test_every_box_has_the_caption_the_model_generates_for_it(folder, out, tiny_model, tiny_processor):
    caption_folder(folder, tiny_model, tiny_processor, out, with_boxes=True)
    paths = [folder / name for name in BOXES]
    expected = generate_region_captions(tiny_model, tiny_processor, paths, list(BOXES.values()))
    lines = {line["file_name"]: line for line in read(out)}
    assert lines["0.png"]["region_captions"] + lines["deep/3.png"]["region_captions"] == expected
    assert lines["deep/3.png"]["boxes"] == BOXES["deep/3.png"]
    assert lines["1.png"]["boxes"] == lines["deep/2.png"]["region_captions"] == []


def test_the_vision_tower_runs_once_over_an_image_and_its_boxes(folder, out, tiny_model, tiny_processor):
    counts = []
    hook = tiny_model.vision_tower.register_forward_hook(
        lambda module, inputs, kwargs, output: counts.append(len((*inputs, *kwargs.values())[0])), with_kwargs=True
    )
    caption_folder(folder, tiny_model, tiny_processor, out, with_boxes=True)
    hook.remove()
    assert sum(counts) == len(NAMES)


def test_an_image_is_prepared_once_for_itself_and_its_boxes(folder, out, tiny_model, tiny_processor, monkeypatch):
    prepared, prepare = [], type(tiny_processor.image_processor).preprocess

    def counting(processor, images, *args, **kwargs):
        prepared.extend(image for image in images if image.getbbox())  # no blank ones, by which sizes are found
        return prepare(processor, images, *args, **kwargs)

    monkeypatch.setattr(type(tiny_processor.image_processor), "preprocess", counting)
    caption_folder(folder, tiny_model, tiny_processor, out, with_boxes=True)
    assert len(prepared) == len(NAMES)
    monkeypatch.setattr(captioning, "pictures_prepared_once", lambda processor: nullcontext())
    caption_folder(folder, tiny_model, tiny_processor, out.with_name("apart"), with_boxes=True)
    assert len(prepared) == 2 * len(NAMES) + len(BOXES)
    assert read(out) == read(out.with_name("apart"))


@pytest.mark.parametrize("side", [30, 40])
def test_pictures_that_differ_in_shape_are_prepared_together(side):
    """As it may depend on the others what becomes of one: here they are padded to the widest."""

    class Padding:
        def preprocess(self, images, **options):
            return {"pixel_values": torch.zeros(len(images), 3, 40, max(image.width for image in images))}

    images = [Image.new("RGB", (40, 40)), Image.new("RGB", (side, 40), "red")]
    processor = SimpleNamespace(image_processor=Padding(), vlm_processor=None)
    with pictures_prepared_once(processor):
        together = processor.image_processor.preprocess(images, return_tensors="pt")["pixel_values"]
        assert together.shape == (2, 3, 40, 40)
    assert vars(processor.image_processor) == {}


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_captions_of_boxes_go_to_their_image(folder, out, echo, batch_size):
    caption_folder(folder, torch.nn.Identity(), None, out, with_boxes=True, batch_size=batch_size)
    for line in read(out):
        color = str(Image.open(folder / line["file_name"]).getpixel((0, 0)))
        assert line["caption"] == color
        assert line["region_captions"] == [f"{color} {box}" for box in line["boxes"]]
        assert line["boxes"] == BOXES.get(line["file_name"], [])


def test_a_killed_run_goes_on_where_it_stopped(folder, out, echo):
    caption_folder(folder, None, None, out.with_name("reference"), batch_size=2)
    reference = out.with_name("reference").read_bytes()
    first_two = reference.index(b"\n", reference.index(b"\n") + 1) + 1
    out.write_bytes(reference[: first_two + 20])  # two lines and a part of the third
    echo.clear()
    assert caption_folder(folder, None, None, out, batch_size=2) == (5, 3, [], {})
    assert out.read_bytes() == reference and echo == [2, 1]
    assert caption_folder(folder, None, None, out) == (5, 0, [], {})
    assert out.read_bytes() == reference


def test_edited_images_are_captioned_anew_and_deleted_ones_taken_out(folder, out, echo):
    caption_folder(folder, None, None, out)
    old = {line["file_name"]: line for line in read(out)}
    del old["1.png"]["version"]  # as an earlier release wrote it
    out.write_text("".join(json.dumps(line) + "\n" for line in old.values()))
    Image.new("RGB", (40, 30), "red").save(folder / "0.png")
    Image.new("RGB", (40, 30), "red").save(folder / "1.png")
    (folder / "deep" / "3.png").unlink()
    echo.clear()
    assert caption_folder(folder, None, None, out)[:2] == (4, 1) and echo == [1]
    new = {line["file_name"]: line for line in read(out)}
    assert new["0.png"]["caption"] == "(255, 0, 0)"
    assert list(new) == ["1.png", "deep/2.png", "deep/4.png", "0.png"]
    assert all(new[name] == old[name] for name in ("1.png", "deep/2.png", "deep/4.png"))
    caption_folder(folder, None, None, out, names=["0.png"])  # the others are still there
    assert {line["file_name"] for line in read(out)} == set(new)


@pytest.mark.parametrize("left", [b'{"file_name', bytes(500)])
def test_a_full_disk_or_a_power_cut_loses_no_line(folder, out, echo, monkeypatch, left):
    """What the disk took of a line is cut off, without writing again what was there."""
    caption_folder(folder, None, None, out.with_name("reference"), batch_size=2)
    calls, fsync = [], os.fsync

    def full(number):
        calls.append(number)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        fsync(number)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        caption_folder(folder, None, None, out, batch_size=2)
    with open(out, "ab") as file:
        file.write(left)
    monkeypatch.setattr("pathlib.Path.write_bytes", None)
    assert caption_folder(folder, None, None, out, batch_size=2)[:2] == (5, 1)
    assert out.read_bytes() == out.with_name("reference").read_bytes()


def test_an_empty_path_is_not_the_current_folder(folder, out, echo, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match="`folder` is ''; expected a folder of images"):
        caption_folder("", None, None, out)
    with pytest.raises(ValueError, match="`out` is ''; expected a path"):
        caption_folder(folder, None, None, "")


def test_text_is_kept_as_it_is(folder, out, monkeypatch):
    odd = 'ein "Stern"\u2028\x85\nüber allem ★'
    monkeypatch.setattr(captioning, "generate_captions", lambda model, processor, images: [odd] * len(images))
    monkeypatch.setattr(captioning, "shorter_side_for", lambda processor: 100)
    caption_folder(folder, None, None, out)
    assert [json.loads(line)["caption"] for line in out.read_text(encoding="utf-8").split("\n")[:-1]] == [odd] * 5
    assert caption_folder(folder, None, None, out).captioned == 0


def test_bad_files_and_bad_boxes_are_left_out_and_reported(folder, out, tiny_model, tiny_processor):
    (folder / "empty.png").write_bytes(b"")
    with open(folder / "metadata.jsonl", "a") as metadata:
        metadata.write(json.dumps({"file_name": "1.png", "boxes": [[10, 10, 10, 20]]}))
    report = caption_folder(folder, tiny_model, tiny_processor, out, with_boxes=True)
    assert report[:2] == (4, 4)
    reasons = dict(report.skipped)
    assert set(reasons) == {"empty.png", "1.png"} and "[10.0, 10.0, 10.0, 20.0]" in reasons["1.png"]


def test_boxes_need_metadata_that_has_them(folder, out, echo):
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png"}\n')
    with pytest.raises(ValueError, match="captions of boxes are asked for, but no line of .*jsonl' has any; expected"):
        caption_folder(folder, None, None, out, with_boxes=True)
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "boxes": [5, 5, 20, 20]}\n')
    with pytest.raises(ValueError, match=r"Left out: 1 line: 1 has `boxes` with 5; expected a list of \[x0, y0,"):
        caption_folder(folder, None, None, out, with_boxes=True)
    (folder / "metadata.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"metadata\.jsonl"):
        caption_folder(folder, None, None, out, with_boxes=True)
    assert not out.exists()


def test_lines_about_one_image_are_joined_and_a_bad_one_costs_itself(folder, out, echo):
    first, second = [1, 2, 9, 8], [3, 3, 7, 7]
    lines: list = [
        {"file_name": "0.png", "boxes": [first]},
        {"boxes": [first]},
        {"file_name": "1.png", "boxes": "all"},
    ]
    lines += [{"file_name": "0.png", "text": "a star"}, {"file_name": "./0.png", "boxes": [first, second]}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    report = caption_folder(folder, torch.nn.Identity(), None, out, with_boxes=True)
    boxes = {line["file_name"]: line["boxes"] for line in read(out)}
    assert boxes["0.png"] == [first, second] and boxes["1.png"] == []
    [(name, reason)] = report.skipped
    assert (
        name == "metadata.jsonl" and "2 lines: 2 has no `file_name`; it has boxes. 3 has `boxes` with 'all'" in reason
    )


def test_a_file_that_is_something_else_is_not_appended_to(folder, out, echo):
    out.write_text("dear diary\n")
    with pytest.raises(ValueError, match="line 1 is 'dear diary'"):
        caption_folder(folder, None, None, out)
    assert out.read_text() == "dear diary\n"
    for line in ({"file_name": "a.png", "text": "of a gallery"}, {"file_name": 3, "caption": "a star"}):
        out.write_text(json.dumps(line) + "\n")
        with pytest.raises(ValueError, match="line 1 is .*; expected captions of an earlier run"):
            caption_folder(folder, None, None, out)
        assert json.loads(out.read_text()) == line
    out.unlink()
    caption_folder(folder, None, None, out)
    with pytest.raises(ValueError, match="written without captions of boxes"):
        caption_folder(folder, None, None, out, with_boxes=True)
    with pytest.raises(ValueError, match="a folder; expected a file"):
        caption_folder(folder, None, None, folder)
