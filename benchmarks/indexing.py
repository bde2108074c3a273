"""How much of what the machine can do `mmgem index` and `SentenceTransformer.encode` make of photographs.

    python -m benchmarks.indexing [--images 60] [--rounds 7] [--model MODEL]

Writes photographs of 1 to 20 megapixels as JPEG files, each unlike the others. In each round, one after the other:
reads them as `mmgem index` does, without a model (decoding, at the scale that it needs, hashing and resizing, in as
many threads); runs the model on ready tensors, as good as a loop can be; makes the index, also of one photograph,
which is what its start takes; and encodes the decoded photographs, also as small as the model sees them.

Decoding and the model share the cores of a processor, so that with no time lost the index needs the time of both. Its
rate stands over that of both and over that of the slower, by the clock and by the seconds of the processor, of all
threads together. On a machine with other work only the latter mean something. Threads sleep where they wait for each
other, as in `mmgem index`: waiting in a loop is counted as work.
"""

import os

os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "THP_MEM_ALLOC_ENABLE": "1"}  # as `mmgem index` does, before torch

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
from mmgem.training.search.building import build_index

TINY = Path(__file__).parent.parent / "model_cards" / "mmgem-tiny"
MEGAPIXELS = (1, 2, 5, 12, 20)
BATCH_SIZE = 32
HEADER = (
    "what",
    "images/s",
    "of the slower",
    "of both",
    "quartiles",
    "processor, ms an image",
    "of both",
    "of the model",
)
DECODING, MODEL, INDEX, BOTH = "decoding alone", "the model alone", "`mmgem index`", "both, no time lost"
START, AFTER = "`mmgem index` of one image", "`mmgem index`, without its start"
ENCODE, ENCODE_SMALL = "`encode` of decoded photographs", "`encode` of them, small"


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


def compare(encoder, folder: Path, rounds: int) -> str:
    """The table of the benchmark, as markdown, with the model of an encoder of sentence-transformers."""
    model, processor = encoder[0].model, encoder[0].processor
    names = list(find_images(folder).versions)
    prepare = partial(processor, return_tensors="pt")

    def read() -> list:
        reader = ImageReader(folder, shorter_side_for(processor), prepare=lambda image: prepare(images=[image]))
        return [file for batch in reader.read_batches(names, BATCH_SIZE, []) for file in batch]

    files = read()
    pixels = torch.cat([file.inputs["pixel_values"] for file in files]).split(BATCH_SIZE)
    pictures = [file.image for file in files]
    small = [picture.resize(pixels[0].shape[:1:-1]) for picture in pictures]

    def embed() -> None:
        for batch in pixels:
            embed_images(model, lambda own=batch, **images: {"pixel_values": own}, batch)

    def index(images: Path) -> None:
        with tempfile.TemporaryDirectory() as out:
            build_index(images, model, processor, out, BATCH_SIZE)

    first = folder.parent / "first"
    first.mkdir()
    shutil.copy(folder / names[0], first)
    steps = {
        DECODING: read,
        MODEL: embed,
        START: partial(index, first),
        INDEX: partial(index, folder),
        ENCODE: partial(encoder.encode, pictures, batch_size=BATCH_SIZE),
        ENCODE_SMALL: partial(encoder.encode, small, batch_size=BATCH_SIZE),
    }
    for name in (MODEL, START, ENCODE):
        steps[name]()  # warms up
    clock = lambda: np.array([time.perf_counter(), time.process_time()])  # noqa: E731
    clocks = time_alternately(steps, rounds, clock=clock)  # type: ignore[arg-type]
    clocks[AFTER] = [whole - start for start, whole in zip(clocks.pop(START), clocks[INDEX], strict=True)]
    clocks[BOTH] = [sum(pair) for pair in zip(clocks[DECODING], clocks[MODEL], strict=True)]
    slower = [max(a[0], b[0]) for a, b in zip(clocks[DECODING], clocks[MODEL], strict=True)]
    both, both_of_processor = zip(*clocks[BOTH], strict=True)
    model_of_processor = [of_processor for _, of_processor in clocks[MODEL]]
    rows = []
    for name in (DECODING, MODEL, BOTH, INDEX, AFTER, ENCODE, ENCODE_SMALL):
        times, of_processor = zip(*clocks[name], strict=True)
        low, _, high = statistics.quantiles([theirs / own for own, theirs in zip(times, both, strict=True)], n=4)
        rows.append((
            name,
            f"{len(names) / statistics.median(times):.1f}",
            f"{median_ratio(slower, times):.2f}",
            f"{median_ratio(both, times):.2f}",
            f"{low:.2f} to {high:.2f}",
            f"{1e3 * statistics.median(of_processor) / len(names):.1f}",
            f"{median_ratio(both_of_processor, of_processor):.2f}",
            f"{median_ratio(model_of_processor, of_processor):.2f}",
        ))  # fmt: skip
    return markdown_table(HEADER, rows)


def main(
    images: Annotated[int, typer.Option(min=len(MEGAPIXELS), help="Photographs.")] = 60,
    rounds: Annotated[int, typer.Option(min=2, help="Of each.")] = 7,
    model: Annotated[str, typer.Option(help="Folder of a checkpoint, or a name on the Hub.")] = str(TINY),
):
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(model, trust_remote_code=True)
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, "photographs")
        folder.mkdir()
        write_photographs(folder, images)
        print(machine_facts(), f"{images} photographs of {MEGAPIXELS} megapixels; {rounds} rounds.", sep="\n\n")
        print("\n" + compare(encoder, folder, rounds))


if __name__ == "__main__":
    typer.run(main)
