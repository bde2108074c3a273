"""Two processes forked from the one of a test, over gloo: they have its memory, and start in milliseconds."""

import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = timedelta(seconds=60)


def forked_ranks(task: Callable[[int], Any], folder: Path) -> list[Any]:
    """What a task, called with the rank, returns on each of the two.

    Raises:
        RuntimeError: If one of them fails.
    """
    children = []
    for rank in (0, 1):
        children.append(os.fork())
        if children[-1] == 0:
            status = 1
            try:
                store = dist.FileStore(str(folder / "store"), 2)
                dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=TIMEOUT)
                torch.save(task(rank), folder / f"{rank}.pt")
                dist.barrier()  # whoever exits first would end the collectives of the other
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
    if failed := [rank for rank, child in enumerate(children) if os.waitpid(child, 0)[1]]:
        raise RuntimeError(f"ranks {failed} fail")
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]
