"""The command line `mmgem`. Every command imports what it needs when it runs, so that `--help` answers at once."""

import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand, TyperGroup

from mmgem import __version__
from mmgem.training import cli_index
from mmgem.training.cli_common import (
    MAX_PIXELS,
    PHOTO,
    TINY,
    AsJson,
    BatchSize,
    ImageFolder,
    MaxPixels,
    ModelArgument,
    ModelOption,
    Table,
    Wait,
    answer,
    check_model,
    check_table,
    folder_and_names,
    left_out,
    load_model,
    look_for_less_garbage,
    path,
    report_skipped,
    set_up_torch,
    start,
    table,
    work,
    write_table,
)
from mmgem.training.output_lock import only_writer
from mmgem.training.printable import counted, printable

# Errors that a user can cause and mend take a line; any other is a defect and comes with its traceback.
USER_ERRORS = (ValueError, TypeError, OSError, ImportError, FloatingPointError, OverflowError, MemoryError)
# What libraries say in errors of their own.
NO_ROOM = re.compile("No space left|[Qq]uota exceeded|can't allocate memory|Cannot allocate memory|can't start new")
# A worker of a loader that the system killed, most often for lack of memory.
LOST = re.compile("DataLoader worker .*(killed by signal|exited unexpectedly)")

# What stands before the message of an error in a worker of a loader: its traceback.
OF_WORKER = re.compile(r"^Caught \w+ in DataLoader worker.*\n[\w.]+: ", re.DOTALL)

# Options of `mmgem` that may stand anywhere.
OF_ALL = ("--quiet", "--traceback")

# What is said to whoever interrupts a command.
GOING_ON = {
    "index": "; what is embedded is kept, and the same command goes on from there",
    "caption": "; what is captioned is kept, and the same command goes on from there",
    "train": "; the same command with --resume goes on from the last checkpoint",
}

# What ends a job from outside: `kill`, a job system at its limit of time or a shutdown; a terminal that is closed.
PIPE = 13  # the number of SIGPIPE, which Windows does not have
ENDS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


class _Commands(TyperGroup):
    """Reports user errors in one line, with exit code 1; wrong usage has typer's 2."""

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        """Takes what every command has after the command, too."""
        end = args.index("--") if "--" in args else len(args)
        first = [word for word in args[:end] if word in OF_ALL]
        return super().parse_args(ctx, first + [word for word in args[:end] if word not in OF_ALL] + args[end:])

    def invoke(self, ctx) -> Any:
        try:
            with _ended_as_interrupted():
                result = super().invoke(ctx)
                sys.stdout.flush()  # here, and not where nobody can catch what comes of it
                return result
        except BrokenPipeError as error:  # who reads the answer, such as `head`, has enough of it
            _discard(sys.stdout)
            raise typer.Exit(128 + PIPE) from error
        except Exception as error:
            is_lost = LOST.search(str(error)) is not None
            is_known = isinstance(error, USER_ERRORS) or NO_ROOM.search(str(error)) or is_lost
            if ctx.params["traceback"] or not is_known:
                raise
            said = OF_WORKER.sub("", str(error))
            message = printable(" ".join(said.split()) or type(error).__name__)
            if is_lost:
                message += f" Memory may have run out{GOING_ON.get(ctx.invoked_subcommand, '')}."
            typer.secho(f"mmgem: {message}", err=True, fg=typer.colors.RED)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            number = signal.Signals(*error.args or (signal.SIGINT,))
            by = "" if number == signal.SIGINT else f" by {number.name}"
            after = GOING_ON.get(ctx.invoked_subcommand, "")
            typer.secho(f"mmgem: interrupted{by}{after}", err=True, fg=typer.colors.YELLOW)
            raise typer.Exit(128 + number) from error  # as of a program that the signal ends


