import json
from io import BytesIO
from urllib.request import urlopen

import numpy as np
import pytest
from demonstrations import READING, Page, demonstrate, read_rows
from PIL import Image
from tiny_models import build_model

from mmgem.training.demo.page import BESIDE, FIGURES, data_uri, render_page
from mmgem.training.demo.run import run_demo
from mmgem.training.scenes.caption_parser import parse_region_caption
from mmgem.training.search.index import SearchIndex

pytestmark = pytest.mark.usefixtures("short_answers")


@pytest.fixture(scope="module")
def demonstration(tmp_path_factory, tiny_processor):
    """Of a model with one vector, and no prompts."""
    return demonstrate(tmp_path_factory.mktemp("demo") / "out", build_model(), tiny_processor)


def test_the_page_needs_no_other_file(demonstration):
    out, _ = demonstration
    html = (out / "index.html").read_text()
    page = Page(html)
    assert len(page.all("html")) == len(page.all("h1")) == len(page.all("title")) == 1
    assert not page.all("script") and not page.all("link") and not page.all("iframe")
    assert "url(" not in html and "@import" not in html and "http" not in html
    assert page.all("img") and all(image["src"].startswith("data:image/webp;base64,") for image in page.all("img"))
    assert all({"alt", "width", "height"} <= set(image) for image in page.all("img"))
    assert "prefers-color-scheme: dark" in html and page.all("meta", name="viewport")


def test_the_page_shows_every_result(demonstration):
    out, results = demonstration
    page = Page((out / "index.html").read_text())
    text = " ".join(page.text.split())
    for item in results["captions"]:
        assert item["caption"] in text
        assert item["right"] or item["truth"] in text
    for search in results["text_searches"] + results["region_searches"]:
        assert search["text"] in text and len(search["hits"]) == 5
    for search in results["image_searches"]:
        assert search["instruction"] in text
    for item in results["classified"]:
        assert all(guess["label"] in text for guess in item["guesses"])
    for name in results["figures"]:
        assert (FIGURES[name][0] in text) == (name not in BESIDE)
    boxes = sum(len(item["regions"]) for item in results["regions"])
    boxes += sum(len(search["hits"]) for search in results["region_searches"])
    assert len(page.all("rect")) == boxes > 0


def test_captions_are_judged_by_what_they_say(demonstration):
    _, results = demonstration
    assert [item["right"] for item in results["captions"]] == [True, False] * 6
    for item in results["regions"]:
        assert [region["right"] for region in item["regions"]] == [True] * (len(item["regions"]) - 1) + [False]


def test_right_answers_are_those_the_scenes_know(demonstration):
    out, results = demonstration
    rows = read_rows(out / "gallery")
    of_caption = {caption: row["file_name"] for row in rows for caption in [*row["captions"], row["long_caption"]]}
    for search in results["text_searches"]:
        if search["kind"] != "class":
            for hit in search["hits"]:
                assert hit["right"] == (hit["file_name"] == of_caption[search["text"]])
    twins = {row["file_name"]: row["edit"]["file_name"] for row in rows}
    for search in results["image_searches"]:
        names = [hit["file_name"] for hit in search["hits"]]
        assert search["file_name"] not in names
        assert [hit["right"] for hit in search["hits"]] == [name == twins[search["file_name"]] for name in names]
    meanings = {json.dumps([row["file_name"], box]): text for row in rows for box, text in _regions(row)}
    for search in results["region_searches"]:
        for hit in search["hits"]:
            found = parse_region_caption(meanings[json.dumps([hit["file_name"], hit["box"]])])
            assert hit["right"] == (found == parse_region_caption(search["text"]))


def _regions(row):
    return zip(row["boxes"], row["region_captions"], strict=True)


def test_everything_lies_beside_the_page(demonstration, tiny_processor):
    out, results = demonstration
    assert {path.name for path in out.iterdir()} == {"gallery", "index", "captions.jsonl", "demo.json", "index.html"}
    index = SearchIndex.load(out / "index", build_model(), tiny_processor)
    assert len(index) == results["gallery"]["images"] == len(list((out / "gallery").glob("*.png")))


def test_what_a_checkpoint_does_not_have_is_left_out(demonstration, tiny_processor):
    out, results = demonstration
    assert results["edit_searches"] == results["instructed"] == [] and results["nested"] is results["asked"] is None
    page = Page((out / "index.html").read_text())
    assert page.all("section", id="image") and page.all("section", id="classes")
    assert not [name for name in READING if page.all("section", id=name)]
    assert SearchIndex.load(out / "index", build_model(), tiny_processor).facts.settings.memory is None


def test_a_page_is_safe_with_any_text(demonstration):
    out, results = demonstration
    results = json.loads(json.dumps(results))
    results["captions"][0]["caption"] = "<script>alert('</style>')</script>"
    page = Page(render_page(results, out / "gallery"))
    assert not page.all("script") and "<script>alert" in page.text


def test_a_picture_is_written_out_at_one_size():
    with urlopen(data_uri(Image.new("RGB", (96, 48), "red"))) as file:
        picture = Image.open(BytesIO(file.read()))
    assert picture.size == (288, 144)
    np.testing.assert_allclose(picture.convert("RGB").getpixel((100, 100)), (255, 0, 0), atol=6)


def test_only_a_demonstration_is_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="something else"):
        run_demo(tmp_path, None, None)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


@pytest.mark.slow
def test_a_demonstration_runs_twice_in_one_place(tmp_path, tiny_processor, monkeypatch):
    monkeypatch.setattr("mmgem.training.demo.run.copy_free_photographs", lambda folder: 0)
    for count in (14, 12):
        run_demo(tmp_path / "out", build_model(), tiny_processor, count=count)
        results = json.loads((tmp_path / "out" / "demo.json").read_text())
        assert results["gallery"]["scenes"] == count == len(read_rows(tmp_path / "out" / "gallery"))
