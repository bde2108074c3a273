"""Losses of this process's part of a batch, and their gradients; saves both. Run by torchrun on two processes."""

import sys

import torch
import torch.distributed as dist
from torchrun import leave

from mmgem.contrastive_batch import ContrastiveBatch
from mmgem.training.trainer.contrastive_losses import build_objective

LEAVES = ("query_embeds", "target_embeds", "logit_scale", "logit_bias")


def loss_and_gradients(options: dict, fields: dict, teacher: dict) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Of an objective with `options`, for the fields of two [`ContrastiveBatch`]es."""
    leaves = {name: fields[name].detach().requires_grad_() for name in LEAVES}
    batch = ContrastiveBatch(**{**fields, **leaves})
    loss = build_objective(**options)(batch, teacher=ContrastiveBatch(**teacher))
    return loss.detach(), list(torch.autograd.grad(loss, list(leaves.values())))


if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    cases, folder = torch.load(f"{sys.argv[1]}/cases.pt"), sys.argv[1]
    results = [loss_and_gradients(options, batches[rank], teachers[rank]) for options, batches, teachers in cases]
    torch.save(results, f"{folder}/results_{rank}.pt")
    leave()
