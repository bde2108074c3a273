"""Three steps of EMACallback on weights set by hand, under DDP and FSDP2, with a save and a load. For torchrun."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from test_ema import Line, begun, one_step
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from mmgem.training.trainer.weight_average import EMACallback


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
    # Gloo's threads abort a process that exits before they are joined.
    dist.barrier()
    dist.destroy_process_group()
