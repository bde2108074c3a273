import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmgem.training.recipes.step_memory import SavedTensors, step_memory


def test_step_memory_is_what_is_held():
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 5, bias=False))
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.AdamW([model[1].weight])
    model(torch.ones(2, 10)).sum().backward()
    optimizer.step()
    memory = step_memory(model, optimizer, activations=7, copies=30)
    step_counter = 4
    assert (memory.weights, memory.gradients, memory.activations) == (600, 200, 7)
    assert memory.optimizer == 2 * 200 + step_counter
    assert memory.total == 600 + 200 + 404 + 7 + 30


def test_saved_tensors_are_counted_once_and_while_they_are_kept():
    x = torch.randn(1000, requires_grad=True)  # 4,000 bytes
    weight = nn.Parameter(torch.randn(1000))
    saved = SavedTensors(nn.ParameterList([weight]))
    with saved:
        y = x.exp()  # keeps its result
        z = y * y.view(10, 100).flatten()  # keeps both factors, which are the same storage
        (z * weight).sum().backward()  # keeps z, and the weight
        assert saved.peak == 2 * 4000
        del y, z
        (x.exp() * 2).sum().backward()
        assert saved.peak == 2 * 4000  # nothing of the first graph is left


def test_gradients_are_the_same_while_counting():
    x = torch.randn(100, requires_grad=True)
    (expected,) = torch.autograd.grad(x.exp().sin().sum(), x)
    with SavedTensors(nn.Identity()):
        (x.exp().sin()).sum().backward()
    torch.testing.assert_close(x.grad, expected)


def test_checkpointing_keeps_only_what_goes_in():
    x = torch.randn(1000, requires_grad=True)

    def block(x):
        return x.exp().sin().exp()

    plain, checkpointed = SavedTensors(nn.Identity()), SavedTensors(nn.Identity())
    with plain:
        block(x).sum().backward()
    with checkpointed:
        checkpoint(block, x, use_reentrant=False).sum().backward()
    assert (plain.peak, checkpointed.peak) == (8000, 4000)