@contextmanager
def _ended_as_interrupted() -> Iterator[None]:
    """Lets the signals that end a job do what Ctrl-C does, once; but not where torchrun sends them to its processes,
    which may wait for each other and then would not end."""
    is_ours = threading.current_thread() is threading.main_thread() and "RANK" not in os.environ
    ours = [number for number in ENDS if is_ours and signal.getsignal(number) is signal.SIG_DFL]  # not of `nohup`

    def interrupt(number: int, frame: object) -> None:
        for one in ours:
            signal.signal(one, signal.SIG_IGN)  # what is kept now shall be kept whole
        raise KeyboardInterrupt(number)

    for number in ours:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _discard(stream: Any) -> None:
    """Lets what is still to be written to a closed pipe go nowhere, so that Python does not complain at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


OF_MODELS = "Commands for models"  # which stand in `--help` after those for pictures and texts
app = typer.Typer(cls=_Commands, no_args_is_help=True, pretty_exceptions_enable=False)


def _version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"mmgem {__version__}")
        raise typer.Exit


@app.callback()
def main(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_version, help="Print it.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Say nothing but the answer, and errors.")] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error comes from.")] = False,
):
    """One model that embeds images and text for search, and writes about images.

    Begin with `mmgem index PHOTOGRAPHS --model MODEL --out INDEX`, then `mmgem search INDEX "two dogs in the snow"`;
    or with `mmgem caption PHOTOGRAPHS --model MODEL --out captions.jsonl`. `mmgem COMMAND --help` says more.
    """
    start(quiet)
    look_for_less_garbage()
    if context.invoked_subcommand != "train":  # whose steps keep all threads busy
        set_up_torch()
    for stream in (sys.stdout, sys.stderr):  # so that no name of a file costs the result
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, TextIOWrapper):  # which may name files whose names are any bytes
        sys.stdin.reconfigure(errors="surrogateescape")


app.command(cls=cli_index.IndexCommand)(cli_index.index)
app.command()(cli_index.search)
app.command()(cli_index.ask)
app.command()(cli_index.verify)


@app.command()
def demo(
    folder: Annotated[
        Path | None,
        typer.Argument(
            parser=path,
            metavar="FOLDER",
            help="Folder of photographs; by default scenes and free photographs are shown.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(parser=path, help="Folder for the page and its parts.")] = Path("demo"),
    count: Annotated[int, typer.Option(min=12, help="Scenes in the gallery, without FOLDER.")] = 500,
    label: Annotated[
        list[str] | None, typer.Option(help="Class to choose from for each photograph; may be given again.")
    ] = None,
    question: Annotated[
        list[str] | None, typer.Option(help="Question to ask about photographs; may be given again.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder of a checkpoint, or a name on the Hub; by default mmgem-tiny, for photographs mmgem-photo."
        ),
    ] = None,
    wait: Wait = False,
    as_json: AsJson = False,
):
    """Index, search, classify, caption and ask about a folder of photographs, or measure a drawn gallery; leave one
    HTML page."""
    has_photo = (PHOTO / "model.safetensors").is_file()
    if model is None and folder is not None and not has_photo:
        raise typer.BadParameter("mmgem-photo has no weights here; give --model")
    with work(wait):
        from mmgem.training.demo.run import run_demo

        name = str(TINY if folder is None else PHOTO) if model is None else model
        other = load_model(str(PHOTO)) if model is None and folder is None and has_photo else None
        page, figures = run_demo(out, *load_model(name), count, folder, label or (), question or (), other)
    result = {"page": str(page), "figures": figures}
    answer(result, as_json, [*table(figures), *[""] * bool(figures), f"The page is {page.resolve().as_uri()}"])


@app.command(rich_help_panel=OF_MODELS)
def scenes(
    out: Annotated[
        Path, typer.Argument(parser=path, metavar="OUT", help="New folder for the images and their metadata.jsonl.")
    ],
    seed: Annotated[int, typer.Option(help="Which scenes.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="How many.")] = 1000,
    image_size: Annotated[int, typer.Option(help="Side of the images in pixels.")] = 96,
    wait: Wait = False,
    as_json: AsJson = False,
):
    """Write drawn scenes with ground truth as an image folder."""
    with work(wait):
        from mmgem.training.scenes.dataset import write_scene_folder

        write_scene_folder(out, seed, count, image_size)
    answer({"folder": str(out), "count": count}, as_json, [f"{counted(count, 'scene')} in {out}"])


@app.command(rich_help_panel=OF_MODELS)
def train(
    recipe: Annotated[
        Path, typer.Argument(parser=path, metavar="RECIPE", help="YAML file that says everything about the run.")
    ],
    out: Annotated[
        Path | None, typer.Option(parser=path, help="Folder for the checkpoint; by default runs/ and its name.")
    ] = None,
    stage: Annotated[
        str | None, typer.Option(help="Name or number of the only stage to run, from where the one before it ended.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in OUT.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Only show what the model would see, and take one step of each stage.")
    ] = False,
    wait: Wait = False,
    as_json: AsJson = False,
):
    """Train a model as a recipe says."""
    if check and resume:
        raise typer.BadParameter("give --check or --resume, not both")
    out = out or Path("runs") / (recipe.resolve().parent.name if recipe.stem == "recipe" else recipe.stem)
    if check:
        _check(recipe, out, stage, wait, as_json)
        return
    with work(wait):
        import torch.distributed as dist

        from mmgem.training.recipes.run import train as train_recipe

        report = train_recipe(recipe, out, stage=stage, resume=resume)
        if dist.is_initialized():
            dist.destroy_process_group()  # whose threads may abort a process that exits before they do
    result = {"model": str(report.model), "figures": report.metrics, "skipped": report.skipped}
    skipped = [
        f"{count} of {source} could not be read, see {out / 'skipped.jsonl'}"
        for source, count in report.skipped.items()
    ]
    if os.environ.get("RANK", "0") == "0":  # one of the processes of a distributed run
        answer(result, as_json, [*table(report.metrics), "", *skipped, f"The model is in {report.model}"])


def _check(recipe: Path, out: Path, stage: str | None, wait: bool, as_json: bool) -> None:
    """The dry run, whose lines are said as soon as they are known."""
    stdout = sys.stdout
    with work(wait):
        from mmgem.training.recipes.check import check_recipe

        checks = check_recipe(recipe, out, stage, lambda line: typer.echo(line, sys.stderr if as_json else stdout))
    result = [asdict(check) | {"images": check.images and str(check.images)} for check in checks]
    answer(result, as_json, ["", "Nothing was trained."])


@app.command(rich_help_panel=OF_MODELS)
def soup(
    out: Annotated[Path, typer.Argument(parser=path, metavar="OUT", help="New folder for the averaged model.")],
    folders: Annotated[list[Path], typer.Argument(parser=path, metavar="FOLDER", help="Models to average.")],
    weights: Annotated[list[float] | None, typer.Option("--weight", help="Of each folder, in their order.")] = None,
    wait: Wait = False,
    as_json: AsJson = False,
):
    """Average the weights of checkpoints of one run, or of models fine-tuned from one, into a Hub folder."""
    with work(wait):
        from mmgem.training.soup import soup as average

        shares = average(folders, out, weights)
    lines = [f"{share:.3f}  {folder}" for folder, share in shares.items()]
    answer({"folder": str(out), "shares": shares}, as_json, [*lines, "", f"The average is {out}"])


class _EvaluateCommand(TyperCommand):
    """Lets several names stand after `--mteb`, up to the next option."""

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        parsed: list[str] = []
        is_name = False  # of a task, after the first
        for word in args:
            is_name = is_name and not word.startswith("-")
            if is_name and parsed[-1] != "--mteb":
                parsed.append("--mteb")
            parsed.append(word)
            is_name = is_name or word == "--mteb"
        return super().parse_args(ctx, parsed)


@app.command(cls=_EvaluateCommand, rich_help_panel=OF_MODELS)
def evaluate(
    model: ModelArgument,
    data: Annotated[
        Path | None,
        typer.Argument(parser=path, metavar="DATA", help="Image folder with metadata.jsonl; not with --mteb."),
    ] = None,
    subset: Annotated[
        tuple[float, float] | None,
        typer.Option(metavar="FROM TO", help="Only images that hash to these numbers, such as 0.9 1 for a tenth."),
    ] = None,
    batch_size: BatchSize = 64,
    dataset_id: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME",
            help="Dataset on the Hub that DATA is: keep the figures in MODEL's .eval_results, too.",
        ),
    ] = None,
    mteb: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK...", help="In place of DATA: tasks and benchmarks of mteb, such as 'MIEB(lite)'."),
    ] = None,
    out: Annotated[
        Path, typer.Option(parser=path, help="Folder in which mteb keeps its results; what is there is not run again.")
    ] = Path("mteb-results"),
    all_vectors: Annotated[
        bool, typer.Option("--all-vectors", help="With --mteb, compare all vectors of an input; by default the first.")
    ] = False,
    table_file: Table = None,
    as_json: AsJson = False,
):
    """Measure retrieval, classification, captions and answers on an image folder, with 95% confidence intervals; or
    run tasks of mteb."""
    check_table(table_file)
    if mteb:
        if data is not None or subset is not None or dataset_id is not None:
            raise typer.BadParameter("--mteb brings its own data; give it without DATA, --subset and --dataset-id")
        _evaluate_on_mteb(model, mteb, out, batch_size, all_vectors, table_file, as_json)
        return
    if data is None or all_vectors:
        raise typer.BadParameter("give DATA or --mteb, and --all-vectors with the latter alone")
    with work():
        from mmgem.training.data.image_folder import read_image_folder
        from mmgem.training.data.skipped import SkippedLog
        from mmgem.training.data.text_coverage import warn_uncovered
        from mmgem.training.evaluation.eval_results import check_results_place, write_eval_results
        from mmgem.training.evaluation.evaluate import evaluate_model
        from mmgem.training.evaluation.scene_metrics import SCENE_JUDGE

        if dataset_id is not None:
            check_results_place(model, dataset_id)
        dataset, skipped = read_image_folder(data, subset=subset), SkippedLog(rows_name=str(data))
        intervals: dict[str, tuple[float, float]] = {}
        loaded, processor = load_model(model)
        warn_uncovered(processor.tokenizer, dataset.rows, str(data))
        figures = evaluate_model(
            loaded,
            processor,
            dataset,
            batch_size,
            caption_judge=SCENE_JUDGE,
            intervals=intervals,
            skipped=skipped,
        )
        written = [] if dataset_id is None else [f"kept in {write_eval_results(model, dataset_id, figures)}"]
    lines = [*table(figures, intervals), *_left_out(skipped), *written]
    answer(figures | ({"intervals": intervals} if intervals else {}), as_json, lines)
    rows = {name: dict(zip(("low", "high"), intervals.get(name, (None, None)))) for name in figures}
    write_table([{"measure": name, "value": value, **rows[name]} for name, value in figures.items()], table_file)


def _evaluate_on_mteb(
    model: str, names: list[str], out: Path, batch_size: int, all_vectors: bool, table_file: Path | None, as_json: bool
) -> None:
    with work():
        from mmgem.training.evaluation.mteb_scores import benchmark_means, find_tasks, score_tasks, wrap_model

        tasks = find_tasks(names)
        scores = score_tasks(wrap_model(model, all_vectors), tasks, out, batch_size)
    rows, means = [score._asdict() for score in scores], benchmark_means(scores)
    width = max(len(score.task) for score in scores)
    lines = [f"{score.task:{width}}  {score.score:.4f}  {score.measure}" for score in scores]
    lines += [f"{name}: {mean:.4f}, the mean of its tasks" for name, mean in means.items()]
    answer({"tasks": rows, "means": means, "out": str(out)}, as_json, [*lines, "", f"mteb's results are in {out}"])
    write_table(rows, table_file)


def _left_out(skipped) -> list[str]:
    """A line for each source of which rows could not be used; each was said when it was met."""
    return [f"left out of {source}: {counted(count, 'row')}" for source, count in skipped.counts().items()]


@app.command(rich_help_panel=OF_MODELS)
def calibrate(
    model: ModelArgument,
    data: Annotated[
        Path,
        typer.Argument(
            parser=path, metavar="DATA", help="Image folder with metadata.jsonl: a sample of what is searched."
        ),
    ],
    out: Annotated[Path, typer.Option(parser=path, help="New folder for the calibrated model.")],
    batch_size: BatchSize = 64,
    wait: Wait = False,
    as_json: AsJson = False,
):
    """Close the gap between image, text and fused embeddings, without training, for mixed corpora."""
    with work(wait):
        from mmgem.training.data.skipped import SkippedLog
        from mmgem.training.evaluation.calibration import write_calibrated

        skipped = SkippedLog(rows_name=str(data))
        report = write_calibrated(*load_model(model), data, out, batch_size, skipped)
    lines = [f"{modality:6} mean of {count}" for modality, count in report.counts.items()]
    gap = f"gap {report.gap_before:.4f} before, {report.gap_after:.4f} after"
    lines += [gap, *_left_out(skipped), "", f"The model is in {out}"]
    answer({"folder": str(out), **report._asdict()}, as_json, lines)


@app.command(rich_help_panel=OF_MODELS)
def export(
    model: ModelArgument,
    out: Annotated[
        Path, typer.Argument(parser=path, metavar="OUT", help="Folder for the ONNX graphs and the processor.")
    ],
    int8: Annotated[bool, typer.Option("--int8", help="Write graphs with quantized weights, too.")] = False,
    data: Annotated[
        Path | None,
        typer.Option(parser=path, help="Image folder with captions to compare on; by default 200 drawn scenes."),
    ] = None,
    wait: Wait = False,
    as_json: AsJson = False,
):
    """Export image and text vectors as ONNX, for any batch and length, and compare them with the model's."""
    with work(wait):
        from mmgem.training.data.image_folder import read_image_folder
        from mmgem.training.data.rows import captions_of
        from mmgem.training.onnx_export import export_onnx
        from mmgem.training.scenes.dataset import SceneDataset

        dataset = SceneDataset(2_000_000, 200) if data is None else read_image_folder(data)
        rows = [dataset[number] for number in range(len(dataset))]
        pairs = [(row["image"], captions_of(row)[0]) for row in rows if captions_of(row)]
        loaded, processor = load_model(model)
        images, texts = [image for image, _ in pairs], [text for _, text in pairs]
        report = export_onnx(loaded.cpu(), processor, out, images, texts, int8)
    result = report._asdict() | {"files": [str(file) for file in report.files]}
    lines = [*result["files"], f"At most {report.difference:.1e} from the model, on {len(pairs)} images and texts"]
    if int8:
        lines.append(f"recall@1 {report.recall:.3f}, with int8 {report.int8_recall:.3f}")
    answer(result, as_json, lines)


