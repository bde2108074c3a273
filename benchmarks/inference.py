"""What a user waits for, against what he would use instead: vectors, captions, memory, the start of a process.

    python -m benchmarks.inference [--size laptop] [--device cpu] [--dtype float32] [--rounds 7] [--threads 1]

Every task is done by MM-GEM and its peers, around the same vision tower and, but for CLIP's own text tower, the same
language model, with random weights; `benchmarks/inference_tasks.py` has them. All steps of a round follow one another;
ratios are taken within a round, medians and quartiles over the rounds. A product of large square matrices runs in each
round too: the share of its rate that a step reaches is that of the machine as it was then.

Prints tables in markdown, and writes `OUT/inference.json` with all seconds, and `OUT/inference.png`.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.cold_start import PARTS
from benchmarks.inference_tasks import CLIP, OURS, Task, build_contestants, build_tasks
from benchmarks.measure import (
    count_flops,
    machine_facts,
    markdown_table,
    median_ratio,
    peak_memory,
    quietest_clock,
    synchronized,
    time_alternately,
)
from benchmarks.setting import SETTINGS, Size
from mmgem.training.inference import inference

HEADER = ("by", "ms of one", "time of MM-GEM's", "quartiles", "GFLOP of one", "share of GEMM", "peak MB")
COLD_HEADER = ("cold start", *(f"{part}, CPU s" for part in PARTS), "CPU s in all", "time of CLIP's", "quartiles")
GEMM = "GEMM"


def measure(tasks: Sequence[Task], rounds: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Seconds in each round, FLOPs and peak memory of every step, and the FLOP/s of a GEMM in each round."""
    steps: dict[tuple[str, str], Callable[[], Any]] = {
        (task.name, by): task.steps[by] for task in tasks for by in task.steps
    }
    flops = {key: count_flops(step) for key, step in steps.items()}  # which warms up, too
    memory = {key: peak_memory(step, device) for key, step in steps.items()}
    side = 1024 if device == "cpu" else 8192
    square = torch.randn(side, side, device=device, dtype=dtype)
    timed = {key: synchronized(step, device) for key, step in steps.items()}
    timed[GEMM, ""] = synchronized(lambda: square @ square, device)
    timed[GEMM, ""]()
    seconds = time_alternately(timed, rounds, quietest_clock(device))
    rates = [2 * side**3 / elapsed for elapsed in seconds[GEMM, ""]]
    measured: dict[str, Any] = {"gemm_flops_per_second": rates, "tasks": {}}
    for task in tasks:
        measured["tasks"][task.name] = {
            "count": task.count,
            "of": task.of,
            "by": {
                by: {
                    "seconds": seconds[task.name, by],
                    "flops": flops[task.name, by],
                    "peak_bytes": memory[task.name, by],
                }
                for by in task.steps
            },
        }
    return measured


