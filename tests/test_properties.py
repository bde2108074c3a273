"""The contracts of the design as properties, over inputs that hypothesis draws; the same ones in each run."""

import json

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_models import build_model

from mmgem.processing.boxes import boxes_in_view, check_boxes
from mmgem.training.data.folder_metadata import read_metadata
from mmgem.training.data.mixture import Turns
from mmgem.training.data.permutation import permute
from mmgem.training.evaluation.metrics import recall_at, retrieval_ranks
from mmgem.training.inference import embed_regions, embed_texts
from mmgem.training.recipes.recipe import load_recipe
from mmgem.training.recipes.validation import check_sections
from mmgem.training.search.building import build_index
from mmgem.training.search.storage import read_index
from mmgem.training.search.vector_codec import VectorCodec

settings.register_profile(
    "few", max_examples=12, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), database=None
)
settings.load_profile("few")
MANY = settings(max_examples=40)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
TOKENS = st.lists(st.lists(st.integers(2, 299), min_size=1, max_size=20), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def model():
    return build_model()


def features(model, rows, side="right", extra=0):
    """The embeddings of rows of tokens, padded on a side, by more than is needed."""
    length = max(map(len, rows)) + extra
    ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    for row, own in enumerate(rows):
        place = slice(0, len(own)) if side == "right" else slice(length - len(own), length)
        ids[row, place], mask[row, place] = torch.tensor(own), 1
    with torch.no_grad():
        return model.get_text_features(ids, mask).pooler_output


@given(TOKENS, st.integers(0, 9))
def test_an_embedding_is_that_of_the_text_alone(model, rows, extra):
    alone = torch.cat([features(model, [row]) for row in rows])
    for side in ("left", "right"):
        torch.testing.assert_close(features(model, rows, side, extra), alone, rtol=0, atol=1e-5)


@given(st.lists(TEXT, min_size=1, max_size=6), st.integers(1, 4))
def test_any_text_is_embedded_whatever_the_batch(model, tiny_processor, texts, batch_size):
    embeds = embed_texts(model, tiny_processor, texts, batch_size)
    alone = torch.cat([embed_texts(model, tiny_processor, [text]) for text in texts])
    torch.testing.assert_close(embeds, alone, rtol=0, atol=1e-5)


@given(TOKENS.filter(lambda rows: len(rows) > 1))
def test_packed_texts_are_embedded_as_alone(model, rows):
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True)
    inputs = {"pixel_values": torch.zeros(len(rows), 3, 32, 32), "image_index": torch.arange(len(rows))}
    with torch.no_grad():
        inputs |= {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
        output = model(**inputs, return_loss=True)
    alone = torch.nn.functional.normalize(torch.cat([features(model, [row]) for row in rows]), dim=-1)
    torch.testing.assert_close(output.text_embeds, alone, rtol=0, atol=1e-5)


EDGE = st.floats(-50, 150, allow_nan=False, width=32)
BOX = st.tuples(EDGE, EDGE, EDGE, EDGE)


@MANY
@given(st.lists(BOX, min_size=1, max_size=6), st.integers(1, 200), st.integers(1, 200))
def test_boxes_are_clipped_or_refused(boxes, width, height):
    try:
        [clipped] = check_boxes([list(boxes)], [(width, height)])
    except ValueError as error:
        assert "expected" in str(error)
        return
    x0, y0, x1, y1 = clipped.T
    assert (0 <= x0).all() and (x0 < x1).all() and (x1 <= width).all()
    assert (0 <= y0).all() and (y0 < y1).all() and (y1 <= height).all()
    assert (clipped == np.clip(np.array(boxes), 0, [width, height] * 2)).all()  # and nothing else is changed
    seen = boxes_in_view([clipped], [np.array([0.0, 0, width, height])])[0]
    np.testing.assert_allclose(seen, clipped / ([width, height] * 2), atol=1e-6)


@given(st.permutations(range(4)))
def test_the_order_of_boxes_is_that_of_their_embeddings(model, tiny_processor, order):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    boxes = [[0, 0, 9, 9], [5, 5, 60, 40], [30, 0, 60, 20], [0, 0, 60, 40]]
    embeds = embed_regions(model, tiny_processor, [image], [boxes])
    permuted = embed_regions(model, tiny_processor, [image], [[boxes[number] for number in order]])
    torch.testing.assert_close(permuted, embeds[list(order)], rtol=0, atol=1e-6)


@MANY
@given(st.data())
def test_recall_is_what_counting_gives(data):
    queries, gallery = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 8))
    values = st.integers(-2, 2)  # so that there are ties
    vectors = [data.draw(st.lists(values, min_size=3, max_size=3)) for _ in range(queries + gallery)]
    query, rows = torch.tensor(vectors[:queries]).float(), torch.tensor(vectors[queries:]).float()
    right = [data.draw(st.sets(st.integers(0, gallery - 1), min_size=1)) for _ in range(queries)]
    ranks = retrieval_ranks(query, rows, right)
    for number, own in enumerate(right):
        scores = (query[number] @ rows.T).tolist()
        best = max(scores[row] for row in own)
        expected = sum(score >= best for row, score in enumerate(scores) if row not in own)
        assert ranks[number] == expected
    for k in (1, 5):
        assert recall_at(ranks, k) == sum(rank < k for rank in ranks.tolist()) / queries


