"""A bad row never ends a run: it is left out, named and counted, or cut by a rule; in training and in evaluation."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import build_model

from mmgem.training.data.collator import MMGEMCollator
from mmgem.training.data.image_folder import FolderSource, read_image_folder
from mmgem.training.data.mixture import Mixture
from mmgem.training.data.open_source import open_source
from mmgem.training.data.shards import ShardSource
from mmgem.training.data.skipped import SkippedLog
from mmgem.training.data.sources import DatasetSource
from mmgem.training.evaluation.calibration import calibrate
from mmgem.training.evaluation.evaluate import evaluate_model

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
GOOD = {"image": PICTURE, "caption": "a red star"}
DEEP = "[" * 100_000 + "]" * 100_000


def png() -> bytes:
    buffer = io.BytesIO()
    PICTURE.save(buffer, "PNG")
    return buffer.getvalue()


BAD_ROWS = {
    "no picture": {"image": b"nothing", "caption": "a star"},
    "truncated": {"image": png()[:900], "caption": "a star"},
    "empty picture": {"image": b"", "caption": "a star"},
    "no file": {"image": "nothing.png", "caption": "a star"},
    "surrogate": {"image": PICTURE, "caption": "a \ud800 star"},
    "surrogate in an answer": {"image": PICTURE, "qa": [{"question": "what?", "answer": "\udfff"}]},
    "surrogate in a label": {"image": PICTURE, "label": "\ud800", "caption": "a star"},
    "empty caption": {"image": PICTURE, "caption": " "},
    "a number": {"image": PICTURE, "caption": 3},
    "unknown prompt": {"image": PICTURE, "caption": "a star", "prompt_name": "nobody"},
    "box outside": {"image": PICTURE, "boxes": [[90, 90, 99, 99]], "region_captions": ["a star"]},
    "a box that is none": {"image": PICTURE, "boxes": [["x", 0, 1, 2]], "region_captions": ["a star"]},
    "no caption of a box": {"image": PICTURE, "boxes": [[0, 0, 9, 9]], "caption": "a star"},
    "question without answer": {"image": PICTURE, "qa": [{"question": "what?"}]},
    "several images, one missing": {"images": [PICTURE, "nothing.png"], "caption": "two", "image_id": "7"},
    "too many images": {
        "images": [PICTURE] * 60,
        "edit": {"instruction": "in blue"},
        "edited_image": PICTURE,
        "caption": "many",
        "image_id": "8",
    },
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_left_out_and_named(tiny_processor, name):
    skipped = SkippedLog()
    rows = Mixture([DatasetSource([GOOD, BAD_ROWS[name]])], None, 0, 6, skipped)
    collator = MMGEMCollator(tiny_processor, edits_per_image=1, label_template="a {label}")
    rows.check = collator.check
    batch = collator([rows[position] for position in range(6)])
    assert batch["pixel_values"].shape[0] == 6
    assert skipped.counts() == {"data": 1} and ("data", "1") in skipped._added


LONG = "a red star " * 200
ODD_ROWS = {
    "placeholder": {"image": PICTURE, "caption": "the <image> of a star"},
    "only a placeholder": {"image": PICTURE, "caption": "<image>"},
    "llava": {"image": PICTURE, "qa": [{"question": "<image>\nWhat is it?", "answer": "a star"}]},
    "llava, at the end": {"image": PICTURE, "qa": [{"question": "What is it?\n<image>", "answer": "a star"}]},
    "placeholder in an answer": {"image": PICTURE, "qa": [{"question": "what?", "answer": "<image>"}]},
    "long answer": {"image": PICTURE, "qa": [{"question": "what?", "answer": LONG}]},
    "long question": {"image": PICTURE, "qa": [{"question": LONG, "answer": "a star"}]},
    "long question and answer": {"image": PICTURE, "qa": [{"question": LONG, "answer": LONG}]},
    "long caption": {"image": PICTURE, "caption": LONG, "long_caption": LONG},
    "long region": {"image": PICTURE, "boxes": [[0, 0, 20, 20]], "region_captions": [LONG]},
    "long instruction": {
        "images": [PICTURE] * 8,
        "edit": {"instruction": LONG},
        "edited_image": PICTURE,
        "caption": "a star",
        "image_id": "8",
    },
    "end token": {"image": PICTURE, "caption": "a <|endoftext|> star"},
}


@pytest.fixture(scope="module")
def model():
    return build_model()


@pytest.mark.parametrize("name", ODD_ROWS)
def test_an_odd_row_is_cut_by_rule_and_trained(model, tiny_processor, name):
    tiny_processor.tokenizer.model_max_length = 256 - 4 - 1  # all that the model takes
    collator = MMGEMCollator(tiny_processor, edits_per_image=1, long_caption_probability=1.0)
    row = ODD_ROWS[name] | {"draw_seed": 0}
    collator.check(row)
    batch = collator([row, GOOD | {"draw_seed": 1, "image_id": "0"}] if "image_id" in row else [row])
    assert not (batch["input_ids"] == tiny_processor.image_token_id).any()
    assert torch.isfinite(model(**batch).loss)
    if "long" in name:
        assert tiny_processor.cut_texts
        assert (batch["labels"] != -100).any(-1)[: 1 if "question" in name else 0].all()  # an answer is left to learn
    tiny_processor.tokenizer.model_max_length, tiny_processor.cut_texts = 200, 0


def test_questions_of_llava_are_those_without_the_placeholder(tiny_processor):
    for question in ("<image>\nWhat is it?", "What is it?\n<image>", " <image> <image>\nWhat is it?", "What is it?"):
        assert tiny_processor.plain_text(question) == "What is it?"
        assert tiny_processor.prompt(question) == "<image>What is it?"
    assert tiny_processor.plain_text("the <image> of a star") == "the image of a star"
    assert tiny_processor.plain_text("<image>") == "image"


def write_folder(folder, lines):
    folder.mkdir()
    (folder / "good.png").write_bytes(png())
    (folder / "cut.png").write_bytes(png()[:900])
    (folder / "metadata.jsonl").write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    )
    return folder


def test_json_nested_without_end(tmp_path):
    lines = [{"file_name": "good.png", "caption": "a star"}, '{"file_name": "good.png", "caption": ' + DEEP + "}"]
    folder = write_folder(tmp_path / "folder", lines)
    skipped = SkippedLog()
    rows = Mixture([FolderSource(str(folder))], None, 0, 4, skipped)
    assert [rows[position]["captions"] for position in range(4)] == [["a star"]] * 4
    assert len(skipped._added) == 1
    with pytest.raises(ValueError, match="line 2 .*nested too deeply"):
        read_image_folder(folder)


def write_shard(path, files):
    with tarfile.open(path, "w") as shard:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            shard.addfile(info, io.BytesIO(data))


def sparse_member(name: str, size: int) -> bytes:
    """A member of GNU tar that says it has `size` bytes and holds 512."""
    header = tarfile.TarInfo(name)
    header.size, header.type = 512, tarfile.GNUTYPE_SPARSE
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    block[386:398], block[398:410] = b"%011o\0" % 0, b"%011o\0" % 512
    block[483:495] = b"%011o\0" % size if size < 8**11 else b"\x80" + size.to_bytes(11, "big")
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block[:512])
    return bytes(block) + bytes(512)


def test_a_member_of_thirty_gigabytes_in_a_small_shard(tmp_path):
    path = tmp_path / "a.tar"
    write_shard(path, [("0.png", png()), ("0.txt", b"a star")])
    content = path.read_bytes()
    end = len(content.rstrip(b"\0"))
    end += -end % 512
    path.write_bytes(content[:end] + sparse_member("1.png", 30 * 10**9) + bytes(1024))
    source = ShardSource(str(path))
    assert len(source) == 2
    skipped = SkippedLog()
    rows = Mixture([source], None, 0, 4, skipped)
    assert [rows[position]["captions"] for position in range(4)] == [["a star"]] * 4
    [(_, key)] = skipped._added
    assert key == "a.tar/1"
    with pytest.raises(ValueError, match="has a sample of 30,000,000,000 bytes"):
        source.fields(1)


def test_a_sample_of_a_shard_with_json_nested_without_end(tmp_path):
    write_shard(tmp_path / "a.tar", [("0.png", png()), ("0.txt", b"a"), ("1.png", png()), ("1.json", DEEP.encode())])
    source = ShardSource(str(tmp_path / "a.tar"))
    with pytest.raises(ValueError, match="nested too deeply"):
        source[1]


def test_evaluation_leaves_out_what_training_does(tmp_path, model, tiny_processor):
    lines = [{"file_name": "good.png", "caption": f"a star {number}"} for number in range(3)]
    folder = write_folder(tmp_path / "folder", [lines[0], {"file_name": "cut.png", "caption": "cut"}, *lines[1:]])
    for size in (1, 64):
        skipped = SkippedLog(rows_name="folder")
        dataset = read_image_folder(folder)
        figures = evaluate_model(model, tiny_processor, dataset, size, max_new_tokens=1, skipped=skipped)
        assert skipped.counts() == {"folder": 1} and skipped._added == {("folder", "1")}
        whole = [dataset[number] for number in (0, 2, 3)]
        expected = evaluate_model(model, tiny_processor, whole, size, max_new_tokens=1)
        assert figures == pytest.approx(expected)
    with pytest.raises(ValueError, match="1 rows that can be read; expected 2 or more"):
        evaluate_model(model, tiny_processor, [GOOD, BAD_ROWS["truncated"]], max_new_tokens=1)


def test_evaluation_leaves_out_rows_whose_boxes_lie_outside(model, tiny_processor):
    boxed = [
        GOOD | {"boxes": [box], "region_captions": ["it"]} for box in ([0, 0, 9, 9], [50, 50, 60, 60], [5, 5, 9, 9])
    ]
    skipped = SkippedLog()
    figures = evaluate_model(model, tiny_processor, boxed, max_new_tokens=1, skipped=skipped)
    assert skipped._added == {("rows", "1")} and "region_recall@1" in figures


def test_calibration_leaves_out_what_training_does(tiny_processor):
    model, skipped = build_model(), SkippedLog()
    other = {"image": PICTURE.rotate(90), "caption": "a blue moon"}
    bad = [BAD_ROWS[name] for name in ("truncated", "surrogate", "empty caption")]
    report = calibrate(model, tiny_processor, [GOOD, *bad, other], skipped=skipped)
    assert skipped.counts() == {"rows": 3} and report.counts == {"text": 2, "image": 2, "fused": 2}


OUTSIDE = ["../good.png", "/etc/good.png", "a/../../good.png", "C:\\good.png", "..\\good.png", "//host/good.png"]


@pytest.mark.parametrize("path", OUTSIDE)
def test_paths_stay_below_their_folder(tmp_path, path):
    (tmp_path / "good.png").write_bytes(png())
    folder = write_folder(tmp_path / "folder", [{"file_name": path, "caption": "a star"}])
    for read in (lambda: FolderSource(str(folder))[0], lambda: read_image_folder(folder)):
        with pytest.raises(ValueError, match="may lead out of the folder; expected a path below it, or `allow_out"):
            read()


def test_paths_may_be_let_out_of_their_folder(tmp_path):
    (tmp_path / "good.png").write_bytes(png())
    folder = write_folder(tmp_path / "folder", [{"file_name": "../good.png", "caption": "a star"}])
    source = open_source({"folder": str(folder), "allow_outside_paths": True})
    assert source[0]["image"].size == source.checked()[0]["image"].size == (40, 40)


@pytest.mark.parametrize("image", ["/etc/a.png", "a.png", "http://127.0.0.1/a.png", "file:///etc/a.png"])
def test_a_shard_names_no_files_and_no_urls(tmp_path, image):
    content = json.dumps({"image": image, "text": "a star"}).encode()
    write_shard(tmp_path / "a.tar", [("0.json", content), ("1.json", content)])
    source = open_source({"webdataset": str(tmp_path / "a.tar"), "allow_urls": True, "allow_outside_paths": True})
    with pytest.raises(ValueError, match="outside the shard; expected a file in it"):
        source[0]


def test_rows_name_urls_only_where_they_may():
    rows = [{"image": "http://127.0.0.1:9/a.png", "caption": "a star"}]
    with pytest.raises(ValueError, match="fetching is off"):
        DatasetSource(rows)[0]
    source = DatasetSource(rows)
    source.allow_urls = True
    with pytest.raises(ValueError, match="which is no public address"):
        source[0]
