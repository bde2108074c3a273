"""WebDataset shards: grouping of files, reading anywhere, damage, and the cache of their indexes."""

import json
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import pytest
from image_bytes import png

from mmgem.training.data import shard_index
from mmgem.training.data.open_source import open_source
from mmgem.training.data.paths import expand_paths
from mmgem.training.data.shards import ShardSource


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_index.constants, "HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "mmgem" / "shard_indexes"


def write_shard(path, parts, tar_format=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w", format=tar_format) as shard:
        for name, data in parts:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            shard.addfile(member, BytesIO(data))


def sample(key, color="red", **fields):
    return [(f"{key}.png", png(color)), (f"{key}.json", json.dumps({"caption": f"about {key}"} | fields).encode())]


def test_files_of_a_name_are_a_sample(tmp_path):
    long_name = "a/" + "very-" * 30 + "long"
    parts = [
        *sample("a/0"),
        ("__meta__/info.json", b"{}"),
        ("a/.hidden", b"no part"),
        ("a/1.0.PNG", png("blue")),  # the key ends at the first dot
        ("a/1.txt", b"about 1"),
        ("readme", b"without extension"),
        *sample("b/1", "green"),  # another directory is another key
        *sample(long_name, label="star"),
    ]
    for tar_format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        write_shard(tmp_path / "x.tar", parts, tar_format)
        source = open_source({"webdataset": str(tmp_path / "x.tar")})
        assert [source.key(i) for i in range(len(source))] == [
            "x.tar/a/0",
            "x.tar/a/1",
            "x.tar/b/1",
            f"x.tar/{long_name}",
        ]
        rows = [source[i] for i in (2, 0, 3, 1)]  # in any order
        assert [row["captions"] for row in rows] == [["about b/1"], ["about a/0"], [f"about {long_name}"], ["about 1"]]
        assert [row["image"].getpixel((0, 0))[2] for row in rows] == [0, 0, 0, 255]
        assert rows[2]["label"] == "star" and source.damaged == []
        assert set(rows[0]) == {"image", "captions"}


def test_samples_count_on_over_shards(tmp_path):
    for number in range(3):
        write_shard(tmp_path / f"x-{number:03d}.tar", [part for i in range(4) for part in sample(f"{number}{i}")])
    source = ShardSource(str(tmp_path / "x-{000..002}.tar"))
    assert [source[i]["captions"][0] for i in range(12)] == [f"about {s}{i}" for s in range(3) for i in range(4)]
    assert source.key(5) == "x-001.tar/11"
    assert len(ShardSource(str(tmp_path / "*.tar"))) == 12
    assert len(ShardSource([str(tmp_path / "x-000.tar"), str(tmp_path / "x-002.tar")])) == 8
    with pytest.raises(FileNotFoundError, match="x-003.tar', where there is no file"):
        ShardSource(str(tmp_path / "x-{000..003}.tar"))


def test_parts_are_columns(tmp_path):
    parts = [("0.left.png", png("red")), ("0.right.png", png("blue")), ("0.note.txt", b"a note"), ("0.txt", b"a text")]
    write_shard(tmp_path / "x.tar", parts)
    section = {"webdataset": str(tmp_path / "x.tar")}
    row = open_source(section | {"columns": {"image": "right.png", "captions": "note.txt"}})[0]
    assert row["image"].getpixel((0, 0)) == (0, 0, 255) and row["captions"] == ["a note"]
    with pytest.raises(ValueError, match="no column `jpg`, which `columns` gives for `image`"):
        open_source(section | {"columns": {"image": "jpg"}})
    write_shard(tmp_path / "x.tar", [("0.png", png("red")), ("0.json", b'{"words": "a cat", "url": "x"}')])
    with pytest.raises(ValueError, match="no column `captions`; it has .*words.*columns: {captions: NAME}"):
        open_source(section)
    assert open_source(section | {"columns": {"captions": "words"}})[0]["captions"] == ["a cat"]


@pytest.mark.parametrize("kept", [0.3, 0.55, 0.9])
def test_a_shard_that_is_cut_off_gives_what_stands_before(tmp_path, kept):
    write_shard(tmp_path / "whole.tar", sample("w"))
    path = tmp_path / "x.tar"
    write_shard(path, [part for i in range(10) for part in sample(f"{i}")])
    size = 10 * 4 * 512  # headers and contents of 512 bytes each, before the empty blocks at the end
    data = path.read_bytes()
    assert data[size : size + 512] == bytes(512) != data[size - 1024 : size - 512]
    path.write_bytes(data[: int(size * kept)])
    source = ShardSource(str(tmp_path / "*.tar"))
    assert len(source) - 1 in (int(10 * kept) - 1, int(10 * kept))
    assert all(source[i]["captions"] for i in range(len(source)))
    ((key, reason),) = source.damaged
    assert key == "x.tar" and "damaged at byte" in reason


def test_damage_in_the_middle_and_elsewhere(tmp_path):
    path = tmp_path / "x.tar"
    write_shard(path, [part for i in range(10) for part in sample(f"{i}")])
    data = bytearray(path.read_bytes())
    data[4 * 4 * 512 + 100] ^= 255  # the header of sample 4
    path.write_bytes(data)
    source = ShardSource(str(path))
    assert len(source) == 3 and [key for key, _ in source.damaged] == ["x.tar"]

    for content in (b"", b"no tar file at all" * 100):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="has no samples; expected some in 1 tar files. x.tar: is damaged"):
            ShardSource(str(path))


