"""The caption loss over a large vocabulary: all logits at once, or chunk by chunk in two ways.

    python -m benchmarks.caption_loss

Prints time and peak memory, forward and backward, for the labels of 16 and of 128 images. `MMGEMModel` takes the first
way while the logits are few, above that `linear_cross_entropy` in float32 and the checkpointed chunks otherwise.
"""

import statistics
from collections.abc import Callable
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmarks.measure import machine_facts, markdown_table, peak_memory, time_alternately
from mmgem.joint_step import LOGITS_AT_ONCE


def all_logits(head: nn.Linear, states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(M, H) states and (M,) labels -> sum of the losses."""
    return F.cross_entropy(head(states).float(), labels, reduction="sum")


def fused(head: nn.Linear, states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The same by `linear_cross_entropy`, which takes no part in autocast by itself."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else states.dtype
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=_chunk_size(head), chunking_method=None)
    states, weight = states.to(dtype), head.weight.to(dtype)
    return F.linear_cross_entropy(states, weight, labels, reduction="sum", options=options)


def checkpointed(head: nn.Linear, states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The same with the logits of each chunk computed once more for the gradient."""
    chunks = zip(states.split(_chunk_size(head)), labels.split(_chunk_size(head)), strict=True)
    losses = [checkpoint(all_logits, head, *chunk, use_reentrant=False) for chunk in chunks]
    return torch.stack(losses).sum()


def _chunk_size(head: nn.Linear) -> int:
    return max(1, LOGITS_AT_ONCE // head.out_features)


WAYS: dict[str, Callable] = {
    "all logits, `cross_entropy`": all_logits,
    "`linear_cross_entropy` in chunks": fused,
    "`cross_entropy` in checkpointed chunks": checkpointed,
}


def compare(hidden_size: int, vocabulary_size: int, num_labels: int, rounds: int) -> str:
    """The table for one number of labels, as markdown."""
    torch.manual_seed(0)
    head = nn.Linear(hidden_size, vocabulary_size, bias=False)
    states = torch.randn(num_labels, hidden_size, requires_grad=True)
    labels = torch.randint(0, vocabulary_size, (num_labels,))

    def step(way: Callable, bf16: bool):
        states.grad = head.weight.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = way(head, states, labels)
        loss.backward()

    keys = [(name, bf16) for name in WAYS for bf16 in (False, True)]
    steps = {key: lambda key=key: step(WAYS[key[0]], bf16=key[1]) for key in keys}
    memory = {}
    for key, run in steps.items():  # these runs warm up, too
        states.grad = head.weight.grad = None
        memory[key] = peak_memory(run)
    seconds = {key: statistics.median(values) for key, values in time_alternately(steps, rounds).items()}
    rows = []
    for name in WAYS:
        figures = [(f"{seconds[name, bf16]:.2f}", f"{memory[name, bf16] / 1e6:.0f}") for bf16 in (False, True)]
        rows.append((name, *figures[0], *figures[1]))
    header = (f"{num_labels:,} labels, {vocabulary_size:,} words", "float32, s", "MB", "bfloat16 autocast, s", "MB")
    return markdown_table(header, rows)


def main(rounds: Annotated[int, typer.Option(help="Measured runs of each.")] = 3):
    print(machine_facts(), compare(768, 32000, 536, rounds), compare(768, 32000, 4288, rounds), sep="\n\n")


if __name__ == "__main__":
    typer.run(main)
