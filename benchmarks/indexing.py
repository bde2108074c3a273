"""How much of what the machine can do `mmgem index` makes of a folder of photographs.

    python -m benchmarks.indexing [--images 60] [--rounds 7] [--model MODEL]

Writes photographs of 1 to 20 megapixels as JPEG files, each unlike the others, and does three things with them, one
after the other in each round: reads them as `mmgem index` does, without a model (decoding, at the scale that the model
needs, hashing and resizing, in as many threads); runs the model on ready tensors; and makes the index. Prints images a
second of each, and the rate of the index over the slower of the other two, also without its start, which an index of
one image takes too. Decoding and the model share the cores of a processor: with no time lost the index needs the time
of both, printed as well. Seconds of the processor, of all threads together, say what other work on the machine hides.
"""

import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image

from benchmarks.measure import machine_facts, markdown_table, median_ratio, time_alternately
from mmgem.training.data.image_files import ImageReader, find_images, shorter_side_for
from mmgem.training.inference import embed_images
from mmgem.training.loading import load_checkpoint
from mmgem.training.search.building import build_index

TINY = Path(__file__).parent.parent / "model_cards" / "mmgem-tiny"
MEGAPIXELS = (1, 2, 5, 12, 20)
BATCH_SIZE = 32
HEADER = ("what", "images/s", "of the slower", "quartiles", "ms of the processor for one")
DECODING, MODEL, INDEX, BOTH = "decoding alone", "the model alone", "`mmgem index`", "both, no time lost"
START, AFTER = "`mmgem index` of one image", "`mmgem index`, without its start"


def write_photographs(folder: Path, count: int, megapixels: Sequence[float] = MEGAPIXELS) -> None:
    """So many JPEG files of these sizes, in turn, with detail at all scales as photographs have it."""
    generator = np.random.default_rng(0)
    files = []
    for size in megapixels:
        width = round((size * 1e6 * 4 / 3) ** 0.5)
        height = width * 3 // 4
        pixels = np.zeros((height, width, 3), dtype=np.float32)
        for cells in (4, 16, 64, 256):
            noise = generator.integers(0, 256, (cells * 3 // 4, cells, 3), dtype=np.uint8)
            layer = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
            pixels += np.asarray(layer, dtype=np.float32) / 4
        data = BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(data, "JPEG", quality=90)
        files.append(data.getvalue())
    for number in range(count):  # what comes after the end of a picture makes another file of it
        (folder / f"{number:05}.jpg").write_bytes(files[number % len(files)] + number.to_bytes(4, "big"))


def compare(model, processor, folder: Path, rounds: int) -> str:
    """The table of the benchmark, as markdown."""
    names = list(find_images(folder).versions)
    prepare = partial(processor, return_tensors="pt")

    def read() -> list[torch.Tensor]:
        reader = ImageReader(folder, shorter_side_for(processor), prepare=lambda image: prepare(images=[image]))
        return [file.inputs["pixel_values"] for batch in reader.read_batches(names, BATCH_SIZE, []) for file in batch]

    pixels = torch.cat(read()).split(BATCH_SIZE)

    def embed() -> None:
        for batch in pixels:
            embed_images(model, lambda own=batch, **images: {"pixel_values": own}, batch)

    def index(images: Path) -> None:
        with tempfile.TemporaryDirectory() as out:
            build_index(images, model, processor, out, BATCH_SIZE)

    first = folder.parent / "first"
    first.mkdir()
    shutil.copy(folder / names[0], first)
    embed()
    clocks = time_alternately(
        {DECODING: read, MODEL: embed, START: partial(index, first), INDEX: partial(index, folder)},
        rounds,
        clock=lambda: np.array([time.perf_counter(), time.process_time()]),  # type: ignore[arg-type, return-value]
    )
    clocks[AFTER] = [whole - start for start, whole in zip(clocks.pop(START), clocks[INDEX], strict=True)]
    clocks[BOTH] = [sum(pair) for pair in zip(clocks[DECODING], clocks[MODEL], strict=True)]
    slower = [max(a[0], b[0]) for a, b in zip(clocks[DECODING], clocks[MODEL], strict=True)]
    rows = []
    for name, found in clocks.items():
        times, of_processor = zip(*found, strict=True)
        low, _, high = statistics.quantiles([theirs / own for own, theirs in zip(times, slower, strict=True)], n=4)
        rate = len(names) / statistics.median(times)
        cost = 1e3 * statistics.median(of_processor) / len(names)
        ratio = f"{median_ratio(slower, times):.2f}"
        rows.append((name, f"{rate:.1f}", ratio, f"{low:.2f} to {high:.2f}", f"{cost:.1f}"))
    return markdown_table(HEADER, rows)


def main(
    images: Annotated[int, typer.Option(min=len(MEGAPIXELS), help="Photographs.")] = 60,
    rounds: Annotated[int, typer.Option(min=2, help="Of each.")] = 7,
    model: Annotated[str, typer.Option(help="Folder of a checkpoint, or a name on the Hub.")] = str(TINY),
):
    loaded, processor = load_checkpoint(model)
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, "photographs")
        folder.mkdir()
        write_photographs(folder, images)
        print(machine_facts(), f"{images} photographs of {MEGAPIXELS} megapixels; {rounds} rounds.", sep="\n\n")
        print("\n" + compare(loaded, processor, folder, rounds))


if __name__ == "__main__":
    typer.run(main)
