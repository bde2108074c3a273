"""Memory and rate of long jobs from beginning to end: a model is trained for 10,000 steps, 100,000 images are indexed
with it, then four threads, and then two processes, embed at once.

    python -m benchmarks.long_run --out OUT --write

The commands are those of users, in processes of their own, and are watched from outside: every few seconds, the
memory that they take with their workers, and what is done by then, which is read from their outputs.
Interrupted, the same command goes on; so do the jobs. `--write` renews `long_run.json` and `long_run.png` beside this
file.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import yaml
from PIL import Image
from tqdm.auto import tqdm

from benchmarks.measure import machine_facts, markdown_table
from mmgem.training.scenes.dataset import SceneDataset
from mmgem.training.search.storage import MANIFEST, UNFINISHED, read_index

TRAIN, INDEX, THREADS, PROCESSES = "train", "index", "four threads", "two processes"
FOLDERS = 10  # of images; the first two are indexed by two processes, two others embedded by threads
BATCH_SIZE, ROWS_PER_PART = 32, 256  # of `mmgem index`
ROWS_PER_STEP, STEPS_PER_CHECKPOINT = 4, 250
CODE = "import sys; from benchmarks.long_run import embed_in_threads; embed_in_threads(*sys.argv[1:])"


def write_gallery(out: Path, count: int) -> None:
    """Writes different scenes, as an image folder with captions; what is there already stays."""
    metadata = out / "metadata.jsonl"
    if metadata.exists():
        return
    scenes = SceneDataset(5, count, unique=True, columns=("image", "captions"))
    lines = []
    for number in tqdm(range(count), desc=f"scenes to {out}"):
        row, name = scenes[number], f"{number * FOLDERS // count}/{number:06d}.png"
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        row["image"].save(path)
        lines.append(json.dumps({"file_name": name, "captions": row["captions"]}) + "\n")
    metadata.write_text("".join(lines), encoding="utf-8")


def recipe(gallery: Path, steps: int) -> dict:
    """Returns the recipe of the run: a model smaller than mmgem-tiny learns from the gallery."""
    layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {"model_type": "siglip_vision_model", "image_size": 96, "patch_size": 24, "vision_use_head": False}
    text = {"model_type": "llama", "max_position_embeddings": 256, "tie_word_embeddings": True}
    training = {
        "max_steps": steps,
        "per_device_train_batch_size": ROWS_PER_STEP,
        "learning_rate": 1.0e-3,
        "save_steps": STEPS_PER_CHECKPOINT,
        "save_total_limit": 1,
        "dataloader_num_workers": 1,
        "disable_tqdm": True,
    }
    return {
        "model": {
            "attn_implementation": "eager",  # for heads this small the fastest on a CPU
            "vision_config": layers | vision,
            "text_config": layers | text,
            "projection_dim": 32,
            "num_visual_tokens": 4,
        },
        "image_processor": {"size": {"height": 96, "width": 96}},
        "tokenizer": {"vocab_size": 400, "model_max_length": 200},
        "stages": [{"name": "long", "train_data": {"folder": str(gallery)}, "training": training}],
    }


def start(*command: str | Path) -> subprocess.Popen:
    """Starts a command in a process of its own, which says its errors where this one does."""
    return subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.DEVNULL)


def mmgem(*arguments: str | Path) -> tuple[str | Path, ...]:
    """Returns the command of the command line."""
    return ("-m", "mmgem.training.cli", "--quiet", *arguments)


def embedded_images(out: Path, total: int) -> int:
    """Counts the images that an index has, or that a run has embedded for it so far."""
    if (out / MANIFEST).exists():
        return total
    return min(total, ROWS_PER_PART * len(list((out / UNFINISHED).glob("part-*.json"))))


def embed_in_threads(model_folder: str, gallery: str, index: str, progress: str, threads: str = "4") -> None:
    """Embeds the images of two folders of a gallery by one model, in threads; ends with an error if any vector is
    not that of the index."""
    from mmgem.training.inference import embed_images
    from mmgem.training.loading import load_checkpoint

    model, processor = load_checkpoint(model_folder)
    rows = read_index(Path(index), "index").rows
    assert rows is not None
    names = rows["file_name"]
    chosen = [number for number, name in enumerate(names) if name.split("/")[0] in ("2", "3")]
    batches = [chosen[first : first + BATCH_SIZE] for first in range(0, len(chosen), BATCH_SIZE)]

    def embed(batch: list[int]) -> float:
        images = [Image.open(Path(gallery) / names[number]).convert("RGB") for number in batch]
        vectors = embed_images(model, processor, images).numpy()
        return float(np.abs(vectors - rows.arrays["embedding"][batch]).max())

    worst = 0.0
    with ThreadPoolExecutor(int(threads)) as pool:
        for number, difference in enumerate(pool.map(embed, batches), 1):
            worst = max(worst, difference)
            if number % 10 == 0 or number == len(batches):
                Path(progress).write_text(
                    json.dumps({"images": min(number * BATCH_SIZE, len(chosen)), "difference": worst})
                )
    if not worst < 1e-5:
        raise SystemExit(f"vectors differ from those of the index by {worst}")


def memory_of(processes: Sequence[psutil.Process]) -> int:
    """Bytes that processes take with those that they started; what several share is counted once."""
    total = 0
    for process in processes:
        try:
            total += sum(one.memory_full_info().pss for one in [process, *process.children(recursive=True)])
        except psutil.NoSuchProcess:  # one of its workers ended meanwhile
            pass
    return total


def watch(
    running: Sequence[subprocess.Popen], done: Callable[[], int], every: float, after: float
) -> Iterator[dict[str, float]]:
    """Yields the memory of commands, and what is done, until they have ended.

    Args:
        running: The commands.
        done: Counts what is done.
        every: Seconds between two looks.
        after: Seconds that were spent on it before.

    Raises:
        RuntimeError: If one of them fails.
    """
    begin, processes = time.monotonic() - after, [psutil.Process(one.pid) for one in running]
    while any(one.poll() is None for one in running):
        bytes_now = memory_of([process for process, one in zip(processes, running, strict=True) if one.poll() is None])
        yield {"seconds": time.monotonic() - begin, "bytes": bytes_now, "done": done()}
        time.sleep(every)
    if failed := [one.args for one in running if one.returncode]:
        raise RuntimeError(f"{failed[0]} ended with an error.")
    yield {"seconds": time.monotonic() - begin, "bytes": 0, "done": done()}


def run(out: Path, images: int, steps: int, every: float) -> dict[str, list[dict[str, float]]]:
    """Runs the jobs that have not ended, one after the other.

    Args:
        out: Where the gallery, the outputs and the samples are kept.
        images: Of the gallery.
        steps: Of training.
        every: Seconds between two samples.

    Returns:
        Samples of each job.
    """
    gallery, index, trained, progress = out / "images", out / "index", out / "run", out / "threads.json"
    write_gallery(gallery, images)
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe(gallery, steps)))
    halves = [(gallery / str(number), out / f"index-{number}") for number in range(2)]

    def checkpoints() -> int:
        steps_done = [int(path.name.partition("-")[2]) for path in trained.glob("checkpoints/*/checkpoint-*")]
        return max(steps_done, default=0)

    def in_threads() -> int:
        return json.loads(progress.read_text())["images"] if progress.exists() else 0

    def options(folder: Path) -> tuple[str | Path, ...]:
        return "--model", trained, "--out", folder, "--batch-size", str(BATCH_SIZE)

    share = images // FOLDERS
    jobs: dict[str, tuple[list[tuple], Callable[[], int]]] = {
        TRAIN: ([mmgem("train", out / "recipe.yaml", "--out", trained, "--resume")], checkpoints),
        INDEX: ([mmgem("index", gallery, *options(index))], lambda: embedded_images(index, images)),
        THREADS: ([("-c", CODE, trained, gallery, index, progress)], in_threads),
        PROCESSES: (
            [mmgem("index", folder, *options(place)) for folder, place in halves],
            lambda: sum(embedded_images(place, share) for _, place in halves),
        ),
    }
    kept = out / "samples.json"
    samples = json.loads(kept.read_text()) if kept.exists() else {}
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the jobs end with this
    for job, (commands, done) in jobs.items():
        own = samples.setdefault(job, [])
        if own and own[-1]["bytes"] == 0:
            continue
        running = [start(*command) for command in commands]
        try:
            for sample in watch(running, done, every, own[-1]["seconds"] if own else 0.0):
                own.append(sample)
                kept.write_text(json.dumps(samples))
        finally:
            for one in running:
                one.terminate()
    check_halves(index, [place for _, place in halves])
    return samples


def check_halves(index: Path, halves: Sequence[Path]) -> None:
    """Compares the vectors of indexes of folders with those of the index of all.

    Raises:
        RuntimeError: If a vector is another one, or an image is not there.
    """
    rows = read_index(index, "index").rows
    assert rows is not None
    numbers = {name: number for number, name in enumerate(rows["file_name"])}
    for folder, half in enumerate(halves):
        own = read_index(half, "index").rows
        assert own is not None
        chosen = [numbers[f"{folder}/{name}"] for name in own["file_name"]]
        of_folder = sum(name.startswith(f"{folder}/") for name in numbers)
        difference = np.abs(own.arrays["embedding"][:] - rows.arrays["embedding"][chosen]).max()
        if len(chosen) != of_folder or not difference < 1e-5:
            raise RuntimeError(
                f"{half} has {len(chosen)} of {of_folder} images, whose vectors differ by {difference}."
            )


def figures(samples: Sequence[dict[str, float]]) -> dict[str, float]:
    """Sums up the samples of a job.

    Returns:
        What was done, seconds, MiB at the end of each quarter, and MiB that 1,000 more of what is done add in the
        second half, by least squares.
    """
    during, end = [sample for sample in samples if sample["bytes"]], samples[-1]
    total = end["done"]
    quarters = {}
    for quarter in range(1, 5):
        last = [sample for sample in during if sample["done"] <= total * quarter / 4][-3:]
        quarters[f"MiB at {25 * quarter}%"] = float(np.median([sample["bytes"] for sample in last])) / 2**20
    half = [sample for sample in during if total / 2 <= sample["done"] < total]
    x, y = [sample["done"] / 1000 for sample in half], [sample["bytes"] / 2**20 for sample in half]
    growth = float(np.polyfit(x, y, 1)[0]) if len(set(x)) > 1 else 0.0
    return {"done": total, "seconds": end["seconds"], **quarters, "MiB per 1,000": growth}


def draw(samples: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Draws memory and rate of each job over what is done."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        2, len(samples), figsize=(3.6 * len(samples), 5), sharex="col", layout="constrained"
    )
    for (job, own), (above, below) in zip(samples.items(), axes.T, strict=True):
        during = [sample for sample in own if sample["bytes"]]
        above.plot([sample["done"] for sample in during], [sample["bytes"] / 2**20 for sample in during])
        steps = [sample for sample, before in zip(own[1:], own) if sample["done"] > before["done"]]
        rates = [
            (one["done"], (one["done"] - before["done"]) / (one["seconds"] - before["seconds"]))
            for before, one in zip(steps, steps[1:])
        ]
        below.plot(*zip(*rates)) if rates else None
        above.set_title(job)
        above.set_ylim(bottom=0)
        below.set_ylim(bottom=0)
        below.set_xlabel("steps" if job == TRAIN else "images")
    axes[0][0].set_ylabel("MiB")
    axes[1][0].set_ylabel("a second")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def report(samples: dict[str, list[dict[str, float]]]) -> str:
    """A table in Markdown."""
    rows = []
    for job, own in samples.items():
        done, seconds, *memory, growth = figures(own).values()
        rows.append(
            [job, f"{done:,.0f}", f"{seconds / 60:.1f}", *(f"{value:.0f}" for value in memory), f"{growth:+.2f}"]
        )
    header = ["job", "images or steps", "minutes", "MiB at 25%", "at 50%", "at 75%", "at 100%", "MiB per 1,000 more"]
    return markdown_table(header, rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Index 100,000 images and train 10,000 steps, and watch the memory.")
    parser.add_argument("--out", type=Path, required=True, help="folder that is gone on with; takes 600 MB")
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two samples")
    parser.add_argument("--write", action="store_true", help="renew long_run.json and long_run.png beside this file")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    samples = run(options.out, options.images, options.steps, options.every)
    print(machine_facts())
    print(report(samples))
    if options.write:
        place = Path(__file__)
        sums = {job: figures(own) for job, own in samples.items()}
        place.with_suffix(".json").write_text(json.dumps({"machine": machine_facts(), "jobs": sums}, indent=1) + "\n")
        draw(samples, place.with_suffix(".png"))
