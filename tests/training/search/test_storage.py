import errno
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mmgem.training.search import checked_files, storage
from mmgem.training.search.checked_files import (
    BLOCK,
    CheckedFile,
    DamagedFileError,
    read_checked_json,
    write_checked,
    write_checked_json,
)
from mmgem.training.search.fingerprint import Fingerprint
from mmgem.training.search.inverted_lists import InvertedLists
from mmgem.training.search.settings import IndexSettings
from mmgem.training.search.storage import (
    MANIFEST,
    ArrayFile,
    IndexFacts,
    chunks,
    is_free,
    is_index,
    next_part,
    note_stamp,
    read_index,
    read_parts,
    remove_parts,
    verify_index,
    write_index,
    write_part,
)

OF_0_1_0 = Path(__file__).parent / "index-0.1.0"


@pytest.fixture
def facts():
    fingerprint = Fingerprint(
        {"prompts": {"query": "Wo ist … "}},
        {"text": np.arange(10, dtype=np.float32).reshape(2, 5), "memory": np.ones((1, 3), np.float32)},
    )
    return IndexFacts("/images", "a/model", IndexSettings(2, 5, "int8", 1), fingerprint, bound=0.7)


def make_columns(count, seed=0):
    generator = np.random.default_rng(seed)
    return {
        "file_name": [f"{number} ★.png" for number in range(count)],
        "width": list(range(count)),
        "embedding": generator.integers(0, 256, (count, 2, 3), dtype=np.uint8),
        "memory": generator.normal(size=(count, 2, 4)).astype(np.float16),
    }


def write(place, facts, version=1, count=5, seed=0):
    columns = make_columns(count, seed)
    batches = [{name: column[part] for name, column in columns.items()} for part in (slice(3), slice(3, count))]
    write_index(place, facts, version, count, batches)
    return columns


@pytest.fixture
def small_blocks(monkeypatch):
    """Files have several blocks."""
    monkeypatch.setattr("mmgem.training.search.checked_files.BLOCK", 64)
    monkeypatch.setattr("mmgem.training.search.storage.BLOCK", 64)


@pytest.mark.parametrize("blocks", ["large", "small"])
def test_an_index_comes_back_as_it_was(facts, tmp_path, blocks, request):
    if blocks == "small":
        request.getfixturevalue("small_blocks")
    columns = write(tmp_path / "index", facts)
    names = ["embedding-1.npy", "memory-1.npy", "probes-1.safetensors", "rows-1.parquet", MANIFEST]
    assert is_index(tmp_path / "index") and sorted(os.listdir(tmp_path / "index")) == names
    stored = read_index(tmp_path / "index", "index")
    assert (stored.facts.folder, stored.facts.model, stored.facts.bound) == ("/images", "a/model", 0.7)
    assert stored.facts.settings == facts.settings and stored.facts.codec == facts.codec
    assert stored.facts.fingerprint.difference(facts.fingerprint) is None
    assert stored.bytes_per_row == 2 * 3 + 2 * 4 * 2 and len(stored.rows) == 5
    assert stored.rows["file_name"] == columns["file_name"] and stored.rows["width"] == columns["width"]
    for name in ("embedding", "memory"):
        array = stored.rows.arrays[name]
        assert array[:].dtype == columns[name].dtype
        for rows in (slice(None), slice(1, 3), slice(9, 12), [4, 0, 4, 2, 3], range(1, 2), []):
            expected = columns[name][list(rows) if isinstance(rows, range) else rows]
            np.testing.assert_array_equal(array[rows], expected.reshape(-1, *columns[name].shape[1:]))
        np.testing.assert_array_equal(np.load(tmp_path / "index" / f"{name}-1.npy"), columns[name])
    assert verify_index(tmp_path / "index").damaged == {} and not stored.rows.damaged().any()


