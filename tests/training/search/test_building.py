import json
import os
import shutil
import threading
from dataclasses import asdict
from functools import partial

import numpy as np
import pyarrow as pa
import pytest
import torch
from image_folders import NAMES, build_multi_vector_model, write_noise
from PIL import Image
from safetensors.numpy import save
from tiny_models import build_model

from mmgem.training.inference import batch_of, embed_and_remember, embed_images, remember
from mmgem.training.search import building, item_embedder, storage
from mmgem.training.search.building import build_index
from mmgem.training.search.index import SearchIndex
from mmgem.training.search.storage import MANIFEST, UNFINISHED, read_index, verify_index


def read(out):
    return read_index(out, "out").rows


def array_of(out, name):
    return read(out).arrays[name][:]


def vectors_of(out):
    return read_index(out, "out").facts.codec.decode(array_of(out, "embedding"))


@pytest.fixture
def embedded(monkeypatch):
    """The number of images in each batch that is embedded for an index, probes aside."""
    sizes = []

    def counting(function, model, processor, images):
        sizes.append(len(images))
        return function(model, processor, images)

    monkeypatch.setattr(item_embedder, "embed_images", partial(counting, embed_images))
    monkeypatch.setattr(item_embedder, "embed_and_remember", partial(counting, embed_and_remember))
    return sizes


@pytest.mark.parametrize("memory", [False, True])
def test_the_vision_tower_runs_once_over_each_image(folder, out, tiny_processor, monkeypatch, memory):
    model, sizes = build_multi_vector_model(4), []
    take = building.Fingerprint.take

    def take_and_forget(*arguments):
        fingerprint = take(*arguments)
        sizes.clear()  # of the probes
        return fingerprint

    monkeypatch.setattr(building.Fingerprint, "take", take_and_forget)
    hook = model.vision_tower.register_forward_hook(
        lambda module, inputs, kwargs, output: sizes.append(len((*inputs, *kwargs.values())[0])), with_kwargs=True
    )
    build_index(folder, model, tiny_processor, out, batch_size=3, memory=memory)
    assert sizes == [3, 3, 1]
    hook.remove()
    paths = [folder / name for name in sorted(NAMES)]
    np.testing.assert_allclose(vectors_of(out), embed_images(model, tiny_processor, paths), atol=1e-6)
    if memory:
        kept = array_of(out, "memory")
        np.testing.assert_array_equal(kept, remember(model, tiny_processor, paths).half())


def test_an_index_has_the_unit_embedding_of_every_image(folder, out, tiny_model, tiny_processor):
    report = build_index(folder, tiny_model, tiny_processor, out, batch_size=3)
    assert report == (7, 7, [], 64, {}, {"image": 7}, {})
    rows = read(out)
    assert rows["file_name"] == sorted(NAMES)
    assert set(zip(rows["width"], rows["height"], strict=True)) == {(40, 30)}
    embeddings = torch.tensor(rows.arrays["embedding"][:])
    expected = embed_images(tiny_model, tiny_processor, [folder / name for name in sorted(NAMES)])
    torch.testing.assert_close(embeddings, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(7))
    assert not (out / UNFINISHED).exists()


def test_images_are_prepared_in_the_threads_that_decode_them(folder, out, tiny_model, tiny_processor, monkeypatch):
    threads, prepare = [], type(tiny_processor)._process_images

    def process_images(processor, images, *others, **options):
        threads.append((threading.current_thread() is threading.main_thread(), len(images)))
        return prepare(processor, images, *others, **options)

    monkeypatch.setattr(type(tiny_processor), "_process_images", process_images)
    build_index(folder, tiny_model, tiny_processor, out, batch_size=3)
    assert threads.count((False, 1)) == 7
    of_main = [size for is_main, size in threads if is_main]
    build_index(folder, tiny_model, tiny_processor, out.with_name("fused"), batch_size=3, image_mode="fused")
    assert len(threads) - 7 - len(of_main) > len(of_main)  # beside the probes: all batches, as before


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (1, 3, 8, 9)])
def test_images_of_other_shapes_are_no_batch(shape):
    parts = [{"pixel_values": torch.zeros(1, 3, 8, 8)}, {"pixel_values": torch.ones(shape)}]
    batch = batch_of(parts)
    assert (batch is None) == (shape[3] == 9) and batch_of([*parts, None]) is None
    assert batch is None or torch.equal(batch["pixel_values"].mean((1, 2, 3)), torch.tensor([0.0, 1.0]))


