import copy

import numpy as np
import pytest
import torch
from image_folders import NAMES, build_multi_vector_model
from PIL import Image
from tiny_models import build_model
from torch.nn.functional import normalize

from mmgem.late_interaction import maxsim
from mmgem.training.inference import embed_fused, embed_images, embed_regions, embed_texts
from mmgem.training.search.building import build_index
from mmgem.training.search.conditions import Condition
from mmgem.training.search.index import SearchIndex
from mmgem.training.search.storage import MANIFEST

PATHS = sorted(NAMES)


def build(folder, out, model, processor, **settings):
    build_index(folder, model, processor, out, **settings)
    return SearchIndex.load(out, model, processor)


def expected_hits(folder, scores, top):
    order = scores.argsort(descending=True)[:top].tolist()
    return [folder / PATHS[row] for row in order], scores[order].tolist()


def check(hits, folder, scores):
    """Best first, each with its own score; images of equal scores, as few bits make them, come in any order."""
    _, values = expected_hits(folder, scores, len(hits))
    np.testing.assert_allclose([hit.score for hit in hits], values, atol=1e-5)
    np.testing.assert_allclose([float(scores[hit.row]) for hit in hits], values, atol=1e-5)
    assert len({hit.row for hit in hits}) == len(hits)
    assert [folder / PATHS[hit.row] for hit in hits] == [hit.path for hit in hits]


def test_answers_are_the_nearest_by_cosine_best_first(folder, out, tiny_model, tiny_processor):
    index = build(folder, out, tiny_model, tiny_processor)
    paths = [folder / name for name in PATHS]
    images = embed_images(tiny_model, tiny_processor, paths)
    box, other_box = [2.0, 3.0, 30.0, 20.0], [20.0, 0.0, 40.0, 30.0]
    both = embed_fused(tiny_model, tiny_processor, [paths[4]], ["a red star"])
    two = embed_fused(tiny_model, tiny_processor, [[paths[4], paths[1]]], ["a red star"])
    boxes = embed_fused(tiny_model, tiny_processor, [paths[4]], ["a red star"], [[box, other_box]])
    queries = [
        ({"text": "a red star"}, embed_texts(tiny_model, tiny_processor, ["a red star"])),
        ({"image": paths[4]}, images[4:5]),
        ({"image": Image.open(paths[4])}, images[4:5]),
        ({"image": [paths[4]], "boxes": [box]}, embed_regions(tiny_model, tiny_processor, [paths[4]], [[box]])),
        ({"text": "a red star", "image": paths[4]}, both),
        ({"text": "a red star", "image": [paths[4], paths[1]]}, two),
        ({"text": "a red star", "image": paths[4], "boxes": [box, other_box]}, boxes),
    ]
    for arguments, query in queries:
        check(index.search(**arguments, top=4), folder, images @ query[0])
    assert index.search(image=paths[4], top=1)[0].score == pytest.approx(1, abs=1e-5)
    assert not torch.allclose(both, two) and not torch.allclose(both, boxes)


def test_several_texts_and_embeddings_are_searched_for_as_one_is(folder, out, tiny_processor):
    model = build_model(prompts={"query": "Find the image of "})
    index = build(folder, out, model, tiny_processor, regions=2)
    texts = ["a red star", "a moon on the right", "it"]
    for limits in (
        {"top": 3},
        {"top": 2, "kinds": ["region"], "prompt": "query", "where": [Condition.parse("file_name!=0.png")]},
        {"top": 4, "lexical_weight": 0.3},
    ):
        for hits, text in zip(index.search_texts(texts, **limits), texts, strict=True):
            one = index.search(text, **limits)
            assert [hit._replace(score=0) for hit in hits] == [hit._replace(score=0) for hit in one]
            np.testing.assert_allclose([hit.score for hit in hits], [hit.score for hit in one], atol=1e-5)
    one = index.search("it", top=3, kinds=["region"])
    assert index.nearest(index.query("it"), top=3, kinds=["region"]) == one
    for arguments, message in [
        (([],), "`texts` is empty"),
        ((["a", " "],), "`text` is ' '"),
        ((["a"], 0), "`top` is 0"),
        ((["a"], 1, "ask"), "`prompt` is 'ask'"),
        ((["a"], 1, None, 1), "`vectors` is 1, but"),
    ]:
        with pytest.raises(ValueError, match=message):
            index.search_texts(*arguments)
    with pytest.raises(ValueError, match="`top` is 0"):
        index.nearest(index.query("it"), top=0)