@app.command(rich_help_panel=OF_MODELS)
def push(
    folder: Annotated[
        Path, typer.Argument(parser=path, metavar="FOLDER", help="Folder of a checkpoint, with its card.")
    ],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="NAME or OWNER/NAME on the Hub.")],
    private: Annotated[bool, typer.Option("--private", help="Only its owner sees it, if it is made now.")] = False,
    as_json: AsJson = False,
):
    """Push a whole checkpoint to the Hub, with its code, processor and card."""
    with work():
        from mmgem.training.hub_push import push_folder

        url = push_folder(folder, repository, private)
    answer({"url": url}, as_json, [url])


@app.command()
def serve(
    model: ModelArgument,
    index: Annotated[
        Path | None, typer.Option(parser=path, help="Folder that `mmgem index` wrote with this model, for /search.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; by default only this machine is heard.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 8000,
    batch_size: Annotated[int, typer.Option(min=1, help="Inputs of all requests at a time.")] = 32,
    max_inputs: Annotated[int, typer.Option(min=1, help="The most inputs of a request.")] = 512,
    max_bytes: Annotated[int, typer.Option(min=1, help="The most bytes of a request.")] = 32 * 2**20,
    max_pixels: Annotated[int, typer.Option(min=1, help="The most pixels of an image.")] = 1 << 26,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="The most tokens of a text, if the model takes as many.")
    ] = 8192,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens of an answer.")] = 512,
    max_queue: Annotated[int, typer.Option(min=1, help="The most inputs of all requests that are in work.")] = 2048,
    timeout: Annotated[float, typer.Option(min=0.1, help="The most seconds of a request.")] = 60,
    allow_urls: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST", help="Fetch images from this host; '*' for any public one; by default none."),
    ] = None,
    allow_origins: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="Let scripts of this origin's pages ask (CORS); '*' for any."),
    ] = None,
):
    """Serve embeddings, chat and search over HTTP, in the shapes of OpenAI's and Cohere's clients."""
    with work():
        from mmgem.training.serving.limits import Limits
        from mmgem.training.serving.run import serve as run_server

        limits = Limits(
            max_bytes=max_bytes,
            max_inputs=max_inputs,
            max_pixels=max_pixels,
            max_tokens=max_tokens,
            max_new_tokens=max_new_tokens,
            max_queue=max_queue,
            max_batch=batch_size,
            timeout=timeout,
        )
        run_server(
            model, index, host, port, limits, "*" in (allow_urls or []) or allow_urls or False, allow_origins or []
        )