def test_no_bit_of_an_index_can_be_flipped_unnoticed(facts, tmp_path, small_blocks):
    """Either it is not opened, or reading what is damaged is refused; and `verify` names the file in any case."""
    place = tmp_path / "index"
    columns = write(place, facts)
    generator = np.random.default_rng(0)
    flips = [(name, byte, bit) for name in os.listdir(place) for byte, bit in [(0, 0), (-1, 7)]]
    for name in os.listdir(place):
        size = (place / name).stat().st_size
        flips += [(name, int(generator.integers(size)), int(generator.integers(8))) for _ in range(12)]
    for name, byte, bit in flips:
        whole = (place / name).read_bytes()
        content = bytearray(whole)
        content[byte] ^= 1 << bit
        (place / name).write_bytes(content)
        if name == MANIFEST:
            with pytest.raises(ValueError, match="Delete it, and make it anew"):
                read_index(place, "index")
        else:
            assert list(verify_index(place).damaged) == [name]
            with pytest.raises(ValueError, match="damaged"):
                rows = read_index(place, "index").rows
                for array in rows.arrays.values():
                    array.file.read()
            if name.endswith(".npy"):
                rows = read_index(place, "index").rows
                whole_rows = np.flatnonzero(~rows.damaged())
                column = name.split("-")[0]
                np.testing.assert_array_equal(rows.arrays[column][whole_rows], columns[column][whole_rows])
        (place / name).write_bytes(whole)
    assert verify_index(place).damaged == {}


@pytest.mark.parametrize("damage", ["cut", "zeros", "longer", "gone", "other"])
def test_files_that_are_cut_or_zeroed_or_exchanged_are_noticed(facts, tmp_path, damage):
    write(tmp_path / "other", facts, seed=1)
    for name in ("embedding-1.npy", "memory-1.npy", "rows-1.parquet", "probes-1.safetensors"):
        place = tmp_path / name
        write(place, facts)
        content = (place / name).read_bytes()
        half = len(content) // 2
        if damage == "gone":
            (place / name).unlink()
        else:
            changed = {
                "cut": content[:half],
                "zeros": content[:half] + bytes(len(content) - half),
                "longer": content + b"\0",
                "other": (tmp_path / "other" / name).read_bytes(),
            }
            (place / name).write_bytes(changed[damage])
        if damage == "other" and (place / name).read_bytes() == content:  # the other has the same names and probes
            continue
        assert list(verify_index(place).damaged) == [name]
        with pytest.raises(ValueError, match=f"{name}' (is damaged|has)|No such file.*{name}"):
            for array in read_index(place, "index").rows.arrays.values():
                array[:]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes in folders")
@pytest.mark.parametrize("name", ["embedding-1.npy", "rows-1.parquet", "probes-1.safetensors"])
def test_a_pipe_is_not_waited_for(facts, tmp_path, name):
    write(tmp_path, facts)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises((OSError, ValueError), match=f"no regular file.*{name}|{name}.*no regular file"):
        for array in read_index(tmp_path, "index").rows.arrays.values():
            array[:]


def test_folders_that_are_no_index_of_this_format_are_refused_by_a_sentence(facts, tmp_path):
    with pytest.raises(ValueError, match=f"`out` is .*no index; expected a folder with {MANIFEST}"):
        read_index(tmp_path, "out")
    with pytest.raises(ValueError, match=f"`index` is .*no index; expected a folder with {MANIFEST}"):
        verify_index(tmp_path)
    earlier = {"folder": "/images", "model": "a/model", "probe": [0.1, 0.2]}
    (tmp_path / MANIFEST).write_text(json.dumps(earlier))
    with pytest.raises(ValueError, match="`index` is .*of format 1; expected format 4. Delete it, and make it anew"):
        read_index(tmp_path, "index")
    write(tmp_path, facts)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    for broken in ("{", "[]", '{"format": 2}', "[" * 100_000, '"x"', "", json.dumps(manifest | {"bound": 0.8})):
        (tmp_path / MANIFEST).write_text(broken)
        with pytest.raises(ValueError, match="Delete it, and make it anew"):
            read_index(tmp_path, "index")


