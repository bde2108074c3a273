"""Engines for the vectors of many images, in one run: what each takes to build, to keep, to open and to ask.

    python -m benchmarks.vector_engines [--images 1000000] [--dimensions 192] [--engine mmgem ...] [--limit 600]

The vectors are drawn, since no million of photographs is at hand: 300 topics, 20,000 clusters around them of sizes by
Zipf's law, and vectors around those, all with variances that fall as 1 / i from dimension to dimension, as those of
mmgem-photo's vectors of photographs do. Half of the queries are drawn as the vectors are, as pictures that are looked
for; the other half lie off them in a common direction, as texts do.

`mmgem` is what `mmgem index` writes and `mmgem search` reads, with all its files and checksums, and the effort that
`mmgem index` settles, shown as 0. Each other engine gets the smallest effort (lists, candidates) at which both halves
reach the recall@10 that is asked for; all but the exact one rescore candidates by the vectors as they are. LanceDB
takes part where it is installed (`pip install lancedb`), which no extra does.

An index is built in a process of its own, which ends where it takes more of the processor's time than the limit. Time
is that of one query after the other, CPU and wall; "open" is a new process, from importing the engine to the first
answer. Threads sleep where they wait for each other: waiting in a loop is counted as work.
"""

import os

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # which FAISS and torch read when they are imported

import multiprocessing
import resource
import shutil
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np
import typer

TOP = 10
CANDIDATES = 10 * TOP  # that are rescored
HEADER = (
    "engine", "build s", "build CPU s", "MB on disk", "open s", "effort", "recall, like images", "like texts",
    "p50 ms", "p99 ms", "CPU ms",
)  # fmt: skip
_AT_A_TIME = 50_000
Search = Callable[[np.ndarray, int], np.ndarray]  # (query, effort) -> (n,) candidates


class Draw:
    """Vectors that are clustered as those of photographs are.

    Args:
        dimensions: Their width D.
        generator: The source of chance.
    """

    def __init__(self, dimensions: int, generator: np.random.Generator):
        self._generator, self._shape = generator, dimensions
        self._deviations = (1 / np.sqrt(1 + np.arange(dimensions))).astype(np.float32)
        topics = self._noise(300)
        self._centers = 0.7 * (topics[generator.integers(len(topics), size=20_000)] + self._noise(20_000))
        sizes = (1 + np.arange(len(self._centers))) ** -0.7
        self._shares = sizes / sizes.sum()
        self._off = self._noise(1)

    def images(self, count: int) -> np.ndarray:
        """(count, D) float32 of unit length."""
        clusters = self._generator.choice(len(self._centers), size=count, p=self._shares)
        return _unit(self._centers[clusters] + 0.6 * self._noise(count))

    def texts(self, count: int) -> np.ndarray:
        """(count, D) float32 of unit length."""
        return _unit(self.images(count) + 0.3 * (self._off + self.images(count)))

    def _noise(self, count: int) -> np.ndarray:
        return self._generator.standard_normal((count, self._shape), dtype=np.float32) * self._deviations


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


