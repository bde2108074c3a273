"""Each benchmark of speed and memory runs, on towers of a size for tests."""

import json
import re
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from starlette.testclient import TestClient

from benchmarks import (
    caption_loss,
    cold_start,
    data_loading,
    fused_cost,
    grad_cache,
    indexing,
    inference,
    inference_tasks,
    joint_step,
    search,
    serving,
    training_memory,
    vector_engines,
)
from benchmarks.setting import build_batch, build_model, micro_setting
from mmgem.processing import save_sentence_transformer
from mmgem.training.loading import load_checkpoint
from mmgem.training.search import inverted_lists
from mmgem.training.serving.app import create_app


def rows_of(table: str) -> list[list[str]]:
    """Cells of a markdown table in a text, without its header."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def cells(table: str) -> dict[str, list[str]]:
    """Rows of the markdown tables in a text, by their first cell."""
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")]
    return {line[0]: [cell.strip() for cell in line[1:]] for line in lines}


@pytest.mark.parametrize("bf16", [False, True])
def test_joint_step(bf16):
    rows = cells(joint_step.compare(micro_setting(), rounds=1, bf16=bf16))
    joint, stack = rows[joint_step.JOINT], rows[joint_step.STACK]
    assert stack[1] == stack[3] == stack[5] == "1.00"
    assert 0 < float(joint[3]) < 1 and 0 < float(joint[5]) < 1
    assert float(rows[joint_step.CLIP][3]) + float(rows[joint_step.LLAVA][3]) == pytest.approx(1, abs=0.011)


def test_training_memory():
    rows = cells(training_memory.compare(micro_setting(), rounds=1, bf16=False))
    assert list(rows)[0] == "step" and set(training_memory.CHANGES) < set(rows)
    assert all(float(row[1]) > 0 for name, row in rows.items() if name not in ("step", "---"))


@pytest.mark.slow
def test_grad_cache_holds_one_chunk_at_a_time():
    rows = cells(grad_cache.compare(micro_setting(), numbers_of_chunks=(2, 16), plain_up_to=16, rounds=1))
    (plain_small, cached_small, _), (plain_large, cached_large, _) = rows["8"], rows["64"]
    assert float(plain_large) > 4 * float(plain_small)
    assert float(cached_large) < 2 * float(cached_small)
    assert float(rows["ratio"][0]) > 0


def test_caption_loss():
    rows = cells(caption_loss.compare(hidden_size=8, vocabulary_size=50, num_labels=6, rounds=1))
    assert set(caption_loss.WAYS) < set(rows)


def test_inference(tmp_path):
    """Each contestant does what the task says, and the tables and the plot are made of it."""
    setting = micro_setting()
    contestants = inference_tasks.build_contestants(setting, "cpu", torch.float32)
    tasks = inference_tasks.build_tasks(contestants, setting)
    with inference.inference(contestants.ours):
        found = {(task.name, by): step() for task in tasks for by, step in task.steps.items()}
        measured = inference.measure(tasks, 3, "cpu", torch.float32)
    vectors = {key: value for key, value in found.items() if "vectors" in key[0]}
    counts = {task.name: task.count for task in tasks}
    assert all(len(getattr(value, "pooler_output", value)) == counts[name] for (name, _), value in vectors.items())
    texts = vectors["text vectors", inference_tasks.OURS]
    batch = build_batch(replace(setting, num_images=inference_tasks.TEXTS))
    with torch.no_grad():
        expected = contestants.ours.get_text_features(batch["input_ids"], batch["attention_mask"]).pooler_output
    torch.testing.assert_close(texts, expected)
    written = {key: value for key, value in found.items() if key not in vectors}
    name = f"captions of {inference_tasks.NEW_TOKENS} tokens"
    bare, ours = written[name, inference_tasks.BARE], written[name, inference_tasks.OURS]
    assert torch.equal(bare, ours[:, -inference_tasks.NEW_TOKENS :])
    assert len(written) == 7 and all(len(value) == counts[name] for (name, _), value in written.items())
    for name, task in measured["tasks"].items():
        rows = rows_of(inference.task_table(task, measured["gemm_flops_per_second"]))
        assert [row[0] for row in rows] == list(task["by"]) and rows[0][2] == "1.00", name
        assert all(own["flops"] > 0 and own["peak_bytes"] > 0 for own in task["by"].values())
    inference.draw_plot(measured, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_cold_start(tmp_path, capsys):
    build_model(micro_setting()).save_pretrained(tmp_path)
    cold_start.main("mmgem", str(tmp_path))
    parts = json.loads(capsys.readouterr().out)
    assert tuple(parts) == cold_start.PARTS and min(parts.values()) >= 0
    several = {by: {part: [1.0, 2.0, 3.0] for part in parts} for by in (inference_tasks.OURS, inference_tasks.CLIP)}
    assert rows_of(inference.cold_table(several))[0][4:6] == ["6.00", "1.00"]


def test_indexing(tmp_path, tiny_model, tiny_processor):
    folder = tmp_path / "photographs"
    folder.mkdir()
    indexing.write_photographs(folder, 6, (0.01, 0.02))
    contents = {path.read_bytes() for path in folder.iterdir()}
    assert len(contents) == 6
    save_sentence_transformer(tiny_model, tiny_processor, tmp_path / "checkpoint")
    encoder = SentenceTransformer(str(tmp_path / "checkpoint"), trust_remote_code=True, device="cpu")
    rows = {
        name: list(map(float, (*row[:3], *row[4:]))) for name, *row in rows_of(indexing.compare(encoder, folder, 2))
    }
    assert list(rows)[:4] == [indexing.DECODING, indexing.MODEL, indexing.BOTH, indexing.INDEX] and len(rows) == 7
    assert max(rows[indexing.DECODING][1], rows[indexing.MODEL][1]) >= 1 > rows[indexing.BOTH][1]
    assert rows[indexing.BOTH][2] == rows[indexing.BOTH][4] == rows[indexing.MODEL][5] == 1
    assert rows[indexing.INDEX][3] > rows[indexing.AFTER][3]


def test_a_fused_embedding_costs_its_emb_vectors_more_than_the_prefill():
    """Also of the FLOPs of the prompt that `generate` begins with, a small part."""
    setting = replace(micro_setting(), caption_lengths=(6, 6))
    rows = rows_of(fused_cost.compare(setting, (1, 3), (1, 4), rounds=1))
    assert [tuple(map(int, row[:3])) for row in rows] == [(1, 10, 1), (3, 18, 1), (1, 10, 4), (3, 18, 4)]
    for row in rows:
        tokens, vectors, of_prefill, of_prompt = int(row[1]), int(row[2]), float(row[5]), float(row[9])
        # As many more tokens, and attention, whose cost is a square.
        assert 1 + vectors / tokens <= of_prefill <= (1 + vectors / tokens) ** 2
        assert abs(of_prompt - 1) < of_prefill - 1
        assert row[6] == ("yes" if max(float(row[4]), of_prefill) <= fused_cost.LIMIT else "no")


def test_the_prefill_is_what_the_fused_embedding_contains():
    setting = micro_setting()
    model = build_model(setting, num_embedding_tokens=2, embedding_pooling="mean").eval()
    steps, tokens = fused_cost.build_steps(model, setting, num_images=2)
    with torch.no_grad():
        found = {name: step() for name, step in steps.items()}
    torch.testing.assert_close(found[fused_cost.READ].pooler_output, found[fused_cost.FUSED].pooler_output)
    prefill = found[fused_cost.PREFILL].last_hidden_state  # (B, L, H)
    assert prefill.shape[1] == tokens
    logits = found[fused_cost.PROMPT].logits  # (B, 1, vocabulary)
    torch.testing.assert_close(model.get_output_embeddings()(prefill[:, -1:]), logits)


@pytest.mark.parametrize("engine", ["mmgem", "faiss-exact", "faiss-ivf-sq8", "usearch-i8"])
def test_vector_engines(engine, tmp_path, monkeypatch):
    def build_here(name, folder, limit):
        vector_engines.ENGINES[name].build(np.load(tmp_path / "vectors.npy"), folder)
        return 2.0, 1.0

    monkeypatch.setattr(inverted_lists, "EXACT_BELOW", 1000)  # so that ours has lists, too
    monkeypatch.setattr(vector_engines, "build_anew", build_here)  # and not in new processes
    monkeypatch.setattr(vector_engines, "open_anew", lambda name, folder, query, effort: 0.5)
    table = vector_engines.compare([engine], images=2000, dimensions=48, queries=20, aim=0.9, folder=tmp_path)
    [[name, _, _, size, opened, _, like_images, like_texts, *milliseconds]] = rows_of(table)
    assert name == engine and opened == "0.50" and not list(tmp_path.glob(engine))
    assert min(float(like_images), float(like_texts)) >= 0.9 and all(float(one) >= 0 for one in milliseconds)


def test_an_engine_that_takes_too_long_to_build_has_a_row_that_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(vector_engines, "build_anew", lambda name, folder, limit: None)
    arguments = {"images": 1000, "dimensions": 48, "queries": 2, "aim": 0.9, "folder": tmp_path}
    [row] = rows_of(vector_engines.compare(["faiss-exact"], **arguments, limit=7))
    assert row[:3] == ["faiss-exact", "not built in", "7"] and len(row) == len(vector_engines.HEADER)


@pytest.mark.slow
def test_a_process_that_builds_ends_at_its_limit(tmp_path):
    place = tmp_path / "faiss-hnsw-sq8"
    place.mkdir()
    vectors = np.random.default_rng(0).standard_normal((40_000, 96), dtype=np.float32)
    np.save(tmp_path / "vectors.npy", vectors)
    assert vector_engines.build_anew("faiss-hnsw-sq8", place, limit=1) is None
    assert len(vector_engines.build_anew("faiss-exact", place, limit=60)) == 2


def test_search():
    modes = search.modes(dimensions=16, vectors=4)
    assert {mode.precision for mode in modes if mode.vectors == 1} == set(search.PRECISIONS)
    assert [mode.vectors for mode in modes if mode.precision == "float32"] == [1, 1, 1, 1, 2, 4]
    rows = rows_of(search.compare(modes, images=50, queries=2))
    for mode, row in zip(modes, rows, strict=True):
        bits = {"float32": 32, "int8": 8, "binary": 1}[mode.precision]
        assert row[:3] == [str(field) for field in mode]
        assert int(row[3]) == mode.vectors * -(-mode.dimensions * bits // 8)
        assert float(row[6]) > 0


@pytest.mark.slow
def test_data_loading(monkeypatch):
    monkeypatch.setattr(data_loading, "WARM_UP_STEPS", 1)
    table = data_loading.compare(num_steps=1, per_device_train_batch_size=2, dataloader_num_workers=0, bf16=False)
    rows = cells(table)
    assert re.fullmatch(r"\d+\.\d%", rows["ground, 0 worker"][3]) and float(rows["describe, 0 worker"][0]) > 0


def test_serving(monkeypatch):
    """A server in this process, where the benchmark starts one of its own."""

    @contextmanager
    def serve(model, port, options):
        with TestClient(create_app("tiny", *load_checkpoint(model))) as client:
            monkeypatch.setattr(serving.httpx2, "Client", lambda **options: nullcontext(client))
            yield ""

    monkeypatch.setattr(serving, "serve", serve)
    rows = rows_of(serving.compare(serving.TINY, clients=(1, 2), seconds=0.05, port=0))
    ways = [("none", "1"), *((server, count) for server in serving.SERVERS for count in ("1", "2"))]
    assert [tuple(row[:3]) for row in rows] == [(kind, *way) for kind in ("a text", "an image") for way in ways]
    assert all(float(row[3]) > 0 for row in rows) and rows[0][4] == rows[5][4] == "1.00"
