"""The findings of a dry run about a stage, and the lines that tell them."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn

from mmgem.training.printable import counted
from mmgem.training.recipes.step_memory import StepMemory
from mmgem.training.trainer.parameter_selection import own_name


@dataclass
class StageCheck:
    """The findings about a stage, on one process.

    Args:
        name: The name of the stage.
        steps: Optimizer steps of the whole stage.
        rows_per_step: Rows of each step.
        parameters: How many parameters the model has.
        trained_parameters: How many of them train.
        memory: The memory of the step.
        seconds: The duration of the step; the first of a run, which is slower than those after it.
        losses: The losses of the step, by name.
        images: A file with the images as the model sees them; None where there are none.
        skipped: For each source, how many of the rows and shards met could not be read.
    """

    name: str
    steps: int
    rows_per_step: int
    parameters: int
    trained_parameters: int
    memory: StepMemory
    seconds: float
    losses: dict[str, float]
    images: Path | None
    skipped: dict[str, int]


def describe_model(model: nn.Module) -> str:
    """Say in a line which parts of a model train, and how it attends.

    Args:
        model: An `MMGEMModel`, or one with LoRA, ready to train.
    """
    parts: dict[str, list[int]] = {}  # parameters, and those of them that learn
    for name, parameter in model.named_parameters():
        if ".original_module." in name:  # of which LoRA trains a copy
            continue
        counts = parts.setdefault(own_name(name).partition(".")[0], [0, 0])
        counts[0] += parameter.numel()
        counts[1] += parameter.numel() if parameter.requires_grad else 0
    learning = [
        name if learned == count else f"{name} ({learned / count:.1%})"
        for name, (count, learned) in parts.items()
        if learned
    ]
    return f"  learns: {', '.join(learning)}; text attention {model.config.text_attention}"


def describe_check(check: StageCheck) -> Iterator[str]:
    """Yield the lines about the step of a dry run."""
    memory = check.memory
    parts = ", ".join(f"{part} {_in_bytes(size)}" for part, size in asdict(memory).items() if size)
    per_row = _in_bytes(memory.activations // check.rows_per_step)
    yield f"  trains {check.trained_parameters:,} of {check.parameters:,} parameters"
    yield f"  memory: {parts} ({per_row} a row); {_in_bytes(memory.total)} in all, on each process"
    losses = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in check.losses.items())
    yield f"  one of {counted(check.steps, 'step')}, of {counted(check.rows_per_step, 'row')}: {losses}"
    yield f"  it took {check.seconds:.1f} s, as the first one; those after it are faster"
    if check.skipped:
        yield f"  could not be read so far: {', '.join(f'{n} of {source}' for source, n in check.skipped.items())}"


def _in_bytes(size: int) -> str:
    unit, name = next(
        (unit, name)
        for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))
        if size >= unit or unit == 1
    )
    return f"{size / unit:.1f} {name}"
