"""Indexes of images, captions, regions and texts: what their rows are, and that they are kept as images are."""

import json
import os
import shutil

import numpy as np
import pandas
import pytest
import torch
from image_folders import NAMES, build_multi_vector_model
from tiny_models import build_model

from mmgem.training.data.image_files import shorter_side_for
from mmgem.training.inference import embed_fused, embed_images, embed_regions, embed_texts, remember
from mmgem.training.search import building, folder_items, item_embedder
from mmgem.training.search.asking import ask
from mmgem.training.search.building import build_index
from mmgem.training.search.conditions import Condition
from mmgem.training.search.index import SearchIndex
from mmgem.training.search.storage import MANIFEST, read_index, verify_index, write_checked_json

BOXES = [[0, 0, 20, 15], [10, 5, 40, 30]]
LINES = [
    {
        "file_name": NAMES[0],
        "captions": ["a red star", "one star"],
        "boxes": BOXES,
        "region_captions": ["tip", "rest"],
    },
    {"file_name": NAMES[1], "text": "a blue circle", "label": "circle", "year": 2020},
    {"file_name": NAMES[2], "boxes": BOXES[:1], "label": "moon", "tags": ["new", "old"], "year": 2021},
]
ALL = {"captions": "beside", "regions": "boxes", "texts": "body"}


def describe(folder, lines=LINES):
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def corpus(folder):
    """Pictures with captions and boxes, and texts of every kind of file."""
    describe(folder)
    (folder / "deep" / "note.txt").write_text("notes about stars")
    (folder / "READ.md").write_text("# Stars\nand moons")
    records = [{"body": f"record {number}", "year": 2000 + number} for number in range(3)]
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    pandas.DataFrame({"body": ["cell one", "cell two"], "label": ["x", "y"]}).to_csv(folder / "t.csv", index=False)
    pandas.DataFrame({"body": ["a parquet text"], "image": [b"\0"]}).to_parquet(folder / "deep" / "t.parquet")
    return folder


@pytest.fixture
def embedded(monkeypatch):
    """The texts and the number of pictures in each batch that is embedded, probes aside."""
    calls = []
    for name in ("embed_texts", "embed_images", "embed_regions", "embed_fused"):

        def counting(model, processor, *inputs, name=name, function=getattr(item_embedder, name)):
            calls.append((name, len(inputs[0])))
            return function(model, processor, *inputs)

        monkeypatch.setattr(item_embedder, name, counting)
    return calls


def rows_of(out):
    rows = read_index(out, "out").rows
    keys = zip(rows["file_name"], rows["kind"], rows["part"], strict=True)
    return dict(zip(keys, rows.table.to_pylist(), strict=True)), dict(
        zip(zip(rows["file_name"], rows["kind"], rows["part"], strict=True), rows.arrays["embedding"][:], strict=True)
    )