def test_a_prompt_stands_before_the_text(folder, out, tiny_processor):
    model = build_model(prompts={"query": "Find the image of ", "edit": "Change this: "})
    index = build(folder, out, model, tiny_processor)
    images = embed_images(model, tiny_processor, [folder / name for name in PATHS])
    query = embed_texts(model, tiny_processor, ["Find the image of a red star"])[0]
    check(index.search("a red star", prompt="query"), folder, images @ query)
    fused = embed_fused(model, tiny_processor, [folder / PATHS[2]], ["Change this: make it blue"])[0]
    check(index.search("make it blue", folder / PATHS[2], prompt="edit"), folder, images @ fused)
    with pytest.raises(ValueError, match="`prompt` is 'ask'; expected one of 'query', 'edit'"):
        index.search("a red star", prompt="ask")
    with pytest.raises(ValueError, match="`prompt` is 'query', but there is no `text`"):
        index.search(image=folder / PATHS[2], prompt="query")


def test_several_vectors_are_compared_by_maxsim_as_many_as_asked_for(folder, out, tiny_processor):
    model = build_multi_vector_model(4)
    index = build(folder, out, model, tiny_processor)
    images = embed_images(model, tiny_processor, [folder / name for name in PATHS])  # (7, 4, D)
    query = embed_texts(model, tiny_processor, ["a red star"])  # (1, 4, D)
    seen = set()
    for arguments, q, r in [
        ({}, 4, 4),
        ({"vectors": 1}, 1, 1),
        ({"vectors": 2}, 2, 2),
        ({"query_vectors": 1}, 1, 4),
        ({"vectors": 1, "query_vectors": 3}, 3, 1),
    ]:
        hits = index.search("a red star", **arguments)
        check(hits, folder, maxsim(query[:, :q], images[:, :r])[0])
        seen.add(tuple(hit.score for hit in hits))
    assert len(seen) == 5


def test_a_sliced_index_answers_as_one_that_kept_less(folder, out, tiny_processor):
    model = build_multi_vector_model(4)
    whole = build(folder, out, model, tiny_processor)
    short = build(folder, out.with_name("short"), model, tiny_processor, vectors=2)
    for query in ({"text": "a red star"}, {"image": folder / PATHS[3]}, {"text": "it", "image": folder / PATHS[3]}):
        hits, short_hits = whole.search(**query, vectors=2), short.search(**query)
        assert [hit.path for hit in hits] == [hit.path for hit in short_hits]
        np.testing.assert_allclose([hit.score for hit in hits], [hit.score for hit in short_hits], atol=1e-6)


@pytest.mark.parametrize("precision", ["float32", "int8", "binary"])
@pytest.mark.parametrize("build_any", [build_model, build_multi_vector_model])
def test_queries_are_as_wide_as_the_index_and_as_exact_as_ever(folder, out, tiny_processor, precision, build_any):
    model = build_any()
    index = build(folder, out, model, tiny_processor, dimensions=8, precision=precision)
    stored = torch.tensor(index.facts.codec.decode(index.vectors.codes))
    query = normalize(embed_texts(model, tiny_processor, ["a red star"])[..., :8], dim=-1)
    scores = stored @ query[0] if stored.ndim == 2 else maxsim(query, stored)[0]
    check(index.search("a red star"), folder, scores)


def test_counts_that_are_not_there_are_refused(folder, out, tiny_model, tiny_processor):
    single = build(folder, out, tiny_model, tiny_processor)
    several = build(folder, out.with_name("several"), build_multi_vector_model(4), tiny_processor, vectors=2)
    for index, arguments, message in [
        (single, {"vectors": 1}, "`vectors` is 1, but the index has a single vector"),
        (single, {"query_vectors": 1}, "`query_vectors` is 1, but the index has a single vector"),
        (several, {"vectors": 3}, "`vectors` is 3; expected 1 to 2"),
        (several, {"vectors": 0}, "`vectors` is 0; expected 1 to 2"),
        (several, {"query_vectors": 5}, "`query_vectors` is 5; expected 1 to 4"),
        (single, {"prompt": "query"}, "`prompt` is 'query'; expected None, since the model has no prompts"),
        (single, {"top": 0}, "`top` is 0; expected 1 or more"),
        (single, {"boxes": [[0, 0, 9, 9]]}, "`boxes` is given, but `image` is None"),
    ]:
        with pytest.raises(ValueError, match=message):
            index.search("a red star", **arguments)


