"""The server in this process: its vectors are the model's, and what it does not take it refuses by a sentence."""

import asyncio
import base64
import functools
import gzip
import io
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import openai
import pytest
import torch
import uvicorn
from encoders import PROMPTS, multi_vector_model, picture
from image_folders import write_folder
from PIL import Image
from starlette.testclient import TestClient
from tiny_models import TEXTS, build_model
from typer.testing import CliRunner

from mmgem.processing.sentence_transformers_export import save_sentence_transformer
from mmgem.training.cli import app
from mmgem.training.inference import embed_fused, embed_images, embed_regions, embed_texts, generate_answers
from mmgem.training.search import index as index_module
from mmgem.training.search.building import build_index
from mmgem.training.search.conditions import Condition
from mmgem.training.search.index import SearchIndex
from mmgem.training.serving import run as serving_run
from mmgem.training.serving.answers import until_stop
from mmgem.training.serving.app import create_app
from mmgem.training.serving.limits import Limits

PAGE = Path(__file__).parents[3] / "docs" / "serve.md"


def data_uri(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def decode(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f4")


JSON = {"Content-Type": "application/json"}
PICTURES = [picture(seed) for seed in range(3)]
URIS = [data_uri(image) for image in PICTURES]


@pytest.fixture(scope="module")
def model():
    return build_model(prompts=PROMPTS)


@pytest.fixture(scope="module")
def client(model, tiny_processor):
    with TestClient(create_app("tiny", model, tiny_processor)) as client:
        yield client


def limited(model, processor, **limits) -> TestClient:
    return TestClient(create_app("tiny", model, processor, limits=Limits(**limits)), raise_server_exceptions=False)


def embed(client, inputs, path="/v1/embeddings", **fields) -> np.ndarray:
    response = client.post(path, json={"input": inputs} | fields)
    assert response.status_code == 200, response.text
    return np.array([row["embedding"] for row in response.json()["data"]])


def sentence(response, status: int) -> str:
    assert response.status_code == status, response.text
    message = response.json()["error"]["message"]
    assert message.endswith(".") and "\n" not in message
    return message


def test_vectors_are_those_of_the_model(client, model, tiny_processor):
    close = {"atol": 1e-5, "rtol": 0}
    np.testing.assert_allclose(embed(client, TEXTS), embed_texts(model, tiny_processor, TEXTS), **close)
    np.testing.assert_allclose(embed(client, TEXTS[0]), embed_texts(model, tiny_processor, TEXTS[:1]), **close)
    images = embed_images(model, tiny_processor, PICTURES)
    np.testing.assert_allclose(embed(client, URIS), images, **close)
    np.testing.assert_allclose(embed(client, [{"image": uri} for uri in URIS]), images, **close)
    texts = ["", TEXTS[1], "blue"]
    pairs = [{"image": uri, "text": text} for uri, text in zip(URIS, texts)]
    np.testing.assert_allclose(embed(client, pairs), embed_fused(model, tiny_processor, PICTURES, texts), **close)
    region = embed(client, {"image": URIS[0], "boxes": [[3, 5, 40, 30]]})
    np.testing.assert_allclose(region, embed_regions(model, tiny_processor, PICTURES[:1], [[[3, 5, 40, 30]]]), **close)
    boxes = [[3, 5, 40, 30], [0, 0, 9, 9]]
    np.testing.assert_allclose(
        embed(client, {"image": URIS[0], "text": "both", "boxes": boxes}),
        embed_fused(model, tiny_processor, PICTURES[:1], ["both"], [boxes]),
        **close,
    )
    np.testing.assert_allclose(
        embed(client, {"image": URIS[:2], "text": "both"}),
        embed_fused(model, tiny_processor, [PICTURES[:2]], ["both"]),
        **close,
    )
    # A list may mix them, and each answer is in its place.
    mixed = embed(client, [TEXTS[0], URIS[1], {"image": URIS[2], "text": "blue"}, TEXTS[1]])
    expected = [embed_texts(model, tiny_processor, TEXTS[:1]), images[1:2]]
    expected += [
        embed_fused(model, tiny_processor, PICTURES[2:], ["blue"]),
        embed_texts(model, tiny_processor, TEXTS[1:]),
    ]
    np.testing.assert_allclose(mixed, torch.cat(expected), **close)
    # A text is a text, whatever it looks like.
    words = ["/etc/passwd", "http://127.0.0.1/a.png", "<image>", ""]
    np.testing.assert_allclose(embed(client, words), embed_texts(model, tiny_processor, words), **close)


@pytest.mark.slow
def test_vectors_are_those_of_sentence_transformers(tmp_path, tiny_processor):
    from sentence_transformers import SentenceTransformer

    model = multi_vector_model()
    save_sentence_transformer(model, tiny_processor, tmp_path)
    encoder = SentenceTransformer(str(tmp_path), trust_remote_code=True, device="cpu")
    pair = {"image": PICTURES[0], "text": "blue"}
    expected = encoder.encode([TEXTS[0], PICTURES[1], pair], prompt_name="edit")
    with TestClient(create_app("tiny", model, tiny_processor)) as client:
        inputs = [TEXTS[0], URIS[1], {"image": URIS[0], "text": "blue"}]
        np.testing.assert_allclose(embed(client, inputs, prompt_name="edit"), expected, atol=1e-5)
        query = {"texts": TEXTS, "input_type": "search_query", "embedding_types": ["float"]}
        found = client.post("/v2/embed", json=query).json()["embeddings"]["float"]
        np.testing.assert_allclose(found, encoder.encode_query(TEXTS), atol=1e-5)


def test_dimensions_are_nested_and_base64_is_the_same(client):
    whole = embed(client, TEXTS)
    short = embed(client, TEXTS, dimensions=5)
    np.testing.assert_allclose(short, whole[:, :5] / np.linalg.norm(whole[:, :5], axis=1, keepdims=True), atol=1e-6)
    body = client.post("/v1/embeddings", json={"input": TEXTS, "encoding_format": "base64"}).json()
    np.testing.assert_array_equal(np.stack([decode(row["embedding"]) for row in body["data"]]), whole.astype("f4"))


def test_all_vectors_of_a_model_with_several(tiny_processor):
    model = multi_vector_model()
    with TestClient(create_app("tiny", model, tiny_processor)) as client:
        body = client.post("/v1/embeddings", json={"input": [TEXTS[0], URIS[0]], "return_multivector": True}).json()
        found = np.array([row["embeddings"] for row in body["data"]])  # (2, k, D)
        np.testing.assert_allclose(found[:1], embed_texts(model, tiny_processor, TEXTS[:1]), atol=1e-5)
        np.testing.assert_allclose(found[1:], embed_images(model, tiny_processor, PICTURES[:1]), atol=1e-5)
        np.testing.assert_allclose(embed(client, [TEXTS[0], URIS[0]]), found[:, 0], atol=1e-5)


def test_usage_counts_what_was_read(client, tiny_processor):
    texts = [len(tiny_processor.tokenizer(text)["input_ids"]) for text in TEXTS]
    body = client.post(
        "/v1/embeddings", json={"input": [*TEXTS, URIS[0], {"image": URIS[1], "text": TEXTS[0]}]}
    ).json()
    count = sum(texts) + 4 + (4 + texts[0])
    assert body["usage"] == {"prompt_tokens": count, "total_tokens": count} and body["model"] == "tiny"


def test_the_shape_of_cohere(client):
    fields = {
        "model": "tiny",
        "input_type": "search_query",
        "embedding_types": ["float", "base64", "ubinary", "binary"],
    }
    body = client.post("/v2/embed", json={"texts": TEXTS} | fields).json()
    vectors = embed(client, TEXTS, prompt_name="query")
    np.testing.assert_allclose(body["embeddings"]["float"], vectors, atol=1e-5)
    np.testing.assert_allclose([decode(row) for row in body["embeddings"]["base64"]], vectors, atol=1e-5)
    bits = np.unpackbits(np.array(body["embeddings"]["ubinary"], dtype=np.uint8), axis=1)
    np.testing.assert_array_equal(bits, vectors > 0)
    np.testing.assert_array_equal(np.array(body["embeddings"]["binary"]) + 128, body["embeddings"]["ubinary"])
    assert body["texts"] == TEXTS and body["response_type"] == "embeddings_by_type"
    assert body["meta"]["billed_units"]["images"] == 0

    image = client.post("/v2/embed", json={"images": URIS[:1], "input_type": "image", "output_dimension": 4}).json()
    np.testing.assert_allclose(image["embeddings"]["float"], embed(client, URIS[:1], dimensions=4), atol=1e-5)
    content = [{"type": "text", "text": "blue"}, {"type": "image_url", "image_url": {"url": URIS[0]}}]
    fused = client.post("/v2/embed", json={"inputs": [{"content": content}], "input_type": "clustering"}).json()
    np.testing.assert_allclose(
        fused["embeddings"]["float"], embed(client, {"image": URIS[0], "text": "blue"}), atol=1e-5
    )
    # Long texts are cut or refused, as the request says.
    long = {"texts": ["a red star " * 400], "input_type": "classification"}
    assert client.post("/v2/embed", json=long).status_code == 200
    refused = client.post("/v2/embed", json=long | {"truncate": "NONE"})
    assert refused.status_code == 422 and "`texts[0]` has" in refused.json()["message"]


def test_requests_at_one_time_share_batches_and_get_their_own_answers(model, tiny_processor):
    texts = [f"{words} {number}" for number in range(12) for words in TEXTS]
    expected = embed_texts(model, tiny_processor, texts)
    with limited(model, tiny_processor, max_wait=2, max_batch=8) as client:
        with ThreadPoolExecutor(24) as threads:
            found = list(threads.map(lambda text: embed(client, text)[0], texts))
        np.testing.assert_allclose(found, expected, atol=1e-5)
        metrics = client.get("/metrics").text
    batches = float(metrics.split('mmgem_batch_inputs_count{action="embed"} ')[1].split()[0])
    assert batches < len(texts)
    assert 'mmgem_requests_total{route="/v1/embeddings",status="200"} 24.0' in metrics
    assert 'mmgem_batch_inputs_sum{action="embed"} 24.0' in metrics


def test_an_input_that_fails_in_the_model_fails_alone(tiny_processor, monkeypatch):
    model = build_model()
    run = model.get_text_features

    def fail_on_long(input_ids, **inputs):
        if input_ids.shape[1] > 9:
            raise RuntimeError("out of memory")
        return run(input_ids=input_ids, **inputs)

    monkeypatch.setattr(model, "get_text_features", fail_on_long)
    with limited(model, tiny_processor, max_wait=2, max_batch=2) as client, ThreadPoolExecutor(2) as threads:
        texts = ["star", TEXTS[1]]
        short, long = threads.map(lambda text: client.post("/v1/embeddings", json={"input": text}), texts)
        assert short.status_code == 200
        assert sentence(long, 500) == "the server failed with a RuntimeError; its log says where."


def test_chat_answers_as_the_model_does(client, model, tiny_processor):
    parts = [{"type": "image_url", "image_url": {"url": URIS[0]}}, {"type": "text", "text": "what color?"}]
    asked = {"messages": [{"role": "user", "content": parts}], "max_tokens": 12}
    body = client.post("/v1/chat/completions", json=asked).json()
    [expected] = generate_answers(model, tiny_processor, PICTURES[:1], ["what color?"], max_new_tokens=12)
    [choice] = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected} and expected
    assert body["usage"]["completion_tokens"] == 12 and choice["finish_reason"] == "length"
    prompt = tiny_processor(images=PICTURES[:1], text=["<image>what color?"])["input_ids"][0]
    assert body["usage"]["prompt_tokens"] == len(prompt)

    # The pieces of a stream are the answer.
    stream = client.post(
        "/v1/chat/completions", json=asked | {"stream": True, "stream_options": {"include_usage": True}}
    )
    events = [line.removeprefix("data: ") for line in stream.text.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    chunks = [json.loads(event) for event in events]
    assert chunks[-1]["usage"] == body["usage"] and chunks[-2]["choices"][0]["finish_reason"] == "length"
    pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1]]
    assert "".join(pieces).strip() == expected

    sampled = [
        client.post("/v1/chat/completions", json=asked | {"temperature": 1.5, "seed": seed}).json()
        for seed in (1, 1, 2)
    ]
    first, again, other = (answer["choices"][0]["message"]["content"] for answer in sampled)
    assert first == again != other
    coldest = client.post("/v1/chat/completions", json=asked | {"temperature": 1e-300}).json()
    assert coldest["choices"][0]["message"]["content"] == body["choices"][0]["message"]["content"]


