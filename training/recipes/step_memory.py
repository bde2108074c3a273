"""The memory of a training step: weights, gradients, the state of the optimizer, and tensors kept for the backward
pass."""

from collections import Counter
from dataclasses import asdict, dataclass

import torch
from torch import nn


@dataclass
class StepMemory:
    """Bytes on one device, without those that an operation needs while it runs and those that the allocator wastes.

    Args:
        weights: Parameters and buffers.
        copies: Copies of the weights that a teacher or a moving average keeps.
        gradients: Gradients of the parameters that train.
        optimizer: The state of the optimizer, after a step.
        activations: The most that was kept for the backward pass at one time; grows with the batch.
    """

    weights: int
    copies: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """The sum, which is there at once when the backward pass begins, but for a part of the gradients."""
        return sum(asdict(self).values())


def step_memory(model: nn.Module, optimizer: torch.optim.Optimizer, activations: int, copies: int = 0) -> StepMemory:
    """Add up the memory of a step.

    Args:
        model: The model, after a step.
        optimizer: Its optimizer, after the step.
        activations: Bytes kept for the backward pass, from `SavedTensors`.
        copies: Bytes of copies of the weights.
    """
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
    """A context that measures the tensors that autograd keeps for backward passes.

    A storage that several operations share counts once, the weights of `model` not at all. With gradient
    checkpointing, tensors that a block keeps while it is computed again are not seen.

    Args:
        model: The model, whose weights are no activations.

    Attributes:
        peak: The most bytes at one time.
    """

    def __init__(self, model: nn.Module):
        self._weights = {_storage_of(parameter)[0] for parameter in model.parameters()}
        self._uses: Counter[int] = Counter()  # of each storage, by address
        self._bytes = 0
        self.peak = 0
        super().__init__(lambda tensor: _Kept(tensor, self), lambda kept: kept.tensor)

    def add(self, address: int, size: int) -> None:
        """Count a storage that is kept once more."""
        if address in self._weights:
            return
        self._uses[address] += 1
        if self._uses[address] == 1:
            self._bytes += size
            self.peak = max(self.peak, self._bytes)

    def remove(self, address: int, size: int) -> None:
        """Count a storage that is kept once less."""
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
