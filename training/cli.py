"""The command line `mmgem`. Every command imports what it needs when it runs, so that `--help` answers at once."""

import json
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

TINY = Path(__file__).parent.parent / "model_cards" / "mmgem-tiny"

# What a user can cause; anything else is a defect of ours and deserves its traceback.
USER_ERRORS = (ValueError, TypeError, OSError, ImportError)


class _Commands(TyperGroup):
    """Reports what a user can mend in one line, with exit code 1 (wrong usage has typer's 2)."""

    def invoke(self, ctx) -> Any:
        try:
            return super().invoke(ctx)
        except USER_ERRORS as error:
            if ctx.params["traceback"]:
                raise
            typer.secho(f"mmgem: {' '.join(str(error).split())}", err=True, fg=typer.colors.RED)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=_Commands,
    help="Search, caption and classify images with one model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Folder = Annotated[Path, typer.Argument(help="Folder of images, at any depth.")]
Model = Annotated[str, typer.Option("--model", help="Folder of a checkpoint, or its name on the Hub.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images at a time.")]
Seed = Annotated[int, typer.Option(help="Which scenes.")]


@app.callback()
def main(traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error comes from.")] = False):
    """Search, caption and classify images with one model."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the page and everything it was made from.")] = Path("demo"),
    count: Annotated[int, typer.Option(min=12, help="Images in the gallery.")] = 500,
    model: Model = str(TINY),
    as_json: AsJson = False,
):
    """Draw a gallery, then index, search, classify, caption and measure it; leaves one HTML page."""
    _be_quiet()
    from mmgem.training.demo import run_demo

    page, figures = run_demo(out, *_load(model), count=count)
    _print({"page": str(page), "figures": figures}, as_json, [*_table(figures), f"\nOpen {page.resolve().as_uri()}"])