def test_an_answer_ends_before_a_stop(client, model, tiny_processor):
    asked = {"messages": [{"role": "user", "content": "a large red star"}], "max_tokens": 12}

    def ask(**fields) -> tuple[str, str, int]:
        body = client.post("/v1/chat/completions", json=asked | fields).json()
        [choice] = body["choices"]
        return choice["message"]["content"], choice["finish_reason"], body["usage"]["completion_tokens"]

    whole, _, count = ask()
    assert count == 12 and len(whole) > 20
    stop = whole[9:13]
    text, reason, used = ask(stop=stop)
    assert text == whole[: whole.index(stop)].strip() and reason == "stop" and 0 < used < count
    assert ask(stop=["nowhere", stop, whole[15:]]) == (text, reason, used)
    assert ask(stop="nowhere") == ask(stop=[]) == ask(stop=None) == (whole, "length", count)
    stream = client.post("/v1/chat/completions", json=asked | {"stop": [stop, "nowhere"], "stream": True}).text
    events = [json.loads(line.removeprefix("data: ")) for line in stream.split("\n\n") if "{" in line]
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events).strip() == text
    assert events[-1]["choices"][0]["finish_reason"] == "stop"
    refused = client.post("/v1/chat/completions", json=asked | {"stop": [""]})
    assert "`stop[0]` is ''; expected" in refused.json()["error"]["message"]


