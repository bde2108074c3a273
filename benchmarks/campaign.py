"""Kills, full disks, power cuts, folders that are away, doubled jobs and corruptions, over `index` and `caption`.

    python -m benchmarks.campaign --write docs/reliability.md

A run is forked for each trial, so that whatever becomes of it, the next one begins as it did. The moments of a run are
its operations on files: each that opens one to write, brings one to the disk, renames, deletes or makes one. There the
run is killed, or killed with the power cut (what was not brought to the disk becomes zeros from some byte on), or the
disk is full. Then the same command is run again, and has to leave what an undisturbed run leaves.

Embeddings and captions are of `mmgem-tiny`, which computes them once; trials look them up.
"""

import argparse
import gc
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmgem.training import captioning
from mmgem.training.captioning import caption_folder
from mmgem.training.inference import embed_and_remember, generate_captions
from mmgem.training.loading import load_checkpoint
from mmgem.training.scenes.dataset import SceneDataset
from mmgem.training.search import building, item_embedder
from mmgem.training.search.building import build_index
from mmgem.training.search.checked_files import DamagedFileError
from mmgem.training.search.fingerprint import Fingerprint
from mmgem.training.search.index import SearchIndex
from mmgem.training.search.storage import MANIFEST, UNFINISHED, read_index, verify_index

TINY = Path(__file__).parent.parent / "model_cards" / "mmgem-tiny"
IMAGES, BATCH_SIZE, ROWS_PER_PART = 24, 4, 8
DOUBLED = 20  # pairs of jobs, and updates while a folder is away
TIMEOUT = 120  # seconds that a trial may take
_OPERATIONS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree"}
WRONG = "wrong"


class Moments:
    """Counts the operations on files of this process, and acts at one of them, before it happens.

    Args:
        at: The number of the operation; None for none.
        act: What is done there.
    """

    def __init__(self, at: int | None = None, act: Callable[["Moments"], None] = lambda moments: None):
        self.at, self.act, self.count = at, act, 0
        self.unsynced: set[str] = set()
        self._fsync = os.fsync
        os.fsync = self._sync  # type: ignore[assignment]
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple) -> None:
        is_opened = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR) and "/dev/" not in str(arguments[0])
        if is_opened or event in _OPERATIONS:
            self._meet()
            if is_opened:
                self.unsynced.add(str(arguments[0]))

    def _sync(self, number: int) -> None:
        self._meet()
        self._fsync(number)
        self.unsynced.discard(os.readlink(f"/proc/self/fd/{number}"))

    def _meet(self) -> None:
        self.count += 1
        if self.count - 1 == self.at:
            self.act(self)


