"""What a search among many images takes, in time and bytes, by what an index keeps of each.

    python -m benchmarks.search [--images 100000] [--dimensions 256] [--queries 10]

Searches random unit vectors with `mmgem.training.search.vector_search`, which `mmgem search` runs on: one vector of
each image as float32, int8 and binary codes, fewer dimensions of it (Matryoshka), and several vectors with MaxSim.
Time is that of one query at a time, the best ten answers. What each mode finds is another question:
`python -m benchmarks.budgets`.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, NamedTuple

import numpy as np
import typer
from tqdm.auto import tqdm

from benchmarks.measure import machine_facts, markdown_table, median_ratio, time_alternately
from mmgem.training.search.settings import Precision
from mmgem.training.search.vector_codec import VectorCodec
from mmgem.training.search.vector_search import VectorSearch

TOP = 10  # answers
PRECISIONS: tuple[Precision, ...] = ("float32", "int8", "binary")
HEADER = ("vectors of an image", "dimensions", "precision", "bytes of an image", "MB in all", "ms of a query", "ratio")
_VALUES_AT_A_TIME = 1 << 24  # random numbers


class Mode(NamedTuple):
    """What is kept of each image. A query has as many vectors."""

    vectors: int
    dimensions: int
    precision: Precision


def modes(dimensions: int, vectors: int) -> list[Mode]:
    """One vector, of all dimensions and of a half, a quarter and an eighth, in each precision; then `vectors` and
    halves of that of all dimensions, the fewest first, as float32 and int8.
    """
    single = [Mode(1, width, precision) for width in halves(dimensions, 4) for precision in PRECISIONS]
    counts = sorted(halves(vectors, vectors.bit_length()))
    several = [Mode(count, dimensions, precision) for count in counts for precision in ("float32", "int8")]
    return single + [mode for mode in several if mode.vectors > 1]


def halves(number: int, count: int) -> list[int]:
    """The number, half of it, half of that, rounded down; `count` of them at most, none of them 0."""
    return [number >> power for power in range(count) if number >> power]


def build_search(
    mode: Mode, images: int, queries: int, generator: np.random.Generator
) -> tuple[int, Callable[[], object]]:
    """Make an index of random vectors, and search it once, which makes it ready.

    Returns:
        Bytes of all codes, and a step that searches for the next of the queries.
    """
    codec = VectorCodec(mode.precision, mode.dimensions, bound=4 / mode.dimensions**0.5)  # of four deviations
    codes = np.empty((images, mode.vectors, codec.width), np.float32 if mode.precision == "float32" else np.uint8)
    filled = 0
    for part in _random_vectors(images, mode, generator):
        codes[filled : filled + len(part)] = codec.encode(part)
        filled += len(part)
    search = VectorSearch(codes[:, 0] if mode.vectors == 1 else codes, codec)
    vectors = iter(np.concatenate(list(_random_vectors(queries + 1, mode, generator))))  # (R, D) each

    def step():
        query = next(vectors)
        return search.search(query[0] if mode.vectors == 1 else query, TOP)

    step()
    return codes.nbytes, step


def _random_vectors(count: int, mode: Mode, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """(count, R, D) float32 unit vectors, in parts."""
    rows = max(1, _VALUES_AT_A_TIME // (mode.vectors * mode.dimensions))
    for start in range(0, count, rows):
        shape = min(rows, count - start), mode.vectors, mode.dimensions
        vectors = generator.standard_normal(shape, dtype=np.float32)
        yield vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def compare(to_measure: Sequence[Mode], images: int, queries: int) -> str:
    """The table of the benchmark, as markdown; the first mode is what the others are compared with."""
    generator = np.random.default_rng(0)
    progress = tqdm(to_measure, desc="indexes", unit="index")
    built = {mode: build_search(mode, images, queries, generator) for mode in progress}
    seconds = time_alternately({mode: step for mode, (_, step) in built.items()}, queries)
    rows = []
    for mode, (size, _) in built.items():
        ratio = median_ratio(seconds[mode], seconds[to_measure[0]])
        figures = f"{size // images}", f"{size / 1e6:.1f}", f"{1e3 * statistics.median(seconds[mode]):.2f}"
        rows.append((*mode, *figures, f"{ratio:.2f}"))
    return "\n\n".join([f"{images:,} images; {queries} queries, one at a time.", markdown_table(HEADER, rows)])


def main(
    images: Annotated[int, typer.Option(min=1, help="In the index.")] = 100_000,
    dimensions: Annotated[int, typer.Option(min=1, help="Of a whole vector.")] = 256,
    vectors: Annotated[int, typer.Option(min=1, help="Of an image, at most; halves of it are measured too.")] = 16,
    queries: Annotated[int, typer.Option(min=1, help="Of which the median is shown.")] = 10,
):
    print(machine_facts(), compare(modes(dimensions, vectors), images, queries), sep="\n\n")


if __name__ == "__main__":
    typer.run(main)