def test_an_index_of_0_1_0_is_read_and_the_next_update_replaces_its_files(facts, tmp_path):
    shutil.copytree(OF_0_1_0, tmp_path / "index")
    stored = read_index(tmp_path / "index", "index")
    assert stored.version == 0 and stored.facts.folder == "/images" and stored.facts.settings.precision == "int8"
    assert len(stored.rows) == 7 and stored.rows["file_name"][0] == "0.png" and stored.rows["content"] == [""] * 7
    vectors = stored.facts.codec.decode(stored.rows.arrays["embedding"][:])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1), 1, atol=0.02)
    assert stored.rows.arrays["memory"][[3, 5]].dtype == np.float16
    assert verify_index(tmp_path / "index").damaged == {}
    write(tmp_path / "index", facts)
    names = ["embedding-1.npy", "memory-1.npy", "probes-1.safetensors", "rows-1.parquet", MANIFEST]
    assert sorted(os.listdir(tmp_path / "index")) == names


def test_wrong_offsets_of_an_index_of_0_1_0_do_not_end_the_process(tmp_path):
    shutil.copytree(OF_0_1_0, tmp_path / "index")
    path = tmp_path / "index" / "rows.arrow"
    table = pa.ipc.open_stream(path.read_bytes()).read_all()
    offsets = table["file_name"].chunk(0).buffers()[1].to_pybytes()[: 4 * 8]
    content = path.read_bytes()
    assert content.count(offsets) == 1
    wrong = np.frombuffer(offsets, np.int32).copy()
    wrong[3] = 2**30
    path.write_bytes(content.replace(offsets, wrong.tobytes()))
    with pytest.raises(ValueError, match="a damaged index"):
        read_index(tmp_path / "index", "index")


def test_an_update_is_one_step_for_readers_and_who_reads_keeps_what_he_has(facts, tmp_path):
    before = write(tmp_path, facts)
    reader = read_index(tmp_path, "index")
    seen = []

    class Watched(list):
        """Batches during whose writing somebody opens the index."""

        def __iter__(self):
            for batch in super().__iter__():
                seen.append(read_index(tmp_path, "index").version)
                yield batch

    after = make_columns(7, seed=1)
    write_index(tmp_path, facts, 2, 7, Watched([after]))
    assert seen == [1]
    assert sorted(path.name for path in tmp_path.glob("*-1.*")) == []
    np.testing.assert_array_equal(reader.rows.arrays["memory"][[4, 1]], before["memory"][[4, 1]])
    np.testing.assert_array_equal(read_index(tmp_path, "index").rows.arrays["memory"][:], after["memory"])


def test_who_opens_an_index_while_it_is_replaced_gets_the_new_one(facts, tmp_path, monkeypatch):
    write(tmp_path, facts)
    read_once = checked_files.read_checked_json

    def read_and_update(path):
        manifest = read_once(path)
        if manifest["version"] == 1:
            write(tmp_path, facts, version=2, seed=1)
        return manifest

    monkeypatch.setattr("mmgem.training.search.storage.read_checked_json", read_and_update)
    stored = read_index(tmp_path, "index")
    assert stored.version == 2
    np.testing.assert_array_equal(stored.rows.arrays["embedding"][:], make_columns(5, seed=1)["embedding"])


