"""One SGD step of SelfCriticalTrainer, whose captions follow from the images; run by torchrun, on two processes."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from one_step import arguments_of_one_step, read_processor, rows
from tiny_models import build_model
from torchrun import leave

from mmgem.training.self_critical.trainer import SelfCritical, SelfCriticalTrainer


def parts() -> dict[str, list[list[dict]]]:
    """Name to what each of the two processes gets."""
    data = [*rows(), {"text": "a sentence about nothing in particular"}, {"text": "another"}]
    data = [row | {"draw_seed": seed} for seed, row in enumerate(data)]
    return {"three and one": [data[:3], data[3:]], "images on one": [data[:4], data[4:]]}


def draw(prompt_ids: torch.Tensor, visual_tokens: torch.Tensor) -> torch.Tensor:
    """(S, 3) tokens that follow from the image and from which of its three captions it is."""
    return visual_tokens[:, :3].argmax(-1) + 20 + torch.arange(len(visual_tokens))[:, None] % 3


def reward(captions, are_whole, references) -> list[float]:
    return [float(sum(map(ord, caption)) % 7) for caption in captions]


def gradient_of_one_step(processor, folder, items: list[list[dict]], per_batch: int, reward_weight=1.0) -> dict:
    """Parameter by parameter, what one step with learning rate 1 subtracts; on items that are lists of rows."""
    torch.manual_seed(0)
    arguments = arguments_of_one_step(
        folder,
        per_device_train_batch_size=per_batch,
        train_sampling_strategy="sequential",
        logging_steps=1,
    )
    options = SelfCritical(captions_drawn=3, reward_weight=reward_weight)
    trainer = SelfCriticalTrainer(
        build_model(), arguments, processor, reward=reward, options=options, train_dataset=items
    )
    trainer._draw = draw
    collate = trainer.data_collator
    trainer.data_collator = lambda batch: collate([row for item in batch for row in item])
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    return {name: before[name] - parameter.detach() for name, parameter in trainer.model.named_parameters()}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    processor = read_processor(str(folder / "tokenizer"))
    gradients = {name: gradient_of_one_step(processor, folder, items, 1) for name, items in parts().items()}
    torch.save(gradients, folder / f"gradients-{dist.get_rank()}.pt")
    leave()
