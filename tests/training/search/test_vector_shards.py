"""Shards of vectors: made as an index makes them, checked by the model's fingerprint, and made an index."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_folders import NAMES, build_multi_vector_model, write_noise
from tiny_models import build_model

from mmgem.training.search import inverted_lists, vector_shards
from mmgem.training.search.building import build_index
from mmgem.training.search.conditions import Condition
from mmgem.training.search.index import SearchIndex
from mmgem.training.search.storage import read_index, verify_index
from mmgem.training.search.vector_shards import ImageEmbedder, begin_shards, index_shards


@pytest.fixture
def shards(tmp_path):
    return tmp_path / "shards"


def files(folder, names=NAMES, **columns):
    """A table as Ray Data reads files."""
    return pa.table(
        {
            "path": [str(folder / name) for name in names],
            "bytes": [(folder / name).read_bytes() for name in names],
            **columns,
        }
    )


@pytest.fixture
def make(folder, shards, tiny_processor, monkeypatch):
    """Makes shards of tables of files by a model."""

    def make(model, *tables, **settings):
        monkeypatch.setattr(vector_shards, "load_checkpoint", lambda name: (model, tiny_processor))
        begin_shards(shards, model, tiny_processor, folder, **settings)
        embedder = ImageEmbedder(shards, threads=2)
        for number, table in enumerate(tables or (files(folder, NAMES[:3]), files(folder, NAMES[3:]))):
            pq.write_table(embedder(table), shards / f"{number}.parquet")

    return make


def vectors_by_name(out):
    stored = read_index(out, "out")
    return dict(
        zip(stored.rows["file_name"], stored.facts.codec.decode(stored.rows.arrays["embedding"][:]), strict=True)
    )


@pytest.mark.parametrize("settings", [{}, {"dimensions": 5, "precision": "int8"}, {"image_mode": "fused"}])
def test_an_index_of_shards_is_that_of_the_folder_and_is_updated_as_one(
    folder, out, tmp_path, tiny_processor, make, shards, settings, monkeypatch
):
    model = build_multi_vector_model(4)
    make(model, vectors=3, **settings)
    report = index_shards(shards, model, tiny_processor, out)
    assert (report.images, report.skipped, report.rows) == (7, [], {"image": 7}) and verify_index(out).damaged == {}
    expected = build_index(folder, model, tiny_processor, tmp_path / "direct", vectors=3, **settings)
    assert report.bytes_per_image == expected.bytes_per_image
    vectors, of_folder = vectors_by_name(out), vectors_by_name(tmp_path / "direct")
    assert vectors.keys() == of_folder.keys()
    for name, vector in vectors.items():
        np.testing.assert_allclose(vector, of_folder[name], atol=1e-5)
    assert set(read_index(out, "out").rows["width"]) == {40}
    write_noise(folder / "new.png", 11)
    assert build_index(folder, model, tiny_processor, out, vectors=3, **settings).embedded == 1
    index = SearchIndex.load(out, model, tiny_processor)
    assert index.search(image=folder / NAMES[2])[0].path == folder / NAMES[2] and len(index) == 8


def test_captions_and_metadata_come_along_and_many_vectors_get_lists(
    folder, out, tiny_model, tiny_processor, make, shards, monkeypatch
):
    monkeypatch.setattr(inverted_lists, "EXACT_BELOW", 5)
    make(tiny_model, files(folder, caption=[f"a star {number}" for number in range(7)], year=list(range(7))))
    assert index_shards(shards, tiny_model, tiny_processor, out).recall.keys() == {"rows", "captions"}
    index = SearchIndex.load(out, tiny_model, tiny_processor)
    assert [hit.text for hit in index.search("a star", where=[Condition("year", "=", 4)])] == ["a star 4"]
    assert index.search("a star 4", lexical_weight=1)[0].text == "a star 4"


def test_images_that_cannot_be_read_are_reported_and_cost_nothing_else(
    folder, out, tiny_model, tiny_processor, make, shards, monkeypatch
):
    (folder / NAMES[1]).write_bytes(b"no picture")
    table = files(folder)
    structs = [{"bytes": data, "path": None} for data in table["bytes"].to_pylist()]
    structs[4] = {"bytes": None, "path": "elsewhere.png"}  # as `datasets` writes files that it does not embed
    make(tiny_model, files(folder, NAMES[:4]), table.set_column(1, "bytes", pa.array(structs)))
    report = index_shards(shards, tiny_model, tiny_processor, out)
    assert report.images == 5
    (first, first_reason), (second, second_reason), (shard, repeated) = sorted(
        report.skipped, key=lambda one: one[0] == "1.parquet"
    )
    assert (first, second, shard) == (NAMES[1], NAMES[4], "1.parquet")
    assert "no image" in first_reason and "expected the bytes of an image" in second_reason
    assert repeated == "in other rows already: 3 images"  # as of a worker that died before it said so
    # Another try that succeeds counts.
    write_noise(folder / NAMES[1], 1)
    pq.write_table(ImageEmbedder(shards)(files(folder, [NAMES[1], NAMES[4]])), shards / "2.parquet")
    report = index_shards(shards, tiny_model, tiny_processor, out)
    assert report.images == 7 and [name for name, _ in report.skipped] == ["1.parquet"]


def test_a_shard_that_is_written_while_it_is_read_is_refused(
    folder, out, tiny_model, tiny_processor, make, shards, monkeypatch
):
    make(tiny_model)
    choose = vector_shards._choose_rows

    def choose_and_write(*arguments):
        kept = choose(*arguments)
        table = pq.read_table(shards / "0.parquet")
        pq.write_table(table.take(list(range(len(table)))[::-1]), shards / "0.parquet")
        return kept

    monkeypatch.setattr(vector_shards, "_choose_rows", choose_and_write)
    with pytest.raises(ValueError, match="`shards` has 0.parquet, which was written while it was read; expected"):
        index_shards(shards, tiny_model, tiny_processor, out)
    monkeypatch.undo()
    assert index_shards(shards, tiny_model, tiny_processor, out).images == 7


def test_a_shard_that_is_cut_is_named_and_the_others_are_indexed(
    folder, out, tiny_model, tiny_processor, make, shards
):
    make(tiny_model)
    whole = (shards / "1.parquet").read_bytes()
    (shards / "1.parquet").write_bytes(whole[: len(whole) // 2])
    report = index_shards(shards, tiny_model, tiny_processor, out)
    assert report.images == 3 and [name for name, _ in report.skipped] == ["1.parquet"]
    (shards / "0.parquet").unlink()
    with pytest.raises(
        ValueError, match="`shards` is .* where no vector is; expected some Parquet files with vectors"
    ):
        index_shards(shards, tiny_model, tiny_processor, out)
    assert len(SearchIndex.load(out, tiny_model, tiny_processor)) == 3


def test_another_model_is_refused_wherever_it_comes_in(
    folder, out, tiny_model, tiny_processor, make, shards, tmp_path, monkeypatch
):
    make(tiny_model)
    other = build_model()
    for weight in other.parameters():
        weight.data += 1
    with pytest.raises(
        ValueError, match="`model` is .*, which (has other weights|embeds .* otherwise), compared with"
    ):
        begin_shards(shards, other, tiny_processor, folder)
    with pytest.raises(ValueError, match="`shards` is .*IndexSettings.*expected"):
        begin_shards(shards, tiny_model, tiny_processor, folder, dimensions=3)
    with pytest.raises(ValueError, match="expected the same model, or another place"):
        index_shards(shards, other, tiny_processor, out)
    with monkeypatch.context() as patch:  # a worker whose folder of the model changed meanwhile
        patch.setattr(vector_shards, "load_checkpoint", lambda name: (other, tiny_processor))
        with pytest.raises(ValueError, match="expected the same model, or another place"):
            ImageEmbedder(shards)
    shutil.copy(shards / "0.parquet", tmp_path / "9.parquet")
    table = pq.read_table(tmp_path / "9.parquet")
    other_hash = pa.array(["0" * 32] * len(table))
    pq.write_table(table.set_column(table.column_names.index("model"), "model", other_hash), shards / "9.parquet")
    with pytest.raises(ValueError, match="`shards` has 9.parquet, by a model with the hash 0000"):
        index_shards(shards, tiny_model, tiny_processor, out)
    (shards / "9.parquet").unlink()
    build_index(folder, tiny_model, tiny_processor, out)
    assert index_shards(shards, tiny_model, tiny_processor, out).images == 7 and read_index(out, "out").version == 2
    build_index(write_other(tmp_path), tiny_model, tiny_processor, tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="`out` is .*, an index of the folder .*expected one of"):
        index_shards(shards, tiny_model, tiny_processor, tmp_path / "elsewhere")


def write_other(tmp_path):
    write_noise(tmp_path / "other" / "0.png", 0)
    return tmp_path / "other"


def test_places_and_columns_that_are_something_else_are_refused(
    folder, out, tiny_model, tiny_processor, make, shards, tmp_path
):
    with pytest.raises(ValueError, match="`shards` is .*, where other files are; expected a new or an empty folder"):
        begin_shards(folder, tiny_model, tiny_processor, folder)
    with pytest.raises(ValueError, match="`shards` is .*no index"):
        index_shards(folder, tiny_model, tiny_processor, out)
    build_index(folder, tiny_model, tiny_processor, out)
    with pytest.raises(ValueError, match="`shards` is .*, an index; expected a folder that `begin_shards` has begun"):
        index_shards(out, tiny_model, tiny_processor, tmp_path / "new")
    make(tiny_model)
    for names, argument in [({"image": "jpg"}, "image"), ({"name": "key"}, "name")]:
        with pytest.raises(ValueError, match=f"`{argument}` is .*; expected one of path, bytes"):
            ImageEmbedder(shards, **names)(files(folder))
    manifest = json.loads((shards / "search_index.json").read_text())
    (shards / "search_index.json").write_text(json.dumps(manifest | {"version": 9}))
    with pytest.raises(ValueError, match="search_index.json is damaged"):
        index_shards(shards, tiny_model, tiny_processor, out)


def test_a_full_disk_leaves_what_was_there(folder, out, tiny_model, tiny_processor, make, shards, monkeypatch):
    def fail(number):
        raise OSError(28, "No space left on device")

    make(tiny_model, files(folder, NAMES[:3]))
    index_shards(shards, tiny_model, tiny_processor, out)
    make(tiny_model)
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fail)
        with pytest.raises(OSError, match="No space left"):
            index_shards(shards, tiny_model, tiny_processor, out)
    assert len(SearchIndex.load(out, tiny_model, tiny_processor)) == 3 and verify_index(out).damaged == {}
    assert index_shards(shards, tiny_model, tiny_processor, out).images == 7
