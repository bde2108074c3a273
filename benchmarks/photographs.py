"""What each part of a recipe for photographs brings, by switching it off.

    python -m benchmarks.photographs --photos PHOTOS --towers TOWERS --out OUT

`PHOTOS` has `flickr8k/train`, `flickr8k/val` and `captions.txt`, see docs/train_on_photographs.md; `TOWERS` is what
`model_cards/mmgem-photo/build_towers.py` writes. Every run takes the same steps of as many rows, and is measured on
the validation photographs. The table shows means over the seeds, the difference to the first variant, paired by
seed, and what seeds alone make of a difference. A finished run is a file in `OUT/results`; a command that was stopped
is given again and goes on.
"""

import copy
import json
import logging
import math
import shutil
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Annotated, Any, NamedTuple

import torch
import typer
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from benchmarks.experiment_report import interval
from benchmarks.measure import machine_facts, markdown_table
from mmgem.training.output_folder import whole_folder
from mmgem.training.recipes.run import RESULTS_NAME, train
from mmgem.training.recipes.trimming import keep_first_layers, with_first_layers

BASE = "base"
CHANCE = "two runs of the base"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
NUM_LAYERS = 5
METRICS = {
    "text_to_image_recall@1": "text to image R@1",
    "text_to_image_recall@10": "R@10",
    "image_to_text_recall@1": "image to text R@1",
    "cider": "CIDEr-D",
    "region_in_image_recall@1": "region in its image",
    "text_to_image_recall@10_de": "German R@10",
    "text_to_image_recall@10_zh": "Chinese R@10",
    "fused_text_to_image_recall@1": "fused R@1",
}
FEATURES = {"views": 4}
NO_TEXTS = {"captions_per_image": 0, "queries_per_image": 0, "regions_per_image": 0, "questions_per_image": 0}
# The stages of CoMa: captions are written from the vectors of an image, then find it by them.
COMPRESS = {
    "embedding": {"num_embedding_tokens": 8, "embedding_pooling": "mean"},
    "collator": NO_TEXTS | {"memory_captions_per_image": 2},
    "training": {"contrastive_loss_weight": 0},
}
MATCH = {
    "embedding": {"num_embedding_tokens": 8, "embedding_pooling": "mean"},
    "collator": NO_TEXTS | {"match_captions_per_image": 2},
    "training": {"caption_loss_weight": 0},
}
# Changes of the recipe: of its `model`, and of its one stage, or of several that share its steps.
VARIANTS: dict[str, dict[str, Any]] = {
    BASE: {},
    "fresh language model": {"model": {"text": "fresh"}},
    "whole language model": {"model": {"num_hidden_layers": None}},
    "whole vocabulary": {"model": {"trim_vocabulary": None}},
    "EfficientNet-Lite2": {"model": {"vision": "efficientnet-lite2"}},
    "last blocks of the tower trained": {
        "stages": [
            {
                "cache_features": False,
                "training": {
                    "freeze": ["vision_tower.embeddings"] + [f"vision_tower.encoder.blocks.{i}" for i in range(11)],
                    "learning_rates": {"vision_tower": 2e-4},
                },
            }
        ]
    },
    "whole tower trained": {
        "stages": [{"cache_features": False, "training": {"freeze": None, "learning_rates": {"vision_tower": 2e-4}}}]
    },
    "no augmentation": {"stages": [{"cache_features": True, "collator": {"augmentation": None}}]},
    "one caption a step": {"stages": [{"collator": {"captions_per_image": 1}}]},
    "text-only captions": {"text_only": True},
    "no regions": {"stages": [{"collator": {"regions_per_image": 0}}]},
    "English alone": {"stages": [{"collator": {"queries_per_image": 0}}]},
    "1 visual token": {"model": {"num_visual_tokens": 1}},
    "4 visual tokens": {"model": {"num_visual_tokens": 4}},
    "embedding alone": {"stages": [{"training": {"caption_loss_weight": 0}}]},
    "captioning alone": {"stages": [{"training": {"contrastive_loss_weight": 0}}]},
    "CoMa without compression": {"stages": [MATCH]},
    "CoMa": {"stages": [COMPRESS, MATCH]},
}


class Run(NamedTuple):
    """A variant, and the seed of its weights and draws."""

    variant: str
    seed: int

    @property
    def name(self) -> str:
        """A name for its files."""
        return f"{''.join(c if c.isalnum() else '-' for c in self.variant)}-{self.seed}"


class Setting(NamedTuple):
    """The data, towers and size of all runs; see `main`."""

    photos: Path
    towers: Path
    out: Path
    steps: int
    batch_size: int
    loader_workers: int
    bf16: bool


