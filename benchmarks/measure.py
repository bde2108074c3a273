"""What the benchmarks measure with: time side by side, counted FLOPs, allocated memory, the machine's GEMM rate."""

import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.modules.linear_cross_entropy  # registers an operator whose FLOPs are counted
import transformers
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

Key = TypeVar("Key", bound=Hashable)
aten = torch.ops.aten
_GEMMS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}


def machine_facts(device: str = "cpu") -> str:
    """One line: processor, cores, threads used, versions; of an accelerator its name."""
    versions = (
        f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    )
    if device != "cpu":
        return f"{torch.cuda.get_device_name(device)}; {versions}"
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.processor() or platform.machine()
    return (
        f"{processor}, {os.cpu_count()} cores, {torch.get_num_threads()} threads "
        f"({torch.backends.cpu.get_cpu_capability()}); {versions}"
    )


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table whose first column is text and whose others are figures."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def time_alternately(
    steps: Mapping[Key, Callable[[], Any]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[Key, list[float]]:
    """Seconds of each step in each round. All steps of a round follow one another, so that what slows the machine down
    for a while slows down all of them.
    """
    seconds: dict[Key, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = clock()
            step()
            seconds[name].append(clock() - start)
    return seconds


def quietest_clock(device: str = "cpu") -> Callable[[], float]:
    """With one thread the processor's own time, which other work on the machine changes least."""
    return time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over the rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def count_flops(step: Callable[[], Any]) -> int:
    """Floating point operations of the matrix products of a step, a multiplication and an addition counted as two;
    attention as if every query saw every key of its row.
    """
    with FlopCounterMode(display=False, custom_mapping=_MORE_FLOPS) as counter:
        step()
    return counter.get_total_flops()


def _cpu_attention_flops(query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_flop_count(query, key, value)


def _cpu_attention_backward_flops(gradient, query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


def _linear_cross_entropy_flops(states, weight, *args, out_shape=None, **kwargs) -> int:
    products = 1 + sum(args[-3:-1])  # the logits, and the gradients of states and weight that go along with them
    return 2 * states[0] * states[1] * weight[0] * products


# The counter knows the attention kernels of accelerators only, and of this loss nothing.
_MORE_FLOPS = {
    aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward_flops,
    torch.ops.torch_nn._linear_cross_entropy_batch_chunked: _linear_cross_entropy_flops,
}


def synchronized(step: Callable[[], Any], device: str) -> Callable[[], Any]:
    """The step, and on an accelerator the wait for its end."""
    if device == "cpu":
        return step

    def run():
        step()
        torch.cuda.synchronize(device)

    return run


def peak_memory(step: Callable[[], Any], device: str = "cpu") -> int:
    """Bytes that a step allocates at its highest point, over what was allocated before it: on the CPU by every
    allocation and release of torch's allocator, in order of time; on an accelerator by its own statistics.
    """
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    allocated = highest = 0
    for _, change in changes:
        allocated += change
        highest = max(highest, allocated)
    return highest


class _GemmShapes(TorchDispatchMode):
    """Counts the matrix products that run within it, by operator and layout of the operands."""

    def __init__(self):
        super().__init__()
        self.calls: Counter[tuple] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in _GEMMS:
            self.calls[func, tuple((tuple(x.shape), x.stride(), x.dtype) for x in args)] += 1
        return func(*args, **(kwargs or {}))


def gemm_rates(step: Callable[[], Any], repetitions: int = 10, coverage: float = 0.9) -> tuple[float, float]:
    """How fast this machine multiplies the matrices of a step, each product alone, its best time of several.

    Args:
        step: The shapes, layouts and data types are taken from a run of it.
        repetitions: Of each product.
        coverage: Share of the FLOPs of all products; the small rest is left out.

    Returns:
        FLOP/s of the fastest shape, and FLOP/s over all shapes, each weighing as much as it does in the step.
    """
    with _GemmShapes() as shapes:
        step()
    flops_of = {key: 2 * _multiplications(key[1]) for key in shapes.calls}
    total = sum(flops_of[key] * count for key, count in shapes.calls.items())
    products: dict[tuple, Callable[[], Any]] = {}
    covered = 0
    for key in sorted(shapes.calls, key=lambda key: -flops_of[key] * shapes.calls[key]):
        if covered >= coverage * total:
            break
        operator, layouts = key
        operands = [torch.empty_strided(size, stride, dtype=dtype).normal_() for size, stride, dtype in layouts]
        products[key] = partial(operator, *operands)
        covered += flops_of[key] * shapes.calls[key]
    best = {key: min(seconds) for key, seconds in time_alternately(products, repetitions).items()}
    fastest = max(flops_of[key] / seconds for key, seconds in best.items())
    return fastest, covered / sum(seconds * shapes.calls[key] for key, seconds in best.items())


def _multiplications(layouts: Sequence[tuple]) -> int:
    """Of (..., M, K) @ (..., K, N), the last two operands."""
    left, right = layouts[-2][0], layouts[-1][0]
    return int(torch.Size(left).numel()) * right[-1]