@pytest.fixture
def windows(monkeypatch):
    """The rules of Windows: what is open is neither deleted nor replaced, and a folder is not renamed over another."""
    replace, unlink = os.replace, Path.unlink

    def is_open(path):
        links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
        return os.path.realpath(path) in [os.path.realpath(link) for link in links if os.path.exists(link)]

    def strict_replace(source, target):
        if is_open(target) or os.path.isdir(target):
            raise PermissionError(13, "Access is denied", str(target))
        replace(source, target)

    def strict_unlink(path, missing_ok=False):
        if is_open(path):
            raise PermissionError(13, "The process cannot access the file", str(path))
        unlink(path, missing_ok)

    monkeypatch.setattr(os, "replace", strict_replace)
    monkeypatch.setattr(os, "rename", strict_replace)
    monkeypatch.setattr(Path, "rename", strict_replace)
    monkeypatch.setattr(Path, "unlink", strict_unlink)
    monkeypatch.setattr(checked_files, "REPLACING_PAUSE", 0)


def test_updates_go_by_the_rules_of_windows(facts, tmp_path, windows, monkeypatch):
    before = write(tmp_path, facts)
    reader = read_index(tmp_path, "index")
    write(tmp_path, facts, version=2, seed=1)
    assert len(list(tmp_path.glob("*-1.npy"))) == 2  # which the reader has open
    np.testing.assert_array_equal(reader.rows.arrays["memory"][:], before["memory"])
    del reader
    write(tmp_path, facts, version=3, seed=2)
    assert sorted(path.name for path in tmp_path.glob("*.npy")) == ["embedding-3.npy", "memory-3.npy"]
    # Somebody reads the manifest at the moment, and is done soon; or is not.
    manifest = open(tmp_path / MANIFEST)
    pauses = []
    monkeypatch.setattr(checked_files.time, "sleep", lambda seconds: (pauses.append(seconds), manifest.close()))
    write(tmp_path, facts, version=4)
    assert read_index(tmp_path, "index").version == 4 and pauses == [checked_files.REPLACING_PAUSE]
    with open(tmp_path / MANIFEST), pytest.raises(PermissionError):
        write(tmp_path, facts, version=5)
    assert read_index(tmp_path, "index").version == 4


@pytest.mark.parametrize("step", range(9))
def test_a_full_disk_leaves_what_was_there(facts, tmp_path, monkeypatch, step):
    before = write(tmp_path, facts)
    steps, fsync = iter(range(100)), os.fsync

    def fail(number):
        if next(steps) == step:
            raise OSError(28, "No space left on device")
        fsync(number)

    monkeypatch.setattr(os, "fsync", fail)
    try:
        write(tmp_path, facts, version=2, seed=1)
        assert step > 4  # a folder that cannot be brought to the disk
    except OSError:
        np.testing.assert_array_equal(read_index(tmp_path, "index").rows.arrays["memory"][:], before["memory"])
    monkeypatch.undo()
    write(tmp_path, facts, version=2, seed=1)
    assert verify_index(tmp_path).damaged == {} and len(list(tmp_path.iterdir())) == 5


def test_files_are_on_the_disk_before_they_are_named(facts, tmp_path, monkeypatch):
    synced, replace = [], os.replace
    monkeypatch.setattr(
        os, "fsync", lambda number: synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{number}")))
    )
    monkeypatch.setattr(os, "replace", lambda *paths: synced.append("replaced") or replace(*paths))
    write(tmp_path / "index", facts)
    assert set(synced[:4]) == {"embedding-1.npy", "memory-1.npy", "rows-1.parquet", "probes-1.safetensors"}
    assert synced[4:] == ["search_index.tmp", "index", "replaced", "index"]


def test_parts_are_there_as_a_whole_or_not_at_all(facts, tmp_path):
    write_index(tmp_path, facts, 1)
    for number in range(3):
        write_part(tmp_path, number, make_columns(4, seed=number))
    content = bytearray((tmp_path / "embedding-part-000001.npy").read_bytes())
    content[-1] ^= 1
    (tmp_path / "embedding-part-000001.npy").write_bytes(content)
    (tmp_path / "rows-part-000003.parquet").write_bytes(b"killed while it was written")
    parts = list(read_parts(tmp_path))
    assert [len(part) for part in parts] == [4, 4] and next_part(tmp_path) == 3
    np.testing.assert_array_equal(parts[1].arrays["embedding"][:], make_columns(4, seed=2)["embedding"])
    assert list(verify_index(tmp_path).damaged) == ["embedding-part-000001.npy"]
    (tmp_path / "part-000000.json").unlink()  # as of one that could not be written
    assert next_part(tmp_path) == 3 and next_part(tmp_path / "nowhere") == 0


