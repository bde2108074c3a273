"""The type of numbers in which this machine runs a model fastest, by measurement."""

import time
from functools import cache

import torch
from torch import nn

TOKENS = 256  # of a sample, about those of an image
TURNS = 5  # of which the best counts
GAIN = 0.8  # of the time in float32, for which digits are given up


def fastest_dtype(model: nn.Module) -> torch.dtype:
    """Times samples of a model's work in float32 and in bfloat16: milliseconds, once for each size in a process.

    The samples are its largest linear layer and, if there is one, its largest depthwise convolution: a processor that
    has bfloat16 for the first may lack it for the second.

    Args:
        model: On the device it will run on.

    Returns:
        `torch.bfloat16` if it takes less than 0.8 of the time, else `torch.float32`.
    """
    device = next(model.parameters()).device
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    linear = [module.weight.shape for module in model.modules() if isinstance(module, nn.Linear)]
    depthwise = [module.weight.shape for module in convolutions if 1 < module.groups == module.in_channels]
    largest = [tuple(max(shapes, key=torch.Size.numel)) for shapes in (linear, depthwise) if shapes]
    times = {
        dtype: sum(_seconds(shape, dtype, device) for shape in largest) for dtype in (torch.float32, torch.bfloat16)
    }
    return torch.bfloat16 if times[torch.bfloat16] < GAIN * times[torch.float32] else torch.float32


@cache
def _seconds(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> float:
    """Of a layer with a weight of this shape, (out, in) or (channels, 1, h, w)."""
    to = {"dtype": dtype, "device": device}
    layer: nn.Module
    if len(shape) == 2:
        layer, inputs = nn.Linear(shape[1], shape[0], **to), torch.ones(TOKENS, shape[1], **to)
    else:
        side = int(TOKENS**0.5)
        layer = nn.Conv2d(shape[0], shape[0], shape[2:], padding="same", groups=shape[0], **to)
        inputs = torch.ones(1, shape[0], side, side, **to)
    seconds = []
    with torch.inference_mode():
        for _ in range(TURNS):
            start = time.perf_counter()
            layer(inputs).sum().item()  # waits for the device
            seconds.append(time.perf_counter() - start)
    return min(seconds)