def base_recipe(setting: Setting) -> dict[str, Any]:
    """The recipe that the variants change."""
    return {
        "model": {
            "vision": "efficientnet-lite0",
            "text": "pretrained",
            "num_hidden_layers": NUM_LAYERS,
            "trim_vocabulary": 8000,
            "projection_dim": 512,
            "num_visual_tokens": 16,
            "aggregator_size": 128,
            "logit_scale_init_value": 3.0,
        },
        "eval_data": {"folder": str(setting.photos / "flickr8k" / "val")},
        "stages": [
            {
                "name": "photographs",
                "train_data": [
                    {
                        "folder": str(setting.photos / "flickr8k" / "train"),
                        "columns": {"queries": ["captions_de", "captions_zh", "captions_fr", "captions_cs"]},
                    }
                ],
                "cache_features": FEATURES | {"folder": str(setting.out / "features")},
                "collator": {
                    "augmentation": {"min_crop": 0.4, "flip_probability": 0.5, "color_jitter": 0.2},
                    "captions_per_image": 2,
                    "queries_per_image": 1,
                    "regions_per_image": 1,
                },
                "training": {
                    "freeze": ["vision_tower"],
                    "max_steps": setting.steps,
                    "per_device_train_batch_size": setting.batch_size,
                    "per_device_eval_batch_size": 100,
                    "learning_rate": 1.5e-3,
                    "learning_rates": {"language_model": 6e-4},
                    "lr_scheduler_type": "cosine",
                    "warmup_steps": setting.steps // 20,
                    "weight_decay": 0.05,
                    "adam_beta2": 0.98,
                    "max_grad_norm": 1.0,
                    "bf16": setting.bf16,
                    "dataloader_num_workers": setting.loader_workers,
                    "logging_steps": max(1, setting.steps // 10),
                    "save_strategy": "no",
                    "disable_tqdm": True,
                },
            }
        ],
    }


def recipe_of(run: Run, setting: Setting) -> dict[str, Any]:
    """The recipe of a run."""
    changes, recipe = VARIANTS[run.variant], base_recipe(setting)
    [stage] = recipe["stages"]
    several = changes.get("stages", [{}])
    recipe["stages"] = [_merged(stage, {"name": f"stage-{number}"} | own) for number, own in enumerate(several)]
    for own in recipe["stages"]:
        own["training"]["max_steps"] = setting.steps // len(several)
        folder = {"folder": str(setting.out / "features")}
        if own["cache_features"]:  # True means the whole image alone
            own["cache_features"] = folder if own["cache_features"] is True else own["cache_features"] | folder
        if changes.get("text_only"):  # beside as many photographs as in the other runs
            captions = {"dataset": "text", "data_files": str(setting.photos / "captions.txt"), "weight": 0.25}
            own["train_data"].append(captions)
            own["train_data"][0]["weight"] = 0.75
            own["training"]["per_device_train_batch_size"] = setting.batch_size * 4 // 3
    model = _merged(recipe["model"], changes.get("model", {}))
    model["vision"] = str(setting.towers / model["vision"])
    name = f"fresh-{run.seed}" if model["text"] == "fresh" else model["text"]
    model["text"] = str(language_model_folder(setting, name))
    return recipe | {"seed": run.seed, "model": model}


def _merged(section: Mapping, changes: Mapping) -> dict:
    """The section with these values in place of its own, at any depth; None takes one away."""
    merged = {**copy.deepcopy(dict(section)), **changes}
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(section.get(key), Mapping):
            merged[key] = _merged(section[key], value)
    return {key: value for key, value in merged.items() if value is not None}


def write_language_models(setting: Setting, seeds: Collection[int]) -> None:
    """The pretrained language model, out of a GGUF file that is slow to read, and a fresh one for each seed: as many
    layers as the variants keep, the same tokenizer, random weights.
    """
    folder = setting.towers / "smollm2"
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_FILE)
    pretrained = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF_FILE, dtype=torch.float32)
    whole = keep_first_layers(pretrained, pretrained.config.num_hidden_layers)  # without the quantization of the file
    config = with_first_layers(pretrained.config, NUM_LAYERS)
    models = {f"fresh-{seed}": lambda: AutoModelForCausalLM.from_config(config, dtype=torch.float32) for seed in seeds}
    for name, build in {"pretrained": lambda: whole, **models}.items():
        with whole_folder(language_model_folder(setting, name)) as partial:
            set_seed(int(name.partition("-")[2] or 0))
            build().save_pretrained(partial)
            tokenizer.save_pretrained(partial)