def test_only_what_was_asked_for_is_kept_of_each_image(folder, out, tiny_processor):
    model = build_multi_vector_model(4)
    report = build_index(folder, model, tiny_processor, out, vectors=2, dimensions=8, memory=3)
    paths = [folder / name for name in sorted(NAMES)]
    expected = embed_images(model, tiny_processor, paths)[:, :2, :8]
    np.testing.assert_allclose(vectors_of(out), torch.nn.functional.normalize(expected, dim=-1), atol=1e-5)
    memory = array_of(out, "memory")
    assert memory.dtype == np.float16
    expected_memory = remember(model, tiny_processor, paths)[:, :3]
    np.testing.assert_allclose(memory, expected_memory, rtol=2e-3, atol=2e-3)
    assert report.bytes_per_image == 2 * 8 * 4 + 3 * 32 * 2


def test_fewer_vectors_are_what_a_model_with_fewer_embedding_tokens_makes(folder, out, tiny_processor):
    """The first vectors do not depend on the others, so that a sliced index is one of fewer tokens."""
    model = build_multi_vector_model(4)
    build_index(folder, model, tiny_processor, out, vectors=2, memory=2)
    model.set_embedding_tokens(2, "multi_vector")
    build_index(folder, model, tiny_processor, out.with_name("fewer"), memory=True)
    np.testing.assert_allclose(vectors_of(out), vectors_of(out.with_name("fewer")), atol=1e-5)
    memory, fewer = (array_of(place, "memory") for place in (out, out.with_name("fewer")))
    np.testing.assert_allclose(memory, fewer, atol=2e-3)


@pytest.mark.parametrize(("precision", "bytes_per_image"), [("float32", 64), ("int8", 16), ("binary", 2)])
def test_a_quantized_index_is_smaller_and_says_the_same_where_it_can(
    folder, out, tiny_model, tiny_processor, precision, bytes_per_image
):
    report = build_index(folder, tiny_model, tiny_processor, out, precision=precision)
    assert report.bytes_per_image == bytes_per_image
    exact = embed_images(tiny_model, tiny_processor, [folder / name for name in sorted(NAMES)]).numpy()
    if precision == "binary":
        np.testing.assert_array_equal(np.sign(vectors_of(out)), np.sign(exact))
    else:
        np.testing.assert_allclose(vectors_of(out), exact, atol=1e-5 if precision == "float32" else 2 / 255 / 2)


@pytest.mark.parametrize("precision", ["int8", "binary"])
def test_a_quantized_index_that_is_brought_up_to_date_keeps_its_codes(
    folder, out, tiny_model, tiny_processor, precision
):
    build_index(folder, tiny_model, tiny_processor, out, precision=precision)
    before = array_of(out, "embedding")
    build_index(folder, tiny_model, tiny_processor, out, precision=precision)
    np.testing.assert_array_equal(array_of(out, "embedding"), before)
    bound = read_index(out, "out").facts.bound
    for number in range(20):  # of which some have larger values
        write_noise(folder / f"z{number}.png", seed=200 + number)
    assert build_index(folder, tiny_model, tiny_processor, out, precision=precision).embedded == 20
    exact = embed_images(tiny_model, tiny_processor, [folder / name for name in read(out)["file_name"]]).numpy()
    if precision == "int8":
        wider = read_index(out, "out").facts.bound
        assert wider == pytest.approx(np.abs(exact).max(), abs=1e-5) and wider > bound
        np.testing.assert_allclose(vectors_of(out), exact, atol=(bound + wider) / 255 + 1e-5)
    else:
        np.testing.assert_array_equal(array_of(out, "embedding")[:7], before)


