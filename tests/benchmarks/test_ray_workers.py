"""What `benchmarks.ray_workers` makes of the notes of its workers; Ray itself is not needed."""

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest

from benchmarks import ray_workers
from benchmarks.ray_workers import NotingEmbedder, Run, read_notes, row


def test_a_row_says_what_was_embedded_again_and_what_is_there_twice():
    notes = [
        {"moments": [10.0, 11.0], "cpu": 0.5, "names": ["a", "b"]},
        {"moments": [10.5, 12.0], "cpu": 0.25, "names": ["b", "c"]},
    ]
    once = Run(7.2, notes, Counter("abc"))
    assert row("2", once) == ("2", "7", "1.5", "250.0", "1", "3, each once")
    assert row("2", once._replace(shards=Counter("abbc")))[-1] == "3, up to 2 times"


def test_a_worker_notes_its_batches_and_kills_itself_once(tmp_path, monkeypatch):
    killed = []
    monkeypatch.setattr(ray_workers.os, "kill", lambda process, number: killed.append(number))
    monkeypatch.setattr(ray_workers.ImageEmbedder, "__init__", lambda self, shards: None)
    monkeypatch.setattr(ray_workers.ImageEmbedder, "__call__", lambda self, batch: batch)
    worker = NotingEmbedder(Path("shards"), tmp_path, killed_after=3)
    for names, deaths in [(["a", "b"], 0), (["c"], 1), (["d"], 1)]:
        assert worker(pa.table({"file_name": names}))["file_name"].to_pylist() == names
        assert killed == [ray_workers.signal.SIGKILL] * deaths
    notes = read_notes(tmp_path)
    assert [note["names"] for note in notes] == [["a", "b"], ["c"], ["d"]]
    assert all(note["moments"][0] <= note["moments"][1] and note["cpu"] == pytest.approx(0, abs=1) for note in notes)
