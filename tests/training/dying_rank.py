"""Two processes go on from the last whole checkpoint; the second may end or hang, in a `step` or when `saving`."""

import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from killed_run import die, die_at, train, write_in_two_halves
from one_step import read_processor
from torchrun import leave
from transformers import TrainerCallback

from mmgem.training.trainer.checkpoints import last_complete_checkpoint


class InThirdStep(TrainerCallback):
    """Does something on the second process, and lets the first not wait long for it."""

    def __init__(self, act: Callable[[], None]):
        self.act = act

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            if dist.get_rank() == 1:
                self.act()
            # As `ddp_timeout` does on accelerators; on a CPU transformers leaves it at half an hour.
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=2), dist.group.WORLD)


ACTS = {"step": [InThirdStep(die)], "hanging": [InThirdStep(lambda: time.sleep(1000))]}


def main(folder: Path, moment: str):
    if moment == "saving":
        write_in_two_halves(die_at("rng_state_1.pth"))
    processor, checkpoint = read_processor(str(folder / "tokenizer")), last_complete_checkpoint(folder)
    trainer = train(processor, folder, 2, checkpoint, ACTS.get(moment, ()), is_seeded=True)
    if dist.get_rank() == 0:
        torch.save(trainer.model.state_dict(), folder / "weights.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
    leave()