def test_size_is_that_of_the_image_as_displayed(tmp_path, out, tiny_model, tiny_processor):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "images" / "turned.jpg", exif=exif)
    build_index(tmp_path / "images", tiny_model, tiny_processor, out)
    assert (read(out)["width"], read(out)["height"]) == ([30], [40])


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_a_killed_run_goes_on_where_it_stopped(
    folder, out, tiny_model, tiny_processor, monkeypatch, embedded, precision
):
    settings = {"batch_size": 2, "precision": precision, "memory": True}
    build_index(folder, tiny_model, tiny_processor, out.with_name("reference"), **settings)
    embedded.clear()
    monkeypatch.setattr(item_embedder, "ROWS_PER_PART", 2)
    counting = item_embedder.embed_and_remember

    def killed_at_the_third_batch(model, processor, images):
        if len(embedded) == 2:
            raise KeyboardInterrupt
        return counting(model, processor, images)

    monkeypatch.setattr(item_embedder, "embed_and_remember", killed_at_the_third_batch)
    with pytest.raises(KeyboardInterrupt):
        build_index(folder, tiny_model, tiny_processor, out, **settings)
    assert os.listdir(out) == [UNFINISHED]
    with pytest.raises(FileNotFoundError, match="interrupted"):
        SearchIndex.load(out, tiny_model, tiny_processor)
    with pytest.raises(ValueError, match="unfinished', an index with dimensions 16; expected 8"):
        build_index(folder, tiny_model, tiny_processor, out, dimensions=8, **settings)

    monkeypatch.setattr(item_embedder, "embed_and_remember", counting)
    embedded.clear()
    report = build_index(folder, tiny_model, tiny_processor, out, **settings)
    assert report[:3] == (7, 3, []) and embedded == [2, 1]
    resumed, reference = read(out), read(out.with_name("reference"))
    assert resumed["file_name"] == reference["file_name"]
    np.testing.assert_allclose(vectors_of(out), vectors_of(out.with_name("reference")), atol=1e-5)
    np.testing.assert_allclose(resumed.arrays["memory"][:], reference.arrays["memory"][:], atol=2e-3)


@pytest.mark.parametrize("killed_at", ["before the manifest", "after the manifest", "while it tidies up"])
def test_a_run_that_is_killed_at_its_end_loses_nothing(
    folder, out, tiny_model, tiny_processor, monkeypatch, killed_at
):
    build_index(folder, tiny_model, tiny_processor, out)
    write_noise(folder / "new.png", seed=101)
    write, unlink = storage.write_checked_json, type(out).unlink

    def killed(path, content):
        if path != out / MANIFEST:
            return write(path, content)
        if killed_at == "after the manifest":
            write(path, content)
        raise KeyboardInterrupt

    def killed_after_the_first_file(path, **kwargs):
        was_there = path.exists()
        unlink(path, **kwargs)
        if was_there and path.parent.name == UNFINISHED:
            raise KeyboardInterrupt

    if killed_at == "while it tidies up":
        monkeypatch.setattr(type(out), "unlink", killed_after_the_first_file)
    else:
        monkeypatch.setattr(storage, "write_checked_json", killed)
    with pytest.raises(KeyboardInterrupt):
        build_index(folder, tiny_model, tiny_processor, out)
    monkeypatch.undo()
    assert len(SearchIndex.load(out, tiny_model, tiny_processor)) == 7 + (killed_at != "before the manifest")
    monkeypatch.setattr(item_embedder, "embed_images", None)  # nothing is left to embed
    assert build_index(folder, tiny_model, tiny_processor, out)[:3] == (8, 0, [])
    assert len(os.listdir(out)) == 4 and verify_index(out).damaged == {}


def test_a_run_that_is_killed_before_it_wrote_what_it_is_about_leaves_a_free_place(
    folder, out, tiny_model, tiny_processor, monkeypatch
):
    monkeypatch.setattr(storage, "write_checked_json", None)
    with pytest.raises(TypeError):
        build_index(folder, tiny_model, tiny_processor, out)
    monkeypatch.undo()
    assert os.listdir(out / UNFINISHED)
    assert build_index(folder, tiny_model, tiny_processor, out).images == 7