@pytest.mark.parametrize("size", [1, 2, 5, 40])
def test_pieces_end_before_a_stop(size):
    text = "one two twofold three"

    async def pieces():
        for start in range(0, len(text), size):
            yield text[start : start + size]

    async def join(stop: list[str]) -> str:
        return "".join([piece async for piece in until_stop(pieces(), stop)])

    found = [asyncio.run(join(stop)) for stop in ([], ["four"], ["twof"], ["three", "fold"], ["one"])]
    assert found == [text, text, "one two ", "one two two", ""]


def test_chats_at_one_time_are_written_together(model, tiny_processor):
    questions = ["what color?", "how many objects are there in all of this picture?", "where"]
    expected = generate_answers(model, tiny_processor, PICTURES, questions, max_new_tokens=8)

    def ask(number: int) -> str:
        parts = [
            {"type": "image_url", "image_url": {"url": URIS[number]}},
            {"type": "text", "text": questions[number]},
        ]
        request = {"messages": [{"role": "user", "content": parts}], "max_tokens": 8}
        return client.post("/v1/chat/completions", json=request).json()["choices"][0]["message"]["content"]

    with limited(model, tiny_processor, max_wait=5, max_batch=3) as client, ThreadPoolExecutor(3) as threads:
        assert list(threads.map(ask, range(3))) == expected
        assert 'mmgem_batch_inputs_count{action="chat"} 1.0' in client.get("/metrics").text