def test_only_own_files_make_a_place_free(tmp_path):
    assert is_free(tmp_path / "nowhere") and is_free(tmp_path)
    for name in ("rows-3.parquet", "search_index.tmp"):
        (tmp_path / name).touch()
    (tmp_path / "unfinished").mkdir()
    assert is_free(tmp_path)
    for name in ("thesis.txt", "rows-a.parquet", MANIFEST):
        (tmp_path / name).touch()
        assert not is_free(tmp_path)
        (tmp_path / name).unlink()
    assert not is_free(Path(__file__))


def test_a_file_is_read_by_blocks(tmp_path, small_blocks):
    content = np.random.default_rng(0).bytes(64 * 3 + 10)
    with write_checked(tmp_path / "file") as writer:
        for start in range(0, len(content), 50):
            writer.write(content[start : start + 50])
    file = CheckedFile(tmp_path, writer.facts)
    assert writer.facts["bytes"] == len(content) and len(writer.facts["checksums"]) == 4
    for start in range(0, 202, 7):
        assert all(file.read(start, stop) == content[start:stop] for stop in range(start, 202, 11))
    (tmp_path / "file").write_bytes(content[:70] + b"\0" + content[71:])
    assert file.damaged_blocks() == [1] and file.read(128) == content[128:]
    with pytest.raises(DamagedFileError, match=r"file' is damaged in bytes 64 to 128"):
        file.read(0, 65)
    assert BLOCK == 1 << 20  # what files on the disk have


def test_a_block_of_a_held_file_is_compared_once(tmp_path, small_blocks, monkeypatch):
    content = np.random.default_rng(0).bytes(64 * 3 + 10)
    with write_checked(tmp_path / "file") as writer:
        writer.write(content)
    compared = []

    def digest(block, own=checked_files.xxh3_64_hexdigest):
        compared.append(len(block))
        return own(block)

    monkeypatch.setattr(checked_files, "xxh3_64_hexdigest", digest)
    sizes = {
        (70, 120): [64],
        (0, 100): [64, 64],
        (100, 130): [64, 64],
        (64, 202): [64, 64, 10],
        (0, 202): [64, 64, 64, 10],
    }
    held, other = CheckedFile(tmp_path, writer.facts), CheckedFile(tmp_path, writer.facts)
    held.hold()
    for once in (True, False):
        for (start, stop), expected in sizes.items():
            for file, own in ((held, expected if once and stop - start < 200 else []), (other, expected)):
                compared.clear()
                assert file.read(start, stop) == content[start:stop] and compared == own
    compared.clear()
    assert held.read(64, 64) == b"" and held.damaged_blocks() == [] and compared == [64, 64, 64, 10]
    with open(tmp_path / "file", "r+b") as file:  # what was compared is gone
        file.truncate(150)
    assert held.read(70, 120) == content[70:120]
    with pytest.raises(DamagedFileError, match=r"is damaged in bytes 128 to 150"):
        held.read(70, 151)


@pytest.mark.parametrize("size", [0, 63, 64, 65, 128])
def test_a_block_has_a_checksum_and_what_is_not_there_has_none(tmp_path, small_blocks, size):
    with write_checked(tmp_path / "file") as file:
        file.write(bytes(size))
    assert len(file.facts["checksums"]) == math.ceil(size / 64) and file.facts["bytes"] == size
    assert CheckedFile(tmp_path, file.facts).read() == bytes(size)