def test_who_interrupts_a_run_keeps_what_it_has_embedded(
    folder, out, tiny_model, tiny_processor, monkeypatch, embedded
):
    counting = item_embedder.embed_images

    def interrupted(model, processor, images):
        if len(embedded) == 2:
            raise KeyboardInterrupt
        return counting(model, processor, images)

    monkeypatch.setattr(item_embedder, "embed_images", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_index(folder, tiny_model, tiny_processor, out, batch_size=2)
    monkeypatch.setattr(item_embedder, "embed_images", counting)
    embedded.clear()
    assert build_index(folder, tiny_model, tiny_processor, out)[:2] == (7, 3) and embedded == [3]


@pytest.mark.parametrize("moment", range(6))
def test_a_full_disk_loses_nothing(folder, out, tiny_model, tiny_processor, monkeypatch, moment):
    """The moments are when the first file, part, manifest ... is written."""
    build_index(folder, tiny_model, tiny_processor, out)
    write_noise(folder / "new.png", seed=101)
    moments, write_checked = iter(range(100)), storage.write_checked

    def full(path):
        if next(moments) >= moment:
            raise OSError(28, "No space left on device")
        return write_checked(path)

    monkeypatch.setattr(storage, "write_checked", full)
    with pytest.raises(OSError, match="No space left"):
        build_index(folder, tiny_model, tiny_processor, out)
    monkeypatch.undo()
    assert len(SearchIndex.load(out, tiny_model, tiny_processor)) == 7
    assert build_index(folder, tiny_model, tiny_processor, out)[:3] == (8, 1 if moment < 3 else 0, [])


def test_what_is_as_it_was_is_not_written_again(folder, out, tiny_model, tiny_processor):
    build_index(folder, tiny_model, tiny_processor, out)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    build_index(folder, tiny_model, tiny_processor, out)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_images_whose_rows_are_damaged_are_embedded_again(folder, out, tiny_model, tiny_processor, monkeypatch):
    monkeypatch.setattr("mmgem.training.search.checked_files.BLOCK", 128)
    monkeypatch.setattr(storage, "BLOCK", 128)
    build_index(folder, tiny_model, tiny_processor, out)
    vectors, path = vectors_of(out), out / "embedding-1.npy"
    content = bytearray(path.read_bytes())
    content[128 + 3 * 64] ^= 1  # of the fourth vector, in a block with the third
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged in bytes 256 to 384.*`mmgem index` embeds anew"):
        SearchIndex.load(out, tiny_model, tiny_processor)
    assert build_index(folder, tiny_model, tiny_processor, out)[:3] == (7, 2, [])
    np.testing.assert_allclose(vectors_of(out), vectors, atol=1e-5)
    assert verify_index(out).damaged == {}


def test_a_damaged_part_of_a_killed_run_is_embedded_again(folder, out, tiny_model, tiny_processor, monkeypatch):
    monkeypatch.setattr(item_embedder, "ROWS_PER_PART", 2)
    with monkeypatch.context() as patch:
        patch.setattr(building, "merge", None)
        with pytest.raises(TypeError):
            build_index(folder, tiny_model, tiny_processor, out, batch_size=2)
    (out / UNFINISHED / "part-000001.json").write_bytes(bytes(100))
    assert build_index(folder, tiny_model, tiny_processor, out)[:3] == (7, 2, [])
    paths = [folder / name for name in sorted(NAMES)]
    np.testing.assert_allclose(vectors_of(out), embed_images(tiny_model, tiny_processor, paths), atol=1e-5)


@pytest.mark.parametrize("number", [0, 2], ids=["of a killed run", "of this one"])
def test_a_part_that_cannot_be_read_again_leaves_no_row_out(
    folder, out, tiny_model, tiny_processor, monkeypatch, number
):
    monkeypatch.setattr(item_embedder, "ROWS_PER_PART", 2)
    names = sorted(NAMES)
    with monkeypatch.context() as patch:
        patch.setattr(building, "merge", None)
        with pytest.raises(TypeError):
            build_index(folder, tiny_model, tiny_processor, out, batch_size=2, names=names[:4])
    write = item_embedder.ItemEmbedder.write

    def write_on_a_bad_disk(self):
        write(self)
        if self.written == 2:  # all of this run
            (out / UNFINISHED / f"part-{number:06d}.json").write_bytes(b"")

    with monkeypatch.context() as patch:
        patch.setattr(item_embedder.ItemEmbedder, "write", write_on_a_bad_disk)
        with pytest.raises(ValueError, match="unfinished' has 3 parts that can be read; expected 4, as were written"):
            build_index(folder, tiny_model, tiny_processor, out, batch_size=2)
    assert build_index(folder, tiny_model, tiny_processor, out)[:3] == (7, 2, [])
    expected = embed_images(tiny_model, tiny_processor, [folder / name for name in names])
    np.testing.assert_allclose(vectors_of(out), expected, atol=1e-5)


def test_an_index_of_0_1_0_is_brought_up_to_date(folder, out, tiny_model, tiny_processor, embedded):
    """One is made of an index of today."""
    build_index(folder, tiny_model, tiny_processor, out)
    facts, rows = read_index(out, "out").facts, read(out)
    shutil.rmtree(out)
    out.mkdir()
    vectors = pa.FixedSizeListArray.from_arrays(rows.arrays["embedding"][:].reshape(-1), 16)
    table = rows.table.drop_columns(["content"]).append_column("embedding", vectors)
    with pa.OSFile(str(out / "rows.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    (out / "probes.safetensors").write_bytes(save(facts.fingerprint.probes))
    described = {"folder": facts.folder, "model": facts.model, "settings": asdict(facts.settings)}
    model = {"model_settings": facts.fingerprint.settings, "bound": facts.bound}
    (out / MANIFEST).write_text(json.dumps({"format": 2, **described, **model}))
    expected = SearchIndex.load(out, tiny_model, tiny_processor).search("star", top=7)
    write_noise(folder / "zz.png", seed=101)
    embedded.clear()
    assert build_index(folder, tiny_model, tiny_processor, out)[:2] == (8, 1) and embedded == [1]
    found = [
        hit for hit in SearchIndex.load(out, tiny_model, tiny_processor).search("star") if hit.path.name != "zz.png"
    ]
    assert found == expected and verify_index(out).files == 3


@pytest.fixture
def away(monkeypatch):
    """Folders that cannot be listed, by name."""
    names, scandir = set(), os.scandir

    def listing(path):
        if os.path.basename(str(path)) in names:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", listing)
    return names


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_what_cannot_be_seen_is_kept_until_it_is_gone(
    folder, out, tiny_model, tiny_processor, embedded, away, precision
):
    build_index(folder, tiny_model, tiny_processor, out, precision=precision)
    codes = array_of(out, "embedding")
    away.add("er")
    write_noise(folder / "new.png", seed=101)
    report = build_index(folder, tiny_model, tiny_processor, out, precision=precision)
    reason = "it cannot be listed: Permission denied; what the index has of it, 3 rows, is kept until it is gone"
    assert report[:3] == (8, 1, [("deep/er", reason)])
    assert set(NAMES) < set(read(out)["file_name"])

    away.clear()
    embedded.clear()
    (folder / "new.png").unlink()
    assert build_index(folder, tiny_model, tiny_processor, out, precision=precision)[:3] == (7, 0, [])
    assert embedded == []
    if precision == "float32":
        np.testing.assert_array_equal(array_of(out, "embedding"), codes)

    shutil.move(folder / "deep" / "er", folder.with_name("disk"))
    (folder / "deep" / "er").mkdir()  # where it was mounted
    report = build_index(folder, tiny_model, tiny_processor, out, precision=precision)
    assert report[:2] == (7, 0) and "it is empty, as if its disk were away" in report.skipped[0].reason
    shutil.rmtree(folder / "deep")
    assert build_index(folder, tiny_model, tiny_processor, out, precision=precision)[:3] == (4, 0, [])


def test_a_link_whose_file_is_away_keeps_its_row(folder, out, tiny_model, tiny_processor):
    write_noise(folder.with_name("disk") / "linked.png", seed=5)
    (folder / "link.png").symlink_to(folder.with_name("disk") / "linked.png")
    assert build_index(folder, tiny_model, tiny_processor, out).images == 8
    folder.with_name("disk").rename(folder.with_name("away"))
    report = build_index(folder, tiny_model, tiny_processor, out)
    assert report[:2] == (8, 0) and [name for name, _ in report.skipped] == ["link.png"]


def test_a_gallery_that_moved_is_not_embedded_again(folder, out, tiny_model, tiny_processor, embedded):
    build_index(folder, tiny_model, tiny_processor, out)
    vectors, new = vectors_of(out), folder.with_name("new")
    shutil.copytree(folder, new, copy_function=shutil.copyfile)  # with new times
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match=r"an index of the folder '.*images'; expected one of '.*new'.*`--moved`"):
        build_index(new, tiny_model, tiny_processor, out)
    embedded.clear()
    assert build_index(new, tiny_model, tiny_processor, out, moved=True)[:3] == (7, 0, []) and embedded == []
    np.testing.assert_array_equal(vectors_of(out), vectors)
    index = SearchIndex.load(out, tiny_model, tiny_processor)
    assert index.search(image=new / NAMES[3], top=1)[0].path == new / NAMES[3]
    assert build_index(new, tiny_model, tiny_processor, out)[:3] == (7, 0, [])


def test_a_file_with_another_name_is_not_embedded_again(folder, out, tiny_model, tiny_processor, embedded):
    build_index(folder, tiny_model, tiny_processor, out, memory=True)
    memory = dict(zip(read(out)["file_name"], array_of(out, "memory"), strict=True))
    (folder / NAMES[0]).rename(folder / "renamed.png")
    os.utime(folder / NAMES[2], ns=(1, 1))
    shutil.copy(folder / NAMES[4], folder / "copied.png")
    embedded.clear()
    assert build_index(folder, tiny_model, tiny_processor, out, memory=True)[:3] == (8, 0, []) and embedded == []
    now = dict(zip(read(out)["file_name"], array_of(out, "memory"), strict=True))
    for name, before in [("renamed.png", NAMES[0]), (NAMES[2], NAMES[2]), ("copied.png", NAMES[4])]:
        np.testing.assert_array_equal(now[name], memory[before])


def test_an_index_is_brought_up_to_date_by_embedding_only_what_changed(
    folder, out, tiny_model, tiny_processor, embedded
):
    build_index(folder, tiny_model, tiny_processor, out)
    (folder / NAMES[0]).unlink()
    write_noise(folder / NAMES[2], seed=100)
    os.utime(folder / NAMES[2], ns=(1, 1))
    write_noise(folder / "new.png", seed=101)
    embedded.clear()
    report = build_index(folder, tiny_model, tiny_processor, out)
    assert report[:3] == (7, 2, []) and embedded == [2]
    index = SearchIndex.load(out, tiny_model, tiny_processor)
    assert index.rows["file_name"] == sorted([*NAMES[1:], "new.png"])
    for name in index.rows["file_name"]:
        best = index.search(image=folder / name, top=1)[0]
        assert best.path == folder / name and best.score == pytest.approx(1, abs=1e-5)
    embedded.clear()
    assert build_index(folder, tiny_model, tiny_processor, out)[:3] == (7, 0, []) and embedded == []


def test_bad_files_are_left_out_and_reported(folder, out, tiny_model, tiny_processor):
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("hello")
    report = build_index(folder, tiny_model, tiny_processor, out, batch_size=2)
    assert report.images == 7
    assert sorted(name for name, _ in report.skipped) == ["empty.png", "text.jpg"]
    again = build_index(folder, tiny_model, tiny_processor, out)
    assert (again.images, again.embedded, len(again.skipped)) == (7, 0, 2)


def test_a_folder_of_nothing_but_bad_files_is_refused_and_leaves_nothing(
    tmp_path, folder, out, tiny_model, tiny_processor
):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "empty.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no image can be read, such as 'empty\.png': "):
        build_index(tmp_path / "bad", tiny_model, tiny_processor, out)
    with pytest.raises(ValueError, match="`batch_size` is 0; expected 1 or more"):
        build_index(tmp_path / "bad", tiny_model, tiny_processor, out, batch_size=0)
    assert build_index(folder, tiny_model, tiny_processor, out).images == 7  # nothing of it stands in the way


def test_memory_that_float16_cannot_hold_leaves_the_image_out(folder, out, tiny_model, tiny_processor, monkeypatch):
    def remember_too_much(model, processor, images):
        states = embed_and_remember(model, processor, images)
        return states._replace(memory=torch.full_like(states.memory, 1e5))

    monkeypatch.setattr(item_embedder, "embed_and_remember", remember_too_much)
    with pytest.raises(ValueError, match="no image can be read.*up to 1e.05; expected at most 65504"):
        build_index(folder, tiny_model, tiny_processor, out, memory=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_an_image_without_a_direction_is_left_out_by_name(folder, out, tiny_model, tiny_processor, monkeypatch, value):
    bad = np.asarray(Image.open(folder / NAMES[2]).convert("RGB"))

    def embed(model, processor, images):
        embeds = embed_images(model, processor, images).clone()
        for row, image in enumerate(images):
            if np.array_equal(np.asarray(image), bad):
                embeds[row] = torch.full_like(embeds[row], value)
        return embeds

    monkeypatch.setattr(item_embedder, "embed_images", embed)
    report = build_index(folder, tiny_model, tiny_processor, out, batch_size=3)
    assert (report.images, [file_name for file_name, _ in report.skipped]) == (6, [NAMES[2]])
    assert "zeros" in report.skipped[0].reason if value == 0 else "NaN or infinite" in report.skipped[0].reason
    assert np.isfinite(vectors_of(out)).all()


def test_a_model_that_gives_nan_is_refused_before_any_image_is_read(folder, out, tiny_model, tiny_processor):
    torch.nn.init.constant_(tiny_model.text_projection.weight, float("nan"))
    with pytest.raises(ValueError, match="`model` is .*whose weights and text and fused of a fixed input are NaN"):
        build_index(folder, tiny_model, tiny_processor, out)
    assert not out.exists()


def test_nothing_but_an_index_of_the_same_folder_is_replaced(folder, out, tiny_model, tiny_processor):
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="`out` is .*no index"):
        build_index(folder, tiny_model, tiny_processor, out)
    assert (out / "thesis.txt").read_text() == "precious"
    (out / MANIFEST).write_text(json.dumps({"folder": str(folder), "model": "", "probe": [1.0]}))
    with pytest.raises(ValueError, match="`out` is .*of format 1.*make it anew"):
        build_index(folder, tiny_model, tiny_processor, out)
    assert (out / "thesis.txt").read_text() == "precious"

    build_index(folder, tiny_model, tiny_processor, out.with_name("other"))
    write_noise(folder.with_name("elsewhere") / "a.png", seed=1)
    with pytest.raises(ValueError, match="an index of the folder .*images.*elsewhere"):
        build_index(folder.with_name("elsewhere"), tiny_model, tiny_processor, out.with_name("other"))


def test_an_index_with_other_settings_is_not_brought_up_to_date(folder, out, tiny_processor):
    model = build_multi_vector_model(4)
    build_index(folder, model, tiny_processor, out, vectors=2)
    for asked, message in [
        ({"vectors": 4}, "an index with vectors 2; expected 4"),
        ({"vectors": 2, "dimensions": 8}, "an index with dimensions 16; expected 8"),
        ({"vectors": 2, "precision": "binary"}, "an index with precision float32; expected binary"),
        ({"vectors": 2, "memory": True}, "an index with memory None; expected 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            build_index(folder, model, tiny_processor, out, **asked)


def test_an_index_is_not_brought_up_to_date_by_another_model(folder, out, tiny_model, tiny_processor):
    build_index(folder, tiny_model, tiny_processor, out, memory=True)
    build_index(folder, build_model().bfloat16(), tiny_processor, out, memory=True)  # the same weights, rounded
    with torch.no_grad():
        tiny_model.image_projection[1].weight[0] *= -3
    with pytest.raises(ValueError, match="which embeds images otherwise"):
        build_index(folder, tiny_model, tiny_processor, out, memory=True)
    with pytest.raises(ValueError, match="whose num_embedding_tokens is 2 instead of 1"):
        build_index(folder, build_model(num_embedding_tokens=2), tiny_processor, out, memory=1)
