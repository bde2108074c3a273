import os

import pytest
from PIL import Image

from mmgem.training.data.image_files import apply_to_batch, find_images, read_batches


def write_image(path, size=(8, 6), color="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def test_images_are_found_at_any_depth_by_extension_in_any_case(tmp_path):
    for name in ("b.png", "a/deep/er/c.JPG", "a/d.webp", ".hidden.png", ".thumbnails/e.png", "._b.png"):
        write_image(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    assert find_images(tmp_path) == ["a/d.webp", "a/deep/er/c.JPG", "b.png"]


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
    batches = list(read_batches(tmp_path, names, batch_size, skipped))
    files = [file for batch in batches for file in batch]
    assert [file.file_name for file in files] == names[:3] + names[4:]
    assert [file.image.width for file in files] == [1, 2, 3, 5, 6, 7]
    assert len(batches) == -(-7 // batch_size)
    assert [file.file_name for file in skipped] == [names[3]]


def test_one_batch_is_read_ahead_and_no_more(tmp_path, monkeypatch):
    names = [f"{number}.png" for number in range(12)]
    seen = []
    monkeypatch.setattr(
        "mmgem.training.data.image_files.load_image", lambda path: seen.append(path.name) or Image.new("RGB", (1, 1))
    )
    batches = read_batches(tmp_path, names, 3, [])
    next(batches)
    assert set(seen) <= set(names[:6])


def test_whatever_is_wrong_with_a_file_is_reported_and_never_fatal(tmp_path):
    write_image(tmp_path / "good.png")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:40])
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    undecodable = os.fsdecode(b"caf\xe9.png")
    (tmp_path / undecodable).write_bytes((tmp_path / "good.png").read_bytes())
    skipped = []
    [batch] = read_batches(tmp_path, find_images(tmp_path), 10, skipped)
    assert [file.file_name for file in batch] == ["good.png"]
    assert sorted(file.file_name for file in skipped) == [
        "caf\ufffd.png",
        "cut.png",
        "empty.png",
        "link.png",
        "text.jpg",
    ]
    assert all(file.reason and "\n" not in file.reason for file in skipped)


def test_a_batch_size_of_zero_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`batch_size` is 0; expected 1 or more"):
        next(read_batches(tmp_path, ["a.png"], 0, []))


def test_an_image_that_fails_takes_no_other_with_it(tmp_path):
    names = [f"{number}.png" for number in range(4)]
    for number, name in enumerate(names):
        write_image(tmp_path / name, size=(number + 1, 1))
    skipped = []
    [batch] = read_batches(tmp_path, names, 10, skipped)

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
