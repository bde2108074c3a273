"""The commands of `mmgem` that make an index of images and texts, search it, and ask about what is in it."""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from mmgem.training.cli_common import (
    MAX_PIXELS,
    AsJson,
    BatchSize,
    ImageFolder,
    MaxPixels,
    ModelOption,
    Table,
    Wait,
    answer,
    check_model,
    check_table,
    folder_and_names,
    left_out,
    load_model,
    path,
    report_skipped,
    work,
    write_table,
)
from mmgem.training.json_text import to_json
from mmgem.training.output_folder import check_writable, whole_folder
from mmgem.training.printable import counted, printable

IndexArgument = Annotated[Path, typer.Argument(parser=path, metavar="INDEX", help="Folder that `mmgem index` wrote.")]
MovedModel = Annotated[str | None, typer.Option("--model", help="The model of the index, if it has moved.")]
PromptName = Annotated[
    str | None, typer.Option("--prompt", help="Name of the model's prompt to put before the text that is searched.")
]


class IndexCommand(TyperCommand):
    """Lets `--with-memory` stand without its number, which typer has no way to say."""

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        args, option = list(args), "--with-memory"
        if option in args:
            after = args.index(option) + 1
            if not (args[after : after + 1] == ["all"] or "".join(args[after : after + 1]).isdecimal()):
                args.insert(after, "all")
        return super().parse_args(ctx, args)


def index(
    folder: ImageFolder,
    model: ModelOption,
    out: Annotated[Path, typer.Option(parser=path, help="Folder for the index.")],
    batch_size: BatchSize = 32,
    vectors: Annotated[
        int | None, typer.Option(min=1, help="Vectors kept of each image, of a model with several; by default all.")
    ] = None,
    dimensions: Annotated[
        int | None, typer.Option(min=1, help="Values kept of each vector, the first ones; by default all.")
    ] = None,
    precision: Annotated[Literal["float32", "int8", "binary"], typer.Option(help="Of each value.")] = "float32",
    with_memory: Annotated[
        str | None,
        typer.Option(
            metavar="[J]", help="Keep what `mmgem ask` needs: all states of each image's memory, or the first J."
        ),
    ] = None,
    moved: Annotated[
        bool,
        typer.Option("--moved", help="OUT is the index of a folder from which the images have moved here."),
    ] = False,
    image_mode: Annotated[
        Literal["image", "fused"],
        typer.Option(help="Images are embedded by the vision tower, or (CoMa) through the language model."),
    ] = "image",
    captions: Annotated[
        Literal["beside", "fused"] | None,
        typer.Option(help="Also index captions in the metadata, beside the images, or fused with them in one vector."),
    ] = None,
    regions: Annotated[
        str | None,
        typer.Option(metavar="boxes|N", help="Also index boxes in the metadata, or the cells of an N x N grid."),
    ] = None,
    texts: Annotated[
        bool,
        typer.Option("--texts", help="Also index .txt and .md files, and records of .jsonl, .csv, .parquet."),
    ] = False,
    text_column: Annotated[str, typer.Option(help="Column of the records that holds the text.")] = "text",
    max_pixels: MaxPixels = MAX_PIXELS,
    wait: Wait = False,
    as_json: AsJson = False,
):
    """Embed every image below a folder into a search index; again, to bring it up to date.

    For example `mmgem index PHOTOGRAPHS --model MODEL --out INDEX`. Captions, boxes and what `search --where` compares
    come from the folder's metadata.jsonl or metadata.csv, a line for each image: {"file_name": "a.jpg", "captions":
    ["..."], "boxes": [[X0, Y0, X1, Y1]], "year": 2020, ...}. A job that was killed goes on by the same command.
    """
    memory, parts = _memory(with_memory), _regions(regions)
    folder, names = folder_and_names(folder)
    check_model(model)
    with work(wait):  # whoever cannot write learns it before a model is loaded
        from mmgem.training.search.up_to_date import update_index

        settings: dict[str, Any] = {"vectors": vectors, "dimensions": dimensions, "precision": precision}
        settings |= {"memory": memory, "image_mode": image_mode, "captions": captions, "regions": parts}
        settings |= {"texts": text_column if texts else None}
        report = update_index(folder, model, out, names, batch_size, moved, max_pixels, **settings)
    report_skipped(report.skipped, report.passed_over)
    result = {"index": str(out), **report._asdict(), "skipped": [file._asdict() for file in report.skipped]}
    kinds = [counted(count, "fused image" if kind == "fused" else kind) for kind, count in report.rows.items()]
    summary = (
        f"{', '.join(kinds)} in {out}, {report.embedded:,} new; {left_out(report.skipped)}; "
        f"{counted(report.bytes_per_image, 'byte')} each"
    )
    lines = [summary]
    if report.recall:
        asked = {"rows": "by images and texts of it", "between": "halfway between two", "captions": "by captions"}
        reached = ", ".join(f"{recall:.3f} {asked[kind]}" for kind, recall in report.recall.items())
        lines += [f"searched by lists; recall@10 against a comparison with all vectors: {reached}"]
    answer(result, as_json, lines)


