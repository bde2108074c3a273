"""Work divided among processes comes back whole and in order."""

import pytest
import sharded_vlm
import torch
import torch.distributed as dist
from tiny_models import build_model
from torchrun import torchrun

from mmgem.training.distributed import Share, is_sharded, whole


class Stream:
    def __init__(self, count: int):
        self.count = count

    def __iter__(self):
        return iter(range(self.count))


class Indexed:
    """As a data set whose rows are costly to read."""

    def __init__(self, count: int):
        self.count, self.read = count, []

    def __len__(self):
        return self.count

    def __getitem__(self, number: int) -> int:
        if number >= self.count:
            raise IndexError(number)
        self.read.append(number)
        return number


@pytest.mark.parametrize("kind", [Stream, Indexed, lambda count: list(range(count))])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_shares_come_back_whole_and_in_order(monkeypatch, kind, size, count):
    parts = [[f"item {item}" for item in Share(rank, size).of(kind(count))] for rank in range(size)]

    def all_gather_object(received, own):
        received[:] = parts

    monkeypatch.setattr(dist, "all_gather_object", all_gather_object)
    for rank in range(size):
        assert Share(rank, size).gather(parts[rank]) == [f"item {item}" for item in range(count)]


def test_rows_of_others_are_not_read():
    rows = Indexed(7)
    assert list(Share(1, 3).of(rows)) == [1, 4] and rows.read == [1, 4]


def test_work_is_divided_unless_the_model_is(monkeypatch, tmp_path):
    model = build_model()
    assert Share.for_model(model) == Share(0, 1) and not is_sharded(model)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        monkeypatch.setattr(dist, "get_rank", lambda: 1)
        monkeypatch.setattr(dist, "get_world_size", lambda: 4)
        assert Share.for_model(model) == Share(1, 4)
        model.logit_scale.ds_id = 0  # as ZeRO-3 marks its parameters
        assert is_sharded(model) and Share.for_model(model) == Share(0, 1)
    finally:
        monkeypatch.undo()
        dist.destroy_process_group()


def test_whole_of_a_plain_tensor_is_itself():
    parameter = torch.nn.Parameter(torch.ones(3))
    assert torch.equal(whole(parameter), torch.ones(3)) and not whole(parameter).requires_grad


@pytest.mark.slow
def test_a_model_that_began_as_a_vlm_can_be_sharded():
    torchrun(sharded_vlm)