@pytest.fixture(scope="module")
def index(model, tiny_processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving")
    model.name_or_path = "tiny"
    build_index(write_folder(folder / "images"), model, tiny_processor, folder / "index")
    return SearchIndex.load(folder / "index", model, tiny_processor)


def test_search_finds_what_the_index_finds(index, model, tiny_processor):
    image = Image.open(index.path(1))
    queries = [
        ({"text": TEXTS[0]}, {"text": TEXTS[0]}),
        ({"image": data_uri(image)}, {"image": image}),
        (
            {"text": "a", "image": data_uri(image), "prompt_name": "edit"},
            {"text": "a", "image": image, "prompt": "edit"},
        ),
        ({"image": data_uri(image), "boxes": [[0, 0, 9, 9]]}, {"image": image, "boxes": [[0, 0, 9, 9]]}),
        (
            {"text": "5", "kinds": ["image"], "where": ["file_name!=0.png"], "lexical_weight": 0.7},
            {"text": "5", "where": [Condition.parse("file_name!=0.png")], "lexical_weight": 0.7},
        ),
    ]
    with TestClient(create_app("tiny", model, tiny_processor, index)) as client:
        for request, query in queries:
            found = client.post("/search", json=request | {"top": 3}).json()["hits"]
            hits = index.search(**query, top=3)
            assert [hit["row"] for hit in found] == [hit.row for hit in hits]
            assert [hit["path"] for hit in found] == [hit.path.relative_to(index.folder).as_posix() for hit in hits]
            np.testing.assert_allclose([hit["score"] for hit in found], [hit.score for hit in hits], atol=1e-5)
        several = client.post("/search", json={"queries": [request | {"top": 3} for request, _ in queries]}).json()
        assert several["results"] == [
            client.post("/search", json=request | {"top": 3}).json() for request, _ in queries
        ]
        assert "`text` has 1,9" in sentence(client.post("/search", json={"text": "star " * 999}), 422)
        assert "`where` is 'x'" in sentence(client.post("/search", json={"text": "a", "where": ["x"]}), 422)
        assert "`kinds` holds 'x'" in sentence(client.post("/search", json={"text": "a", "kinds": ["x"]}), 422)
        assert "`prompt` is 'x'" in sentence(client.post("/search", json={"text": "a", "prompt_name": "x"}), 422)
        sentence(client.post("/search", json={}), 422)
        query = {"text": "a"}
        beside = client.post("/search", json={"queries": [query], "top": 3})
        assert "`top` is given beside `queries`" in sentence(beside, 422)
        assert "`queries` is empty" in sentence(client.post("/search", json={"queries": []}), 422)
        assert "`queries` holds 513 inputs" in sentence(client.post("/search", json={"queries": [query] * 513}), 413)
        assert "`queries[0].txt` is not known" in sentence(
            client.post("/search", json={"queries": [{"txt": "a"}]}), 422
        )


def test_queries_of_texts_are_embedded_together(index, model, tiny_processor, monkeypatch):
    batches = []
    embed = index_module.embed_texts
    monkeypatch.setattr(
        index_module, "embed_texts", lambda *arguments: batches.append(len(arguments[2])) or embed(*arguments)
    )
    queries = [{"text": text, "top": 2} for text in "abcde"] + [{"text": "f", "top": 3}, {"text": " ", "top": 2}]
    with TestClient(create_app("tiny", model, tiny_processor, index)) as client:
        results = client.post("/search", json={"queries": queries[:6]}).json()["results"]
        assert [len(result["hits"]) for result in results] == [2, 2, 2, 2, 2, 3]
        assert sorted(batches) == [1, 5]
        assert "`text` is ' '" in sentence(client.post("/search", json={"queries": queries}), 422)


def large_png() -> str:
    """A picture of 100 megapixels, in a file of a few kilobytes."""
    file = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(file, "png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


TEXT_FILE = "data:image/png;base64," + base64.b64encode(b"not a picture" * 9).decode()


@pytest.mark.parametrize(
    ("path", "body", "nulls"),
    [
        ("/v1/embeddings", {"input": [{"text": "a"}]}, ("encoding_format", "dimensions", "user", "extra")),
        ("/v2/embed", {"input_type": "image", "texts": ["a"]}, ("images", "embedding_types", "truncate")),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2},
            ("temperature", "n", "stream", "tools"),
        ),
    ],
)
def test_a_field_that_is_null_is_left_out(client, path, body, nulls):
    expected, found = (client.post(path, json=sent).json() for sent in (body, body | dict.fromkeys(nulls)))
    for answer in (expected, found):
        assert "error" not in answer
        for name in ("id", "created"):
            answer.pop(name, None)
    assert found == expected


