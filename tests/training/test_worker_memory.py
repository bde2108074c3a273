"""Memory that workers share."""

import gc
import resource
import sys
from pathlib import Path

import pytest
import torch

from mmgem.training.worker_memory import shared_with_workers


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_start_without_memory_that_was_freed():
    torch.ones(5 << 20)  # as it is freed, blocks of up to its 20 MB become part of the heap
    with shared_with_workers():
        pass
    before = _resident()
    blocks = [torch.ones(1 << 18) for _ in range(100)]  # 1 MB each
    del blocks[:-1]  # the last one keeps the heap from shrinking
    assert _resident() > before + 80e6
    with shared_with_workers():
        assert _resident() < before + 20e6
    assert len(blocks) == 1


def test_objects_are_left_out_of_collections_meanwhile():
    with shared_with_workers():
        assert gc.get_freeze_count() > 1000
    assert gc.get_freeze_count() == 0
