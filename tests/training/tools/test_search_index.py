import json
import os

import numpy as np
import pytest
import torch
from datasets import load_from_disk
from PIL import Image
from tiny_models import build_model

from mmgem.training.encoding import embed_images, embed_texts
from mmgem.training.tools import search_index
from mmgem.training.tools.search_index import FACTS_FILE, SearchIndex, build_index

NAMES = [f"{'deep/er/' if number % 2 else ''}{number}.png" for number in range(7)]


def write_noise(path, seed, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (size[1] // 10, size[0] // 10, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(size).save(path)


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(NAMES):
        write_noise(tmp_path / "images" / name, number)
    return tmp_path / "images"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "index"


@pytest.fixture
def embedded(monkeypatch):
    """The number of images in each batch that is embedded for an index, the probe aside."""
    sizes = []

    def counting(model, processor, images):
        if images[0].size != (256, 256):
            sizes.append(len(images))
        return embed_images(model, processor, images)

    monkeypatch.setattr(search_index, "embed_images", counting)
    return sizes


def test_an_index_is_a_datasets_folder_with_the_unit_embedding_of_every_image(folder, out, tiny_model, tiny_processor):
    report = build_index(folder, tiny_model, tiny_processor, out, batch_size=3)
    rows = load_from_disk(str(out))
    assert report == (7, 7, [])
    assert rows["file_name"][:] == sorted(NAMES)
    assert set(zip(rows["width"], rows["height"])) == {(40, 30)}
    embeddings = torch.tensor(rows["embedding"][:])
    expected = embed_images(tiny_model, tiny_processor, [folder / name for name in sorted(NAMES)])
    torch.testing.assert_close(embeddings, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(7))
    rows.load_faiss_index("embedding", out / "embedding.faiss")
    assert rows.search("embedding", expected[2].numpy(), k=1).indices == [2]
    assert not out.with_name("index.partial").exists()


def test_size_is_that_of_the_image_as_displayed(tmp_path, out, tiny_model, tiny_processor):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "images" / "turned.jpg", exif=exif)
    build_index(tmp_path / "images", tiny_model, tiny_processor, out)
    [row] = load_from_disk(str(out))
    assert (row["width"], row["height"]) == (30, 40)


def test_answers_are_the_nearest_by_cosine_best_first(folder, out, tiny_model, tiny_processor):
    build_index(folder, tiny_model, tiny_processor, out)
    index = SearchIndex.load(out, tiny_model, tiny_processor)
    paths = [folder / name for name in sorted(NAMES)]
    images = embed_images(tiny_model, tiny_processor, paths)

    def expected(query):
        scores = (images @ query).tolist()
        return sorted(zip(scores, paths), reverse=True)[:4]

    text = embed_texts(tiny_model, tiny_processor, ["a red star"])[0]
    prompt = tiny_processor(images=[paths[4]], text=["<image>a red star"], return_tensors="pt")
    fused = torch.nn.functional.normalize(tiny_model.get_multimodal_features(**prompt).pooler_output[0], dim=0)
    queries = [
        ({"text": "a red star"}, text),
        ({"image": paths[4]}, images[4]),
        ({"image": Image.open(paths[4])}, images[4]),
        ({"text": "a red star", "image": paths[4]}, fused.detach()),
    ]
    for arguments, query in queries:
        hits = index.search(**arguments, top=4)
        assert [hit.path for hit in hits] == [path for _, path in expected(query)]
        np.testing.assert_allclose([hit.score for hit in hits], [score for score, _ in expected(query)], atol=1e-5)
    assert index.search(image=paths[4], top=1)[0].score == pytest.approx(1, abs=1e-5)


def test_more_answers_than_images_are_all_images(folder, out, tiny_model, tiny_processor):
    build_index(folder, tiny_model, tiny_processor, out)
    index = SearchIndex.load(out, tiny_model, tiny_processor)
    assert len(index) == 7
    assert len({hit.path for hit in index.search("", top=100)}) == 7


def test_a_killed_run_goes_on_where_it_stopped(folder, out, tiny_model, tiny_processor, monkeypatch, embedded):
    build_index(folder, tiny_model, tiny_processor, out.with_name("reference"), batch_size=2)
    embedded.clear()
    monkeypatch.setattr(search_index, "ROWS_PER_PART", 2)
    counting = search_index.embed_images

    def killed_at_the_third_batch(model, processor, images):
        if len(embedded) == 2:
            raise KeyboardInterrupt
        return counting(model, processor, images)

    monkeypatch.setattr(search_index, "embed_images", killed_at_the_third_batch)
    with pytest.raises(KeyboardInterrupt):
        build_index(folder, tiny_model, tiny_processor, out, batch_size=2)
    assert not out.exists()
    with pytest.raises(FileNotFoundError, match="interrupted"):
        SearchIndex.load(out, tiny_model, tiny_processor)

    monkeypatch.setattr(search_index, "embed_images", counting)
    embedded.clear()
    report = build_index(folder, tiny_model, tiny_processor, out, batch_size=2)
    assert report == (7, 3, []) and embedded == [2, 1]
    resumed, reference = load_from_disk(str(out)), load_from_disk(str(out.with_name("reference")))
    assert resumed["file_name"][:] == reference["file_name"][:]
    np.testing.assert_allclose(resumed["embedding"][:], reference["embedding"][:], atol=1e-5)


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
    assert report == (7, 2, []) and embedded == [2]
    index = SearchIndex.load(out, tiny_model, tiny_processor)
    assert index.rows["file_name"][:] == sorted([*NAMES[1:], "new.png"])
    for name in index.rows["file_name"]:
        best = index.search(image=folder / name, top=1)[0]
        assert best.path == folder / name and best.score == pytest.approx(1, abs=1e-5)
    embedded.clear()
    assert build_index(folder, tiny_model, tiny_processor, out) == (7, 0, []) and embedded == []


def test_bad_files_are_left_out_and_reported(folder, out, tiny_model, tiny_processor):
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("hello")
    report = build_index(folder, tiny_model, tiny_processor, out, batch_size=2)
    assert report.images == 7
    assert sorted(name for name, _ in report.skipped) == ["empty.png", "text.jpg"]
    again = build_index(folder, tiny_model, tiny_processor, out)
    assert (again.images, again.embedded, len(again.skipped)) == (7, 0, 2)


def test_a_folder_of_nothing_but_bad_files_is_refused(tmp_path, out, tiny_model, tiny_processor):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "empty.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no image can be read.*empty\.png"):
        build_index(tmp_path / "images", tiny_model, tiny_processor, out)