BAD_EMBEDDINGS = {
    "100 megapixels": ({"input": large_png()}, 422, "too large: 10000 x 10000 pixels"),
    "a text file": ({"input": TEXT_FILE}, 422, "that are no image"),
    "no base64": ({"input": "data:image/png;base64,%%%"}, 422, "is no base64"),
    "half a picture": ({"input": URIS[0][: URIS[0].index(",") + 1 + 2000]}, 422, "cannot be decoded"),
    "a path": ({"input": {"image": "/etc/passwd"}}, 422, "is '/etc/passwd'; expected a data URI"),
    "a loopback URL": ({"input": {"image": "http://127.0.0.1:1/a.png"}}, 422, "fetching is off"),
    "a file URL": ({"input": {"image": "file:///etc/passwd"}}, 422, "fetching is off"),
    "10,000 inputs": ({"input": ["a"] * 10_000}, 413, "holds 10,000 inputs; expected at most 512"),
    "a long text": ({"input": ["a", "star " * 999]}, 422, r"`input[1]` has 1,99"),
    "a very long text": ({"input": "a" * 3_000_000}, 422, "has 3,000,000 characters"),
    "nothing": ({"input": []}, 422, "`input` is empty"),
    "no input": ({}, 422, "`input` is missing"),
    "tokens": ({"input": [[1, 2, 3]]}, 422, "`input[0]` is [1, 2, 3], in tokens"),
    "a number": ({"input": 5}, 422, "`input[0]` is 5"),
    "null": ({"input": [None]}, 422, "`input[0]` is None"),
    "an empty object": ({"input": [{}]}, 422, "has neither `text` nor `image`"),
    "two images": ({"input": {"image": URIS[:2]}}, 422, "holds 2 images without a `text`"),
    "a box of text": ({"input": {"text": "a", "boxes": [[0, 0, 1, 1]]}}, 422, "`boxes` came without"),
    "an empty box": ({"input": {"image": URIS[0], "boxes": [[5, 5, 5, 5]]}}, 422, "boxes"),
    "half a surrogate": ({"input": "\ud800"}, 422, "surrogate"),
    "another model": ({"input": "a", "model": "gpt"}, 404, "`model` is 'gpt'; expected 'tiny'"),
    "another prompt": ({"input": "a", "prompt_name": "x"}, 422, "expected one of 'query', 'edit'"),
    "too many dimensions": ({"input": "a", "dimensions": 17}, 422, "`dimensions` is 17; expected 1 to 16"),
    "no dimensions": ({"input": "a", "dimensions": 0}, 422, "`dimensions` is 0; expected greater than"),
    "true dimensions": ({"input": "a", "dimensions": True}, 422, "`dimensions` is True; expected a valid integer"),
    "dimensions in words": ({"input": "a", "dimensions": "5"}, 422, "`dimensions` is '5'; expected a valid integer"),
    "a true edge": ({"input": {"image": URIS[0], "boxes": [[False, 0, 5, 5]]}}, 422, "[0][0]` is False; expected a v"),
    "another encoding": ({"input": "a", "encoding_format": "hex"}, 422, "`encoding_format` is 'hex'; expected"),
    "another field": ({"input": "a", "truncate": True}, 422, "`truncate` is not known here"),
}  # fmt: skip