def test_an_index_holds_everything_by_the_vectors_of_each(corpus, out, tiny_model, tiny_processor):
    report = build_index(corpus, tiny_model, tiny_processor, out, batch_size=3, **ALL)
    assert report.rows == {"caption": 3, "image": 7, "region": 3, "text": 8} and report.skipped == []
    assert (report.images, report.embedded) == (7, 21)
    rows, vectors = rows_of(out)
    texts = {
        ("READ.md", "text", 0): "# Stars\nand moons",
        ("deep/note.txt", "text", 0): "notes about stars",
        ("deep/t.parquet", "text", 1): "a parquet text",
        ("records.jsonl", "text", 2): "record 1",
        ("t.csv", "text", 3): "cell two",
        (NAMES[0], "caption", 1): "one star",
        (NAMES[1], "caption", 0): "a blue circle",
    }
    for (key, text), expected in zip(texts.items(), embed_texts(tiny_model, tiny_processor, [*texts.values()])):
        assert rows[key]["text"] == text
        np.testing.assert_allclose(vectors[key], expected, atol=1e-5)
    assert json.loads(rows["records.jsonl", "text", 2]["metadata"]) == {"year": 2001}
    assert json.loads(rows["t.csv", "text", 3]["metadata"]) == {"label": "y"}
    regions = embed_regions(tiny_model, tiny_processor, [corpus / NAMES[0]], [BOXES])
    for part, text in enumerate(["tip", "rest"]):
        row = rows[NAMES[0], "region", part]
        assert (row["text"], row["box"], row["width"]) == (text, BOXES[part], 40)
        np.testing.assert_allclose(vectors[NAMES[0], "region", part], regions[part], atol=1e-5)
    assert rows[NAMES[0], "image", 0]["text"] == "a red star\none star"
    image = embed_images(tiny_model, tiny_processor, [corpus / NAMES[2]])[0]
    np.testing.assert_allclose(vectors[NAMES[2], "image", 0], image, atol=1e-5)
    assert json.loads(rows[NAMES[2], "image", 0]["metadata"]) == {
        "label": "moon",
        "tags": ["new", "old"],
        "year": 2021,
    }
    assert verify_index(out).damaged == {}

    index = SearchIndex.load(out, tiny_model, tiny_processor)
    hit = index.search("record 1", top=1)[0]
    assert hit[1:] == (corpus / "records.jsonl", hit.row, "text", 2, "record 1", None)
    assert hit.score == pytest.approx(1, abs=1e-5)
    hit = index.search(image=corpus / NAMES[0], boxes=BOXES[1:], top=1)[0]
    assert (hit.path, hit.kind, hit.part, hit.box) == (corpus / NAMES[0], "region", 1, BOXES[1])


def test_a_search_is_limited_to_kinds_and_metadata(corpus, out, tiny_model, tiny_processor):
    build_index(corpus, tiny_model, tiny_processor, out, **ALL)
    index = SearchIndex.load(out, tiny_model, tiny_processor)
    every = {hit.row: hit.score for hit in index.search("a star", top=100)}
    assert len(every) == 21
    for limits, count in [
        ({"kinds": ["text"]}, 8),
        ({"kinds": ["region", "caption"]}, 6),
        ({"where": [Condition.parse("year>=2020")]}, 4),
        ({"where": [Condition.parse("label=moon")]}, 2),
        ({"where": [Condition.parse("tags=new"), Condition.parse("kind=image")]}, 1),
        ({"where": [Condition.parse("year<2002")], "kinds": ["text"]}, 2),
        ({"where": [Condition.parse("year>3000")]}, 0),
        ({"where": [Condition.parse("label!=moon")], "kinds": ["image"]}, 6),
    ]:
        hits = index.search("a star", top=100, **limits)
        assert len(hits) == count
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
        np.testing.assert_allclose([hit.score for hit in hits], [every[hit.row] for hit in hits], atol=1e-6)
    with pytest.raises(ValueError, match="`row` is 20, of the kind 'text'"):
        index.explain(20, None)
    with pytest.raises(ValueError, match="`kinds` holds 'fused', of which the index has none; expected some of image"):
        index.search("a star", kinds=["fused"])
    with pytest.raises(ValueError, match="`where` names 'colour', which no row has; expected one of .*label"):
        index.search("a star", where=[Condition.parse("colour=red")])


def test_conditions_compare_numbers_as_numbers_and_texts_as_texts():
    for text, value, holds in [
        ("year>=2020", 2020, True),
        ("year>=2020", "2021", True),
        ("year>=2020", "about 2021", False),
        ("year < 9", 10, False),
        ("label=red star", "red star", True),
        ("label=red", "red star", False),
        ("label!=red", "red star", True),
        ("label!=red", None, True),
        ("label=red", None, False),
        ("tags=b", ["a", "b"], True),
        ("tags!=b", ["a", "b"], False),
        ("done=true", True, True),
        ("name<b", "a", True),
        ("name=nan", "nan", True),
        ("edit>1", {"image": "b.png"}, False),
        ("edit!=1", [{"image": "b.png"}, [1]], True),
        ("year>1", 10**400, True),
        ("id=9007199254740993", 9007199254740993, True),
        ("id=9007199254740993", "9007199254740993", True),
        ("id=9007199254740993", 9007199254740992, False),
        ("id>9007199254740992", 9007199254740993, True),
    ]:
        assert Condition.parse(text).holds(value) == holds, text
    for text in ("year", "=3", ""):
        with pytest.raises(ValueError, match="`where` is"):
            Condition.parse(text)


