"""What one worker of Ray Data embeds, what two do, and what it costs when one of them is killed.

    pip install -e '.[ray]'
    python -m benchmarks.ray_workers [--images 512] [--model MODEL]

Draws scenes as PNG files, and embeds them into shards as `docs/search_a_million_pictures.md` does: with one worker,
with two, and with two of which one is killed after a quarter of the images. Each worker notes the time of each batch.
The rate is that from the first batch that begins to the last that ends, without the start of Ray and of the workers;
the processor's time is that of the workers, batches that were lost included. Images that were embedded again are those
that the killed worker had embedded, and not yet handed on; each image has to be in the shards once.
"""

import json
import os
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import typer

from mmgem.training.loading import load_checkpoint
from mmgem.training.scenes.dataset import write_scene_folder
from mmgem.training.search.vector_shards import ImageEmbedder, begin_shards

TINY = Path(__file__).parent.parent / "model_cards" / "mmgem-tiny"
BATCH_SIZE = 32
HEADER = ("workers", "seconds in all", "images/s", "CPU ms an image", "embedded again", "in the shards")


class NotingEmbedder(ImageEmbedder):
    """Notes each batch in a folder, and once a number of images is embedded kills itself, the first time.

    Args:
        shards: As for `ImageEmbedder`.
        notes: The folder.
        killed_after: The number; None for never.
    """

    def __init__(self, shards: Path, notes: Path, killed_after: int | None):
        super().__init__(shards)
        self._notes, self._killed_after = notes, killed_after

    def __call__(self, batch: pa.Table) -> pa.Table:
        moments, cpu = [time.time()], time.process_time()
        table = super().__call__(batch)
        moments.append(time.time())
        note = {"moments": moments, "cpu": time.process_time() - cpu, "names": table["file_name"].to_pylist()}
        with (self._notes / f"{os.getpid()}.jsonl").open("a") as file:
            file.write(json.dumps(note) + "\n")
        embedded = sum(len(one["names"]) for one in read_notes(self._notes))
        if self._killed_after is not None and embedded >= self._killed_after:
            mark = self._notes / "killed"
            if not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return table


def read_notes(folder: Path) -> list[dict]:
    """The batches of all workers."""
    return [json.loads(line) for file in folder.glob("*.jsonl") for line in file.read_text().splitlines()]


class Run(NamedTuple):
    """What a run took.

    Args:
        seconds: Of the clock, in all.
        notes: Its batches.
        shards: How often each image is in the shards.
    """

    seconds: float
    notes: list[dict]
    shards: Counter


def embed(photos: Path, place: Path, model: str, workers: int, killed_after: int | None = None) -> Run:
    """Embeds the images below a folder into shards."""
    import ray

    shards, notes = place / "shards", place / "notes"
    notes.mkdir(parents=True)
    begin_shards(shards, *load_checkpoint(model), folder=photos)
    start = time.perf_counter()
    vectors = ray.data.read_binary_files(str(photos), include_paths=True, file_extensions=["png"]).map_batches(
        NotingEmbedder,
        fn_constructor_args=[shards, notes, killed_after],
        batch_format="pyarrow",
        batch_size=BATCH_SIZE,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=1,
    )
    vectors.write_parquet(str(shards))
    seconds = time.perf_counter() - start
    names = (name for file in shards.glob("*.parquet") for name in pq.read_table(file)["file_name"].to_pylist())
    return Run(seconds, read_notes(notes), Counter(names))


def row(name: str, run: Run) -> tuple[str, ...]:
    """A row of the table."""
    images = len(run.shards)
    embedded = sum(len(note["names"]) for note in run.notes)
    took = max(note["moments"][1] for note in run.notes) - min(note["moments"][0] for note in run.notes)
    cpu = 1e3 * sum(note["cpu"] for note in run.notes) / images
    once = "each once" if {*run.shards.values()} == {1} else f"up to {max(run.shards.values())} times"
    figures = f"{run.seconds:.0f}", f"{images / took:.1f}", f"{cpu:.1f}", f"{embedded - images}"
    return name, *figures, f"{images}, {once}"


def compare(images: int, model: str, place: Path) -> str:
    """The table of the benchmark, as markdown."""
    import ray

    from benchmarks.measure import markdown_table

    photos = place / "photos"
    write_scene_folder(photos, seed=0, count=images)
    found = len(list(photos.glob("*.png")))
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        runs = {
            "1": embed(photos, place / "one", model, 1),
            "2": embed(photos, place / "two", model, 2),
            "2, one killed": embed(photos, place / "killed", model, 2, killed_after=found // 4),
        }
    finally:
        ray.shutdown()
    return markdown_table(HEADER, [row(name, run) for name, run in runs.items()])


def main(
    images: Annotated[int, typer.Option(min=BATCH_SIZE, help="Scenes.")] = 512,
    model: Annotated[str, typer.Option(help="Folder of a checkpoint, or a name on the Hub.")] = str(TINY),
):
    from benchmarks.measure import machine_facts

    with tempfile.TemporaryDirectory() as place:
        table = compare(images, model, Path(place))
    print(machine_facts(), table, sep="\n\n")


if __name__ == "__main__":
    typer.run(main)
