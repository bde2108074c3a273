"""Batches in shared memory, in which workers hand them over."""

from typing import Any

import torch
from torch.utils.data import get_worker_info


def in_shared_memory(batch: dict[str, Any]) -> dict[str, Any]:
    """Move the tensors of a batch into shared memory, if a worker of a `DataLoader` made it.

    The loader does so too, but in a thread whose errors nobody reads: without room the batch would be lost there, and
    the loader would wait for it for ever.

    Args:
        batch: Tensors and other values by name; the tensors are moved in place.

    Returns:
        The same batch.

    Raises:
        OSError: If there is no room.
    """
    if get_worker_info() is None:
        return batch
    tensors = [value for value in batch.values() if isinstance(value, torch.Tensor)]
    try:
        for tensor in tensors:
            tensor.share_memory_()
    except RuntimeError as error:
        size = sum(tensor.nbytes for tensor in tensors)
        raise OSError(
            f"shared memory has no room for a batch of {size:,} bytes ({error}); expected more of it, such as by "
            "`docker run --shm-size`, smaller batches, or no workers."
        ) from error
    return batch