class OurIndex:
    """An index of images as `mmgem index` writes it, which knows itself how many lists to search."""

    efforts = [0]

    def build(self, vectors: np.ndarray, folder: Path) -> None:
        from mmgem.training.search.fingerprint import Fingerprint
        from mmgem.training.search.list_making import make_lists
        from mmgem.training.search.settings import IndexSettings
        from mmgem.training.search.storage import IndexFacts, write_index

        def batches() -> Iterator[dict[str, Any]]:
            for start in range(0, len(vectors), _AT_A_TIME):
                part = vectors[start : start + _AT_A_TIME]
                columns: dict[str, Any] = {
                    "file_name": [f"{number:08}.jpg" for number in range(start, start + len(part))]
                }
                same = {
                    "kind": "image",
                    "part": 0,
                    "version": "",
                    "text": "",
                    "metadata": "",
                    "content": "",
                    "box": None,
                }
                columns |= {
                    name: [value] * len(part) for name, value in (same | {"width": 640, "height": 480}).items()
                }
                yield columns | {"embedding": part}

        settings = IndexSettings(vectors=None, dimensions=vectors.shape[1], precision="float32", memory=None)
        facts = IndexFacts("photographs", "drawn", settings, Fingerprint({}, {}))
        embeds_no_text: Any = SimpleNamespace(config=SimpleNamespace(embedded_kinds=()))
        make = lambda rows: make_lists(rows, facts, embeds_no_text, None)  # noqa: E731
        write_index(folder, facts, 1, len(vectors), batches(), 0, make)

    def open(self, folder: Path) -> Search:
        from mmgem.training.search.storage import read_index
        from mmgem.training.search.vector_search import VectorSearch

        stored = read_index(folder, "folder")
        assert stored.rows is not None
        codes: Any = stored.rows.arrays["embedding"]
        lists = None if stored.lists is None else stored.lists.read()
        search = VectorSearch(codes[:] if lists is None else codes, stored.facts.codec, lists)
        return lambda query, effort: search.search(query, TOP)[1]


class Faiss:
    """An index of `faiss.index_factory`.

    Args:
        description: What it makes of it, with {lists} for the number of lists.
        effort: The name of the parameter that is turned, and its values.
    """

    def __init__(self, description: str, effort: tuple[str, list[int]]):
        self.description, (self.name, self.efforts) = description, effort

    def build(self, vectors: np.ndarray, folder: Path) -> None:
        import faiss

        lists = 1 << round(np.log2(2 * len(vectors) ** 0.5))
        inner_product = faiss.METRIC_INNER_PRODUCT
        index = faiss.index_factory(vectors.shape[1], self.description.format(lists=lists), inner_product)
        chosen = np.random.default_rng(0).choice(len(vectors), min(len(vectors), 64 * lists), replace=False)
        index.train(vectors[np.sort(chosen)])
        for start in range(0, len(vectors), _AT_A_TIME):
            index.add(vectors[start : start + _AT_A_TIME])
        faiss.write_index(index, str(folder / "index.faiss"))

    def open(self, folder: Path) -> Search:
        import faiss

        flags = faiss.IO_FLAG_MMAP_IFC if "Flat" in self.description else 0
        index = faiss.read_index(str(folder / "index.faiss"), flags)
        space = faiss.ParameterSpace()

        def search(query: np.ndarray, effort: int) -> np.ndarray:
            space.set_index_parameter(index, self.name, effort)
            return index.search(query[None], CANDIDATES)[1][0]

        return search


class Usearch:
    """HNSW of usearch, a byte for each value, which is read from the disk as it is needed."""

    efforts = [64, 128, 256, 512, 1024]

    def build(self, vectors: np.ndarray, folder: Path) -> None:
        from usearch.index import Index

        index = Index(ndim=vectors.shape[1], metric="ip", dtype="i8")
        index.add(np.arange(len(vectors)), vectors, threads=os.cpu_count() or 1)
        index.save(str(folder / "index.usearch"))

    def open(self, folder: Path) -> Search:
        from usearch.index import Index

        index = Index.restore(str(folder / "index.usearch"), view=True)

        def search(query: np.ndarray, effort: int) -> np.ndarray:
            index.expansion_search = effort
            return index.search(query, CANDIDATES, threads=1).keys.astype(np.int64)

        return search