def test_only_what_changed_is_embedded_and_what_is_said_of_the_rest_is_renewed(
    corpus, out, tiny_model, tiny_processor, embedded
):
    build_index(corpus, tiny_model, tiny_processor, out, **ALL)
    embedded.clear()
    assert build_index(corpus, tiny_model, tiny_processor, out, **ALL)[:3] == (7, 0, []) and embedded == []
    assert read_index(out, "out").version == 1

    describe(corpus, [LINES[0] | {"captions": ["a red star", "two stars"]}, LINES[1] | {"label": "disc"}])
    with open(corpus / "records.jsonl", "a") as file:
        file.write(json.dumps({"body": "record 1"}) + "\n" + json.dumps({"body": "new"}) + "\n")
    (corpus / "READ.md").rename(corpus / "READ2.md")
    (corpus / "t.csv").unlink()
    report = build_index(corpus, tiny_model, tiny_processor, out, **ALL)
    assert embedded == [("embed_texts", 2)] and report.embedded == 2
    assert report.rows == {"caption": 3, "image": 7, "region": 2, "text": 8}
    rows, vectors = rows_of(out)
    assert json.loads(rows[NAMES[1], "caption", 0]["metadata"])["label"] == "disc"
    assert rows[NAMES[0], "image", 0]["text"] == "a red star\ntwo stars"
    assert rows[NAMES[2], "image", 0]["metadata"] == ""
    expected = embed_texts(tiny_model, tiny_processor, ["two stars", "record 1"])
    np.testing.assert_allclose(vectors[NAMES[0], "caption", 1], expected[0], atol=1e-5)
    np.testing.assert_allclose(vectors["records.jsonl", "text", 4], expected[1], atol=1e-5)


def test_a_killed_run_goes_on_and_a_moved_corpus_is_known(
    corpus, out, tiny_model, tiny_processor, embedded, monkeypatch
):
    build_index(corpus, tiny_model, tiny_processor, out.with_name("reference"), memory=True, **ALL)
    monkeypatch.setattr(item_embedder, "ROWS_PER_PART", 2)
    monkeypatch.setattr(building, "ROWS_PER_PART", 2)
    batches, counting = [], item_embedder.embed_texts

    def killed_at_the_fourth_batch(model, processor, texts):
        batches.append(len(texts))
        if len(batches) == 4:
            raise KeyboardInterrupt
        return counting(model, processor, texts)

    with monkeypatch.context() as patch:
        patch.setattr(item_embedder, "embed_texts", killed_at_the_fourth_batch)
        with pytest.raises(KeyboardInterrupt):
            build_index(corpus, tiny_model, tiny_processor, out, memory=True, batch_size=2, **ALL)
    done = sum(batches[:3])
    embedded.clear()
    report = build_index(corpus, tiny_model, tiny_processor, out, memory=True, batch_size=2, **ALL)
    assert report.embedded == 21 - done
    assert sum(count for name, count in embedded if name == "embed_texts") == 11 - done
    (rows, vectors), (expected_rows, expected) = rows_of(out), rows_of(out.with_name("reference"))
    assert rows == expected_rows
    np.testing.assert_allclose(list(vectors.values()), list(expected.values()), atol=1e-5)

    moved = corpus.with_name("moved")
    shutil.copytree(corpus, moved, copy_function=shutil.copyfile)
    shutil.rmtree(corpus)
    embedded.clear()
    assert build_index(moved, tiny_model, tiny_processor, out, memory=True, moved=True, **ALL).embedded == 0
    assert embedded == [] and SearchIndex.load(out, tiny_model, tiny_processor).search("new")[0].path.parent == moved