def test_nothing_but_an_index_of_the_same_folder_is_replaced(folder, out, tiny_model, tiny_processor):
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="out is .*not an index"):
        build_index(folder, tiny_model, tiny_processor, out)
    assert (out / "thesis.txt").read_text() == "precious"

    build_index(folder, tiny_model, tiny_processor, out.with_name("other"))
    write_noise(folder.with_name("elsewhere") / "a.png", seed=1)
    with pytest.raises(ValueError, match="an index of the folder .*images.*elsewhere"):
        build_index(folder.with_name("elsewhere"), tiny_model, tiny_processor, out.with_name("other"))


def test_another_model_is_recognised_by_what_it_does(folder, out, tiny_model, tiny_processor):
    build_index(folder, tiny_model, tiny_processor, out)
    SearchIndex.load(out, build_model().bfloat16(), tiny_processor)  # the same weights, rounded
    with torch.no_grad():
        for weight in tiny_model.image_projection.parameters():
            weight[0] += 0.5
    with pytest.raises(ValueError, match="does not embed images as"):
        SearchIndex.load(out, tiny_model, tiny_processor)
    with pytest.raises(ValueError, match="embeds images otherwise"):
        build_index(folder, tiny_model, tiny_processor, out)


def test_the_model_is_loaded_from_where_it_was_when_none_is_given(folder, out, tiny_model, tiny_processor, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    tiny_processor.save_pretrained(tmp_path / "model")
    tiny_model = type(tiny_model).from_pretrained(tmp_path / "model")
    build_index(folder, tiny_model, tiny_processor, out)
    index = SearchIndex.load(out)
    assert index.search(image=folder / NAMES[0], top=1)[0].path == folder / NAMES[0]

    (tmp_path / "model").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=r"model is '.*model'"):
        SearchIndex.load(out)


def test_what_is_not_an_index_is_not_loaded(tmp_path, tiny_model, tiny_processor):
    with pytest.raises(FileNotFoundError, match="nowhere.*not there$"):
        SearchIndex.load(tmp_path / "nowhere", tiny_model, tiny_processor)
    with pytest.raises(ValueError, match=f"expected a folder with {FACTS_FILE}"):
        SearchIndex.load(tmp_path, tiny_model, tiny_processor)


def test_a_query_needs_text_or_image_and_a_positive_number_of_answers(folder, out, tiny_model, tiny_processor):
    build_index(folder, tiny_model, tiny_processor, out)
    index = SearchIndex.load(out, tiny_model, tiny_processor)
    with pytest.raises(ValueError, match="text and image are both None"):
        index.search()
    with pytest.raises(ValueError, match="top must be 1 or more, got 0"):
        index.search("a star", top=0)
    with pytest.raises(FileNotFoundError, match="gone.png"):
        index.search(image=folder / "gone.png")


def test_facts_are_readable_json(folder, out, tiny_model, tiny_processor):
    build_index(folder, tiny_model, tiny_processor, out)
    facts = json.loads((out / FACTS_FILE).read_text())
    assert facts["folder"] == str(folder) and len(facts["probe"]) == tiny_model.config.projection_dim
