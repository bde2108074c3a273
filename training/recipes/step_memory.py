"""What a training step keeps in memory: weights, gradients, the optimizer's state, and what waits for the backward
pass."""

from collections import Counter
from dataclasses import asdict, dataclass

import torch
from torch import nn


@dataclass
class StepMemory:
    """
    Bytes on one device. Not in it: what an operation needs while it runs, and what the allocator wastes.

    Args:
        weights: parameters and buffers.
        copies: of the weights, which a teacher or a moving average keeps.
        gradients: of the parameters that train.
        optimizer: its state, after a step.
        activations: the most that was kept for the backward pass at one time; grows with the batch.
    """

    weights: int
    copies: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of it, which is there at once when the backward pass begins, but for a part of the gradients."""
        return sum(asdict(self).values())


def step_memory(model: nn.Module, optimizer: torch.optim.Optimizer, activations: int, copies: int = 0) -> StepMemory:
    """What `model` and `optimizer` hold after a step, and the given bytes of activations and of copies."""
    parameters = list(model.parameters())
    state = [value for values in optimizer.state.values() for value in values.values()]
    return StepMemory(
        weights=sum(tensor.nbytes for tensor in [*parameters, *model.buffers()]),
        copies=copies,
        gradients=sum(parameter.nbytes for parameter in parameters if parameter.requires_grad),
        optimizer=sum(value.nbytes for value in state if isinstance(value, torch.Tensor)),
        activations=activations,
    )


class SavedTensors(torch.autograd.graph.saved_tensors_hooks):
    """
    A context that measures what autograd keeps for backward passes: `peak` is the most bytes at one time. A storage
    that several operations share counts once, the weights of `model` not at all. With gradient checkpointing, what a
    block keeps while it is computed again is not seen.

    Args:
        model: whose weights are no activations.
    """

    def __init__(self, model: nn.Module):
        self._weights = {_storage_of(parameter)[0] for parameter in model.parameters()}
        self._uses: Counter[int] = Counter()  # of each storage, by address
        self._bytes = 0
        self.peak = 0
        super().__init__(lambda tensor: _Kept(tensor, self), lambda kept: kept.tensor)

    def add(self, address: int, size: int) -> None:
        """A storage is kept once more."""
        if address in self._weights:
            return
        self._uses[address] += 1
        if self._uses[address] == 1:
            self._bytes += size
            self.peak = max(self.peak, self._bytes)

    def remove(self, address: int, size: int) -> None:
        """A storage is kept once less."""
        if address in self._weights:
            return
        self._uses[address] -= 1
        if not self._uses[address]:
            self._bytes -= size


class _Kept:
    """A tensor as long as autograd keeps it."""

    def __init__(self, tensor: torch.Tensor, counter: SavedTensors):
        self.tensor, self.counter, self.storage = tensor, counter, _storage_of(tensor)
        counter.add(*self.storage)

    def __del__(self):
        self.counter.remove(*self.storage)


def _storage_of(tensor: torch.Tensor) -> tuple[int, int]:
    """Address and bytes."""
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()
