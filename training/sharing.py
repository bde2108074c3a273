"""Work divided among the processes of a distributed run, and its results put together in their first order."""

from collections.abc import Iterable, Sized
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import torch.distributed as dist
from torch.utils.data import Subset

from mmgem.training.sharded import is_sharded

Item = TypeVar("Item")


@dataclass(frozen=True)
class Share:
    """
    Every `size`-th item, from number `rank` on. The default is all of the work.

    Args:
        rank: number of this process among those that divide the work.
        size: how many they are.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def for_model(cls, model) -> "Share":
        """
        This process's share of the work that `model` does.

        All of it where the parameters are sharded (FSDP, ZeRO-3): every layer is then gathered from all processes, so
        that they must take the same steps, and on rows of their own they would generate texts of different lengths.
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