def test_a_query_needs_text_or_image_that_make_one_query(folder, out, tiny_model, tiny_processor):
    index = build(folder, out, tiny_model, tiny_processor)
    pictures = [folder / name for name in PATHS[:2]]
    box = [0, 0, 9, 9]
    for arguments, message in [
        ({}, "`text` and `image` are both None"),
        ({"image": []}, "`image` is empty"),
        ({"image": pictures}, "`image` holds 2 images, without a `text`"),
        ({"image": pictures[0], "boxes": [box, box]}, "`boxes` holds 2 boxes, without a `text`"),
        ({"image": pictures, "boxes": [box], "text": "it"}, "`image` holds 2 images, with `boxes`"),
        ({"image": pictures[0], "boxes": []}, "box"),
        ({"image": pictures[0], "boxes": [], "text": "it"}, "box"),
    ]:
        with pytest.raises(ValueError, match=message):
            index.search(**arguments)
    with pytest.raises(FileNotFoundError, match="gone.png"):
        index.search(image=folder / "gone.png")


def test_more_answers_than_images_are_all_images(folder, out, tiny_model, tiny_processor):
    index = build(folder, out, tiny_model, tiny_processor)
    assert len(index) == 7
    assert len({hit.path for hit in index.search("star", top=100)}) == 7


@pytest.mark.parametrize("text", ["", "  "])
def test_an_empty_text_is_nothing_to_look_for(folder, out, tiny_model, tiny_processor, text):
    index = build(folder, out, tiny_model, tiny_processor)
    with pytest.raises(ValueError, match=f"`text` is {text!r}; expected something to look for"):
        index.search(text)


def test_a_model_comes_with_its_processor(folder, out, tiny_model, tiny_processor):
    build_index(folder, tiny_model, tiny_processor, out)
    for given in ({"model": tiny_model}, {"processor": tiny_processor}):
        with pytest.raises(ValueError, match="is None, but `(model|processor)` is not; expected both, or neither"):
            SearchIndex.load(out, **given)