def test_json_is_the_old_or_the_new(tmp_path, monkeypatch):
    path = tmp_path / "content.json"
    write_checked_json(path, {"name": "é\udce9", "values": [1.5, None]})
    assert read_checked_json(path) == {"name": "é\udce9", "values": [1.5, None]}
    monkeypatch.setattr(os, "replace", None)
    with pytest.raises(TypeError):
        write_checked_json(path, {"name": "new"})
    assert read_checked_json(path)["values"] == [1.5, None]


def test_rows_in_a_damaged_block_are_known(tmp_path, small_blocks):
    rows = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)  # 12 bytes each
    with write_checked(tmp_path / "a.npy") as writer:
        np.lib.format.write_array_header_1_0(writer, {"descr": "<f4", "fortran_order": False, "shape": (40, 3)})
        writer.write(rows.tobytes())
    start = (tmp_path / "a.npy").stat().st_size - rows.nbytes
    for row in (0, 17, 39):
        content = bytearray((tmp_path / "a.npy").read_bytes())
        content[start + 12 * row] ^= 1
        (tmp_path / "a.npy").write_bytes(content)
        array = ArrayFile(tmp_path, writer.facts | {"dtype": "<f4", "shape": [40, 3]})
        is_damaged = array.damaged_rows()
        assert is_damaged[row] and is_damaged.sum() <= 7
        np.testing.assert_array_equal(array[np.flatnonzero(~is_damaged)], rows[~is_damaged])
        content[start + 12 * row] ^= 1
        (tmp_path / "a.npy").write_bytes(content)


def test_lists_come_back_as_they_were_and_are_verified(facts, tmp_path):
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(40, 2, 3)).astype(np.float32)
    made = InvertedLists.build(vectors)
    made.effort, made.recall = 3, {"rows": 0.99}
    columns = make_columns(40) | {"embedding": vectors}
    seen = []

    def make(rows):
        seen.append(rows.arrays["embedding"][:])
        return made

    write_index(tmp_path, facts, 7, 40, [columns], None, make)
    np.testing.assert_array_equal(seen[0], vectors)  # which are on the disk by then
    stored = read_index(tmp_path, "index")
    assert stored.version == 7 and stored.lists.recall == {"rows": 0.99}
    lists = stored.lists.read()
    assert (lists.vectors, lists.effort, lists.recall) == (2, 3, {"rows": 0.99})
    np.testing.assert_array_equal(lists.cells(), made.cells())
    check = verify_index(tmp_path)
    files = [path for path in tmp_path.iterdir() if path.name != MANIFEST]
    assert tmp_path / "lists-7.faiss" in files
    assert check == (len(files), sum(path.stat().st_size for path in files), {})
    damaged, held = (read_index(tmp_path, "index").lists for _ in range(2))
    whole = (tmp_path / "lists-7.faiss").read_bytes()
    (tmp_path / "lists-7.faiss").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert list(verify_index(tmp_path).damaged) == ["lists-7.faiss"]
    with pytest.raises(DamagedFileError, match="lists-7.faiss.* `mmgem index` makes the lists anew"):
        damaged.read()
    (tmp_path / "lists-7.faiss").write_bytes(whole)
    write_index(tmp_path, facts, 8, 40, [columns])
    assert read_index(tmp_path, "index").lists is None and not (tmp_path / "lists-7.faiss").exists()
    np.testing.assert_array_equal(held.read().cells(), made.cells())  # who has them open keeps them


