"""Options and answers that the commands of `mmgem` share. Nothing heavy is imported before a command runs."""

import atexit
import gc
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from mmgem.training.data.paths import check_folder, no_checkpoint
from mmgem.training.json_text import to_json
from mmgem.training.output_folder import check_writable, whole_file
from mmgem.training.printable import counted, is_utf8, printable
from mmgem.training.progress import shown

KEPT = "search_index.json", "config.json"  # in folders none of whose files is replaced by a table
CARDS = Path(__file__).parent.parent / "model_cards"
TINY, PHOTO = CARDS / "mmgem-tiny", CARDS / "mmgem-photo"


def path(text: str) -> Path:
    """Parses a path; an empty one, such as of a variable that is not set, would be the current folder."""
    if not str(text):
        raise typer.BadParameter("is empty; expected a path")
    return Path(text)


ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Folder of a checkpoint, or a name on the Hub.")]
ModelOption = Annotated[str, typer.Option("--model", help="Folder of a checkpoint, or a name on the Hub.")]
ImageFolder = Annotated[
    Path,
    typer.Argument(
        parser=path,
        metavar="FOLDER",
        help="Folder of images, at any depth; - for the files that standard input names, below the current folder.",
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Images at a time.")]
MAX_PIXELS = 1 << 28  # of `processing.image_loading`, whose import takes long
MaxPixels = Annotated[int, typer.Option(min=1, help="The most pixels of an image that is read.")]
Table = Annotated[
    Path | None,
    typer.Option("--table", parser=path, help="File for the answers as a table: .csv, .parquet or .jsonl."),
]
Wait = Annotated[bool, typer.Option("--wait", help="Wait for a job that writes OUT, instead of giving up.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


OBJECTS = 10_000  # that are new before Python looks for garbage
notes = {"are_said": True}  # of `--quiet`
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def start(is_quiet: bool) -> None:
    """Before a command: without notes if it is to be quiet, and without progress bars where nobody sees them move."""
    notes["are_said"] = not is_quiet
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed: a file that is opened would get its number, and what is printed
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    shown["as"] = "nothing" if is_quiet else None
    if is_quiet or not sys.stderr.isatty():
        os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def set_up_torch() -> None:
    """Sets what torch reads when it is imported, where the user has not.

    Threads of a model sleep where they wait for each other, since others decode pictures meanwhile, or work is short:
    OpenMP's waiting in a loop takes more of the processor than all else. And Linux gives large tensors huge pages: to
    give the activations of a convolutional tower pages of 4 KiB, one after the other, took longer than computing them.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def look_for_less_garbage() -> None:
    """Lets Python look for garbage after 10,000 new objects instead of 700, and not when it ends.

    Torch and transformers define a million objects when they are imported, of which none is garbage.
    """
    if gc.get_threshold()[0] < OBJECTS:
        gc.set_threshold(OBJECTS, 50)
        atexit.register(gc.freeze)


@contextmanager
def work(wait: bool = False) -> Iterator[None]:
    """While a command works, stdout is kept for its answer, and libraries say only what a user needs.

    Args:
        wait: Whether to wait for a job that writes the same output.
    """
    from mmgem.training.output_lock import waiting

    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # What follows a memory shall not be kept from repeating the question, which has no ids there.
    warnings.filterwarnings("ignore", "Passing `.*` with `inputs_embeds`", UserWarning)
    with redirect_stdout(sys.stderr), waiting(wait):
        yield


def folder_and_names(folder: Path) -> tuple[Path, list[str] | None]:
    """Returns FOLDER and no names, or for `-` the current folder, and the files that standard input names.

    Names stand on lines, or end in NUL as those of `find -print0`.

    Raises:
        FileNotFoundError: If FOLDER is not there.
        ValueError: If it is a file, there are no names, or one is not below the current folder.
    """
    if str(folder) != "-":
        check_folder(folder)
        return folder, None
    here, data = Path.cwd(), sys.stdin.buffer.read()
    names: dict[str, None] = {}
    for line in map(os.fsdecode, data.split(b"\0") if b"\0" in data else data.splitlines()):
        name = Path(os.path.normpath(here / line))
        if line and not name.is_relative_to(here):
            raise ValueError(f"standard input names {line!r}; expected files below the current folder, {str(here)!r}.")
        if line:
            names[name.relative_to(here).as_posix()] = None
    if not names:
        raise ValueError("standard input names no file; expected one on each line, or ended by NUL.")
    return here, list(names)


def check_model(model: str) -> None:
    """Refuses what is surely no checkpoint, before anything heavy is imported; raises what `load_checkpoint` does."""
    if not model:
        raise ValueError("`model` is ''; expected the folder of a checkpoint, or a name on the Hub.")
    if model == str(TINY) and not TINY.exists():
        raise FileNotFoundError("`model` is mmgem-tiny, which comes with a source checkout only; expected --model.")
    configs = Path(model, "config.json"), Path(model, "adapter_config.json")  # of a whole model, of LoRA
    may_be_there = any(map(Path.is_file, configs)) if Path(model).is_dir() else _HUB_NAME.fullmatch(model)
    if not may_be_there and is_utf8(model):  # of other names `load_config` says what is wrong with them
        raise no_checkpoint(model)


def load_model(model: str) -> tuple[Any, Any]:
    """Loads model and processor; raises what `load_checkpoint` does."""
    check_model(model)
    from mmgem.training.loading import load_checkpoint

    return load_checkpoint(model)


def report_skipped(skipped: Iterable, passed_over: dict[str, int]) -> None:
    """Says which files were left out, and why; and how many are not read at all."""
    if not notes["are_said"]:
        return
    for file_name, reason in skipped:
        typer.secho(printable(f"left out {file_name}: {reason}"), err=True, fg=typer.colors.YELLOW)
    for kind, count in passed_over.items():
        typer.secho(f"not read: {kind} ({count:,})", err=True, fg=typer.colors.YELLOW)


def left_out(skipped: list) -> str:
    """The end of a summary: how many files were left out."""
    return f"{counted(len(skipped), 'file')} left out"


def table(figures: dict[str, float], intervals: dict[str, tuple[float, float]] | None = None) -> list[str]:
    """A line for each figure, with its confidence interval where it has one."""
    width = max(map(len, figures), default=0)
    lines = {name: f"{name:{width}}  {value:.4f}" for name, value in figures.items()}
    for name, (low, high) in (intervals or {}).items():
        lines[name] += f"  {low:.4f} to {high:.4f}"
    return list(lines.values())


def answer(result: Any, as_json: bool, lines: Iterable[str]) -> None:
    """Prints what a command found: `result` as JSON, or `lines` for a person."""
    is_unicode = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    text = to_json(result, indent=2, ensure_ascii=not is_unicode) if as_json else "\n".join(map(printable, lines))
    try:
        typer.echo(text)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(f"The answer cannot be written to standard output: {error.strerror}.") from error


def write_table(rows: list[dict[str, Any]], file: Path | None) -> None:
    """Writes rows as CSV, Parquet or JSON lines, by the ending of the file; nothing without a file.

    Raises:
        ValueError: For another ending.
    """
    if file is None:
        return
    check_table(file)
    import pandas

    frame, kind = pandas.DataFrame(rows), file.suffix.lower()
    with whole_file(file.resolve()) as partial:  # a link stays one
        if kind == ".csv":
            frame.to_csv(partial, index=False)
        elif kind == ".parquet":
            frame.to_parquet(partial, index=False)
        else:
            frame.to_json(partial, orient="records", lines=True, force_ascii=False)


def check_table(file: Path | None) -> None:
    """Refuses a file that `write_table` cannot write, before any work is done."""
    if file is None:
        return
    if file.suffix.lower() not in (".csv", ".parquet", ".jsonl"):
        raise ValueError(f"`--table` is {str(file)!r}; expected a file that ends in .csv, .parquet or .jsonl.")
    if file.is_dir() or not file.parent.is_dir():
        what = "a folder" if file.is_dir() else "in a folder that is not there"
        raise ValueError(f"`--table` is {str(file)!r}, {what}; expected a file in one that is.")
    check_writable(file, "--table")
    if file.exists() and (file.stem == "metadata" or any((file.parent / name).is_file() for name in KEPT)):
        raise ValueError(
            f"`--table` is {str(file)!r}, which belongs to a gallery, an index or a checkpoint; expected another file."
        )
