"""The jobs of the campaign, the moments at which they are disturbed, and what is done to them there."""

import errno
import gc
import json
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from mmgem.training import captioning
from mmgem.training.captioning import caption_folder
from mmgem.training.demo import photographs
from mmgem.training.demo.run import PAGE_FILE, RESULTS_FILE, run_demo
from mmgem.training.inference import embed_and_remember, generate_captions
from mmgem.training.loading import load_checkpoint
from mmgem.training.scenes.dataset import SceneDataset
from mmgem.training.search import index as index_module
from mmgem.training.search import inverted_lists, item_embedder
from mmgem.training.search.building import build_index
from mmgem.training.search.checked_files import DamagedFileError
from mmgem.training.search.fingerprint import Fingerprint
from mmgem.training.search.index import SearchIndex
from mmgem.training.search.storage import MANIFEST, read_index, verify_index

TINY = Path(__file__).parent.parent / "model_cards" / "mmgem-tiny"
IMAGES, BATCH_SIZE, ROWS_PER_PART = 24, 4, 8
PHOTOGRAPHS = 3  # of a demo
INDEX, CAPTIONS, DEMO = "index", "captions.jsonl", "demo"  # outputs of the jobs
REFERENCE, OLDER = f"reference/{INDEX}", f"older/{INDEX}"  # of an undisturbed run; of other images
QUERY = "a red star"
INDEX_FILES = {"embedding", "lists", "memory", "probes", "rows", MANIFEST}
TIMEOUT = 120  # seconds that a trial may take
_OPERATIONS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree"}
_LISTINGS = {"os.listdir", "os.scandir"}
WRONG = "wrong"
REFUSALS = ValueError, FileNotFoundError, PermissionError, ConnectionError, DamagedFileError