class LanceDB:
    """A table of LanceDB with an index, which rescores by itself.

    Args:
        index_type: The kind of index.
    """

    efforts = [8, 16, 32, 64, 128, 256]

    def __init__(self, index_type: str):
        self.index_type = index_type

    def build(self, vectors: np.ndarray, folder: Path) -> None:
        import lancedb
        import pyarrow as pa
        from lancedb.index import IvfPq, IvfSq

        def batches():
            for start in range(0, len(vectors), _AT_A_TIME):
                part = vectors[start : start + _AT_A_TIME]
                column = pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1)), part.shape[1])
                yield pa.record_batch({"row": pa.array(range(start, start + len(part))), "vector": column})

        schema = next(batches()).schema
        table = lancedb.connect(folder / "lance").create_table("images", batches(), schema=schema)
        lists = 1 << round(np.log2(2 * len(vectors) ** 0.5))
        if self.index_type == "IVF_PQ":
            config = IvfPq(distance_type="dot", num_partitions=lists, num_sub_vectors=vectors.shape[1] // 4)
        else:
            config = IvfSq(distance_type="dot", num_partitions=lists)
        table.create_index("vector", config=config)

    def open(self, folder: Path) -> Search:
        import lancedb

        table = lancedb.connect(folder / "lance").open_table("images")

        def search(query: np.ndarray, effort: int) -> np.ndarray:
            found = table.search(query).distance_type("dot").nprobes(effort).refine_factor(CANDIDATES // TOP)
            return found.select(["row", "_distance"]).limit(TOP).to_arrow()["row"].to_numpy()

        return search


_LISTS = "nprobe", [4, 8, 16, 32, 64, 128, 256]
ENGINES: dict[str, Any] = {
    "mmgem": OurIndex(),
    "faiss-exact": Faiss("Flat", ("verbose", [0])),
    "faiss-ivf-sq8": Faiss("IVF{lists},SQ8", _LISTS),
    "faiss-ivf-pq": Faiss("IVF{lists},PQ48", _LISTS),
    "faiss-ivf-flat": Faiss("IVF{lists},Flat", _LISTS),
    "faiss-hnsw-sq8": Faiss("HNSW32_SQ8", ("efSearch", [64, 128, 256, 512, 1024])),
    "usearch-i8": Usearch(),
    "lancedb-ivf-pq": LanceDB("IVF_PQ"),
    "lancedb-ivf-sq": LanceDB("IVF_SQ"),
}


def nearest(vectors: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """(Q, TOP) The numbers of the nearest vectors, by all products."""
    best = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    for start in range(0, len(vectors), _AT_A_TIME):
        scores = queries @ vectors[start : start + _AT_A_TIME].T
        rows = np.argpartition(-scores, TOP, axis=1)[:, :TOP]
        joined = np.hstack([best[0], np.take_along_axis(scores, rows, 1)]), np.hstack([best[1], rows + start])
        order = np.argsort(-joined[0], axis=1)[:, :TOP]
        best = tuple(np.take_along_axis(one, order, 1) for one in joined)  # type: ignore[assignment]
    return best[1]


def measure(
    engine, folder: Path, vectors: np.ndarray, queries: np.ndarray, expected: np.ndarray, aim: float
) -> list[str]:
    """A row of the table, for an engine whose index is in the folder."""
    search = engine.open(folder)

    def ask(query: np.ndarray, effort: int) -> np.ndarray:
        rows = search(query, effort)
        rows = rows[rows >= 0]
        return rows[np.argsort(-(vectors[rows] @ query))[:TOP]]

    ask(queries[0], engine.efforts[0])
    for effort in engine.efforts:
        seconds, cpu = [], time.process_time()
        hits = np.empty(len(queries))
        for number, query in enumerate(queries):
            start = time.perf_counter()
            found = ask(query, effort)
            seconds.append(time.perf_counter() - start)
            hits[number] = len(np.intersect1d(found, expected[number])) / TOP
        cpu = (time.process_time() - cpu) / len(queries)
        like_images, like_texts = hits[: len(queries) // 2].mean(), hits[len(queries) // 2 :].mean()
        if min(like_images, like_texts) >= aim:
            break
    figures = 1e3 * statistics.median(seconds), 1e3 * np.quantile(seconds, 0.99), 1e3 * cpu
    return [f"{effort}", f"{like_images:.3f}", f"{like_texts:.3f}", *(f"{figure:.1f}" for figure in figures)]


def build_anew(name: str, folder: Path, limit: int) -> tuple[float, float] | None:
    """Builds an engine's index in a new process, of the vectors beside its folder.

    Returns:
        Seconds by the clock and of the processor; None where it was not done within the limit.
    """
    process = multiprocessing.get_context("spawn").Process(target=build, args=(name, folder, limit))
    process.start()
    process.join()
    if process.exitcode == -signal.SIGXCPU:
        return None
    if process.exitcode:
        raise RuntimeError(f"building {name} ended with {process.exitcode}.")
    return tuple(np.load(folder.parent / "seconds.npy"))  # type: ignore[return-value]


def build(name: str, folder: Path, limit: int) -> None:
    """Builds an index, and leaves its times in `seconds.npy` beside its folder."""
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 10))
    start = np.array([time.perf_counter(), time.process_time()])
    ENGINES[name].build(np.load(folder.parent / "vectors.npy", mmap_mode="r"), folder)
    np.save(folder.parent / "seconds.npy", np.array([time.perf_counter(), time.process_time()]) - start)


def open_anew(name: str, folder: Path, query: np.ndarray, effort: int) -> float:
    """Seconds from importing an engine to its first answer, in a new process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_open, (name, folder, query, effort))


def _open(name: str, folder: Path, query: np.ndarray, effort: int) -> float:
    start = time.perf_counter()
    ENGINES[name].open(folder)(query, effort)
    return time.perf_counter() - start


def compare(
    names: list[str], images: int, dimensions: int, queries: int, aim: float, folder: Path, limit: int = 600
) -> str:
    """The table of the benchmark, as markdown."""
    from benchmarks.measure import markdown_table

    draw = Draw(dimensions, np.random.default_rng(0))
    np.lib.format.open_memmap(folder / "vectors.npy", "w+", np.float32, (images, dimensions)).flush()
    vectors = np.load(folder / "vectors.npy", mmap_mode="r+")
    for start in range(0, images, _AT_A_TIME):
        vectors[start : start + _AT_A_TIME] = draw.images(min(_AT_A_TIME, images - start))
    asked = np.concatenate([draw.images(queries // 2), draw.texts(queries // 2)])
    expected = nearest(vectors, asked)
    rows = []
    for name in names:
        place = folder / name
        place.mkdir()
        seconds = build_anew(name, place, limit)
        if seconds is None:
            rows.append([name, "not built in", f"{limit}", *[""] * (len(HEADER) - 3)])
        else:
            size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
            figures = measure(ENGINES[name], place, vectors, asked, expected, aim)
            opened = open_anew(name, place, asked[0], int(figures[0]))
            rows.append([name, *(f"{one:.0f}" for one in seconds), f"{size / 1e6:.0f}", f"{opened:.2f}", *figures])
        print("\t".join(rows[-1]), flush=True)
        shutil.rmtree(place)
    return markdown_table(HEADER, rows)


def main(
    images: Annotated[int, typer.Option(min=1000, help="In the index.")] = 1_000_000,
    dimensions: Annotated[int, typer.Option(min=48, help="Of a vector, a multiple of 48.")] = 192,
    queries: Annotated[int, typer.Option(min=2, help="Half of them like images, half like texts.")] = 400,
    recall: Annotated[float, typer.Option(min=0, max=1, help="Recall@10 to reach in both halves.")] = 0.98,
    engine: Annotated[list[str] | None, typer.Option(help=f"Some of {', '.join(ENGINES)}; all by default.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Seconds of the processor that building may take.")] = 600,
):
    from benchmarks.measure import machine_facts

    has_lancedb = find_spec("lancedb") is not None
    engines = engine or [name for name in ENGINES if has_lancedb or not name.startswith("lancedb")]
    with tempfile.TemporaryDirectory() as folder:
        table = compare(engines, images, dimensions, queries, recall, Path(folder), limit)
    print(machine_facts(), f"{images:,} x {dimensions}, seed 0.", table, sep="\n\n")


if __name__ == "__main__":
    typer.run(main)