def test_what_cannot_be_read_is_named_and_what_cannot_be_seen_is_kept(
    corpus, out, tiny_model, tiny_processor, monkeypatch
):
    (corpus / "latin.txt").write_bytes("é".encode("latin-1"))
    (corpus / "empty.md").write_text(" \n")
    (corpus / "bad.parquet").write_bytes(b"no table")
    (corpus / "other.csv").write_text("title\nx\n")
    with open(corpus / "records.jsonl", "ab") as file:
        file.write(b'{"body": 3}\n{\n{"body": "\\ud800"}\n{"text": "x"}\n')
    with open(corpus / "metadata.jsonl", "a") as file:
        file.write('{"file_name": "gone.png", "text": "x"}\n{"file_name": "0.png", "boxes": [[1, 2]]}\n')
    describe_all = build_index(corpus, tiny_model, tiny_processor, out, **ALL)
    reasons = dict(describe_all.skipped)
    assert describe_all.rows["text"] == 8
    assert set(reasons) == {"latin.txt", "empty.md", "bad.parquet", "other.csv", "records.jsonl", "metadata.jsonl"}
    assert (
        reasons["records.jsonl"].startswith("4 lines: 4 has `body` 3; expected")
        and "And 1 more" in reasons["records.jsonl"]
    )
    assert "2 lines: 4 names 'gone.png'" in reasons["metadata.jsonl"] and "5 has `boxes`" in reasons["metadata.jsonl"]
    assert "has nothing in column 'body', only in title" in reasons["other.csv"]

    read_file = folder_items.read_texts
    (corpus / "deep" / "t.parquet").touch()

    def unreadable(folder, file_name, *arguments):
        if file_name in ("deep/t.parquet", "records.jsonl"):
            raise PermissionError(13, "Permission denied")
        return read_file(folder, file_name, *arguments)

    monkeypatch.setattr(folder_items, "read_texts", unreadable)
    report = build_index(corpus, tiny_model, tiny_processor, out, **ALL)
    assert report.rows["text"] == 8 and report.embedded == 0
    assert ("records.jsonl", "it cannot be read: Permission denied; what the index has of it, 3 rows, is kept until "
            "it is gone") in report.skipped  # fmt: skip


def test_lines_about_one_image_are_joined_and_metadata_of_others_stop_nothing(folder, out, tiny_model, tiny_processor):
    captions = ["one", "two", "one"]
    describe(folder, [{"file_name": NAMES[0], "text": text, "n": n} for n, text in enumerate(captions)])
    report = build_index(folder, tiny_model, tiny_processor, out, captions="beside")
    rows, _ = rows_of(out)
    assert report.rows == {"caption": 2, "image": 7} and rows[NAMES[0], "caption", 1]["text"] == "two"
    assert json.loads(rows[NAMES[0], "image", 0]["metadata"]) == {"n": 0}
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_bytes("größe\n1\n".encode("latin-1"))
    report = build_index(folder, tiny_model, tiny_processor, out.with_name("other"))
    assert report.images == 7 and [name for name, _ in report.skipped] == ["metadata.csv"]


def test_a_box_outside_its_image_costs_itself(corpus, out, tiny_model, tiny_processor):
    describe(corpus, [LINES[0] | {"boxes": [*BOXES, [50, 50, 60, 60]], "region_captions": []}])
    report = build_index(corpus, tiny_model, tiny_processor, out, regions="boxes")
    assert report.rows == {"image": 7, "region": 2}
    assert [name for name, _ in report.skipped] == [f"{NAMES[0]}, region 2"]


def test_a_grid_has_a_row_for_each_cell(folder, out, tiny_processor):
    model = build_multi_vector_model(4)
    report = build_index(folder, model, tiny_processor, out, regions=2)
    assert report.rows == {"image": 7, "region": 28}
    rows, vectors = rows_of(out)
    cells = [[0, 0, 20, 15], [20, 0, 40, 15], [0, 15, 20, 30], [20, 15, 40, 30]]
    assert [rows[NAMES[3], "region", part]["box"] for part in range(4)] == cells
    expected = embed_regions(model, tiny_processor, [folder / NAMES[3]], [cells])
    np.testing.assert_allclose([vectors[NAMES[3], "region", part] for part in range(4)], expected, atol=1e-5)
    assert build_index(folder, model, tiny_processor, out, regions=2).embedded == 0