def test_the_first_rows_alone_may_have_a_memory_and_columns_gaps(facts, tmp_path):
    columns = make_columns(6)
    first = {name: values[:4] for name, values in columns.items()} | {"box": [None] * 4}
    rest = {name: values[4:] for name, values in columns.items() if name != "memory"} | {"box": [[0.0, 1.0]] * 2}
    write_index(tmp_path, facts, 1, 6, [first, rest], 4)
    rows = read_index(tmp_path, "index").rows
    assert len(rows.arrays["memory"]) == 4 and len(rows.arrays["embedding"]) == 6
    np.testing.assert_array_equal(rows.arrays["memory"][:], columns["memory"][:4])
    np.testing.assert_array_equal(rows.arrays["embedding"][[5, 4]], columns["embedding"][[5, 4]])
    assert rows["box"] == [None] * 4 + [[0.0, 1.0]] * 2 and not rows.damaged().any()
    np.testing.assert_array_equal(np.load(tmp_path / "memory-1.npy"), columns["memory"][:4])


def test_parts_without_a_memory_are_counted_and_removed_as_a_whole(facts, tmp_path):
    place = tmp_path / "unfinished"
    write_index(place, facts, 1)
    stored = read_index(place, "index")
    assert stored.rows is None and stored.bytes_per_row == 0
    columns = make_columns(3)
    write_part(place, 0, columns | {"memory": columns["memory"][:2]})
    write_part(place, 1, {name: values for name, values in columns.items() if name != "memory"})
    parts = list(read_parts(place))
    assert [sorted(part.arrays) for part in parts] == [["embedding", "memory"], ["embedding"]]
    assert len(parts[0].arrays["memory"]) == 2
    check = verify_index(place)
    files = [path for path in place.iterdir() if path.suffix != ".json"]
    assert check == (len(files), sum(path.stat().st_size for path in files), {})
    (place / "part-000000.json").write_text("{")
    assert verify_index(place).damaged == {"part-000000.json": "it is not what was written"}
    assert [sorted(part.arrays) for part in read_parts(place)] == [["embedding"]]
    remove_parts(place)
    assert not place.exists()
    remove_parts(place)  # of which nothing is left


@pytest.mark.parametrize("format", [3, 4])
def test_formats_with_checksums_are_read_and_refused_alike(facts, tmp_path, format):
    columns = write(tmp_path, facts)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    manifest.pop("checksum")
    write_checked_json(tmp_path / MANIFEST, manifest | {"format": format})
    stored = read_index(tmp_path, "index")
    assert stored.version == 1 and stored.rows["kind"] == ["image"] * 5
    np.testing.assert_array_equal(stored.rows.arrays["embedding"][:], columns["embedding"])
    assert verify_index(tmp_path).files == 4
    (tmp_path / MANIFEST).write_text(json.dumps(manifest | {"format": format, "folder": "/elsewhere"}))
    for read in (lambda: read_index(tmp_path, "index"), lambda: verify_index(tmp_path)):
        with pytest.raises(ValueError, match="`index` is .*, an index whose search_index.json is damaged"):
            read()


def test_rows_far_apart_are_read_alone_and_no_more_at_a_time_than_may_be(tmp_path, monkeypatch):
    rows = np.arange(60, dtype=np.int64).reshape(20, 3)  # 24 bytes each
    with write_checked(tmp_path / "a.npy") as writer:
        np.lib.format.write_array_header_1_0(writer, {"descr": "<i8", "fortran_order": False, "shape": (20, 3)})
        writer.write(rows.tobytes())
    array = ArrayFile(tmp_path, writer.facts | {"dtype": "<i8", "shape": [20, 3]})
    read, spans = array._read, []
    monkeypatch.setattr(array, "_read", lambda start, stop: spans.append((start, stop)) or read(start, stop))
    monkeypatch.setattr(storage, "_READ_ANYWAY", 49)  # up to 3 rows
    monkeypatch.setattr(storage, "_READ_AT_MOST", 10 * 24 - 1)  # 10 rows
    for asked, expected in [
        ([0, 3, 7, 2], [(0, 4), (7, 8)]),
        ([5, 4, 4], [(4, 6)]),
        ([8, 9, 10, 11], [(8, 10), (10, 12)]),
        (np.array([19, 1], np.uint8), [(1, 2), (19, 20)]),
        ([], []),
    ]:
        spans.clear()
        np.testing.assert_array_equal(array[asked], rows[np.asarray(asked, int)])
        assert spans == expected