@pytest.mark.parametrize("name", ["rows-1.parquet", "embedding-1.npy", "probes-1.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"half"])
def test_files_that_are_damaged_are_named(folder, out, tiny_model, tiny_processor, name, content):
    build_index(folder, tiny_model, tiny_processor, out)
    (out / name).unlink()
    if content is not None:
        (out / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.*(Delete it, and make it anew|`mmgem index` embeds anew)"):
        SearchIndex.load(out, tiny_model, tiny_processor)


def test_an_index_is_known_by_the_model_that_made_it_first(folder, out, tiny_processor):
    """Each of a chain of models may pass for the one before it; the last is another model than the first."""
    torch.manual_seed(0)
    first = model = build_model()
    build_index(folder, first, tiny_processor, out)
    with pytest.raises(ValueError, match="which has other weights"):
        for _ in range(10):
            model = copy.deepcopy(model)
            for weight in model.parameters():
                weight.data += 0.002 * weight.norm() / weight.numel() ** 0.5 * torch.randn_like(weight)
            build_index(folder, model, tiny_processor, out)
    SearchIndex.load(out, first, tiny_processor)


def test_another_model_is_refused_by_what_it_does(folder, out, tiny_model, tiny_processor):
    build_index(folder, tiny_model, tiny_processor, out)
    SearchIndex.load(out, build_model().bfloat16(), tiny_processor)  # the same weights, rounded
    for change, message in [
        (lambda model: torch.nn.init.normal_(model.text_projection.weight), "which embeds texts otherwise"),
        (lambda model: torch.nn.init.normal_(model.image_projection[1].weight), "which has other weights"),
    ]:
        other = build_model()
        change(other)
        with pytest.raises(ValueError, match=f"`model` is .*{message}.*made anew"):
            SearchIndex.load(out, other, tiny_processor)
    with pytest.raises(ValueError, match="whose embedding_pooling is 'mean' instead of 'last'"):
        SearchIndex.load(out, build_model(embedding_pooling="mean"), tiny_processor)
    with pytest.raises(ValueError, match="whose prompts is"):
        SearchIndex.load(out, build_model(prompts={"query": "Find "}), tiny_processor)


def test_images_are_refused_where_they_are_seen_otherwise(folder, out, tiny_model, tiny_processor, monkeypatch):
    index = build(folder, out, tiny_model, tiny_processor)
    monkeypatch.setattr(tiny_processor.image_processor, "image_mean", [0.1, 0.1, 0.1])
    assert len(index.search("a red star")) == 7  # as it was: no image is involved
    with pytest.raises(ValueError, match="which embeds images otherwise"):
        index.search(image=folder / PATHS[0])
    monkeypatch.undo()
    index.search(image=folder / PATHS[0])
    monkeypatch.setattr(
        tiny_model,
        "get_multimodal_features",
        build_model(embedding_pooling="mean", num_embedding_tokens=2).get_multimodal_features,
    )
    with pytest.raises(ValueError, match="which embeds images with texts otherwise"):
        index.search("it", folder / PATHS[0])


def test_a_text_is_searched_without_the_vision_tower_and_the_files(
    folder, out, tiny_model, tiny_processor, monkeypatch
):
    build_index(folder, tiny_model, tiny_processor, out)
    folder.rename(folder.with_name("away"))
    monkeypatch.setattr(tiny_model.vision_tower, "forward", None)
    assert len(SearchIndex.load(out, tiny_model, tiny_processor).search("a red star", top=3)) == 3


def test_the_model_is_loaded_from_where_it_was_when_none_is_given(folder, out, tiny_model, tiny_processor, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    tiny_processor.save_pretrained(tmp_path / "model")
    tiny_model = type(tiny_model).from_pretrained(tmp_path / "model")
    build_index(folder, tiny_model, tiny_processor, out)
    index = SearchIndex.load(out)
    assert index.search(image=folder / NAMES[0], top=1)[0].path == folder / NAMES[0]

    (tmp_path / "model").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=r"`model` is '.*model'"):
        SearchIndex.load(out)


def test_what_is_not_an_index_is_not_loaded(tmp_path, tiny_model, tiny_processor):
    with pytest.raises(FileNotFoundError, match="`path` is .*nowhere', which is not there; expected an index"):
        SearchIndex.load(tmp_path / "nowhere", tiny_model, tiny_processor)
    with pytest.raises(ValueError, match=f"expected a folder with {MANIFEST}"):
        SearchIndex.load(tmp_path, tiny_model, tiny_processor)


@pytest.mark.parametrize("config", [{"embedding_prompt_ids": [5, 6, 7]}, {"text_attention": "bidirectional"}])
def test_other_ways_to_read_an_embedding_have_an_index_too(folder, out, tiny_processor, config):
    model = build_model(**config)
    index = build(folder, out, model, tiny_processor)
    images = embed_images(model, tiny_processor, [folder / name for name in PATHS])
    check(index.search("a star"), folder, images @ embed_texts(model, tiny_processor, ["a star"])[0])


def test_a_calibrated_model_searches_what_it_is_calibrated_for(folder, out, tiny_processor):
    model = build_model(calibrated_modalities=["image", "text"])
    generator = torch.Generator().manual_seed(0)
    model.calibrator.fit({kind: torch.randn(9, 16, generator=generator) + 1 for kind in ("image", "text")})
    index = build(folder, out, model, tiny_processor)
    images = embed_images(model, tiny_processor, [folder / name for name in PATHS])
    check(index.search("a star"), folder, images @ embed_texts(model, tiny_processor, ["a star"])[0])
    with pytest.raises(ValueError, match="`modality` is 'fused'"):
        index.search("it", folder / PATHS[0])


def test_the_shares_of_a_found_image_sum_to_its_score(folder, out, tmp_path, tiny_processor):
    model = build_multi_vector_model(3)
    index = build(folder, out, model, tiny_processor, vectors=2, dimensions=9)
    for arguments in ({"text": "a star"}, {"image": folder / PATHS[2]}, {"text": "a star", "vectors": 1}):
        query, kept = index.query(**arguments), arguments.get("vectors")
        for hit in index.search(**arguments, top=2):
            picture, found = index.explain(hit.row, query, kept)
            assert float(found.shares.sum()) == pytest.approx(hit.score, abs=1e-5)
            assert found.box == (0, 0, *picture.size)
    (folder / PATHS[0]).unlink()
    with pytest.raises(FileNotFoundError):
        index.explain(0, query)
