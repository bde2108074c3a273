"""Kills, power cuts, disks that are full or fail, folders that are away, doubled jobs and corruptions, over `index`,
`caption`, `demo`, `push` and `serve`.

    python -m benchmarks.campaign --write docs/reliability.md

A run is forked for each trial, so that whatever becomes of it, the next one begins as it did. The moments of a run are
its operations on files: each that opens one to write, brings one to the disk, renames, deletes or makes one. There the
run is killed, or killed with the power cut (what was not brought to the disk becomes zeros from some byte on), or the
disk is full or fails; it also fails at each file that is opened to read, and at each folder that is listed. Then the
same command is run again, and has to leave what an undisturbed run leaves. The index has lists, as one of many vectors
has. What meets a network is in `campaign_network`.

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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import campaign_jobs
from benchmarks.campaign_jobs import (
    CAPTIONS,
    DEMO,
    INDEX,
    INDEX_FILES,
    OLDER,
    REFERENCE,
    WRONG,
    Jobs,
    Moments,
    attempt,
    cut_power,
    fail_disk,
    fill_disk,
    fork,
    kill,
)
from benchmarks.campaign_network import DISTURBANCES, disturb_push, end_server
from mmgem.training.search import building
from mmgem.training.search.building import build_index
from mmgem.training.search.storage import MANIFEST, UNFINISHED, read_index, verify_index

ACTS = {  # what is done, and whether where something is read
    "killed": (kill, False),
    "killed with the power cut": (cut_power, False),
    "disk full": (fill_disk, False),
    "disk fails, writing": (fail_disk, False),
    "disk fails, reading": (fail_disk, True),
}
DOUBLED = 20  # pairs of jobs, updates while a folder is away, and servers that are ended


def disturb(jobs: Jobs, name: str, prepare: Callable[[Path], None], how: str, most: int) -> Counter:
    """Disturbs a job at every moment, or as many as `most`, evenly spaced; runs it again each time."""
    act, is_reading = ACTS[how]
    outcomes: Counter = Counter()

    def start(at: int | None) -> tuple[Path, tuple[int, Any]]:
        out = jobs.root / name
        shutil.rmtree(out, ignore_errors=True)
        out.unlink(missing_ok=True)
        prepare(out)

        def run() -> list[int]:
            moments = Moments(at, act, jobs.root if is_reading else None)
            jobs.run(out)
            count, moments.at = moments.count, None
            return [count, jobs.left_out(out)]

        return out, fork(run)()

    _, (_, (count, _)) = start(None)
    for at in sorted({round(step) for step in np.linspace(0, count - 1, min(count, most))}):
        out, (_, result) = start(at)
        was_stopped = not isinstance(result, list)
        status, again = fork(lambda out=out: [jobs.run(out), jobs.is_as_undisturbed(out, not is_reading)])()
        is_right = status == 0 and isinstance(again, list) and again[1]
        if isinstance(result, dict):  # it says of which file
            is_right = is_right and str(jobs.root) in result["message"]
        elif result is not None and not result[1]:  # nothing was left out without a word
            is_right = is_right and again[0] == (campaign_jobs.PHOTOGRAPHS if name == DEMO else 0)
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


def corrupt_index(jobs: Jobs, kind: str, count: int, chance: random.Random) -> Counter:
    """An index with one file damaged: it is searched, verified, and brought up to date."""
    outcomes: Counter = Counter()
    out = jobs.root / INDEX

    def search() -> list:
        return jobs.search(out)

    def verify() -> list[str]:
        return list(verify_index(out).damaged)

    def update() -> list:
        return [jobs.run(out), jobs.is_as_undisturbed(out)]

    for number in range(count):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(jobs.root / REFERENCE, out)
        path = sorted(out.iterdir())[number % len(INDEX_FILES)]
        whole = path.read_bytes()
        path.write_bytes(corrupt(whole, kind, chance))
        is_changed = path.read_bytes() != whole
        status, answers = fork(lambda: [attempt(task) for task in (search, verify, update)])()
        found, check, again = answers or (None, None, None)
        is_refused = isinstance(found, dict) and found["is_refusal"] and str(out) in found["message"]
        is_named = check == [path.name] or (path.name == MANIFEST and isinstance(check, dict))
        is_mended = isinstance(again, list) and again[1]
        is_update_refused = isinstance(again, dict) and again["is_refusal"] and str(out) in again["message"]
        is_right = (
            status == 0
            and (is_refused or found == jobs.hits)
            and (is_named or not is_changed)
            and (is_mended or is_update_refused)
        )
        if not is_right:
            print(f"wrong: {path.name}, {kind}: {status}, {found}, {check}, {again}", file=sys.stderr)
        outcomes["refused by name" if is_refused else "searched as before"] += 1
        outcomes["mended by the update" if is_mended else "update refused"] += 1
        outcomes[WRONG] += not is_right
    return outcomes


def corrupt_parts(jobs: Jobs, kind: str, count: int, chance: random.Random) -> Counter:
    """What a killed run leaves, with one file damaged: the next run takes the rest from there."""
    outcomes: Counter = Counter()
    out, kept = jobs.root / INDEX, jobs.root / "killed"
    if not kept.exists():

        def run() -> None:
            building.merge = None  # type: ignore[assignment]
            jobs.run(kept)

        fork(run)()
    for _ in range(count):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(kept, out)
        path = chance.choice(sorted((out / UNFINISHED).iterdir()))
        path.write_bytes(corrupt(path.read_bytes(), kind, chance))
        status, again = fork(lambda: [jobs.run(out), jobs.is_as_undisturbed(out)])()
        is_mended = isinstance(again, list) and again[1]
        is_refused = isinstance(again, dict) and again["is_refusal"] and str(out) in again["message"]
        is_right = status == 0 and (is_mended or is_refused)
        if not is_right:
            print(f"wrong: {path.name}, {kind}: {status}, {again}", file=sys.stderr)
        outcomes["as undisturbed" if is_mended else "refused by name" if is_refused else WRONG] += 1
        outcomes[WRONG] += status != 0
    return outcomes


def corrupt_captions(jobs: Jobs, kind: str, count: int, chance: random.Random) -> Counter:
    """Half of the captions, with something wrong in the file: they are gone on with, or refused."""
    outcomes: Counter = Counter()
    out = jobs.root / CAPTIONS
    lines = (jobs.root / "reference" / CAPTIONS).read_bytes().splitlines(keepends=True)
    for _ in range(count):
        out.write_bytes(corrupt(b"".join(lines[: campaign_jobs.IMAGES // 2]), kind, chance))
        damaged = out.read_bytes()
        status, again = fork(lambda: jobs.run(out))()
        is_refused = isinstance(again, dict) and again["is_refusal"] and str(out) in again["message"]
        names = [] if is_refused else [json.loads(line).get("file_name") for line in out.read_bytes().splitlines()]
        # A bit of the text of a caption, or of the name of an image, cannot be told from what was meant.
        is_whole = is_refused or (len(names) == len(set(names)) and len(set(names)) >= campaign_jobs.IMAGES)
        outcomes["refused by name" if is_refused else "gone on with"] += 1
        outcomes[WRONG] += status != 0 or not is_whole or (is_refused and out.read_bytes() != damaged)
    return outcomes


def take_folders_away(jobs: Jobs, count: int, chance: random.Random) -> Counter:
    """Updates while folders cannot be listed, or are empty; then they are back."""
    outcomes: Counter = Counter()
    out = jobs.root / INDEX
    for number in range(count):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(jobs.root / REFERENCE, out)
        name, is_emptied = chance.choice(["disk", "disk/deep"]), number % 2
        place, away = jobs.images / name, jobs.root / "away"

        def update(name=name, is_emptied=is_emptied) -> list:
            scandir = os.scandir

            def listing(path):
                if str(path).endswith(name) and not is_emptied:
                    raise OSError(chance.choice([5, 13, 112, 116]), "away", str(path))
                return scandir(path)

            os.scandir = listing  # type: ignore[assignment]
            report = build_index(jobs.images, jobs.model, jobs.processor, out, campaign_jobs.BATCH_SIZE, memory=1)
            return [report.images, report.embedded, [file.file_name for file in report.skipped]]

        if is_emptied:
            place.rename(away)
            place.mkdir()
        _, during = fork(update)()
        if is_emptied:
            place.rmdir()
            away.rename(place)
        _, after = fork(lambda: [jobs.run(out), jobs.is_as_undisturbed(out)])()
        is_right = during == [campaign_jobs.IMAGES, 0, [name]] and after == [0, True]
        outcomes["rows kept, folder named" if is_right else WRONG] += 1
    return outcomes


def double(jobs: Jobs, name: str, count: int, chance: random.Random) -> Counter:
    """Two jobs at one output, one a moment after the other; a third goes on."""
    outcomes: Counter = Counter()
    out = jobs.root / name
    for _ in range(count):
        shutil.rmtree(out, ignore_errors=True)
        out.unlink(missing_ok=True)
        waits = [fork(lambda: jobs.run(out))]
        time.sleep(chance.uniform(0, 0.05))
        waits.append(fork(lambda: jobs.run(out)))
        results = [wait()[1] for wait in waits]
        refused = [one for one in results if isinstance(one, dict) and one["error"] == "BlockingIOError"]
        _, is_whole = fork(
            lambda: jobs.run(out) == (campaign_jobs.PHOTOGRAPHS if name == DEMO else 0) and jobs.is_as_undisturbed(out)
        )()
        outcomes["one refused by name" if refused else "one after the other"] += 1
        outcomes[WRONG] += not is_whole or sum(isinstance(one, int) for one in results) + len(refused) != 2
    return outcomes


def read_while_updated(jobs: Jobs, seconds: float) -> Counter:
    """Loads an index over and over while it is updated over and over: it is always one that was finished."""
    outcomes: Counter = Counter()
    out = jobs.root / INDEX
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(jobs.root / REFERENCE, out)

    def update() -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            (jobs.images / "00b.png").symlink_to(jobs.images / "01.jpg")
            jobs.run(out)
            (jobs.images / "00b.png").unlink()
            jobs.run(out)

    wait, end = fork(update), time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            rows = read_index(out, "out").rows
            assert rows is not None
            is_right = len(rows) in (campaign_jobs.IMAGES, campaign_jobs.IMAGES + 1) and not rows.damaged().any()
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
            shutil.copytree(jobs.root / OLDER, out)

        for what, name, prepare in [
            ("index", INDEX, nothing),
            ("index, an update", INDEX, older),
            ("caption", CAPTIONS, nothing),
            ("demo", DEMO, nothing),
        ]:
            for how in ACTS:
                outcomes = disturb(jobs, name, prepare, how, most)
                add(f"{what}: {how}", outcomes, outcomes["as undisturbed"] + outcomes[WRONG])
        for kind in KINDS:
            share = corruptions // len(KINDS)
            add(f"index: {kind}", corrupt_index(jobs, kind, share * 2 // 3, chance), share * 2 // 3)
            add(f"index, not finished: {kind}", corrupt_parts(jobs, kind, share // 6, chance), share // 6)
            add(f"captions: {kind}", corrupt_captions(jobs, kind, share // 6, chance), share // 6)
        add("index: folders away", take_folders_away(jobs, DOUBLED, chance))
        for name in (INDEX, CAPTIONS, DEMO):
            add(f"{name.removesuffix('s.jsonl')}: two jobs", double(jobs, name, DOUBLED, chance), DOUBLED)
        add("index: opened while it is updated", read_while_updated(jobs, seconds))
        for how in DISTURBANCES:
            outcomes = disturb_push(how)
            add(f"push: {how}", outcomes, outcomes["whole in the end"] + outcomes[WRONG])
        for ending in (signal.SIGKILL, signal.SIGTERM):
            add(f"serve: {ending.name}", end_server(jobs, ending, DOUBLED, chance), DOUBLED)
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
