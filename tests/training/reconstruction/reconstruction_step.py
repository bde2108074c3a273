"""One SGD step of ReconstructionTrainer, and the fixed rows that it takes; run by torchrun, on two processes."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from one_step import arguments_of_one_step, read_processor, rows
from tiny_models import build_model
from torchrun import leave

from mmgem.training.reconstruction.masking import Reconstruction
from mmgem.training.reconstruction.model import MMGEMForReconstruction
from mmgem.training.reconstruction.trainer import ReconstructionTrainer

OPTIONS = Reconstruction(text_mask_ratio=0.3, patch_mask_ratio=0.6, patch_loss_weight=0.5)


def seeded_rows() -> list[dict]:
    """Images with texts of many lengths, texts alone, so that processes and steps mask different numbers."""
    texts = [{"text": "a sentence about nothing in particular, but a long one"}, {"text": "another"}]
    return [row | {"draw_seed": seed} for seed, row in enumerate([*rows(), *texts])]


def parts() -> dict[str, list[list[dict]]]:
    """Name to what each of the two processes gets."""
    data = seeded_rows()
    return {
        "alike": [data[:2] + data[4:5], data[2:4] + data[5:]],
        "images on one": [data[:4], data[4:]],
        "most on one": [data[:5], data[5:]],
    }


def gradient_of_one_step(processor, folder, items: list[list[dict]], per_batch: int, **arguments) -> dict:
    """Parameter by parameter, what one step with learning rate 1 subtracts; on items that are lists of rows."""

    torch.manual_seed(0)
    model = build_model(text_attention="bidirectional")
    arguments = arguments_of_one_step(
        folder,
        contrastive_loss_weight=0.0,
        per_device_train_batch_size=per_batch,
        train_sampling_strategy="sequential",
        logging_steps=1,
        **arguments,
    )
    trainer = ReconstructionTrainer(model, arguments, processor, options=OPTIONS, train_dataset=items)
    collate = trainer.data_collator
    trainer.data_collator = lambda batch: collate([row for item in batch for row in item])
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    assert isinstance(trainer.model, MMGEMForReconstruction)
    log = {name: trainer.state.log_history[0][name] for name in ("loss", *trainer.FIGURES)}
    gradient = {name: before[name] - parameter.detach() for name, parameter in trainer.model.named_parameters()}
    return gradient | {name: torch.tensor(value) for name, value in log.items()}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    processor = read_processor(str(folder / "tokenizer"))
    exact = {"ddp_find_unused_parameters": False}
    gradients = {name: gradient_of_one_step(processor, folder, items, 1, **exact) for name, items in parts().items()}
    torch.save(gradients, folder / f"gradients-{dist.get_rank()}.pt")
    leave()