@pytest.mark.parametrize("body, status, expected", BAD_EMBEDDINGS.values(), ids=BAD_EMBEDDINGS)
def test_bad_embeddings_are_refused_by_a_sentence(client, body, status, expected):
    assert expected in sentence(client.post("/v1/embeddings", content=json.dumps(body), headers=JSON), status)


BAD_CHATS = {
    "nothing": ({"messages": []}, "`messages` is []; expected"),
    "no words": ({"messages": [{"role": "user", "content": ""}]}, "holds no text and no image"),
    "a role": ({"messages": [{"role": "tool", "content": "a"}]}, "`messages[0].role` is 'tool'"),
    "tools": ({"messages": [{"role": "user", "content": "a"}], "tools": [{}]}, "`tools` is not known here"),
    "a penalty": (
        {"messages": [{"role": "user", "content": "a"}], "presence_penalty": 0.5},
        "`presence_penalty` is not known here",
    ),
    "two answers": ({"messages": [{"role": "user", "content": "a"}], "n": 2}, "`n` is 2; expected 1"),
    "a long answer": ({"messages": [{"role": "user", "content": "a"}], "max_tokens": 600}, "`max_tokens` is 600"),
    "no room": ({"messages": [{"role": "user", "content": "a"}], "max_tokens": 256}, "expected 256 together"),
    "true warmth": (
        {"messages": [{"role": "user", "content": "a"}], "temperature": True},
        "is True; expected a valid",
    ),
    "a long text": ({"messages": [{"role": "user", "content": "star " * 999}]}, "`messages` has 1,99"),
    "a part": ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "has no `text`"),
}


@pytest.mark.parametrize("body, expected", BAD_CHATS.values(), ids=BAD_CHATS)
def test_bad_chats_are_refused_by_a_sentence(client, body, expected):
    assert expected in sentence(client.post("/v1/chat/completions", json=body), 422)


def test_other_errors_are_json_too(client):
    assert "no JSON" in sentence(client.post("/v1/embeddings", content=b"{", headers=JSON), 422)
    for content in (b"[" * 100_000, b'{"input": "\xff"}', b'{"input": ' + b"9" * 5000 + b"}"):
        answer = client.post("/v1/embeddings", content=content, headers=JSON)
        assert "expected a JSON object in UTF-8, without deep nesting" in sentence(answer, 400)
    seeded = {"messages": [{"role": "user", "content": "a"}], "seed": 1 << 70}
    assert "`seed` is 1180591620717411303424; expected" in sentence(
        client.post("/v1/chat/completions", json=seeded), 422
    )
    typed = {"content": b"a", "headers": {"Content-Type": "text/plain"}}
    assert "Content-Type" in sentence(client.post("/v1/embeddings", **typed), 422)
    assert "GET /nowhere is not known here; expected /health" in sentence(client.get("/nowhere"), 404)
    assert "there is no index here" in sentence(client.post("/search", json={"text": "a"}), 404)
    assert "is not known" in sentence(client.get("/v1/embeddings"), 405)


def test_health_and_models(client):
    assert client.get("/health").json() == {"status": "ok", "model": "tiny", "in_work": 0}
    assert [one["id"] for one in client.get("/v1/models").json()["data"]] == ["tiny"]


def test_what_may_be_read_has_a_head(client):
    for path in ("/health", "/metrics", "/v1/models", "/v1/models/tiny"):
        head = client.head(path)
        assert head.status_code == 200 and not head.content
    assert client.get("/v1/models/tiny").json()["id"] == "tiny"
    assert "`model` is 'org/other'; expected 'tiny'" in sentence(client.get("/v1/models/org/other"), 404)


def test_a_body_that_is_compressed_is_refused(client):
    packed = gzip.compress(b'{"input": "a"}')
    response = client.post("/v1/embeddings", content=packed, headers=JSON | {"Content-Encoding": "gzip"})
    assert "`Content-Encoding` is 'gzip'; expected a body as it is" in sentence(response, 415)