def test_images_are_fused_with_their_captions_or_alone(corpus, out, tiny_processor):
    model = build_model(num_embedding_tokens=3, embedding_pooling="mean")
    settings = {"captions": "fused", "regions": "boxes", "image_mode": "fused", "memory": True}
    report = build_index(corpus, model, tiny_processor, out, **settings)
    assert report.rows == {"fused": 2, "image": 5, "region": 3}
    rows, vectors = rows_of(out)
    paths = [corpus / NAMES[0], corpus / NAMES[1], corpus / NAMES[2], corpus / NAMES[0]]
    boxes = [[[0, 0, 40, 30]]] * 3 + [BOXES[1:]]
    alone = embed_fused(model, tiny_processor, paths[2:3], [""])
    fused = embed_fused(model, tiny_processor, paths[:2], ["a red star", "a blue circle"])
    region = embed_fused(model, tiny_processor, paths[3:], [""], boxes[3:])
    keys = [(NAMES[0], "fused", 0), (NAMES[1], "fused", 0), (NAMES[2], "image", 0), (NAMES[0], "region", 1)]
    for key, expected in zip(keys, torch.cat([fused, alone, region])):
        np.testing.assert_allclose(vectors[key], expected, atol=1e-5)

    index = SearchIndex.load(out, model, tiny_processor)
    hit = index.search(image=paths[2], top=1)[0]  # embedded as the images of the index are
    assert hit.path == paths[2] and hit.score == pytest.approx(1, abs=1e-5)
    memory = index.memory([index.rows["file_name"].index(NAMES[1])])
    np.testing.assert_array_equal(memory, remember(model, tiny_processor, [paths[1]]).half())
    with pytest.raises(ValueError, match="`rows` holds 0.5, which is no whole image"):
        index.memory([0, 0.5])
    with pytest.raises(ValueError, match="`rows` holds 9, which is no whole image"):
        index.memory([9])


def test_memory_is_of_images_among_texts(corpus, out, tiny_model, tiny_processor):
    build_index(corpus, tiny_model, tiny_processor, out, memory=True, **ALL)
    index = SearchIndex.load(out, tiny_model, tiny_processor)
    assert len(index.rows.arrays["memory"]) == 7 and len(index) == 21
    assert [answer.path for answer in ask(index, images=[NAMES[4], NAMES[0]])] == [
        corpus / NAMES[4],
        corpus / NAMES[0],
    ]
    assert all(answer.path.suffix == ".png" for answer in ask(index, "what?", search="record 1", top=3))
    with pytest.raises(ValueError, match=r"'READ\.md', which is not in the index"):
        ask(index, images=["READ.md"])


def test_damaged_rows_of_any_kind_are_embedded_again(corpus, out, tiny_model, tiny_processor, monkeypatch):
    monkeypatch.setattr("mmgem.training.search.checked_files.BLOCK", 128)
    monkeypatch.setattr("mmgem.training.search.storage.BLOCK", 128)
    build_index(corpus, tiny_model, tiny_processor, out, memory=True, **ALL)
    expected = rows_of(out)
    path = out / "embedding-1.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert build_index(corpus, tiny_model, tiny_processor, out, memory=True, **ALL).embedded in (1, 2)
    rows, vectors = rows_of(out)
    assert rows == expected[0] and verify_index(out).damaged == {}
    np.testing.assert_allclose(list(vectors.values()), list(expected[1].values()), atol=1e-5)