def kill(moments: Moments) -> None:
    """Ends the process, as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def cut_power(moments: Moments) -> None:
    """Ends the process, and leaves zeros from some byte on where nothing was brought to the disk."""
    chance = random.Random(moments.count)
    for path in filter(os.path.exists, moments.unsynced):
        size = os.path.getsize(path)
        os.truncate(path, chance.randrange(size + 1))
        os.truncate(path, size)
    kill(moments)


def fill_disk(moments: Moments) -> None:
    """Lets the operation fail."""
    raise OSError(28, "No space left on device")


def attempt(task: Callable[[], Any]) -> Any:
    """The result of a task, or its error as `{"error": type, "message": text}`."""
    try:
        return task()
    except BaseException as error:
        return {"error": type(error).__name__, "message": str(error)}


def fork(task: Callable[[], Any]) -> Callable[[], tuple[int, Any]]:
    """Starts a task in a process of its own.

    Returns:
        A function that waits for it, and returns the signal that ended it, or 0, and what `attempt` returned.
    """
    descriptor, path = tempfile.mkstemp()
    os.close(descriptor)
    child = os.fork()
    if child == 0:
        gc.disable()
        signal.alarm(TIMEOUT)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        Path(path).write_text(json.dumps(attempt(task)))
        os._exit(0)

    def wait() -> tuple[int, Any]:
        status = os.waitpid(child, 0)[1]
        text = Path(path).read_text()
        os.unlink(path)
        return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0, json.loads(text) if text else None

    return wait


class Jobs:
    """The commands that are disturbed, over one gallery.

    Args:
        root: A folder for everything.
    """

    def __init__(self, root: Path):
        self.root, self.images = root, root / "images"
        self.model, self.processor = load_checkpoint(str(TINY), device="cpu")
        for number, row in enumerate(SceneDataset(8_000_000, IMAGES, columns=["image"])):
            path = self.images / ("" if number % 3 else "disk/deep") / f"{number:02}.{'jpg' if number % 2 else 'png'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            row["image"].save(path)
        self._remember()
        self.index(root / "reference")
        self.captions(root / "reference.jsonl")
        self.caption_lines = (root / "reference.jsonl").read_bytes()
        self.hits = self.search(root / "reference")

    def index(self, out: Path) -> int:
        """How many images an index job embeds."""
        return build_index(self.images, self.model, self.processor, out, BATCH_SIZE, memory=1).embedded

    def captions(self, out: Path) -> int:
        """How many images a caption job captions."""
        return caption_folder(self.images, self.model, self.processor, out, batch_size=BATCH_SIZE).captioned

    def search(self, out: Path) -> list:
        """What is found, and the memory of it."""
        index = SearchIndex.load(out, self.model, self.processor)
        hits = index.search("a red star", top=5)
        names = [hit.path.name for hit in hits]
        return [names, [round(hit.score, 4) for hit in hits], np.asarray(index.memory([hits[0].row])).tolist()]

    def is_as_undisturbed(self, out: Path) -> bool:
        """Whether an index or a file of captions is what a run leaves that was not disturbed."""
        if out.suffix == ".jsonl":
            return out.read_bytes() == self.caption_lines
        rows, reference = (read_index(place, "out").rows for place in (out, self.root / "reference"))
        assert rows is not None and reference is not None
        names = {path.name.partition("-")[0] for path in out.iterdir()}
        return (
            names == {"embedding", "memory", "probes", "rows", MANIFEST}
            and not verify_index(out).damaged
            and not out.with_name(f"{out.name}.lock").exists()
            and rows.table.equals(reference.table)
            and all(np.allclose(rows.arrays[name][:], reference.arrays[name][:], atol=1e-5) for name in rows.arrays)
        )

    def _remember(self) -> None:
        """Lets the model compute everything once, and the jobs take it from there."""
        known: dict[bytes, tuple[torch.Tensor, torch.Tensor, str]] = {}

        def look_up(images: Sequence[Image.Image]) -> list[tuple[torch.Tensor, torch.Tensor, str]]:
            for image in images:
                if image.tobytes() not in known:
                    states = embed_and_remember(self.model, self.processor, [image])
                    caption = generate_captions(self.model, self.processor, [image])[0]
                    known[image.tobytes()] = (states.image_embeds, states.memory, caption)
            return [known[image.tobytes()] for image in images]

        def embed(model, processor, images):
            embeds, memories, _ = zip(*look_up(images), strict=True)
            return torch.cat(embeds), None, torch.cat(memories)

        item_embedder.embed_and_remember = embed  # type: ignore[assignment]
        captioning.generate_captions = lambda model, processor, images: [caption for *_, caption in look_up(images)]
        item_embedder.ROWS_PER_PART = ROWS_PER_PART
        take, fingerprints = Fingerprint.take, {}

        def take_once(model, processor, kinds):
            kinds = tuple(kinds)
            if kinds not in fingerprints:
                fingerprints[kinds] = take(model, processor, kinds)
            return fingerprints[kinds]

        Fingerprint.take = staticmethod(take_once)  # type: ignore[method-assign, assignment]


def disturb(jobs: Jobs, name: str, prepare: Callable[[Path], None], act, most: int) -> Counter:
    """Disturbs a job at every moment, or as many as `most`, evenly spaced; runs it again each time."""
    job = jobs.captions if name == "captions.jsonl" else jobs.index
    outcomes: Counter = Counter()

    def start(at: int | None) -> tuple[Path, tuple[int, Any]]:
        out = jobs.root / name
        shutil.rmtree(out, ignore_errors=True)
        out.unlink(missing_ok=True)
        prepare(out)

        def run() -> int:
            moments = Moments(at, act)
            job(out)
            return moments.count

        return out, fork(run)()

    _, (_, count) = start(None)
    for at in sorted({round(step) for step in np.linspace(0, count - 1, min(count, most))}):
        out, (_, result) = start(at)
        was_stopped = result is None or (isinstance(result, dict) and "No space left" in result["message"])
        status, again = fork(lambda out=out: [job(out), jobs.is_as_undisturbed(out)])()
        is_right = status == 0 and isinstance(again, list) and again[1]
        if not is_right:
            print(f"wrong at moment {at} of {count}: {result}, then {again}", file=sys.stderr)
        outcomes["as undisturbed" if is_right else WRONG] += 1
        outcomes["stopped"] += was_stopped
    return outcomes


def corrupt(content: bytes, kind: str, chance: random.Random) -> bytes:
    """Content with one thing wrong."""
    place = chance.randrange(len(content))
    if kind == "bit flip":
        return content[:place] + bytes([content[place] ^ 1 << chance.randrange(8)]) + content[place + 1 :]
    if kind == "cut":
        return content[:place]
    if kind == "zeros to the end":
        return content[:place] + bytes(len(content) - place)
    if kind == "noise":
        return content[:place] + chance.randbytes(min(64, len(content) - place)) + content[place + 64 :]
    return content + chance.randbytes(16)  # longer


KINDS = ("bit flip", "cut", "zeros to the end", "noise", "longer")
_REFUSALS = (ValueError.__name__, DamagedFileError.__name__, FileNotFoundError.__name__)


def corrupt_index(jobs: Jobs, kind: str, count: int, chance: random.Random) -> Counter:
    """An index with one file damaged: it is searched, verified, and brought up to date."""
    outcomes: Counter = Counter()
    out = jobs.root / "index"

    def search() -> list:
        return jobs.search(out)

    def verify() -> list[str]:
        return list(verify_index(out).damaged)

    def update() -> list:
        return [jobs.index(out), jobs.is_as_undisturbed(out)]

    for number in range(count):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(jobs.root / "reference", out)
        path = sorted(out.iterdir())[number % 5]
        whole = path.read_bytes()
        path.write_bytes(corrupt(whole, kind, chance))
        is_changed = path.read_bytes() != whole
        status, answers = fork(lambda: [attempt(task) for task in (search, verify, update)])()
        found, check, again = answers or (None, None, None)
        is_refused = isinstance(found, dict) and found["error"] in _REFUSALS and str(out) in found["message"]
        is_named = check == [path.name] or (path.name == MANIFEST and isinstance(check, dict))
        is_mended = isinstance(again, list) and again[1]
        is_update_refused = isinstance(again, dict) and again["error"] in _REFUSALS and str(out) in again["message"]
        is_right = (
            status == 0
            and (is_refused or found == jobs.hits)
            and (is_named or not is_changed)
            and (is_mended or is_update_refused)
        )
        outcomes["refused by name" if is_refused else "searched as before"] += 1
        outcomes["mended by the update" if is_mended else "update refused"] += 1
        outcomes[WRONG] += not is_right
    return outcomes


def corrupt_parts(jobs: Jobs, kind: str, count: int, chance: random.Random) -> Counter:
    """What a killed run leaves, with one file damaged: the next run takes the rest from there."""
    outcomes: Counter = Counter()
    out, kept = jobs.root / "index", jobs.root / "killed"
    if not kept.exists():

        def run() -> None:
            building.merge = None  # type: ignore[assignment]
            jobs.index(kept)

        fork(run)()
    for _ in range(count):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(kept, out)
        path = chance.choice(sorted((out / UNFINISHED).iterdir()))
        path.write_bytes(corrupt(path.read_bytes(), kind, chance))
        status, again = fork(lambda: [jobs.index(out), jobs.is_as_undisturbed(out)])()
        is_mended = isinstance(again, list) and again[1]
        is_refused = isinstance(again, dict) and again["error"] in _REFUSALS and str(out) in again["message"]
        outcomes["as undisturbed" if is_mended else "refused by name" if is_refused else WRONG] += 1
        outcomes[WRONG] += status != 0
    return outcomes


def corrupt_captions(jobs: Jobs, kind: str, count: int, chance: random.Random) -> Counter:
    """Half of the captions, with something wrong in the file: they are gone on with, or refused."""
    outcomes: Counter = Counter()
    out = jobs.root / "captions.jsonl"
    lines = jobs.caption_lines.splitlines(keepends=True)
    for _ in range(count):
        out.write_bytes(corrupt(b"".join(lines[: IMAGES // 2]), kind, chance))
        damaged = out.read_bytes()
        status, again = fork(lambda: jobs.captions(out))()
        is_refused = isinstance(again, dict) and again["error"] in _REFUSALS and str(out) in again["message"]
        names = [] if is_refused else [json.loads(line).get("file_name") for line in out.read_bytes().splitlines()]
        # A bit of the text of a caption, or of the name of an image, cannot be told from what was meant.
        is_whole = is_refused or (len(names) == len(set(names)) and len(set(names)) >= IMAGES)
        outcomes["refused by name" if is_refused else "gone on with"] += 1
        outcomes[WRONG] += status != 0 or not is_whole or (is_refused and out.read_bytes() != damaged)
    return outcomes


def take_folders_away(jobs: Jobs, count: int, chance: random.Random) -> Counter:
    """Updates while folders cannot be listed, or are empty; then they are back."""
    outcomes: Counter = Counter()
    out = jobs.root / "index"
    for number in range(count):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(jobs.root / "reference", out)
        name, is_emptied = chance.choice(["disk", "disk/deep"]), number % 2
        place, away = jobs.images / name, jobs.root / "away"

        def update(name=name, is_emptied=is_emptied) -> list:
            scandir = os.scandir

            def listing(path):
                if str(path).endswith(name) and not is_emptied:
                    raise OSError(chance.choice([5, 13, 112, 116]), "away", str(path))
                return scandir(path)

            os.scandir = listing  # type: ignore[assignment]
            report = build_index(jobs.images, jobs.model, jobs.processor, out, BATCH_SIZE, memory=1)
            return [report.images, report.embedded, [file.file_name for file in report.skipped]]

        if is_emptied:
            place.rename(away)
            place.mkdir()
        _, during = fork(update)()
        if is_emptied:
            place.rmdir()
            away.rename(place)
        _, after = fork(lambda: [jobs.index(out), jobs.is_as_undisturbed(out)])()
        is_right = during == [IMAGES, 0, [name]] and after == [0, True]
        outcomes["rows kept, folder named" if is_right else WRONG] += 1
    return outcomes


def double(jobs: Jobs, name: str, count: int, chance: random.Random) -> Counter:
    """Two jobs at one output, one a moment after the other; a third goes on."""
    outcomes: Counter = Counter()
    job, out = jobs.captions if name == "captions.jsonl" else jobs.index, jobs.root / name
    for _ in range(count):
        shutil.rmtree(out, ignore_errors=True)
        out.unlink(missing_ok=True)
        waits = [fork(lambda: job(out))]
        time.sleep(chance.uniform(0, 0.05))
        waits.append(fork(lambda: job(out)))
        results = [wait()[1] for wait in waits]
        refused = [one for one in results if isinstance(one, dict) and one["error"] == "BlockingIOError"]
        _, is_whole = fork(lambda: job(out) == 0 and jobs.is_as_undisturbed(out))()
        outcomes["one refused by name" if refused else "one after the other"] += 1
        outcomes[WRONG] += not is_whole or sum(isinstance(one, int) for one in results) + len(refused) != 2
    return outcomes


def read_while_updated(jobs: Jobs, seconds: float) -> Counter:
    """Loads an index over and over while it is updated over and over: it is always one that was finished."""
    outcomes: Counter = Counter()
    out = jobs.root / "index"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(jobs.root / "reference", out)

    def update() -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            (jobs.images / "00b.png").symlink_to(jobs.images / "01.jpg")
            jobs.index(out)
            (jobs.images / "00b.png").unlink()
            jobs.index(out)

    wait, end = fork(update), time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            rows = read_index(out, "out").rows
            assert rows is not None
            is_right = len(rows) in (IMAGES, IMAGES + 1) and not rows.damaged().any()
        except (OSError, ValueError):
            is_right = False
        outcomes["opened whole" if is_right else WRONG] += 1
    wait()
    (jobs.images / "00b.png").unlink(missing_ok=True)
    return outcomes


def run(most: int, corruptions: int, seconds: float) -> list[tuple[str, int, Counter]]:
    """Runs the campaign.

    Args:
        most: Moments of each job at which it is disturbed; all, if it has no more.
        corruptions: Files that are damaged.
        seconds: How long an index is read while it is updated.

    Returns:
        What was done, how often, and what came of it.
    """
    torch.set_num_threads(1)
    chance = random.Random(0)
    results: list[tuple[str, int, Counter]] = []
    with tempfile.TemporaryDirectory() as folder:
        jobs = Jobs(Path(folder))
        gc.freeze()  # so that the memory of a fork stays that of this process

        def add(what: str, outcomes: Counter, trials: int | None = None) -> None:
            results.append((what, sum(outcomes.values()) if trials is None else trials, outcomes))
            print(f"{what}: {dict(outcomes)}", file=sys.stderr, flush=True)

        def nothing(out: Path) -> None:
            pass

        def older(out: Path) -> None:
            """An index without some images, and with one that is gone."""
            shutil.copytree(jobs.root / "older", out)

        hidden, extra = jobs.images / "disk", jobs.images / "gone.png"
        hidden.rename(jobs.root / "hidden")
        shutil.copy(jobs.images / "01.jpg", extra)
        fork(lambda: jobs.index(jobs.root / "older"))()
        extra.unlink()
        (jobs.root / "hidden").rename(hidden)
        for what, name, prepare in [
            ("index", "index", nothing),
            ("index, an update", "index", older),
            ("caption", "captions.jsonl", nothing),
        ]:
            for how, act in [("killed", kill), ("killed with the power cut", cut_power), ("disk full", fill_disk)]:
                outcomes = disturb(jobs, name, prepare, act, most)
                add(f"{what}: {how}", outcomes, outcomes["as undisturbed"] + outcomes[WRONG])
        for kind in KINDS:
            share = corruptions // len(KINDS)
            add(f"index: {kind}", corrupt_index(jobs, kind, share * 2 // 3, chance), share * 2 // 3)
            add(f"index, not finished: {kind}", corrupt_parts(jobs, kind, share // 6, chance), share // 6)
            add(f"captions: {kind}", corrupt_captions(jobs, kind, share // 6, chance), share // 6)
        add("index: folders away", take_folders_away(jobs, DOUBLED, chance))
        outcomes = double(jobs, "index", DOUBLED, chance)
        add("index: two jobs", outcomes, DOUBLED)
        outcomes = double(jobs, "captions.jsonl", DOUBLED, chance)
        add("caption: two jobs", outcomes, DOUBLED)
        add("index: opened while it is updated", read_while_updated(jobs, seconds))
    return results


def report(results: list[tuple[str, int, Counter]]) -> str:
    """A table in Markdown."""
    lines = ["| trial | number | outcome | wrong |", "|---|---|---|---|"]
    for what, trials, outcomes in results:
        outcome = ", ".join(f"{name} {count}" for name, count in outcomes.items() if name != WRONG and count)
        lines.append(f"| {what} | {trials} | {outcome} | {outcomes[WRONG]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Kill, fill, cut and corrupt `index` and `caption`.")
    parser.add_argument("--moments", type=int, default=1000, help="most of each job; by default all")
    parser.add_argument("--corruptions", type=int, default=450)
    parser.add_argument("--seconds", type=float, default=20.0, help="of reading an index while it is updated")
    parser.add_argument("--write", type=Path, help="page whose table is replaced")
    options = parser.parse_args()
    table = report(run(options.moments, options.corruptions, options.seconds))
    print(table)
    if options.write:
        before, after = options.write.read_text(encoding="utf-8").split("| trial |")[0], "\n\n"
        rest = options.write.read_text(encoding="utf-8").partition("| trial |")[2].partition("\n\n")[2]
        options.write.write_text(f"{before}{table}{after}{rest}", encoding="utf-8")
