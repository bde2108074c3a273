"""Batches that workers hand over in shared memory."""

import pytest
import torch
from torch.utils.data import DataLoader

from mmgem.training.data.shared_memory import in_shared_memory

BATCH = {"pixel_values": torch.ones(2, 3), "boxes": torch.ones(0, 4), "row_keys": ["a"]}


def hand_over(rows):
    return in_shared_memory({name: value for name, value in BATCH.items()})


def test_a_batch_comes_as_it_was_made():
    assert in_shared_memory(BATCH) is BATCH and not BATCH["pixel_values"].is_shared()
    (batch,) = DataLoader([0], num_workers=1, collate_fn=hand_over)
    assert batch["row_keys"] == ["a"] and batch["boxes"].shape == (0, 4)
    assert torch.equal(batch["pixel_values"], BATCH["pixel_values"]) and batch["pixel_values"].is_shared()


def test_a_batch_without_room_is_an_error_and_no_wait(monkeypatch):
    def no_room(tensor):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", no_room)
    with pytest.raises(OSError, match="shared memory has no room for a batch of 24 bytes .*docker run --shm-size"):
        next(iter(DataLoader([0], num_workers=1, collate_fn=hand_over)))
