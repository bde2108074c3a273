"""How much of what the machine can do `mmgem index` makes of a folder of photographs.

    python -m benchmarks.indexing [--images 60] [--rounds 7] [--model MODEL]

Writes photographs of 1 to 20 megapixels as JPEG files, each unlike the others, and does three things with them, one
after the other in each round: reads them as `mmgem index` does, without a model (decoding, at the scale that the model
needs, hashing and resizing, in as many threads); runs the model on ready tensors; and makes the index. Prints images a
second of each, and the rate of the index over the slower of the other two. Decoding and the model share the cores of a
processor: with no time lost it is 1 / (1 / decoding + 1 / model), printed too, which is half of the slower one where
both take as long.
"""

import statistics
import tempfile
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
HEADER = ("what", "images/s", "of the slower", "quartiles")
DECODING, MODEL, INDEX, BOTH = "decoding alone", "the model alone", "`mmgem index`", "both, no time lost"


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

    def index() -> None:
        with tempfile.TemporaryDirectory() as out:
            report = build_index(folder, model, processor, out, BATCH_SIZE)
        assert report.embedded == len(names)

    embed()
    seconds = time_alternately({DECODING: read, MODEL: embed, INDEX: index}, rounds)
    parts = list(zip(seconds[DECODING], seconds[MODEL], strict=True))
    slower, seconds[BOTH] = [max(pair) for pair in parts], [sum(pair) for pair in parts]
    rows = []
    for name, times in seconds.items():
        ratios = [theirs / own for own, theirs in zip(times, slower, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        rate = len(names) / statistics.median(times)
        rows.append((name, f"{rate:.1f}", f"{median_ratio(slower, times):.2f}", f"{low:.2f} to {high:.2f}"))
    return markdown_table(HEADER, rows)


def main(
    images: Annotated[int, typer.Option(min=len(MEGAPIXELS), help="Photographs.")] = 60,
    rounds: Annotated[int, typer.Option(min=2, help="Of each.")] = 7,
    model: Annotated[str, typer.Option(help="Folder of a checkpoint, or a name on the Hub.")] = str(TINY),
):
    loaded, processor = load_checkpoint(model)
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder), images)
        print(machine_facts(), f"{images} photographs of {MEGAPIXELS} megapixels; {rounds} rounds.", sep="\n\n")
        print("\n" + compare(loaded, processor, Path(folder), rounds))


if __name__ == "__main__":
    typer.run(main)
