"""What joint training costs and brings, measured on generated scenes:

    python -m benchmarks.experiment --out runs/experiment

trains every contestant of `ARMS` with three seeds, on the same data in the same order for as many steps, and writes a
table (`OUT/table.md`) and a plot (`OUT/plot.png`). Every finished run is kept as `OUT/ARM-SEED.json`; a command that
was stopped is given again and goes on with the runs that are left.

The claims that are looked at are those of MM-GEM (https://arxiv.org/abs/2405.19333): the two objectives hardly
conflict, the PoolAggregator's attention helps, and a language model finds images by long texts that a 77-token dual
encoder cannot read.
"""

import json
import os
from collections.abc import Callable
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, set_seed

from benchmarks.experiment_data import Setting, prepare_batches, prepare_held_out, prepare_tokenizer
from benchmarks.experiment_report import write_report
from benchmarks.experiment_training import evaluate, train
from benchmarks.peers import CLIPContestant, Contestant, LlavaContestant, MMGEMContestant, TowerSizes
from benchmarks.workers import progress_line, worker_pool
from mmgem.training.scenes.drawing import FILLS, SHAPES

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Arm:
    """One kind of contestant.

    Args:
        title: In the table.
        build: Towers, end token, image token -> contestant.
    """

    title: str
    build: Callable[[TowerSizes, int, int], Contestant]


ARMS = {
    "joint": Arm("MM-GEM: joint, 16 visual tokens", MMGEMContestant),
    "embedding-only": Arm("embedding only", lambda *towers: MMGEMContestant(*towers, writes=False)),
    "captioning-only": Arm("captioning only", lambda *towers: MMGEMContestant(*towers, embeds=False)),
    "average-pooling": Arm("no aggregator attention", lambda *towers: MMGEMContestant(*towers, attends=False)),
    "4-tokens": Arm("4 visual tokens", lambda *towers: MMGEMContestant(*towers, num_visual_tokens=4)),
    "64-tokens": Arm("64 visual tokens", lambda *towers: MMGEMContestant(*towers, num_visual_tokens=64)),
    "clip-77": Arm("CLIP, 77 text tokens", lambda sizes, eos, _: CLIPContestant(sizes, eos)),
    "clip-256": Arm("CLIP, 256 text tokens", lambda sizes, eos, _: CLIPContestant(sizes, eos, max_length=256)),
    "llava": Arm("LLaVA-style, 64 patch tokens", LlavaContestant),
}

SETTINGS = {
    # Two CPU cores, about 25 minutes.
    "cpu": Setting(
        TowerSizes(image_size=64, patch_size=8, vision_layers=2, text_layers=2, width=128, heads=2, vocabulary=800),
        max_objects=2,
        shapes=("circle", "square", "triangle", "cross"),
        fills=("solid",),
        steps=600,
        batch_size=32,
        long_share=0.125,
        held_out=400,
    ),
    # One GPU.
    "gpu": Setting(
        TowerSizes(
            image_size=96,
            patch_size=12,
            vision_layers=6,
            text_layers=6,
            width=384,
            heads=6,
            vocabulary=800,
            attention="sdpa",
        ),
        max_objects=5,
        shapes=SHAPES,
        fills=FILLS,
        steps=4000,
        batch_size=256,
        long_share=0.25,
        held_out=1000,
        warmup=200,
        max_new_tokens=80,
    ),
}


def run(name: str, seed: int, setting: Setting, out: Path, device: str) -> dict:
    """Trains and measures one contestant with one seed; writes and returns what `OUT/ARM-SEED.json` holds."""
    tokenizer = prepare_tokenizer(setting, out / "data" / "tokenizer")
    held_out = prepare_held_out(setting, tokenizer, out / "data" / "held-out.pt")
    batches = prepare_batches(setting, tokenizer, seed, out / "data" / f"seed-{seed}.pt")
    set_seed(seed)
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    contestant = ARMS[name].build(setting.towers, tokenizer.eos_token_id, image_token_id)
    contestant.model.to(device)
    training = train(contestant, batches, setting, progress=f"{name}-{seed}", position=progress_line())
    trained = sum(parameter.numel() for parameter in contestant.model.parameters() if parameter.requires_grad)
    result = {
        "arm": name,
        "seed": seed,
        "metrics": evaluate(contestant, tokenizer, held_out, setting),
        "trained_parameters": trained,
        **training,
    }
    partial = out / f"{name}-{seed}.partial"
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(partial.with_suffix(".json"))
    return result


def finished_runs(out: Path, setting: Setting) -> dict[tuple[str, int], dict]:
    """What `OUT` holds, by arm and seed; an empty one is marked as that of this setting.

    Raises:
        ValueError: If it is that of another setting.
    """
    mark = out / "setting.json"
    if not mark.is_file():
        out.mkdir(parents=True, exist_ok=True)
        mark.write_text(json.dumps(setting.as_dict(), indent=1) + "\n")
    if json.loads(mark.read_text()) != setting.as_dict():
        raise ValueError(f"`out` is {str(out)!r}, which holds runs of another setting; expected another folder.")
    runs = [json.loads(path.read_text()) for path in out.glob("*-*.json")]
    return {(run["arm"], run["seed"]): run for run in runs}


def run_all(setting: Setting, out: Path, workers: int, seeds=SEEDS, device: str = "cpu") -> list[dict]:
    """The runs that are left, `workers` at a time with one thread each; table and plot grow with each that is
    finished.

    Returns:
        The results of all runs.
    """
    results, titles = finished_runs(out, setting), {name: arm.title for name, arm in ARMS.items()}
    tokenizer = prepare_tokenizer(setting, out / "data" / "tokenizer")
    prepare_held_out(setting, tokenizer, out / "data" / "held-out.pt")
    left = [(name, seed) for seed in seeds for name in ARMS if (name, seed) not in results]
    with (
        worker_pool(workers) as pool,
        tqdm(total=len(seeds) * len(ARMS), initial=len(results), desc="runs", unit="run") as progress,
    ):
        paths = {seed: out / "data" / f"seed-{seed}.pt" for seed in sorted({seed for _, seed in left})}
        for drawn in [pool.submit(_draw, setting, seed, tokenizer, path) for seed, path in paths.items()]:
            drawn.result()
        runs = [pool.submit(run, name, seed, setting, out, device) for name, seed in left]
        for finished in as_completed(runs):
            result = finished.result()
            results[result["arm"], result["seed"]] = result
            write_report(list(results.values()), titles, out)
            progress.update()
    write_report(list(results.values()), titles, out)
    return [results[name, seed] for name in ARMS for seed in seeds]


def _draw(setting: Setting, seed: int, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    prepare_batches(setting, tokenizer, seed, path)


def main(
    out: Annotated[Path, typer.Option(help="Folder for the runs, the table and the plot.")] = Path("runs/experiment"),
    scale: Annotated[str, typer.Option(help=f"{' or '.join(SETTINGS)}.")] = "cpu",
    workers: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 2,
):
    """Train and measure every contestant with three seeds; print a table, draw a plot."""
    if scale not in SETTINGS:
        raise typer.BadParameter(f"`scale` is {scale!r}; expected {' or '.join(SETTINGS)}.", param_hint="--scale")
    if scale == "gpu" and not torch.cuda.is_available():
        raise typer.BadParameter("'gpu' expects a GPU that torch can use, and there is none", param_hint="--scale")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    run_all(SETTINGS[scale], out, workers, device="cuda" if scale == "gpu" else "cpu")
    print((out / "table.md").read_text())


if __name__ == "__main__":
    typer.run(main)
