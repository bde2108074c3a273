"""A vision tower on a CPU runs over a few images at a time.

The C library maps memory for large tensors anew, and the kernel clears its pages. EfficientNet-Lite2 spends more than
half of its time there with 32 images at a time, and none with 2.
"""

from collections.abc import Callable, Iterable
from weakref import WeakKeyDictionary

import torch
from torch import nn

REUSED_BYTES = 16 << 20  # of a tensor whose memory is surely reused; glibc maps anew what is larger than 32 MiB
_bytes_of_image: WeakKeyDictionary[nn.Module, dict[tuple, float]] = WeakKeyDictionary()


def in_small_batches(
    vision_tower: nn.Module, pixel_values: torch.Tensor, run: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Run a tower over as many images at a time as keep its tensors small.

    How large they are is found out by the first call for images of a size, over all of them, or where a checkpoint is
    checked. With gradients, in training mode, when compiled or traced, sharded, offloaded, or on another device all
    images run at once.

    Args:
        vision_tower: The tower.
        pixel_values: (B, channels, H, W).
        run: Runs the tower over some of the images.

    Returns:
        What `run` returns, (B, ...).
    """
    if (
        pixel_values.device.type != "cpu"
        or torch.is_grad_enabled()
        or vision_tower.training
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or any(hasattr(one, "device_mesh") or one.is_meta for one in vision_tower.parameters())
    ):
        return run(pixel_values)
    bytes_of_image = _bytes_of_image.get(vision_tower, {}).get(_kind(pixel_values))
    if bytes_of_image is None:
        return measured(vision_tower, pixel_values, run)
    count = max(1, int(REUSED_BYTES // max(1, bytes_of_image)))
    if count >= len(pixel_values):
        return run(pixel_values)
    return torch.cat([run(some) for some in pixel_values.split(count)])


def measured(
    vision_tower: nn.Module, pixel_values: torch.Tensor, run: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Run a tower over all images at once, and keep in mind the largest tensor that one of its modules returns;
    arguments and result as for [`in_small_batches`]."""
    sizes = [0]

    def note(module, inputs, output):
        tensors = output if isinstance(output, Iterable) and not isinstance(output, torch.Tensor) else (output,)
        sizes.extend(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))

    leaves = [module for module in vision_tower.modules() if not any(True for _ in module.children())]
    hooks = [module.register_forward_hook(note) for module in leaves]
    try:
        features = run(pixel_values)
    finally:
        for hook in hooks:
            hook.remove()
    _bytes_of_image.setdefault(vision_tower, {})[_kind(pixel_values)] = max(sizes) / len(pixel_values)
    return features


def _kind(pixel_values: torch.Tensor) -> tuple:
    return (*pixel_values.shape[1:], pixel_values.dtype)