def test_damaged_samples_fail_when_they_are_read(tmp_path):
    parts = [*sample("0"), ("1.png", b"no image"), ("1.txt", b"a"), ("2.png", png("red")), ("2.json", b"{")]
    write_shard(tmp_path / "x.tar", [*parts, ("3.png", png("red")), ("3.txt", b"\xff")])
    source = ShardSource(str(tmp_path / "x.tar"))
    with pytest.raises(ValueError, match="image of row '.*x.tar:x.tar/1'.* no image"):
        source[1]
    for index in (2, 3):
        with pytest.raises(ValueError):
            source[index]


def test_patterns(tmp_path):
    for name in ("a1b08", "a1b09", "a2b08", "a2b09"):
        tmp_path.joinpath(name).touch()
    found = expand_paths(str(tmp_path / "a{1..2}b{08..09}"), "`x`")
    assert [path[-5:] for path in found] == ["a1b08", "a1b09", "a2b08", "a2b09"]
    assert expand_paths(str(tmp_path / "a?b09"), "`x`") == [found[1], found[3]]
    with pytest.raises(FileNotFoundError, match="`x` is .*nowhere.*; expected one or more"):
        expand_paths([found[0], str(tmp_path / "nowhere*")], "`x`")


# The cache


@pytest.fixture
def headers(monkeypatch):
    """The headers of shards that are read, without those of samples."""
    read = []

    def counting(shard, following=tarfile.TarFile.next):
        if shard.name is not None:
            read.append(shard)
        return following(shard)

    monkeypatch.setattr(tarfile.TarFile, "next", counting)
    return read


def write_old_shard(path, *keys, mtime=10**9):
    write_shard(path, [part for key in keys for part in sample(key)])
    os.utime(path, (mtime, mtime))


def captions_of(path):
    source = ShardSource(str(path))
    return [source[i]["captions"][0] for i in range(len(source))]


def scanned(path, headers):
    """The number of headers that are read when shards are opened."""
    headers.clear()
    ShardSource(str(path))
    return len(headers)


def test_a_shard_is_scanned_once(tmp_path, headers, cache):
    for name in ("a.tar", "b.tar"):
        write_old_shard(tmp_path / name, *"0123")
    first = captions_of(tmp_path / "*.tar")
    assert len(list(cache.iterdir())) == 2
    assert scanned(tmp_path / "*.tar", headers) == 0
    assert captions_of(tmp_path / "*.tar") == first == [f"about {i}" for i in "01230123"]
    (tmp_path / "moved").mkdir()
    (tmp_path / "a.tar").rename(tmp_path / "moved" / "a.tar")
    assert scanned(tmp_path / "moved" / "a.tar", headers) == 10


def test_a_changed_shard_is_scanned_again(tmp_path, headers):
    path = tmp_path / "x.tar"
    write_old_shard(path, *"0123")
    assert captions_of(path) == [f"about {i}" for i in "0123"]
    write_old_shard(path, "a", "b", "c.0", "d", mtime=10**9 + 1)  # of the same size
    assert captions_of(path) == [f"about {i}" for i in ("a", "b", "c.0", "d")]
    write_old_shard(path, *"01234567")  # of the time it had at first
    assert len(captions_of(path)) == 8
    write_shard(path, [part for i in "0123" for part in sample(i)])
    assert scanned(path, headers) == scanned(path, headers) == 10  # just written: its time may stay as it is


@pytest.mark.parametrize("damage", ["cut", "bit", "no header", "empty"])
def test_a_damaged_index_is_written_again(tmp_path, headers, cache, damage):
    path = tmp_path / "x.tar"
    write_old_shard(path, *"0123")
    captions = captions_of(path)
    (index,) = cache.iterdir()
    whole = index.read_bytes()
    bit = whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:]
    index.write_bytes({"cut": whole[:-8], "bit": bit, "no header": whole[10:], "empty": b""}[damage])
    assert captions_of(path) == captions
    assert scanned(path, headers) == 0 and index.read_bytes() == whole


def test_damaged_shards_and_read_only_homes_go_without_a_cache(tmp_path, headers, cache):
    path = tmp_path / "x.tar"
    write_old_shard(path, *"0123")
    path.write_bytes(path.read_bytes()[:5000])
    os.utime(path, (10**9, 10**9))
    assert len(ShardSource(str(path)).damaged) == len(ShardSource(str(path)).damaged) == 1 and not cache.exists()
    (tmp_path / "home").write_text("no folder")
    write_old_shard(path, *"0123")
    assert len(captions_of(path)) == 4


def test_many_may_write_the_cache_at_once(tmp_path, headers, cache):
    path = tmp_path / "x.tar"
    write_old_shard(path, *"0123")
    with ThreadPoolExecutor(8) as pool:
        assert len(set(map(tuple, pool.map(captions_of, [path] * 32)))) == 1
    assert [file.suffix for file in cache.iterdir()] == [".index"]
    assert scanned(path, headers) == 0
