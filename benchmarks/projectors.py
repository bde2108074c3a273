"""What the options for few pairs bring to projections between two frozen towers, on cached vectors of photographs.

    python model_cards/mmgem-photo/build_towers.py runs/towers
    python -m benchmarks.projectors runs/towers ../shared/photos/flickr8k --out runs/projectors

The towers are EfficientNet-Lite0 and the first layers of SmolLM2. The [EMB] vector begins as the embedding of the end
token: one that begins at random reads little of a language model that does not train. An image is the mean of its
patch features, as the aggregator has it before it trains. Both towers run once for each photograph and its first
caption; a run then trains both projections and the temperature, with the contrastive loss.

The table shows recall@1 and @10 of held-out captions among the held-out photographs, by the number of pairs, and the
difference to the plain loss, paired by seed. Every finished run is a line of `OUT/runs.jsonl`; a command that was
stopped is given again and goes on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import nn
from tqdm.auto import tqdm
from transformers import set_seed

from benchmarks.compression import finished_runs, write_line
from benchmarks.experiment_data import save_whole
from benchmarks.experiment_report import interval
from benchmarks.experiment_training import train
from benchmarks.measure import machine_facts, markdown_table
from benchmarks.peers import Batch
from mmgem.modeling_mmgem import MMGEMModel
from mmgem.text_rows import IGNORED_LABEL
from mmgem.training.data.image_folder import read_image_folder
from mmgem.training.evaluation.metrics import recall_at, retrieval_ranks
from mmgem.training.inference import inference
from mmgem.training.recipes.recipe import parse_recipe
from mmgem.training.recipes.starting_model import build_model
from mmgem.training.trainer.contrastive_losses import MaskedObjective, build_objective
from mmgem.training.trainer.parameter_selection import set_trainable

TRAINED = ["image_projection", "text_projection", "logit_scale"]
PLAIN = "plain"
OPTIONS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "fusemix 1": {"fusemix": 1.0},
    "structure 10": {"structure": 10.0},
    "structure 10, 3 levels": {"structure": 10.0, "structure_levels": 3},
    "both": {"fusemix": 1.0, "structure": 10.0},
}
HEADER = ("pairs", "option", "R@1", "R@10", "difference of R@10", "seeds")
AT_ONCE = 50


class Run(NamedTuple):
    """One run of the comparison: the name of the option, the number of pairs, the seed."""

    option: str
    pairs: int
    seed: int


@dataclass(frozen=True)
class Setting:
    """What all runs have in common.

    Args:
        towers: The folder of the towers.
        photographs: The folder of `train` and `val`.
        layers: Layers of the language model.
        pairs: Numbers of pairs, rising.
        held_out: Photographs to measure on.
        steps, batch_size, learning_rate: Of a run.
        seeds: Seeds of each run.
    """

    towers: str
    photographs: str
    layers: int = 8
    pairs: tuple[int, ...] = (500, 1000)
    held_out: int = 500
    steps: int = 100
    batch_size: int = 128
    learning_rate: float = 1e-3
    seeds: int = 3

    def as_dict(self) -> dict:
        """As JSON has it."""
        return asdict(self) | {"pairs": list(self.pairs)}


class Pairs(NamedTuple):
    """Cached vectors of N photographs, (N, 1, C), and states of their captions, (N, k, H)."""

    images: torch.Tensor
    states: torch.Tensor

    def batch(self, rows: torch.Tensor) -> Batch:
        """Those of some rows, (B,) long, as `MMGEMModel.forward` takes them."""
        ids = rows[:, None]  # stand for the tokens: equal for equal texts
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": torch.full_like(ids, IGNORED_LABEL),
            "image_index": torch.arange(len(rows)),
            "contrastive_mask": torch.ones(len(rows), dtype=torch.bool),
            "patch_features": self.images[rows].transpose(1, 2)[..., None],  # (B, C, 1, 1)
            "text_states": self.states[rows],
        }


@dataclass(frozen=True)
class Alignment:
    """What `train` asks for: the loss of a batch, and the schedule of its steps."""

    model: MMGEMModel
    objective: MaskedObjective
    learning_rate: float
    warmup: int

    def losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        batch = self.objective.mixed(batch)
        outputs = self.model(**batch, return_loss=True, return_contrastive_batch=True)
        loss = self.objective(outputs.contrastive_batch)
        return {"loss": loss + self.objective.regularization(batch, outputs.image_embeds, outputs.text_embeds)}


def compose(setting: Setting) -> tuple[MMGEMModel, Any]:
    """The model of both towers, of which the projections train, and its processor."""
    vision, text = Path(setting.towers, "efficientnet-lite0"), Path(setting.towers, "smollm2")
    section = {"vision": str(vision), "text": str(text), "gguf_file": next(text.glob("*.gguf")).name}
    section |= {"num_hidden_layers": setting.layers, "projection_dim": 512, "num_visual_tokens": 1}
    stage = {"name": "align", "train_data": {"folder": setting.photographs}, "training": {}}
    model, processor = build_model(parse_recipe({"model": section, "stages": [stage]}))
    model.set_embedding_tokens(1, "last", token_ids=[processor.tokenizer.eos_token_id])
    set_trainable(model, train_only=TRAINED)
    return model, processor


def cached_pairs(model: MMGEMModel, processor, folder: Path, count: int, path: Path) -> Pairs:
    """The vectors of the first photographs of a folder and their first captions, from `path` or computed now."""
    if not path.is_file():
        rows, images, states = read_image_folder(folder), [], []
        for start in tqdm(range(0, count, AT_ONCE), desc=folder.name, unit="batch"):
            own = [rows[number] for number in range(start, min(start + AT_ONCE, count))]
            pixels = processor(images=[row["image"] for row in own], return_tensors="pt")
            texts = processor(text=[row["captions"][0] for row in own], return_tensors="pt")
            with inference(model):
                images.append(model.get_image_features(**pixels).last_hidden_state)  # (B, 1, C)
                states.append(model.get_text_features(**texts).last_hidden_state)  # (B, k, H)
        save_whole({"images": torch.cat(images), "states": torch.cat(states)}, path)
    return Pairs(**torch.load(path))


def recalls(model: MMGEMModel, held_out: Pairs) -> dict[str, float]:
    """Recall of each caption among all photographs."""
    batch = held_out.batch(torch.arange(len(held_out.images)))
    with inference(model):
        outputs = model(**batch, return_loss=True, return_contrastive_batch=True)
    ranks = retrieval_ranks(outputs.text_embeds, outputs.image_embeds, [{row} for row in range(len(held_out.images))])
    return {f"recall@{k}": recall_at(ranks, k) for k in (1, 10)}


def execute(run: Run, setting: Setting, model: MMGEMModel, pairs: Pairs, held_out: Pairs) -> dict:
    """Train fresh projections, and measure them.

    Returns:
        The line of the run: its fields, `recall@1` and `recall@10`.
    """
    set_seed(run.seed)
    for module in (*model.image_projection, model.text_projection):
        module.reset_parameters()
    nn.init.constant_(model.logit_scale, model.config.logit_scale_init_value)
    rows = [torch.randperm(run.pairs)[: setting.batch_size] for _ in range(setting.steps)]
    objective = build_objective(**OPTIONS[run.option])
    alignment = Alignment(model, objective, setting.learning_rate, setting.steps // 10)
    batches = [pairs.batch(own) for own in rows]
    train(alignment, batches, alignment, f"{run.option}, {run.pairs}, seed {run.seed}", bf16=False)
    return run._asdict() | recalls(model, held_out)


def run_all(setting: Setting, out: Path) -> list[dict]:
    """The runs that are left, one after the other.

    Returns:
        The lines of all runs.

    Raises:
        ValueError: As `finished_runs`.
    """
    finished = finished_runs(out, setting, Run)
    runs = [Run(*fields) for fields in product(OPTIONS, setting.pairs, range(setting.seeds))]
    if any(run not in finished for run in runs):
        model, processor = compose(setting)
        folder = Path(setting.photographs)
        pairs = cached_pairs(model, processor, folder / "train", setting.pairs[-1], out / "train.pt")
        held_out = cached_pairs(model, processor, folder / "val", setting.held_out, out / "val.pt")
    for run in runs:
        if run not in finished:
            finished[run] = write_line(out, execute(run, setting, model, pairs, held_out))
    return [finished[run] for run in runs]


def report(lines: Sequence[Mapping], setting: Setting) -> str:
    """Markdown: means over the seeds with half the width of their 95% intervals, by Student's t."""
    found = {(line["option"], line["pairs"], line["seed"]): line for line in lines}
    rows = []
    for pairs, option in product(setting.pairs, OPTIONS):
        values = {
            name: [[found[chosen, pairs, seed][name] for seed in range(setting.seeds)] for chosen in (option, PLAIN)]
            for name in ("recall@1", "recall@10")
        }
        own, plain = values["recall@10"]
        gains = [after - before for after, before in zip(own, plain, strict=True)]
        difference = "" if option == PLAIN else f"{mean(gains):+.3f} ± {interval(gains):.3f}"
        cells = [f"{mean(of_option):.3f} ± {interval(of_option):.3f}" for of_option, _ in values.values()]
        rows.append((pairs, option, *cells, difference, setting.seeds))
    return markdown_table(HEADER, rows)


def main(
    towers: Annotated[str, typer.Argument(help="Folder that build_towers.py wrote.")],
    photographs: Annotated[str, typer.Argument(help="Folder of `train` and `val`, image folders with captions.")],
    out: Annotated[Path, typer.Option(help="Folder of the runs.")],
    layers: Annotated[int, typer.Option(min=1, help="Layers of the language model.")] = 8,
    pairs: Annotated[list[int] | None, typer.Option(help="Numbers of pairs, rising.")] = None,
    held_out: Annotated[int, typer.Option(min=10, help="Photographs to measure on.")] = 500,
    steps: Annotated[int, typer.Option(min=10, help="Steps of a run.")] = 100,
    seeds: Annotated[int, typer.Option(min=2, help="Seeds of each run.")] = 3,
):
    counts = tuple(pairs or Setting.pairs)
    setting = Setting(towers, photographs, layers, counts, held_out, steps, seeds=seeds)
    table = report(run_all(setting, out), setting)
    print(machine_facts(), table, sep="\n\n")


if __name__ == "__main__":
    typer.run(main)