def search(
    index: IndexArgument,
    text: Annotated[
        str | None,
        typer.Argument(
            metavar="TEXT",
            help="What to look for; - for each line of standard input. Without it a terminal is asked; with --where "
            "or --kind what they leave is listed.",
        ),
    ] = None,
    image: Annotated[
        list[str] | None,
        typer.Option(
            help="Image to look for; or one that TEXT speaks about, of which may be more; - for each line's path."
        ),
    ] = None,
    boxes: Annotated[
        list[str] | None,
        typer.Option(
            metavar="X0,Y0,X1,Y1", help="Part of the image, in pixels, instead of all of it; with TEXT parts."
        ),
    ] = None,
    prompt: PromptName = None,
    vectors: Annotated[
        int | None, typer.Option(min=1, help="Vectors of each image to compare, the first ones; by default all.")
    ] = None,
    query_vectors: Annotated[
        int | None, typer.Option(min=1, help="Likewise of the query; by default as many as of an image.")
    ] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option(help="Kind of answer: image, fused, region, caption, text; may be given again. By default all."),
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE", help="Condition on the metadata, also with !=, <, <=, > or >=; may be given again."
        ),
    ] = None,
    hybrid: Annotated[
        bool, typer.Option("--hybrid", help="Also by the words of TEXT, in texts, captions and names of files.")
    ] = False,
    lexical_weight: Annotated[
        float | None, typer.Option(min=0, max=1, help="Hybrid, and how much the words count; by default 0.5.")
    ] = None,
    fit_on: Annotated[
        Path | None,
        typer.Option(
            parser=path,
            metavar="FILE",
            help='Instead of searching, fit --lexical-weight to JSON lines {"text": ..., "relevant": [FILE, ...]}.',
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Number of answers.")] = 10,
    explain: Annotated[
        Path | None,
        typer.Option(parser=path, help="New folder for a heat map over each found image: why it is found."),
    ] = None,
    model: MovedModel = None,
    table_file: Table = None,
    as_json: AsJson = False,
):
    """Find images and texts by text, by image, or by both.

    Without TEXT a terminal is asked for one after the other, and the model stays loaded. By words alone
    (--lexical-weight 1), or by --where and --kind without TEXT, no model is loaded.
    """
    weight = 0.5 if hybrid and lexical_weight is None else lexical_weight
    if fit_on is not None:
        if text is not None or image or weight is not None:
            raise typer.BadParameter("--fit-on takes its queries from FILE; give no other, and no weight")
        _fit(index, fit_on, prompt, vectors, query_vectors, kind, where, model, as_json)
        return
    if text is None and not (image or where or kind) and sys.stdin.isatty():
        text = "-"
    for_model = {"--prompt": prompt, "--vectors": vectors, "--query-vectors": query_vectors, "--explain": explain}
    _check_query(text, image, where or kind, for_model | {"--boxes": boxes or None, "--lexical-weight": weight})
    check_table(table_file)
    if explain is not None and explain.exists() and (not explain.is_dir() or any(explain.iterdir())):
        raise FileExistsError(f"`--explain` is {str(explain)!r}, which is there; expected a new or an empty folder.")
    parts, is_stream = [_box(box) for box in boxes or []], text == "-" or "-" in (image or [])
    is_by_rows = not image and not boxes and (text is None or weight == 1) and not any(for_model.values())
    loaded: Any
    with work():
        from mmgem.training.search.conditions import Condition

        conditions = [Condition.parse(condition) for condition in where or []] or None
        kinds = kind or (None if explain is None else ["image"])  # which maps are of
        if is_by_rows:
            from mmgem.training.search.row_search import RowSearch

            loaded = RowSearch.load(index)
        else:
            files = [name for name in image or [] if name != "-"]
            loaded = _load_index(index, model, None if image else text, kinds, conditions, files)
    if explain is not None:
        explain.mkdir(parents=True, exist_ok=True)
        check_writable(explain / "0001", "--explain")
    found = []
    for number, line in enumerate(_lines() if is_stream else [None], 1):
        of_line, query = line if text == "-" else text, line or text or ", ".join(image or where or kind or [])
        images = [line if name == "-" else name for name in image or []] or None
        try:
            with work():
                if is_by_rows and of_line is None:
                    hits = loaded.list_rows(top, kinds, conditions)
                elif is_by_rows:
                    hits = loaded.search_words(of_line, top, kinds, conditions)
                else:
                    of_query = prompt, vectors, query_vectors
                    hits = loaded.search(of_line, images, top, parts or None, *of_query, kinds, conditions, weight)
        except (OSError, ValueError) as error:
            if not (is_stream and sys.stdin.isatty()):
                raise
            typer.secho(printable(str(error)), err=True, fg=typer.colors.RED)  # and is asked again
            continue
        rows = [{"score": round(hit.score, 4), "path": str(hit.path), **hit.details} for hit in hits]
        if explain is not None:
            with work():
                embed = loaded.query(of_line, images, parts or None, prompt, vectors, query_vectors)
                folder = explain / f"{number:04}" if is_stream else explain
                maps = _draw_maps(loaded, hits, embed, vectors, folder)
            rows = [row | {"heat_map": file and str(file)} for row, file in zip(rows, maps, strict=True)]
        found += [{"query": query, "rank": rank, **row} for rank, row in enumerate(rows, 1)]
        _say_found(query, hits, rows, is_stream, as_json, is_by_words=weight == 1)
    write_table(found, table_file)


def _check_query(text: str | None, image: list[str] | None, limits: Any, options: dict[str, Any]) -> None:
    """Refuses a search for nothing without a limit either, what says something of a query where there is none, and
    standard input asked for twice."""
    if text is None and not image:
        if not limits:
            raise typer.BadParameter("give TEXT, --image, or both; or --where or --kind alone")
        if option := next((name for name, value in options.items() if value is not None), None):
            raise typer.BadParameter(f"{option} says something of a query; give TEXT or --image")
    if text == "-" and "-" in (image or []):
        raise typer.BadParameter("- stands for TEXT or for --image; give it once")


def _say_found(query: str, hits: list, rows: list[dict], is_stream: bool, as_json: bool, is_by_words: bool) -> None:
    """Prints the answers to a query."""
    answers = [f"{hit.score:7.4f}  {_shown(hit)}" for hit in hits]
    if is_stream and as_json:
        typer.echo(to_json({"query": query, "hits": rows}))
    elif hits or as_json or is_stream:
        answer(rows, as_json, [query, *answers, ""] if is_stream else answers)
    if not hits and not as_json:
        where_words_are = ": no text, caption or name of a file has a word of it" if is_by_words else ""
        typer.secho(f"nothing was found{where_words_are}", err=True)


def _load_index(
    index: Path,
    model: str | None,
    text: str | None,
    kinds: list[str] | None = None,
    conditions: Any = None,
    images: Iterable[str] = (),
) -> Any:
    """Loads an index with its model; before that, refuses what is no finished index or has no such rows, a text that
    says nothing, and images that cannot be read."""
    from mmgem.processing.image_loading import load_image
    from mmgem.processing.url_fetching import is_url
    from mmgem.training.search.row_search import RowSearch, check_finished, check_says_something

    check_finished(index)
    if text is not None:
        check_says_something(text)
    for image in images:
        if not is_url(image):  # of which the model's processor knows whether it is fetched
            load_image(image)
    if kinds or conditions:
        RowSearch.load(index).list_rows(1, kinds, conditions)
    from mmgem.training.search.index import SearchIndex

    return SearchIndex.load(index, *(() if model is None else load_model(model)))


def _draw_maps(index, hits: list, query, vectors: int | None, folder: Path) -> list[Path | None]:
    """A heat map over each found image, as files by rank and name; None for one whose file is gone."""
    files: list[Path | None] = []
    with whole_folder(folder) as partial:
        for rank, hit in enumerate(hits, 1):
            name = f"{rank:03}-{hit.path.stem[:50]}.jpg"
            try:
                picture, similarity_map = index.explain(hit.row, query, vectors)
            except FileNotFoundError as error:
                typer.secho(printable(f"no heat map: {error}"), err=True, fg=typer.colors.YELLOW)
                files.append(None)
                continue
            similarity_map.draw(picture).save(partial / name, quality=90)
            files.append(folder / name)
    return files


def _fit(index: Path, file: Path, prompt, vectors, query_vectors, kinds, where, model, as_json: bool) -> None:
    """Fits the weight of the words to labelled queries."""
    with work():
        from mmgem.training.data.records import read_records
        from mmgem.training.search.conditions import Condition
        from mmgem.training.search.hybrid import LabelledQuery, fit_lexical_weight

        if not file.is_file():
            raise FileNotFoundError(f"`--fit-on` is {str(file)!r}, which is no file; expected one of JSON lines.")
        queries = []
        for number, fields in read_records(file):
            if isinstance(fields, str):  # why it cannot be read
                raise ValueError(f"line {number} of {file} {fields}")
            text, relevant = fields.get("text"), fields.get("relevant")
            if not (
                isinstance(text, str) and isinstance(relevant, list) and all(isinstance(r, str) for r in relevant)
            ):
                raise ValueError(
                    f"line {number} of {file} is {fields!r:.80}; expected `text`, and `relevant`, a list of files."
                )
            queries.append(LabelledQuery(text, relevant))
        conditions = [Condition.parse(condition) for condition in where or []] or None
        loaded = _load_index(index, model, None, kinds, conditions)
        limits = {"prompt": prompt, "vectors": vectors, "query_vectors": query_vectors}
        fitted = fit_lexical_weight(loaded, queries, **limits, kinds=kinds or None, where=conditions)
    best, reached, dense, lexical = fitted
    answer(
        fitted._asdict(),
        as_json,
        [
            f"--lexical-weight {best:.2f}: mean reciprocal rank {reached:.3f} over "
            f"{counted(len(queries), 'query', 'queries')}; by vectors alone {dense:.3f}, by words alone {lexical:.3f}"
        ],
    )


def _shown(hit) -> str:
    """An answer as a line: the file, and what of it."""
    if hit.kind == "image":
        return str(hit.path)
    where = ",".join(f"{edge:g}" for edge in hit.box or [])
    place = f"{hit.path}:{hit.part}" if hit.kind == "text" and hit.part else str(hit.path)
    return "  ".join(filter(None, [place, hit.kind, where, shorten(hit.text, 80, placeholder=" …")]))


def _lines() -> Iterator[str]:
    """The lines of standard input that are not empty; a terminal is asked for each."""
    while True:
        if sys.stdin.isatty():
            typer.echo("search> ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def verify(index: IndexArgument, as_json: AsJson = False):
    """Compare every file of an index with its checksums."""
    with work():
        from mmgem.training.search.storage import UNFINISHED, verify_index

        check = verify_index(index)
    state = "some damaged" if check.damaged else "all as written"
    whole = f"{counted(check.files, 'file')} of {counted(check.bytes, 'byte')}, {state}"
    if (Path(index) / UNFINISHED).is_dir():
        whole += f"; {UNFINISHED} holds what a run has embedded that did not end: the same `mmgem index` goes on"
    answer(check._asdict(), as_json, [*(f"{name}: {what}" for name, what in check.damaged.items()), whole])
    if check.damaged:
        raise typer.Exit(1)


def ask(
    index: IndexArgument,
    question: Annotated[
        str | None, typer.Argument(metavar="QUESTION", help="What to answer; without it, images are captioned.")
    ] = None,
    image: Annotated[
        list[str] | None, typer.Option(help="Image to ask about, by its name in the index; may be given again.")
    ] = None,
    search: Annotated[str | None, typer.Option(help="Ask about the images that this text finds.")] = None,
    top: Annotated[int | None, typer.Option(min=1, help="How many images --search finds, by default one.")] = None,
    prompt: PromptName = None,
    model: MovedModel = None,
    as_json: AsJson = False,
):
    """Answer about images of an index that was made --with-memory; their files are not needed."""
    if (not image) == (search is None):
        raise typer.BadParameter("give --image or --search, one of them")
    if image and top is not None:
        raise typer.BadParameter("--top is how many images --search finds; with --image it has nothing to say")
    with work():
        from mmgem.training.search.asking import ask as ask_index
        from mmgem.training.search.asking import check_askable
        from mmgem.training.search.row_search import RowSearch

        check_askable(RowSearch.load(index), question, image or None, search, prompt)
        loaded = _load_index(index, model, search)
        answers = ask_index(loaded, question, image or None, search, top or 1, prompt)
    rows = [
        {"path": str(path), "answer": text, "score": None if score is None else round(score, 4)}
        for path, text, score in answers
    ]
    answer(rows, as_json, [line for row in rows for line in (str(row["path"]), f"  {row['answer']}")])


def _memory(states: str | None) -> int | bool:
    if states is None or states == "all":
        return states is not None
    if not states.isdecimal() or int(states) == 0:
        raise typer.BadParameter(f"--with-memory is {states!r}; expected a number, 1 or more")
    return int(states)


def _regions(regions: str | None) -> Any:
    """A number as one; what is expected besides, `build_index` says."""
    return int(regions) if regions is not None and regions.isdecimal() else regions


def _box(text: str) -> list[float]:
    try:
        box = [float(number) for number in text.split(",")]
    except ValueError:
        box = []
    if len(box) != 4:
        raise typer.BadParameter(f"--boxes is {text!r}; expected four numbers, X0,Y0,X1,Y1")
    return box