def language_model_folder(setting: Setting, name: str) -> Path:
    """Where a language model lies that runs start from."""
    return setting.out / "language-models" / name


def result_file(run: Run, setting: Setting) -> Path:
    """Where the figures of a finished run are."""
    return setting.out / "results" / f"{run.name}.json"


def execute(run: Run, setting: Setting) -> None:
    """Train and measure one run, and keep its figures alone."""
    out = setting.out / "runs" / run.name
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    recipe = out.with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump(recipe_of(run, setting)), encoding="utf-8")
    train(recipe, out)
    partial = result_file(run, setting).with_suffix(".partial")
    shutil.copyfile(out / RESULTS_NAME, partial)
    partial.replace(result_file(run, setting))
    shutil.rmtree(out)


def _try(run: Run, setting: Setting) -> str | None:
    """The error of a run that failed, which leaves the others as they are."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    try:
        execute(run, setting)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def run_all(runs: Sequence[Run], setting: Setting, jobs: int) -> None:
    """The runs that are left, `jobs` at a time.

    The first one is alone, since it computes the features that most others read.
    """
    (setting.out / "results").mkdir(parents=True, exist_ok=True)
    left = [run for run in runs if not result_file(run, setting).is_file()]
    if left:
        write_language_models(setting, {run.seed for run in left})
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for part in (left[:1], left[1:]):
            tried = [(run, pool.submit(_try, run, setting)) for run in part]
            for run, future in tried:
                print(f"{run.variant}, seed {run.seed}: {future.result() or 'done'}", flush=True)


def report(runs: Sequence[Run], setting: Setting) -> str:
    """Markdown: means over the seeds; differences with half the width of their 95% intervals, by Student's t.

    The last row is that of the difference of two runs that differ in their seeds alone, by the runs of the base.
    """
    figures = {
        run: json.loads(result_file(run, setting).read_text(encoding="utf-8"))
        for run in runs
        if result_file(run, setting).is_file()
    }
    rows = []
    for variant in dict.fromkeys(run.variant for run in figures):
        cells = []
        for metric in METRICS:
            own = {
                run.seed: figures[run][metric] for run in figures if run.variant == variant and metric in figures[run]
            }
            base = {seed: figures.get(Run(BASE, seed), {}).get(metric) for seed in own}
            cell = f"{mean(own.values()):.3f}" if own else ""
            gains = [value - base[seed] for seed, value in own.items() if base[seed] is not None]
            if variant != BASE and gains:
                cell += f" ({mean(gains):+.3f}{f' ± {interval(gains):.3f}' * (len(gains) > 1)})"
            cells.append(cell)
        rows.append((variant, *cells, sum(run.variant == variant for run in figures)))
    seeds = [figures[run] for run in figures if run.variant == BASE]
    if len(seeds) > 1:
        of_runs = [[own[metric] for own in seeds if metric in own] for metric in METRICS]
        cells = [f"± {interval(own) * math.sqrt(2 * len(own)):.3f}" if len(own) > 1 else "" for own in of_runs]
        rows.append((CHANCE, *cells, len(seeds)))
    return markdown_table(("variant", *METRICS.values(), "seeds"), rows)


def main(
    photos: Annotated[Path, typer.Option(help="Folder of the photographs.")],
    towers: Annotated[Path, typer.Option(help="Folder of the towers.")],
    out: Annotated[Path, typer.Option(help="Folder of the runs.")],
    variants: Annotated[str, typer.Option(help="Names of variants, with commas between them.")] = ",".join(VARIANTS),
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of each run.")] = 3,
    steps: Annotated[int, typer.Option(min=2, help="Steps of each run.")] = 300,
    batch_size: Annotated[int, typer.Option(min=2, help="Photographs of a step.")] = 96,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 1,
    loader_workers: Annotated[int, typer.Option(min=0, help="Processes that load images, of each run.")] = 1,
    bf16: Annotated[bool, typer.Option(help="Train under bfloat16 autocast.")] = torch.cuda.is_available(),
):
    setting = Setting(photos.resolve(), towers.resolve(), out.resolve(), steps, batch_size, loader_workers, bf16)
    runs = [Run(variant.strip(), seed) for seed in range(seeds) for variant in variants.split(",")]
    if unknown := [run.variant for run in runs if run.variant not in VARIANTS]:
        raise typer.BadParameter(f"`variants` has {unknown[0]!r}; expected some of {', '.join(VARIANTS)}.")
    run_all(runs, setting, jobs)
    print(machine_facts(), report(runs, setting), sep="\n\n")


if __name__ == "__main__":
    typer.run(main)