@MANY
@given(st.integers(1, 300), st.integers())
def test_an_order_has_each_place_once(size, key):
    assert sorted(permute(place, size, key) for place in range(size)) == list(range(size))


@MANY
@given(st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any), st.integers(0, 60))
def test_turns_are_shared_and_each_knows_those_before(weights, count):
    turns = Turns(weights)
    taken = [0] * len(weights)
    for turn in range(count):
        party, before = turns.at(turn)
        assert before == taken[party]
        taken[party] += 1
    for own, weight in zip(taken, weights, strict=True):
        assert abs(own - count * weight / sum(weights)) < len(weights)


@MANY
@given(st.integers(1, 40), st.floats(0.01, 2), st.integers(0, 99), st.sampled_from(["int8", "binary", "float32"]))
def test_codes_of_decoded_vectors_are_the_same(dimensions, bound, seed, precision):
    codec = VectorCodec(precision, dimensions, bound)
    vectors = np.random.default_rng(seed).uniform(-bound, bound, (5, dimensions)).astype(np.float32)
    codes = codec.encode(vectors)
    decoded = codec.decode(codes)
    assert codes.shape == (5, codec.width) and (codec.encode(decoded) == codes).all()
    if precision == "int8":
        assert np.abs(decoded - vectors).max() <= codec.step * 0.51
    if precision == "binary":
        assert ((decoded > 0) == (vectors > 0)).all()


ACTIONS = st.tuples(st.sampled_from(["write", "write", "delete", "rename"]), st.integers(0, 3))


@pytest.mark.slow
@settings(max_examples=2)
@given(st.lists(ACTIONS, min_size=3, max_size=5))
def test_an_index_after_updates_is_one_made_anew(model, tiny_processor, tmp_path_factory, steps):
    folder = tmp_path_factory.mktemp("updates")
    images = folder / "images"
    images.mkdir()

    def vectors(name):
        build_index(images, model, tiny_processor, folder / name)
        stored = read_index(folder / name, "out")
        return dict(zip(stored.rows["file_name"], stored.rows.arrays["embedding"][:].tolist(), strict=True))

    write(images / "first.png", 99)
    vectors("updated")
    for number, (action, file) in enumerate(steps):
        place = images / f"{file}.png"
        if action == "write":
            write(place, number)
        elif place.exists():
            place.unlink() if action == "delete" else place.rename(images / f"{number}-renamed.png")
        updated = vectors("updated")
    anew = vectors("anew")
    assert updated.keys() == anew.keys() == {file.name for file in images.iterdir()}
    for name, vector in anew.items():
        np.testing.assert_allclose(updated[name], vector, atol=1e-5)


def write(place, seed):
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(place)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
SECTIONS = ["model", "stages", "seed", "prompts", "generation", "tokenizer", "image_processor", "eval_data"]
SECTION = st.sampled_from(SECTIONS)
STAGE = st.sampled_from(["name", "train_data", "training", "collator", "objective", "embedding", "cache_features"])
DATA = st.sampled_from(["folder", "scenes", "weight", "columns", "allow_urls", "parquet"])


@MANY
@given(
    JSON
    | st.dictionaries(SECTION, JSON | st.lists(st.dictionaries(STAGE, JSON | st.dictionaries(DATA, JSON)), max_size=2))
)
def test_a_recipe_of_anything_is_refused_as_one(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(ValueError):
        check_sections(load_recipe(file))


@MANY
@given(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
def test_metadata_of_anything_is_read_line_by_line_or_refused(tmp_path_factory, content):
    for name in ("metadata.jsonl", "metadata.csv"):
        file = tmp_path_factory.getbasetemp() / name
        file.write_bytes(content)
        try:
            lines = list(read_metadata(file))
        except ValueError as error:
            assert "expected" in str(error)
        else:
            assert all(isinstance(fields, str | dict) for _, fields in lines)


@MANY
@given(JSON | st.fixed_dictionaries({}, optional={"format": JSON, "settings": JSON, "files": JSON, "folder": JSON}))
def test_a_manifest_of_anything_is_refused_as_one(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / "manifest"
    folder.mkdir(exist_ok=True)
    (folder / "search_index.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError):
        read_index(folder, "path")