@app.command()
def caption(
    folder: ImageFolder,
    model: ModelOption,
    out: Annotated[Path, typer.Option(parser=path, help="File of JSON lines; captions it has are kept.")],
    boxes: Annotated[bool, typer.Option("--boxes", help="Caption the boxes of FOLDER's metadata.jsonl too.")] = False,
    batch_size: BatchSize = 32,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"] | None,
        typer.Option(help="Of the weights; auto is what this machine is faster in. By default that of MODEL."),
    ] = None,
    max_pixels: MaxPixels = MAX_PIXELS,
    wait: Wait = False,
    as_json: AsJson = False,
):
    """Caption every image below a folder; again, to bring the file up to date.

    For example `mmgem caption PHOTOGRAPHS --model MODEL --out captions.jsonl`. A job that was killed goes on by the
    same command.
    """
    folder, names = folder_and_names(folder)
    check_model(model)
    with work(wait), only_writer(out):  # whoever cannot write learns it before a model is loaded
        import torch

        from mmgem.training.captioning import caption_folder
        from mmgem.training.dtypes import fastest_dtype

        loaded, processor = load_model(model)
        if dtype is not None:
            loaded.to(fastest_dtype(loaded) if dtype == "auto" else getattr(torch, dtype))
        report = caption_folder(folder, loaded, processor, out, boxes, batch_size, max_pixels, names)
    report_skipped(report.skipped, report.passed_over)
    counts = {"images": report.images, "captioned": report.captioned}
    skipped = [file._asdict() for file in report.skipped]
    result = {"file": str(out), **counts, "skipped": skipped, "passed_over": report.passed_over}
    summary = f"{counted(report.images, 'image')} in {out}, {report.captioned:,} new; {left_out(report.skipped)}"
    answer(result, as_json, [summary])


def _unwrapped(text: str) -> str:
    """A docstring with each paragraph as one line, for a terminal of any width."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


for _command in [app.registered_callback, *app.registered_commands]:
    _command.help = _unwrapped(_command.callback.__doc__ or "")  # type: ignore[union-attr]


if __name__ == "__main__":  # torchrun -m mmgem.training.cli train ...
    app(prog_name="mmgem")
