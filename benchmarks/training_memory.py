"""The joint step with fewer weights to train or fewer activations to keep, and its towers alone.

    python -m benchmarks.training_memory [--bf16]

Prints images per second, peak memory and the weights that train. A step is forward, backward and AdamW; all steps of a
round follow one another.
"""

import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated

import torch
import typer
from torch import nn

from benchmarks.measure import machine_facts, markdown_table, time_alternately
from benchmarks.setting import Setting, build_batch, build_model
from benchmarks.training_step import TrainingStep
from mmgem import MMGEMModel
from mmgem.text_rows import IGNORED_LABEL
from mmgem.training.trainer.lora import add_lora
from mmgem.training.trainer.parameter_selection import set_trainable

LORA_RANK = 16
HEADER = ("step", "s", "images/s", "peak GB", "GB with weights, AdamW", "trained, M")


def _plain(model: MMGEMModel) -> nn.Module:
    return model


def _frozen_vision(model: MMGEMModel) -> nn.Module:
    set_trainable(model, freeze=["vision_tower"])
    return model


def _lora(model: MMGEMModel) -> nn.Module:
    return add_lora(model, towers=["vision_tower", "language_model"], r=LORA_RANK)


def _checkpointed(model: MMGEMModel) -> nn.Module:
    model.activation_checkpointing_enable()
    return model


CHANGES: dict[str, Callable[[MMGEMModel], nn.Module]] = {
    "joint step": _plain,
    "vision tower frozen": _frozen_vision,
    f"LoRA of rank {LORA_RANK} on both towers": _lora,
    "gradient checkpointing": _checkpointed,
    "LoRA and gradient checkpointing": lambda model: _lora(_checkpointed(model)),
}


def tower_steps(setting: Setting, batch: dict[str, torch.Tensor], bf16: bool) -> dict[str, TrainingStep]:
    """Steps of each tower on its own: images to features, and captions to their language modelling loss."""
    model = build_model(setting)
    vision, text = model.vision_tower, model.language_model
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED_LABEL)
    texts = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
    return {
        "vision tower alone": TrainingStep(
            vision, lambda: vision(batch["pixel_values"]).last_hidden_state.float().square().mean(), bf16
        ),
        "language model alone, padded captions": TrainingStep(text, lambda: text(**texts).loss, bf16),
    }


def joint_step(setting: Setting, batch: dict[str, torch.Tensor], change: Callable, bf16: bool) -> TrainingStep:
    """The joint step of a model after `change`."""
    model = change(build_model(setting))
    return TrainingStep(model, lambda: model(**batch, return_loss=True).loss, bf16)


def compare(setting: Setting, rounds: int, bf16: bool) -> str:
    """The table of the benchmark, as markdown."""
    batch = build_batch(setting)
    steps = tower_steps(setting, batch, bf16)
    steps |= {name: joint_step(setting, batch, change, bf16) for name, change in CHANGES.items()}
    memory = {name: step.peak_memory() for name, step in steps.items()}  # these runs warm up, too
    seconds = time_alternately(steps, rounds)
    rows = []
    for name, step in steps.items():
        median = statistics.median(seconds[name])
        trained = sum(p.numel() for p in step.model.parameters() if p.requires_grad)
        rows.append(
            (
                name,
                f"{median:.2f}",
                f"{setting.num_images / median:.2f}",
                f"{memory[name] / 1e9:.2f}",
                f"{(memory[name] + step.resident_memory()) / 1e9:.2f}",
                f"{trained / 1e6:.1f}",
            )
        )
    facts = f"{setting.num_images} images, {'bfloat16 autocast' if bf16 else 'float32'}, {rounds} rounds."
    return f"{facts}\n\n{markdown_table(HEADER, rows)}"


def main(
    rounds: Annotated[int, typer.Option(help="Measured runs of each step.")] = 3,
    batch_size: Annotated[int, typer.Option(help="Images, one caption each.")] = 8,
    bf16: Annotated[bool, typer.Option("--bf16", help="Autocast to bfloat16.")] = False,
):
    print(machine_facts(), compare(replace(Setting(), num_images=batch_size), rounds, bf16), sep="\n\n")


if __name__ == "__main__":
    typer.run(main)
