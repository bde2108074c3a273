"""The log of what was skipped: written by many, counted once."""

import json
import multiprocessing

from mmgem.training.data.skipped import SkippedLog


def _add_many(path, worker):
    log = SkippedLog(path)
    for number in range(50):
        log.add("photos", str(number), f"worker {worker} " + "x" * 300)


def test_lines_of_several_processes_do_not_mix(tmp_path):
    path = tmp_path / "run" / "skipped.jsonl"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_add_many, args=(path, worker)) for worker in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 200 and set(lines[0]) == {"source", "key", "reason"}
    assert SkippedLog(path).counts() == {"photos": 50}


def test_a_row_that_is_met_again_counts_once(tmp_path, caplog):
    log = SkippedLog(tmp_path / "skipped.jsonl")
    assert log.counts() == {}
    for key in ("1", "2", "1"):
        log.add("photos", key, "is no image")
    log.add("shards", "1", "is cut off")
    assert log.counts() == {"photos": 2, "shards": 1}
    assert caplog.messages == [
        "skipped photos:1: is no image",
        "skipped photos:2: is no image",
        "skipped shards:1: is cut off",
    ]
    assert len(log.path.read_text().splitlines()) == 3
    with open(log.path, "a") as file:
        file.write('{"source": "pho')  # the machine went down
    assert SkippedLog(log.path).counts() == {"photos": 2, "shards": 1}


def test_without_a_file_it_still_counts():
    log = SkippedLog()
    log.add("photos", "1", "is no image")
    assert log.counts() == {"photos": 1}