def test_pages_of_other_origins_ask_where_they_may(client, model, tiny_processor):
    asks = {"Origin": "https://a.org", "Access-Control-Request-Method": "POST"}
    asks["Access-Control-Request-Headers"] = "content-type"
    assert "OPTIONS" in sentence(client.options("/v1/embeddings", headers=asks), 405)
    with TestClient(create_app("tiny", model, tiny_processor, allow_origins=["https://a.org"])) as other:
        assert other.options("/v1/embeddings", headers=asks).headers["access-control-allow-origin"] == "https://a.org"
        answer = other.post("/v1/embeddings", json={"input": "a"}, headers={"Origin": "https://a.org"})
        assert answer.headers["access-control-allow-origin"] == "https://a.org"
        asks["Origin"] = "https://b.org"
        assert "access-control-allow-origin" not in other.options("/v1/embeddings", headers=asks).headers


def test_a_server_that_ends_says_so(slow_model, tiny_processor):
    """As uvicorn ends requests: what is left of them after a while is cancelled."""
    model, released = slow_model
    served, sent = create_app("tiny", model, tiny_processor), []

    async def end_in_the_middle():
        async def send(message):
            sent.append(message)

        body = [{"type": "http.request", "body": b'{"input": "a"}'}]

        async def receive():
            return body.pop() if body else await asyncio.sleep(60)

        scope = {"type": "http", "method": "POST", "path": "/v1/embeddings", "query_string": b""}
        scope["headers"] = [(b"content-type", b"application/json")]
        async with served.router.lifespan_context(served):
            request = asyncio.ensure_future(served(scope, receive, send))
            await asyncio.sleep(0.1)
            request.cancel()
            await request
            released.set()

    asyncio.run(end_in_the_middle())
    assert sent[0]["status"] == 503 and b"the server is ending" in sent[1]["body"]


def test_limits_of_bytes_requests_and_queue(model, tiny_processor):
    with limited(model, tiny_processor, max_bytes=1000, max_inputs=3, max_queue=2, max_pixels=2000) as client:
        body = json.dumps({"input": "a" * 2000}).encode()
        assert "the body has 2," in sentence(client.post("/v1/embeddings", content=body, headers=JSON), 413)
        pieces = (body[start : start + 500] for start in range(0, len(body), 500))  # of a length that is not said
        assert "more than 1,000 bytes" in sentence(client.post("/v1/embeddings", content=pieces, headers=JSON), 413)
        assert "4 inputs; expected at most 3" in sentence(
            client.post("/v1/embeddings", json={"input": ["a"] * 4}), 413
        )
        response = client.post("/v1/embeddings", json={"input": ["a"] * 3})
        assert "expected at most 2 in all" in sentence(response, 429) and response.headers["retry-after"] == "1"
        assert client.post("/v1/embeddings", json={"input": ["a"] * 2}).status_code == 200  # nothing is held
    with limited(model, tiny_processor, max_requests=0) as client:
        assert "0 requests are being answered" in sentence(client.post("/v1/embeddings", json={"input": "a"}), 503)
        assert client.get("/health").status_code == 200


@pytest.fixture
def slow_model(model, monkeypatch):
    """A model that waits until it is released."""
    released, run = threading.Event(), model.get_text_features

    def wait(**inputs):
        released.wait(10)
        return run(**inputs)

    monkeypatch.setattr(model, "get_text_features", wait)
    yield model, released
    released.set()


def test_a_request_whose_time_is_over_is_answered_and_leaves_the_queue(slow_model, tiny_processor):
    model, released = slow_model
    limits = Limits(timeout=1, max_batch=1)
    with TestClient(create_app("tiny", model, tiny_processor, limits=limits)) as client:
        assert "no answer within 1 seconds" in sentence(client.post("/v1/embeddings", json={"input": ["a"] * 3}), 503)
        assert client.get("/health").json()["in_work"] == 0
        released.set()
        object.__setattr__(limits, "timeout", 60)  # also on a machine that is busy
        assert client.post("/v1/embeddings", json={"input": "a"}).status_code == 200
        # One was with the model when time was over, two had not begun and never did.
        assert 'mmgem_batch_inputs_sum{action="embed"} 2.0' in client.get("/metrics").text