def test_an_index_of_format_3_is_read_and_grows(corpus, out, tiny_model, tiny_processor, embedded):
    build_index(corpus, tiny_model, tiny_processor, out)
    manifest = json.loads((out / MANIFEST).read_text())
    for name in ("image_mode", "captions", "regions", "texts"):
        del manifest["settings"][name]
    del manifest["checksum"]
    rows = read_index(out, "out").rows.table.select(["file_name", "version", "width", "height", "content"])
    older = building.write_index.__globals__["write_rows"](
        out, "1", 7, [rows.to_pydict() | {"embedding": read_index(out, "out").rows.arrays["embedding"][:]}]
    )
    write_checked_json(out / MANIFEST, manifest | {"format": 3, "rows": older})
    assert SearchIndex.load(out, tiny_model, tiny_processor).search("a star", top=1)[0].kind == "image"
    embedded.clear()
    report = build_index(corpus, tiny_model, tiny_processor, out, **ALL)
    assert report.embedded == 14 and "embed_images" not in dict(embedded)
    assert json.loads((out / MANIFEST).read_text())["format"] == 4
    with pytest.raises(ValueError, match="an index with captions beside; expected None, as is asked for now"):
        build_index(corpus, tiny_model, tiny_processor, out)
    with pytest.raises(ValueError, match="an index with image_mode image; expected fused"):
        build_index(corpus, tiny_model, tiny_processor, out, image_mode="fused", **ALL)


def test_what_the_folder_or_the_calibrator_does_not_have_is_refused(folder, out, tiny_model, tiny_processor):
    calibrated = build_model(calibrated_modalities=["image", "text"])
    calibrated.calibrator.fit({kind: torch.randn(9, 16) for kind in ("image", "text")})
    for model, asked, error, message in [
        (tiny_model, {"captions": "beside"}, FileNotFoundError, "expected a metadata.jsonl or metadata.csv"),
        (
            tiny_model,
            {"captions": "side"},
            ValueError,
            "`captions` is 'side'; expected one of None, 'beside', 'fused'",
        ),
        (tiny_model, {"regions": 1}, ValueError, "`regions` is 1; expected one of None, 'boxes' or 2 to 16"),
        (tiny_model, {"image_mode": "both"}, ValueError, "`image_mode` is 'both'; expected one of 'image', 'fused'"),
        (tiny_model, {"texts": " "}, ValueError, "`texts` is ' '; expected the name of a column"),
        (calibrated, {"captions": "fused"}, ValueError, "calibrated for text and image only; expected .* for fused"),
        (calibrated, {"image_mode": "fused"}, ValueError, "`image_mode` is 'fused', but the model is calibrated for"),
    ]:
        with pytest.raises(error, match=message):
            build_index(folder, model, tiny_processor, out, **asked)
    describe(folder, [{"file_name": NAMES[0], "label": "x"}])
    for asked in ({"captions": "beside"}, {"regions": "boxes"}):
        with pytest.raises(ValueError, match="no line of .*metadata.jsonl.* has any"):
            build_index(folder, tiny_model, tiny_processor, out, **asked)


def test_one_calibrator_serves_a_mixed_corpus(corpus, out, tiny_processor, caplog):
    model = build_model(calibrated_modalities=["image", "text"])
    generator = torch.Generator().manual_seed(0)
    model.calibrator.fit({kind: torch.randn(9, 16, generator=generator) + 1 for kind in ("image", "text")})
    build_index(corpus, model, tiny_processor, out, **ALL)
    assert caplog.messages == []
    _, vectors = rows_of(out)
    np.testing.assert_allclose(
        vectors[NAMES[0], "caption", 1], embed_texts(model, tiny_processor, ["one star"])[0], atol=1e-5
    )
    build_index(corpus, build_model(), tiny_processor, out.with_name("plain"), **ALL)
    assert "not calibrated" in caplog.text


def test_texts_alone_are_an_index(tmp_path, out, tiny_model, tiny_processor):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a star")
    report = build_index(tmp_path / "texts", tiny_model, tiny_processor, out, texts="text", precision="int8")
    assert report[:3] == (0, 1, []) and report.rows == {"text": 1}
    os.remove(tmp_path / "texts" / "a.txt")
    with pytest.raises(ValueError, match="without images or texts; expected files with"):
        build_index(tmp_path / "texts", tiny_model, tiny_processor, out, texts="text", precision="int8")
    assert shorter_side_for(tiny_processor) > 0