class Moments:
    """Counts the operations on files of this process, and acts at one of them, before it happens.

    Args:
        at: The number of the operation; None for none.
        act: What is done there.
        read: The folder below which each file that is opened to read, and each folder that is listed, is an operation;
            None for those that write, anywhere.
    """

    def __init__(
        self,
        at: int | None = None,
        act: Callable[["Moments"], None] = lambda moments: None,
        read: Path | None = None,
    ):
        self.at, self.act, self.read, self.count = at, act, read, 0
        self.unsynced: set[str] = set()
        self._fsync = os.fsync
        os.fsync = self._sync  # type: ignore[assignment]
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple) -> None:
        is_written = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        is_opened = is_written and "/dev/" not in str(arguments[0])
        if self.read is not None:
            if (event in _LISTINGS or event == "open" and not is_written) and str(self.read) in str(arguments[0]):
                self._meet()
        elif is_opened or event in _OPERATIONS:
            self._meet()
        if is_opened:
            self.unsynced.add(str(arguments[0]))

    def _sync(self, number: int) -> None:
        if self.read is None:
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
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fail_disk(moments: Moments) -> None:
    """Lets the operation fail, as what is read or written does on a disk that fails: it says of no file."""
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def attempt(task: Callable[[], Any]) -> Any:
    """The result of a task, or its error as `{"error": type, "message": text, "is_refusal": bool}`."""
    try:
        return task()
    except BaseException as error:
        is_refusal = isinstance(error, REFUSALS) and not isinstance(error, UnicodeError)
        return {"error": type(error).__name__, "message": str(error), "is_refusal": is_refusal}


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
        os.dup2(null, 1)
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
        self.root, self.images, self.photographs = root, root / "images", root / "photographs"
        self.model, self.processor = load_checkpoint(str(TINY), device="cpu")
        self._left_out = 0
        for number, row in enumerate(SceneDataset(8_000_000, IMAGES, columns=["image"])):
            path = self.images / ("" if number % 3 else "disk/deep") / f"{number:02}.{'jpg' if number % 2 else 'png'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            row["image"].save(path)
        self.photographs.mkdir()
        for path in sorted(self.images.glob("*.*"))[:PHOTOGRAPHS]:
            shutil.copy(path, self.photographs)
        self._remember()
        for name in (INDEX, CAPTIONS, DEMO):
            self.run(root / "reference" / name)
        self.hits = self.search(root / REFERENCE)
        hidden, extra = self.images / "disk", self.images / "gone.png"
        hidden.rename(root / "hidden")
        shutil.copy(self.images / "01.jpg", extra)
        self.run(root / OLDER)
        extra.unlink()
        (root / "hidden").rename(hidden)

    def run(self, out: Path) -> int:
        """Runs the job whose output has this name; how many images it embeds or captions."""
        given = self.model, self.processor
        if out.name == CAPTIONS:
            captions = caption_folder(self.images, *given, out, batch_size=BATCH_SIZE)
            self._left_out = len(captions.skipped)
            return captions.captioned
        if out.name == DEMO:
            run_demo(out, *given, folder=self.photographs)
            return PHOTOGRAPHS
        report = build_index(self.images, *given, out, BATCH_SIZE, memory=1)
        self._left_out = len(report.skipped)
        return report.embedded

    def left_out(self, out: Path) -> int:
        """How many files and folders the last run named that it left out."""
        if out.name == DEMO:
            return len(json.loads((out / RESULTS_FILE).read_text())["photographs"]["skipped"])
        return self._left_out

    def search(self, out: Path) -> list:
        """What is found, and the memory of it."""
        index = SearchIndex.load(out, self.model, self.processor)
        hits = index.search(QUERY, top=5)
        names = [hit.path.name for hit in hits]
        return [names, [round(hit.score, 4) for hit in hits], np.asarray(index.memory([hits[0].row])).tolist()]

    def is_as_undisturbed(self, out: Path, in_order: bool = True) -> bool:
        """Whether an output is what a run leaves that was not disturbed; captions perhaps in another order."""
        reference = self.root / "reference" / out.name
        if out.with_name(f"{out.name}.lock").exists():
            return False
        if out.name == CAPTIONS:
            lines, expected_lines = (path.read_bytes().splitlines(keepends=True) for path in (out, reference))
            return lines == expected_lines if in_order else sorted(lines) == sorted(expected_lines)
        if out.name == DEMO:
            figures, expected = (json.loads((place / RESULTS_FILE).read_text()) for place in (out, reference))
            names, expected_names = ({path.name for path in place.rglob("*")} for place in (out, reference))
            page, expected_page = ((place / PAGE_FILE).read_text() for place in (out, reference))
            is_page = page.count("data:image") == expected_page.count("data:image") and "</html>" in page
            return names == expected_names and is_page and figures | {"seconds": 0} == expected | {"seconds": 0}
        rows, expected_rows = (read_index(place, "out").rows for place in (out, reference))
        assert rows is not None and expected_rows is not None
        return (
            {path.name.partition("-")[0] for path in out.iterdir()} == INDEX_FILES
            and not verify_index(out).damaged
            and rows.table.equals(expected_rows.table)
            and all(
                np.allclose(rows.arrays[name][:], expected_rows.arrays[name][:], atol=1e-5) for name in rows.arrays
            )
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
        inverted_lists.EXACT_BELOW = 1
        Fingerprint.take = staticmethod(once(Fingerprint.take))  # type: ignore[method-assign, assignment]
        SearchIndex.explain = once(SearchIndex.explain)  # type: ignore[method-assign]
        for module, name in [
            (index_module, "embed_texts"),
            (index_module, "embed_images"),
            (photographs, "generate_captions"),
            (photographs, "generate_answers"),
            (photographs, "classify"),
        ]:
            setattr(module, name, once(getattr(module, name)))


def once(function: Callable) -> Callable:
    """The function, which computes once what it is given; an index, a model or a processor is always the same."""
    known: dict[str, Any] = {}

    def written(given: Any) -> str:
        if isinstance(given, Image.Image):
            return f"{given.size}{given.tobytes().hex()}"
        if isinstance(given, torch.Tensor | np.ndarray):
            return str(given.tolist())
        if isinstance(given, list | tuple):
            return str([written(one) for one in given])
        return "" if isinstance(given, SearchIndex | PreTrainedModel | ProcessorMixin) else str(given)

    def remembered(*given, **named):
        key = written([*given, *named.items()])
        if key not in known:
            known[key] = function(*given, **named)
        return known[key]

    return remembered