def test_writing_ends_when_nobody_waits(model, tiny_processor, monkeypatch):
    forward, steps = model.forward, 0

    @functools.wraps(forward)
    def slow(*arguments, **inputs):
        nonlocal steps
        steps += 1
        time.sleep(0.02)
        return forward(*arguments, **inputs)

    monkeypatch.setattr(model, "forward", slow)
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    with limited(model, tiny_processor, timeout=1) as client:
        asked = {"messages": [{"role": "user", "content": "a red star"}], "max_tokens": 200}
        sentence(client.post("/v1/chat/completions", json=asked), 503)
        assert client.get("/health").json()["in_work"] == 0
        client.post("/v1/embeddings", json={"input": "a"})  # after which nothing else is with the model
        assert 0 < steps < 200


@contextmanager
def serving(model, processor, monkeypatch, header_seconds: float, limits: Limits) -> Iterator[int]:
    """The port of a real server of a model."""
    monkeypatch.setattr(serving_run, "HEADER_SECONDS", header_seconds)
    monkeypatch.setattr(serving_run, "load_checkpoint", lambda name: (model, processor))
    servers: list[uvicorn.Server] = []

    def run(app, **options):
        servers.append(uvicorn.Server(uvicorn.Config(app, **options | {"log_level": "error"})))
        asyncio.run(servers[0].serve())

    monkeypatch.setattr(uvicorn, "run", run)
    thread = threading.Thread(target=serving_run.serve, args=("mmgem-tiny",), kwargs={"port": 0, "limits": limits})
    thread.start()
    while not (servers and servers[0].started):
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        host, port = servers[0].servers[0].sockets[0].getsockname()
        assert host == "127.0.0.1"
        yield port
    finally:
        servers[0].should_exit = True
        thread.join()


@pytest.mark.slow
def test_the_client_of_openai_gets_what_it_asks_for(model, tiny_processor, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gallery").mkdir()
    PICTURES[0].save("gallery/scene-7-0000000.png")
    [code] = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    page: dict = {}
    with serving(model, tiny_processor, monkeypatch, 10, Limits()) as port:
        exec(compile(code.replace(":8000/", f":{port}/"), str(PAGE), "exec"), page)
        client = page["client"]
        [expected] = generate_answers(model, tiny_processor, PICTURES[:1], ["how many objects are there?"])
        assert page["answer"].choices[0].message.content == expected
        np.testing.assert_allclose(
            page["vectors"][0].embedding, embed_texts(model, tiny_processor, ["a large red star"])[0], atol=1e-5
        )
        found = client.embeddings.create(model="mmgem-tiny", input=TEXTS, dimensions=8)
        shortened = torch.nn.functional.normalize(embed_texts(model, tiny_processor, TEXTS)[:, :8], dim=-1)
        np.testing.assert_allclose([row.embedding for row in found.data], shortened, atol=1e-5)
        asked = {"model": "mmgem-tiny", "messages": [{"role": "user", "content": page["question"]}]}
        of_no_effect = {"frequency_penalty": 0, "presence_penalty": 0, "logprobs": False, "tools": []}
        assert client.chat.completions.create(**asked, **of_no_effect).choices[0].message.content == expected
        assert client.models.retrieve("mmgem-tiny").id == "mmgem-tiny"
        stream = client.chat.completions.create(**asked, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream).strip() == expected
        with pytest.raises(openai.NotFoundError, match="`model` is 'gpt'; expected 'mmgem-tiny'"):
            client.embeddings.create(model="gpt", input="a")


@pytest.mark.slow
def test_slow_clients_are_let_go(model, tiny_processor, monkeypatch):
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\n"

    def received(data: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            connection.sendall(data)
            return connection.recv(10_000)

    with serving(model, tiny_processor, monkeypatch, 1, Limits(timeout=2)) as port, ThreadPoolExecutor(3) as threads:
        # No word, half of the headers, headers without their body.
        silent, half, bodiless = threads.map(received, [b"", head, head + b"Content-Length: 50\r\n\r\n{"])
        assert silent == half == b"" and b" 408 " in bodiless


def test_the_command_hands_on_what_it_is_told(monkeypatch):
    calls = []
    monkeypatch.setattr(serving_run, "serve", lambda *arguments: calls.append(arguments))
    for hosts, expected in ([], False), (["a.org", "b.org"], ["a.org", "b.org"]), (["*"], True):
        options = [part for host in hosts for part in ("--allow-urls", host)] + ["--allow-origins", "https://a.org"]
        result = CliRunner().invoke(app, ["serve", "folder", "--port", "9", "--max-inputs", "7", *options])
        assert result.exit_code == 0, result.output
        assert calls.pop() == ("folder", None, "127.0.0.1", 9, Limits(max_inputs=7), expected, ["https://a.org"])
