"""The load that `mmgem serve` holds.

    python -m benchmarks.serving [--clients 1 --clients 4 --clients 16 --clients 64] [--seconds 8]

Prints requests a second and their latency for one text and for one image a request, from so many clients at a time, by
a server that puts inputs that wait into batches and by one that does not (`--batch-size 1`), beside the same inputs
embedded one after the other in a bare loop without a server. The server is a process of its own, the clients are
threads of this one, on the same machine.
"""

import base64
import io
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

import httpx2
import typer

from benchmarks.measure import machine_facts, markdown_table
from mmgem.training.inference import embed_images, embed_texts
from mmgem.training.loading import load_checkpoint
from mmgem.training.scenes.dataset import SceneDataset

TINY = Path(__file__).parent.parent / "model_cards" / "mmgem-tiny"
CLIENTS = (1, 4, 16, 64)
LIMITS = httpx2.Limits(max_connections=None)  # or clients would wait for each other
SERVERS = {"batched": (), "one by one": ("--batch-size", "1")}
HEADER = ("one request", "server", "clients", "requests/s", "of the bare loop", "median ms", "99% ms")


@contextmanager
def serve(model: Path, port: int, options: Sequence[str]) -> Iterator[str]:
    """The address of a server in a process of its own."""
    command = [sys.executable, "-m", "mmgem.training.cli", "serve", str(model), "--port", str(port), *options]
    address = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as log:  # a pipe that nobody reads would fill up, and stop the server
        process = subprocess.Popen(command, stderr=log)
        try:
            while True:
                try:
                    httpx2.get(f"{address}/health").raise_for_status()
                    break
                except httpx2.TransportError:
                    if process.poll() is not None:
                        log.seek(0)
                        raise RuntimeError(log.read().decode()) from None
                    time.sleep(0.2)
            yield address
        finally:
            process.terminate()
            process.wait()


def latencies(ask: Callable[[int], object], clients: int, seconds: float) -> tuple[float, list[float]]:
    """Calls `ask` with growing numbers from several threads.

    Returns:
        Calls a second, and the seconds of each.
    """
    end = time.perf_counter() + seconds

    def client(number: int) -> list[float]:
        found = []
        while (start := time.perf_counter()) < end:
            ask(number + clients * len(found))
            found.append(time.perf_counter() - start)
        return found

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as threads:
        times = sum(threads.map(client, range(clients)), [])
    return len(times) / (time.perf_counter() - start), times


def compare(model: Path, clients: Sequence[int], seconds: float, port: int) -> str:
    """The table of the benchmark, as markdown."""
    scenes = SceneDataset(0, 32)
    rows = [scenes[number] for number in range(32)]
    texts, images = [row["captions"][0] for row in rows], [row["image"] for row in rows]
    loaded, processor = load_checkpoint(model)
    bare: dict[str, Callable[[int], object]] = {
        "a text": lambda number: embed_texts(loaded, processor, [texts[number % 32]]),
        "an image": lambda number: embed_images(loaded, processor, [images[number % 32]]),
    }
    inputs = {"a text": texts, "an image": [_data_uri(image) for image in images]}
    rates = {}
    for kind, call in bare.items():
        call(0)
        rates[kind, "none", 1] = latencies(call, 1, seconds)
    for server, options in SERVERS.items():
        with (
            serve(model, port, options) as address,
            httpx2.Client(base_url=address, timeout=60, limits=LIMITS) as http,
        ):

            def ask(own: list[str], number: int) -> None:
                body = {"input": own[number % 32], "encoding_format": "base64"}
                http.post("/v1/embeddings", json=body).raise_for_status()

            for kind, own in inputs.items():
                ask(own, 0)
                for count in clients:
                    rates[kind, server, count] = latencies(partial(ask, own), count, seconds)
    table = []
    for (kind, server, count), (rate, times) in sorted(rates.items(), key=lambda item: item[0][0] != "a text"):
        ratio, slow = rate / rates[kind, "none", 1][0], sorted(times)[int(0.99 * len(times))]
        milliseconds = [f"{1000 * value:.0f}" for value in (statistics.median(times), slow)]
        table.append((kind, server, str(count), f"{rate:.1f}", f"{ratio:.2f}", *milliseconds))
    return markdown_table(HEADER, table)


def _data_uri(image) -> str:
    file = io.BytesIO()
    image.save(file, "png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def main(
    clients: Annotated[list[int], typer.Option(min=1, help="At a time.")] = list(CLIENTS),
    seconds: Annotated[float, typer.Option(min=0.1, help="Of each figure.")] = 8,
    model: Annotated[Path, typer.Option(help="Folder of a checkpoint.")] = TINY,
    port: Annotated[int, typer.Option(help="That is free.")] = 8765,
):
    print(machine_facts(), compare(model, clients, seconds, port), sep="\n\n")


if __name__ == "__main__":
    typer.run(main)
