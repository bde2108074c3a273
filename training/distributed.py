"""Several processes: work divided among them, and models of which each holds only a part (FSDP2, ZeRO-3)."""

from collections.abc import Iterable, Sized
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import Subset

from mmgem.configuration_mmgem import EMBEDDING_METHODS

Item = TypeVar("Item")


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds only a part of the parameters."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in model.parameters())


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Gathers a parameter (or its gradient, or a norm of them) in full, on every process; all of them call this."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def adapt_to_fsdp(model: nn.Module) -> None:
    """Lets the parameters of a model that FSDP2 has wrapped be gathered for all that embeds, and lets it be saved.

    FSDP gathers for `forward` alone. It makes the class of the model one of torch's, whose file would be saved instead
    of the model's own code.

    Args:
        model: An `MMGEMModel`, or one with LoRA, after `fully_shard`.
    """
    # A VLM generates in its own way, and not by our `forward`.
    writes_itself = ["generate"] if getattr(model, "vlm", None) is not None else []
    for method in (*EMBEDDING_METHODS.values(), *writes_itself):
        dist.fsdp.register_fsdp_forward_method(model, method)
    wrapped, own = type(model), type(model).__mro__[2]  # FSDPMMGEMModel, FSDPModule, MMGEMModel
    wrapped.__module__, wrapped.__name__, wrapped.__qualname__ = own.__module__, own.__name__, own.__qualname__


def reshard(model: nn.Module) -> None:
    """Gives up what FSDP2 keeps gathered after a forward pass: it would be out of date once the parameters change."""
    for module in model.modules():
        if isinstance(module, dist.fsdp.FSDPModule):
            module.reshard()


@dataclass(frozen=True)
class Share:
    """Every `size`-th item, from number `rank` on. The default is all of the work.

    Args:
        rank: Number of this process among those that divide the work.
        size: Number of the processes.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def for_model(cls, model) -> "Share":
        """The share of this process in the work that `model` does.

        It is all of the work where the parameters are sharded (FSDP, ZeRO-3): every layer is then gathered from all
        processes, so that they must take the same steps, and on rows of their own they would generate texts of
        different lengths.
        """
        if not (dist.is_available() and dist.is_initialized()) or is_sharded(model):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    def of(self, items: Iterable[Item]) -> Iterable[Item]:
        """The items of this share, in order. Of items that have an index, the others are not read."""
        if self.size == 1:
            return items
        if isinstance(items, Sized) and hasattr(items, "__getitem__"):
            return Subset(items, range(self.rank, len(items), self.size))
        return islice(items, self.rank, None, self.size)

    def gather(self, results: list[Item]) -> list[Item]:
        """The results of all shares, on every process, in the order of the items that they belong to."""
        if self.size == 1:
            return results
        parts: list[list[Item]] = [[] for _ in range(self.size)]
        dist.all_gather_object(parts, results)
        whole: list = [None] * sum(map(len, parts))
        for rank, part in enumerate(parts):
            whole[rank :: self.size] = part
        return whole
