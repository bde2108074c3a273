"""Each benchmark of speed and memory runs, on towers of a size for tests."""

import re

import pytest

from benchmarks import caption_loss, data_loading, grad_cache, joint_step, training_memory
from benchmarks.setting import micro_setting


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


def test_grad_cache_holds_one_chunk_at_a_time():
    rows = cells(grad_cache.compare(micro_setting(), numbers_of_chunks=(2, 16), plain_up_to=16, rounds=1))
    (plain_small, cached_small, _), (plain_large, cached_large, _) = rows["8"], rows["64"]
    assert float(plain_large) > 4 * float(plain_small)
    assert float(cached_large) < 2 * float(cached_small)
    assert float(rows["ratio"][0]) > 0


def test_caption_loss():
    rows = cells(caption_loss.compare(hidden_size=8, vocabulary_size=50, num_labels=6, rounds=1))
    assert set(caption_loss.WAYS) < set(rows)


@pytest.mark.slow
def test_data_loading():
    table = data_loading.compare(
        num_batches=2, num_steps=1, per_device_train_batch_size=4, dataloader_num_workers=0, bf16=False
    )
    rows = cells(table)
    assert re.fullmatch(r"\d+\.\d%", rows["ground, 0 worker"][3]) and float(rows["describe, 0 worker"][0]) > 0