def quartiles(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Of the ratios within a round."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return f"{low:.2f} to {high:.2f}"


def task_table(task: dict[str, Any], rates: Sequence[float]) -> str:
    """A row for each contestant of a task."""
    ours, rows = task["by"][OURS]["seconds"], []
    for by, found in task["by"].items():
        seconds, count = found["seconds"], task["count"]
        share = statistics.median(found["flops"] / own / rate for own, rate in zip(seconds, rates, strict=True))
        rows.append(
            (
                by,
                f"{1e3 * statistics.median(seconds) / count:.1f}",
                f"{median_ratio(ours, seconds):.2f}",
                quartiles(ours, seconds),
                f"{found['flops'] / count / 1e9:.2f}",
                f"{share:.2f}",
                f"{found['peak_bytes'] / 1e6:.0f}",
            )
        )
    return markdown_table(HEADER, rows)


def cold_starts(contestants, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of the processor for each part of the first image vector of a fresh process, by model and round."""
    found: dict[str, dict[str, list[float]]] = {by: {part: [] for part in PARTS} for by in (OURS, CLIP)}
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    with tempfile.TemporaryDirectory() as folder:
        contestants.ours.save_pretrained(f"{folder}/mmgem")
        contestants.clip.save_pretrained(f"{folder}/clip")
        for _ in range(rounds):
            for by, library in ((OURS, "mmgem"), (CLIP, "clip")):
                command = [sys.executable, "-m", "benchmarks.cold_start", library, f"{folder}/{library}"]
                run = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
                for part, seconds in json.loads(run.stdout.splitlines()[-1]).items():
                    found[by][part].append(seconds)
    return found


def cold_table(found: dict[str, dict[str, list[float]]]) -> str:
    """A row for each model."""
    totals = {by: [sum(parts) for parts in zip(*own.values(), strict=True)] for by, own in found.items()}
    rows = []
    for by, own in found.items():
        parts = [f"{statistics.median(seconds):.2f}" for seconds in own.values()]
        ratio = f"{median_ratio(totals[by], totals[CLIP]):.2f}"
        rows.append((by, *parts, f"{statistics.median(totals[by]):.2f}", ratio, quartiles(totals[by], totals[CLIP])))
    return markdown_table(COLD_HEADER, rows)


def draw_plot(measured: dict[str, Any], path: Path) -> None:
    """MM-GEM's time over that of each peer, with quartiles, task after task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = [
        (f"{name}: {by}", [a / b for a, b in zip(task["by"][OURS]["seconds"], own["seconds"], strict=True)])
        for name, task in measured["tasks"].items()
        for by, own in task["by"].items()
        if by != OURS
    ][::-1]
    middle = [statistics.median(ratios) for _, ratios in bars]
    ends = [statistics.quantiles(ratios, n=4) for _, ratios in bars]
    spread = [[m - low for m, (low, _, _) in zip(middle, ends, strict=True)]]
    spread.append([high - m for m, (_, _, high) in zip(middle, ends, strict=True)])
    figure, axis = pyplot.subplots(figsize=(10, 0.4 * len(bars) + 1), layout="constrained")
    axis.barh([label for label, _ in bars], middle, xerr=spread, color="#4c72b0", ecolor="#333333", capsize=3)
    axis.axvline(1, color="#999999", linewidth=1)
    axis.set_xlabel("time of MM-GEM over the peer's")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(
    size: Annotated[
        Size, typer.Option(help="Of the towers: 10 M each, three eighths of the paper's, the paper's.")
    ] = Size.laptop,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    rounds: Annotated[int, typer.Option(min=3, help="Measured runs of each step.")] = 7,
    threads: Annotated[int, typer.Option(min=0, help="Of torch; 0 leaves them as they are.")] = 0,
    only: Annotated[str, typer.Option(help="Tasks whose name begins so.")] = "",
    cold_rounds: Annotated[int, typer.Option(min=0, help="Started processes of each model; 0 for none.")] = 7,
    out: Annotated[Path, typer.Option(help="Folder for the figures and the plot.")] = Path("runs/inference"),
):
    if threads:
        torch.set_num_threads(threads)
    setting, kind = SETTINGS[size](), getattr(torch, dtype)
    contestants = build_contestants(setting, device, kind)
    with inference(contestants.ours):
        tasks = [task for task in build_tasks(contestants, setting) if task.name.startswith(only)]
        measured = measure(tasks, rounds, device, kind)
    measured |= {"machine": machine_facts(device), "size": size.value, "dtype": dtype, "rounds": rounds}
    if cold_rounds > 2:
        measured["cold_start"] = cold_starts(contestants, cold_rounds)
    out.mkdir(parents=True, exist_ok=True)
    (out / "inference.json").write_text(json.dumps(measured, indent=1))
    draw_plot(measured, out / "inference.png")
    print(measured["machine"], f"Size {size.value}, {dtype}; {rounds} rounds.", sep="\n\n")
    for name, task in measured["tasks"].items():
        print(f"\n{name}, {task['count']} {task['of']} at a time\n")
        print(task_table(task, measured["gemm_flops_per_second"]))
    if "cold_start" in measured:
        print("\n" + cold_table(measured["cold_start"]))


if __name__ == "__main__":
    typer.run(main)
