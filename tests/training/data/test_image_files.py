import copy
import errno
import os
import sys
from contextlib import nullcontext
from unittest import mock

import pytest
from PIL import Image
from tiny_models import IMAGE_SIZE

from mmgem.training.data import image_files
from mmgem.training.data.image_files import ImageReader, apply_to_batch, content_hash, find_images, shorter_side_for


def write_image(path, size=(8, 6), color="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def test_images_are_found_at_any_depth_by_extension_in_any_case(tmp_path):
    for name in ("b.png", "a/deep/er/c.JPG", "a/d.webp", ".hidden.png", ".thumbnails/e.png", "._b.png"):
        write_image(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    found = find_images(tmp_path)
    assert list(found.versions) == ["a/d.webp", "a/deep/er/c.JPG", "b.png"]
    assert (found.unseen, found.empty, found.passed_over) == ({}, set(), {})
    os.utime(tmp_path / "b.png", ns=(1, 1))
    changed = find_images(tmp_path).versions
    assert {name for name in changed if changed[name] != found.versions[name]} == {"b.png"}


def test_what_is_not_read_is_counted_and_what_cannot_be_seen_is_named(tmp_path, monkeypatch):
    folder = tmp_path / "images"
    for name in ("a.png", "shut/b.png", "shut.not/c.png", "folder.jpg/d.png"):
        write_image(folder / name)
    (folder / "empty").mkdir()
    (folder / "link").symlink_to(tmp_path)  # and its images would be found without end
    (folder / "link.png").symlink_to(folder / "shut")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "gone.jpg").symlink_to(tmp_path / "nowhere")
    (folder / "gone.txt").symlink_to(tmp_path / "nowhere")
    (folder / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.jpeg")
    for name in ("e.cr2", "f.CR2", "g.svg", "h.txt", ".i.cr2"):
        (folder / name).touch()
    scandir = os.scandir

    def listing(path):
        if str(path).endswith("shut"):
            raise OSError(112, "Host is down", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", listing)
    found = find_images(folder)
    assert list(found.versions) == ["a.png", "folder.jpg/d.png", "shut.not/c.png"]
    assert found.unseen.keys() == {"shut", "loop.png", "gone.jpg"} and found.empty == {"empty"}
    assert found.unseen["shut"] == "it cannot be listed: Host is down"
    assert found.passed_over == {".cr2 files": 2, ".svg files": 1, "links to folders": 2, "pipes and devices": 2}
    for name in ("shut/b.png", "shut/er/b.png", "empty/x.png", "gone.jpg"):
        assert found.hiding_place(name) == name.split("/")[0]
    for name in ("shut.not/x.png", "shut.png", "x.png", "folder.jpg/x.png"):
        assert found.hiding_place(name) is None


def test_folders_deeper_than_the_system_has_paths_for_are_named(tmp_path):
    write_image(tmp_path / "a.png")
    where, deep = os.getcwd(), "d" * 200
    try:
        os.chdir(tmp_path)
        for _ in range(25):
            os.mkdir(deep)
            os.chdir(deep)
    finally:
        os.chdir(where)
    found = find_images(tmp_path)
    assert list(found.versions) == ["a.png"]
    [(name, reason)] = found.unseen.items()
    assert name.startswith(f"{deep}/{deep}") and reason == "it cannot be listed: File name too long"


def test_a_folder_that_is_not_one_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.*not there"):
        find_images(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="without images"):
        find_images(tmp_path)
    write_image(tmp_path / "a.png")
    with pytest.raises(ValueError, match="a file"):
        find_images(tmp_path / "a.png")


@pytest.mark.parametrize("batch_size", [1, 2, 3, 10])
def test_batches_hold_every_readable_image_once_in_order(tmp_path, batch_size):
    names = [f"{number}.png" for number in range(7)]
    for number, name in enumerate(names):
        write_image(tmp_path / name, size=(number + 1, 1))
    (tmp_path / names[3]).write_bytes(b"")
    skipped = []
    batches = list(ImageReader(tmp_path).read_batches(names, batch_size, skipped))
    files = [file for batch in batches for file in batch]
    assert [file.file_name for file in files] == names[:3] + names[4:]
    assert [file.image.width for file in files] == [1, 2, 3, 5, 6, 7]
    assert len(batches) == -(-7 // batch_size)
    assert [file.file_name for file in skipped] == [names[3]]


def test_one_batch_is_read_ahead_and_no_more(tmp_path, monkeypatch):
    names = [f"{number}.png" for number in range(12)]
    write_image(tmp_path / "image.png")
    data, seen = (tmp_path / "image.png").read_bytes(), []
    monkeypatch.setattr(image_files, "read_file", lambda path: seen.append(path.name) or data)
    batches = ImageReader(tmp_path).read_batches(names, 3, [])
    next(batches)
    assert set(seen) <= set(names[:6])
    batches.close()


def test_pixels_in_memory_are_limited_and_every_image_comes_in_order(tmp_path, monkeypatch):
    """Some pictures alone have more than all are allowed together."""
    names = [f"{number:02}.png" for number in range(30)]
    for number, name in enumerate(names):
        write_image(tmp_path / name, size=(10, 60 if number in (7, 8, 20) else 10))
    monkeypatch.setattr(image_files, "PIXELS_IN_MEMORY", 500)
    monkeypatch.setattr(image_files, "PIXELS_TO_A_BATCH", 250)
    reader, skipped = ImageReader(tmp_path), []
    batches, most = [], 0
    for batch in reader.read_batches(names, 8, skipped):
        most = max(most, reader._budget._used)
        batches.append([file.file_name for file in batch])
    assert sum(batches, []) == names and skipped == []
    assert [len(batch) for batch in batches[:5]] == [3, 3, 2, 1, 3]
    assert most <= 500 + 2 * 600 and reader._budget._used == 0


def test_a_reader_that_is_given_up_waits_for_nothing(tmp_path, monkeypatch):
    names = [f"{number:02}.png" for number in range(30)]
    for name in names:
        write_image(tmp_path / name, size=(10, 10))
    monkeypatch.setattr(image_files, "PIXELS_IN_MEMORY", 150)
    batches = ImageReader(tmp_path).read_batches(names, 8, [])
    next(batches)
    batches.close()


def test_reduced_pictures_say_how_large_they_are(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.new("RGB", (900, 600)).save(tmp_path / "a.jpg", exif=exif)
    [[file]] = ImageReader(tmp_path, shorter_side=100).read_batches(["a.jpg"], 8, [])
    assert file.size == (600, 900) and file.image.size == (150, 225)
    skipped = []
    assert list(ImageReader(tmp_path, max_pixels=539_999).read_batches(["a.jpg"], 8, skipped)) == [[]]
    assert "900 x 600 pixels; expected at most 539,999" in skipped[0].reason


def test_the_view_of_a_processor_is_found_by_asking_it(tiny_processor, monkeypatch):
    assert shorter_side_for(tiny_processor) == 2 * IMAGE_SIZE
    larger = copy.deepcopy(tiny_processor)
    larger.image_processor.size = {"height": 40, "width": 40}
    assert shorter_side_for(larger) == 80
    monkeypatch.setattr(Image, "new", None)  # processors that are set up alike are asked once
    assert shorter_side_for(copy.deepcopy(tiny_processor), 0.5) == 4 * IMAGE_SIZE


def test_whatever_is_wrong_with_a_file_is_reported_and_never_fatal(tmp_path):
    write_image(tmp_path / "good.png")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:40])
    undecodable = os.fsdecode(b"caf\xe9.png")
    (tmp_path / undecodable).write_bytes((tmp_path / "good.png").read_bytes())
    skipped = []
    [batch] = ImageReader(tmp_path).read_batches(list(find_images(tmp_path).versions), 10, skipped)
    assert [file.file_name for file in batch] == ["good.png"]
    assert sorted(file.file_name for file in skipped) == [
        r"caf\xe9.png",
        "cut.png",
        "empty.png",
        "text.jpg",
    ]
    assert all(file.reason and "\n" not in file.reason for file in skipped)
    assert "its name is not UTF-8" in dict(skipped)[r"caf\xe9.png"]


def test_too_many_open_files_are_the_fault_of_no_image(tmp_path, monkeypatch):
    write_image(tmp_path / "good.png")
    error = OSError(errno.EMFILE, "Too many open files")
    monkeypatch.setattr(image_files, "read_file", mock.Mock(side_effect=error))
    with pytest.raises(OSError, match="Too many open files"):
        list(ImageReader(tmp_path).read_batches(["good.png"], 1, []))


def test_names_that_would_be_read_otherwise_than_before_are_refused(tmp_path, monkeypatch):
    """As under LC_ALL=en_US.ISO-8859-1; every image with another letter would seem to be gone."""
    write_image(tmp_path / "good.png")
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "iso8859-1")
    with pytest.raises(ValueError, match="are read as iso8859-1 here; expected utf-8. Set PYTHONUTF8=1"):
        find_images(tmp_path)


def test_files_of_known_content_are_recognized_and_not_decoded(tmp_path):
    for number in range(4):
        write_image(tmp_path / f"{number}.png", size=(number + 1, 1))
    contents = [content_hash((tmp_path / f"{number}.png").read_bytes()) for number in range(4)]
    names, skipped = [f"{number}.png" for number in range(4)], []
    reader = ImageReader(tmp_path, is_known=lambda file_name, content: (file_name, content) == ("2.png", contents[2]))
    [batch] = reader.read_batches(names, 10, skipped)
    assert [file.file_name for file in batch] == ["0.png", "1.png", "3.png"] and skipped == []
    assert reader.recognized == {"2.png": contents[2]}
    assert [file.content for file in batch] == contents[:2] + contents[3:] and len(set(contents)) == 4


def test_a_batch_size_of_zero_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`batch_size` is 0; expected 1 or more"):
        next(ImageReader(tmp_path).read_batches(["a.png"], 0, []))


def test_an_image_that_fails_takes_no_other_with_it(tmp_path):
    names = [f"{number}.png" for number in range(4)]
    for number, name in enumerate(names):
        write_image(tmp_path / name, size=(number + 1, 1))
    skipped = []
    [batch] = ImageReader(tmp_path).read_batches(names, 10, skipped)

    def width(files):
        if any(file.image.width == 2 for file in files):
            raise ValueError("two is\ntoo many")
        return [file.image.width for file in files]

    assert [(file.file_name, value) for file, value in apply_to_batch(width, batch, skipped)] == [
        ("0.png", 1),
        ("2.png", 3),
        ("3.png", 4),
    ]
    assert skipped == [("1.png", "two is too many")]
    assert apply_to_batch(width, [], skipped) == []


def test_heic_is_read_where_pillow_heif_is_and_counted_where_it_is_not(tmp_path, monkeypatch):
    for name in ("a.png", "b.heic", "c.HEIF"):
        (tmp_path / name).touch()
    with monkeypatch.context() as patch:
        patch.setattr(image_files, "READS_HEIF", True)
        patch.setattr(image_files, "SUFFIXES", (".png", *image_files.HEIF_SUFFIXES))
        assert list(find_images(tmp_path).versions) == ["a.png", "b.heic", "c.HEIF"]
    monkeypatch.setattr(image_files, "READS_HEIF", False)
    monkeypatch.setattr(image_files, "SUFFIXES", (".png",))
    found = find_images(tmp_path)
    assert list(found.versions) == ["a.png"]
    needing = "files, which need pillow-heif"
    assert found.passed_over == {f".heic {needing}": 1, f".heif {needing}": 1}


def test_every_suffix_of_a_picture_that_pillow_knows_is_read_or_counted():
    Image.init()
    known = {suffix for suffix, name in Image.EXTENSION.items() if Image.MIME.get(name, "").startswith("image/")}
    assert len(known) > 30
    heif = set(image_files.HEIF_SUFFIXES)
    assert known <= {*image_files.SUFFIXES, *image_files.OTHER_SUFFIXES, *heif}
    assert not heif & set(image_files.OTHER_SUFFIXES)


def test_of_files_that_are_named_each_is_found_or_counted(tmp_path):
    for name in ("a.png", "b.png", "deep/c.JPG", ".hidden.png", "d.txt", "e.cr2", "plain"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = ["deep/c.JPG", "a.png", ".hidden.png", "d.txt", "e.cr2", "plain", "deep", "gone.png"]
    found = find_images(tmp_path, names=names)
    assert list(found.versions) == [".hidden.png", "a.png", "deep/c.JPG"]
    counted = {".txt files": 1, ".cr2 files": 1, "files without a suffix": 1, "folders": 1, "names of no file": 1}
    assert found.passed_over == counted and found.unseen == {}
    assert list(find_images(tmp_path, (".txt",), ["d.txt"]).versions) == ["d.txt"]


def test_what_no_system_says_the_kind_of_is_unseen(tmp_path, monkeypatch):
    """As on a disk that fails, where lists do not say what is a folder."""

    class Entry:
        name = "a"

        def is_dir(self, follow_symlinks):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "scandir", lambda folder: nullcontext([Entry()]))
    assert find_images(tmp_path).unseen == {"a": "it cannot be looked at: Input/output error"}
