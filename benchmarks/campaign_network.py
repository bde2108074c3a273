"""The part of the campaign that meets a network: `push` to a Hub on this machine, and `serve` with clients."""

import importlib.util
import os
import random
import shutil
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx2
import numpy as np
from huggingface_hub.utils import get_session

from benchmarks.campaign_jobs import INDEX, OLDER, QUERY, REFERENCE, TINY, WRONG, Jobs, fork
from mmgem.training.hub_push import push_folder
from mmgem.training.inference import embed_texts
from mmgem.training.serving import run as serving

REPOSITORY = "me/tiny"
# What becomes of a request of a push: the process is killed, the connection is broken, or the Hub says so.
DISTURBANCES: dict[str, int | None] = {"killed": None, "connection broken": None, "500": 500, "429": 429, "403": 403}
ASKED: dict[str, Any] = {"/v1/embeddings": {"input": QUERY}, "/search": {"text": QUERY, "top": 5}}
CLIENTS = 3
PATIENCE = 60  # seconds, at most, until a server answers


def hub_module() -> ModuleType:
    """Returns the module of the tests that has a Hub."""
    place = Path(__file__).parent.parent / "tests" / "hub_server.py"
    spec = importlib.util.spec_from_file_location("hub_server", place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _disturb_request(at: int | None, is_done: bool, how: str) -> Counter:
    """Lets a request of this process fail, and counts all of them as they come.

    Args:
        at: Its number; None for none.
        is_done: Whether the Hub does what it asks all the same, and only the answer is lost.
        how: One of `DISTURBANCES`.
    """
    client = type(get_session())
    http, send, requests = sys.modules[client.__module__.partition(".")[0]], client.send, Counter[str]()

    def disturbed(self, request, **options):
        requests["all"] += 1
        if requests["all"] - 1 != at:
            return send(self, request, **options)
        if is_done:
            send(self, request, **options)
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if DISTURBANCES[how] is None:
            raise http.RemoteProtocolError("Server disconnected without sending a response.", request=request)
        return http.Response(DISTURBANCES[how], request=request, json={"error": how})

    client.send = disturbed  # type: ignore[method-assign]
    time.sleep = lambda seconds: None  # between the attempts of a library
    return requests


def disturb_push(how: str) -> Counter:
    """Disturbs a push at each of its requests, before or after the Hub does what is asked; then it is run again.

    Before that the Hub has nothing or all of it, and an error is a sentence; after it the Hub has all.
    """
    hub, outcomes = hub_module(), Counter[str]()

    def trial(at: int | None, is_done: bool) -> tuple[dict, tuple[int, Any], dict, tuple[int, Any]]:
        with hub.serve() as server:

            def push(at: int | None = None) -> list:
                exec(server.connect())
                requests = _disturb_request(at, is_done, how)
                return [push_folder(TINY, REPOSITORY).removeprefix(server.url), requests["all"]]

            first = fork(lambda: push(at))()
            there = dict(server.repositories.get(REPOSITORY, {}))
            second = fork(push)()
            return there, first, dict(server.repositories[REPOSITORY]), second

    whole, _, _, (_, expected) = trial(None, False)
    for at in range(expected[1]):
        for is_done in (False, True):
            there, (status, first), after, second = trial(at, is_done)
            is_refused = isinstance(first, dict) and first["is_refusal"] and first["message"].endswith(".")
            is_pushed = isinstance(first, list) and first[0] == expected[0]
            is_stopped = status == signal.SIGKILL if how == "killed" else is_refused or is_pushed
            is_right = is_stopped and there in ({}, whole) and after == whole and second == (0, expected)
            if not is_right:
                print(f"wrong: push, {how} at {at}, {is_done}: {status}, {first}, then {second}", file=sys.stderr)
            outcomes["whole in the end"] += is_right
            outcomes["refused by name"] += is_refused
            outcomes["tried again by itself"] += isinstance(first, list)
            outcomes[WRONG] += not is_right
    return outcomes


def ask(port: int, path: str) -> Any:
    """Returns the vector, or the names of the images, that a server answers with; None if it does not answer."""
    try:
        response = httpx2.post(f"http://127.0.0.1:{port}{path}", json=ASKED[path], timeout=PATIENCE)
    except httpx2.HTTPError:
        return None
    if response.status_code != 200:
        return response.text
    answer = response.json()
    return [Path(hit["path"]).name for hit in answer["hits"]] if "hits" in answer else answer["data"][0]["embedding"]


def end_server(jobs: Jobs, ending: signal.Signals, count: int, chance: random.Random) -> Counter:
    """Ends a server while clients ask and its index is brought up to date, and starts it again at the same port.

    Each answer that comes is of the index as it was when the server started; the update is not disturbed; and a server
    that is asked to end does so.
    """
    outcomes, out = Counter[str](), jobs.root / INDEX
    vector = embed_texts(jobs.model, jobs.processor, [QUERY]).reshape(-1, jobs.model.config.projection_dim)[0].tolist()
    names = {name: jobs.search(jobs.root / name)[0] for name in (OLDER, REFERENCE)}

    def start(port: int) -> tuple[int, Callable[[], tuple[int, Any]]]:
        place = jobs.root / "server"

        def run() -> None:
            place.write_text(str(os.getpid()))
            serving.load_checkpoint = lambda name: (jobs.model, jobs.processor)  # type: ignore[assignment]
            serving.serve(str(TINY), out, port=port)

        wait, end = fork(run), time.monotonic() + PATIENCE
        while time.monotonic() < end:
            with suppress(OSError):
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                return int(place.read_text()), wait
            time.sleep(0.02)
        raise TimeoutError(f"no server answers at port {port}")

    def is_right(path: str, answer: Any, index: str) -> bool:
        return answer == names[index] if path == "/search" else np.allclose(answer, vector, atol=1e-5)

    for _ in range(count):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(jobs.root / OLDER, out)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        process, wait = start(port)
        update = fork(lambda: [jobs.run(out), jobs.is_as_undisturbed(out)])
        answers: list[tuple[str, Any]] = []

        def keep_asking(path: str) -> None:
            while (answer := ask(port, path)) is not None:
                answers.append((path, answer))

        clients = [threading.Thread(target=keep_asking, args=(path,)) for path in ASKED for _ in range(CLIENTS)]
        for client in clients:
            client.start()
        while len({path for path, _ in answers}) < len(ASKED) and any(client.is_alive() for client in clients):
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 0.3))
        os.kill(process, ending)
        for client in clients:
            client.join()
        status, updated = wait()[0], update()
        process, wait = start(port)
        again = [(path, ask(port, path)) for path in ASKED]
        os.kill(process, signal.SIGTERM)
        wait()
        was_right = [is_right(*answer, OLDER) for answer in answers]
        outcomes["answers as undisturbed"] += sum(was_right)
        outcomes["started again"] += all(is_right(*answer, REFERENCE) for answer in again)
        is_whole = all(was_right) and all(is_right(*answer, REFERENCE) for answer in again)
        if not (is_whole and status in (0, ending) and updated[0] == 0 and updated[1][1]):
            print(f"wrong: serve, {ending.name}: {status}, {updated}, {was_right}, {again[1]}", file=sys.stderr)
            outcomes[WRONG] += 1
    return outcomes
