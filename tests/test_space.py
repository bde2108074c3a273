"""The Space without its pages: what it does with photographs, and what its repository says."""

import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from album import Album, load_picture, outline, read_box
from image_folders import write_folder, write_noise
from PIL import Image
from tiny_models import build_model
from torch.nn.functional import normalize

from mmgem.training.inference import embed_images, embed_regions, embed_texts, generate_answers, generate_captions

ROOT = Path(__file__).parent.parent
SPACE = ROOT / "model_cards" / "space"
BOX = [4.0, 2.0, 30.0, 20.0]
pytestmark = pytest.mark.usefixtures("short_answers")


@pytest.fixture(scope="module")
def album(tmp_path_factory, tiny_processor):
    folder = tmp_path_factory.mktemp("space")
    return Album(write_folder(folder / "photographs"), folder / "index", build_model(), tiny_processor)


def test_words_and_a_picture_count_alike(album):
    picture = album.photographs[2]
    words = embed_texts(album.model, album.processor, ["a red star"])
    image = embed_images(album.model, album.processor, [picture])
    region = embed_regions(album.model, album.processor, [picture], [[BOX]])
    torch.testing.assert_close(album.query("a red star"), words)
    torch.testing.assert_close(album.query("", picture), image)
    torch.testing.assert_close(album.query("a red star", picture), normalize(words + image, dim=-1))
    torch.testing.assert_close(album.query(picture=picture, box=BOX), region)
    with pytest.raises(ValueError, match="expected something to look for"):
        album.query(" ")


def test_the_nearest_are_of_one_kind_and_not_of_the_photograph_itself(album):
    picture = album.photographs[2]
    query = album.query("", picture)
    hits = album.nearest(query, 3)
    assert hits[0].path == picture and hits[0].score == pytest.approx(1, abs=1e-5)
    assert [hit.kind for hit in hits] == ["image"] * 3
    assert [hit.path for hit in album.nearest(query, 2, but=picture)] == [hit.path for hit in hits[1:]]
    regions = album.nearest(query, 9, "region", but=picture)
    assert {hit.path for hit in regions} == {*album.photographs} - {picture} and len(regions) == 6
    assert [hit.score for hit in regions] == sorted((hit.score for hit in regions), reverse=True)
    every = album.index.nearest(query, 63, ["region"])
    for hit in regions:
        assert hit.score == max(other.score for other in every if other.path == hit.path)


def test_what_is_written_is_what_the_model_writes(album):
    picture, model, processor = album.photographs[1], album.model, album.processor
    assert album.caption(picture) == generate_captions(model, processor, [picture])[0]
    assert album.answer(picture, "what?") == generate_answers(model, processor, [picture], ["what?"])[0]
    assert isinstance(album.caption(picture, BOX), str)
    with pytest.raises(ValueError, match="`question` is ' '; expected one"):
        album.answer(picture, " ")


def test_labels_share_one(album):
    picture = album.photographs[1]
    shares = album.classify(picture, [" a cat", "a dog", "", "a dog "])
    texts = embed_texts(album.model, album.processor, ["a picture of a cat", "a picture of a dog"])
    scores = embed_images(album.model, album.processor, [picture]) @ texts.T * album.model.logit_scale.exp().item()
    assert list(shares) == ["a cat", "a dog"]
    np.testing.assert_allclose(list(shares.values()), scores.softmax(dim=-1)[0].numpy(), atol=1e-5)
    with pytest.raises(ValueError, match="`labels` holds 1; expected two or more"):
        album.classify(picture, ["a cat", "a cat"])


def test_pictures_keep_their_size_and_boxes_stand_out(album, tmp_path):
    picture = load_picture(album.photographs[1])
    assert album.heat_map(picture, album.query("a red star")).size == picture.size
    framed = np.asarray(outline(Image.new("RGB", (100, 80), (200, 100, 0)), [10, 20, 60, 50]))
    assert framed[35, 30].tolist() == [200, 100, 0] and framed[35, 10].tolist() == [255, 255, 255]
    assert (framed[5, 5] < 80).all()
    write_noise(tmp_path / "wide.png", 0, (900, 300))
    assert load_picture(tmp_path / "wide.png", 300).size == (300, 100)
    assert load_picture(tmp_path / "wide.png").size == (900, 300)


def test_a_box_is_four_numbers():
    assert read_box("10, 20,30.5, 40") == [10, 20, 30.5, 40]
    for text in ("", "1,2,3", "1,2,3,x"):
        with pytest.raises(ValueError, match="expected four numbers"):
            read_box(text)


def test_its_repository_installs_what_the_package_needs():
    head = yaml.safe_load((SPACE / "README.md").read_text(encoding="utf-8").split("---\n")[1])
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert head["sdk"] == "gradio" and head["sdk_version"] == pinned["gradio"]
    assert (SPACE / head["app_file"]).is_file() and len(head["short_description"]) <= 60
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {*project["dependencies"], *project["optional-dependencies"]["search"]}
    _, *lines = (SPACE / "requirements.txt").read_text().splitlines()
    assert set(lines) == needed