def test_slices_are_those_that_a_length_consists_of():
    assert [list(range(10)[part]) for part in chunks(7, 3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(chunks(7, 3)) == [slice(0, 3), slice(3, 6), slice(6, 7)] and list(chunks(0, 3)) == []


def test_what_lies_between_rows_that_are_asked_for_may_be_damaged(tmp_path, small_blocks):
    rows = np.arange(48, dtype=np.int64).reshape(6, 8)  # a block each
    with write_checked(tmp_path / "a.npy") as writer:
        np.lib.format.write_array_header_1_0(writer, {"descr": "<i8", "fortran_order": False, "shape": (6, 8)})
        writer.write(rows.tobytes())
    content = (tmp_path / "a.npy").read_bytes()
    start = len(content) - rows.nbytes
    for byte, damaged in ((start + 64, [1]), (0, [])):  # row 1; the header
        (tmp_path / "a.npy").write_bytes(content[:byte] + bytes([content[byte] ^ 1]) + content[byte + 1 :])
        array = ArrayFile(tmp_path, writer.facts | {"dtype": "<i8", "shape": [6, 8]})
        assert np.flatnonzero(array.damaged_rows()).tolist() == damaged
        np.testing.assert_array_equal(array[[0, 2, 3]], rows[[0, 2, 3]])


def test_an_index_is_verified_with_what_is_unfinished_in_it_and_named_in_errors(facts, tmp_path):
    write(tmp_path / "index", facts)
    write_index(tmp_path / "index" / "unfinished", facts, 1)
    write_part(tmp_path / "index" / "unfinished", 0, make_columns(3))
    assert verify_index(tmp_path / "index").files == 4 + 4
    (tmp_path / "index" / MANIFEST).write_text("[]")
    with pytest.raises(ValueError, match="`index` is .*, an index whose search_index.json is damaged"):
        verify_index(tmp_path / "index")
    shutil.copytree(OF_0_1_0, tmp_path / "old")
    (tmp_path / "old" / "rows.arrow").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="`index` is .*, a damaged index"):
        verify_index(tmp_path / "old")


def test_a_stamp_is_noted_once_and_changes_nothing_else(facts, tmp_path):
    write(tmp_path, facts)
    before = read_checked_json(tmp_path / MANIFEST)
    assert read_index(tmp_path, "index").stamp is None
    note_stamp(tmp_path, "as it was")
    assert read_index(tmp_path, "index").stamp == "as it was"
    assert read_checked_json(tmp_path / MANIFEST) == before | {"stamp": "as it was"}
    written = (tmp_path / MANIFEST).stat().st_ino
    note_stamp(tmp_path, "as it was")
    assert (tmp_path / MANIFEST).stat().st_ino == written


@pytest.mark.parametrize("file", [MANIFEST, "rows-1.parquet", "probes-1.safetensors"])
def test_an_index_on_a_disk_that_fails_is_not_called_damaged(facts, tmp_path, monkeypatch, file):
    write(tmp_path, facts)

    def failing(read):
        def of_file(self, *args):
            if (self if isinstance(self, Path) else self.path).name == file:
                raise OSError(errno.EIO, "Input/output error")
            return read(self, *args)

        return of_file

    monkeypatch.setattr(Path, "read_bytes", failing(Path.read_bytes))
    monkeypatch.setattr(CheckedFile, "_read_from", failing(CheckedFile._read_from))
    with pytest.raises(ValueError, match="`index` is .*, an index that cannot be read .*Errno 5.*; expected one that"):
        read_index(tmp_path, "index")
    if file == MANIFEST:
        with pytest.raises(OSError, match=f"'.*{file}'"):
            verify_index(tmp_path)
    else:
        assert list(verify_index(tmp_path).damaged) == [file]
