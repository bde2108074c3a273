"""Three steps of EMACallback on weights set by hand, under DDP and FSDP2, with a save and a load. For torchrun."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torchrun import leave
from transformers import TrainerControl, TrainerState, TrainingArguments

from mmgem.training.trainer.weight_average import EMACallback


class Line(nn.Module):
    """y = w x + b, and a part that is frozen."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 1)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x, y):
        return {"loss": (self.linear(x)[:, 0] - y).square().mean()}


def begun(decay: float, model: nn.Module, tmp_path) -> tuple[EMACallback, tuple]:
    """A callback at the start of training, and what it is called with."""
    ema = EMACallback(decay)
    arguments = (TrainingArguments(output_dir=str(tmp_path), use_cpu=True), TrainerState(), TrainerControl())
    ema.on_train_begin(*arguments, model=model)
    return ema, arguments


def one_step(ema, arguments, model, values: dict[str, torch.Tensor]):
    with torch.no_grad():
        for name, value in values.items():
            model.get_parameter(name).copy_(value)
    arguments[1].global_step += 1
    ema.on_step_end(*arguments, model=model)


def averaged_in(folder: Path, model):
    (folder / "checkpoint").mkdir(parents=True, exist_ok=True)
    ema, arguments = begun(0.9, model, folder)
    for value in (1.0, 2.0, 3.0):
        weights = {"linear.weight": torch.full((1, 4), value), "linear.bias": torch.full((1,), value)}
        like = model.linear.weight
        if isinstance(like, DTensor):
            weights = {name: distribute_tensor(w, like.device_mesh, like.placements) for name, w in weights.items()}
        one_step(ema, arguments, model, weights)
        if value == 2:
            ema.save(folder / "checkpoint")
            dist.barrier()
            ema = EMACallback(0.9)
            ema.load(folder / "checkpoint", model)
            ema.on_train_begin(*arguments, model=model)
    ema.save(folder)


if __name__ == "__main__":
    out = Path(sys.argv[1])
    dist.init_process_group("gloo")
    model = Line()
    DistributedDataParallel(model)
    averaged_in(out / "ddp", model)
    model = Line()
    fully_shard(model, mesh=dist.init_device_mesh("cpu", (2,)))
    averaged_in(out / "fsdp2", model)
    leave()
