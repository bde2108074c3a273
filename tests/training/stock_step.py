"""transformers' own Trainer, with `labels` in the batch."""

from functools import partial

import torch
from one_step import rows
from tiny_models import build_model
from transformers import Trainer, TrainingArguments

from mmgem.text_rows import IGNORED_LABEL


def collate(processor, batch: list[dict]) -> dict:
    """Pairs of an image and a caption."""
    texts, images = [row["caption"] for row in batch], [row["image"] for row in batch]
    inputs = processor(images=images, text=texts, return_tensors="pt")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORED_LABEL)
    return {**inputs, "labels": labels, "return_loss": True}


def stock_trainer(model, processor, output_dir, **arguments) -> Trainer:
    """On four pairs, in their order."""
    settings = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "remove_unused_columns": False}
    settings |= {"save_strategy": "no", "max_grad_norm": 0.0, "train_sampling_strategy": "sequential", "max_steps": 1}
    return Trainer(
        model,
        TrainingArguments(str(output_dir), **(settings | arguments)),
        data_collator=partial(collate, processor),
        train_dataset=rows(),
        eval_dataset=rows(),
        processing_class=processor,
    )


def stock_gradient(processor, output_dir, batches: list[list[dict]], **arguments) -> dict[str, torch.Tensor]:
    """Parameter by parameter, what one optimizer step with learning rate 1 subtracts.

    Args:
        processor: Of the model.
        output_dir: Of the trainer.
        batches: The rows of each forward call.
        arguments: Of the trainer.
    """
    model = build_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    settings = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant"}
    trainer = stock_trainer(model, processor, output_dir, per_device_train_batch_size=1, **settings, **arguments)
    trainer.train_dataset = batches
    trainer.data_collator = lambda items: collate(processor, items[0])
    trainer.train()
    return {name: before[name] - parameter.detach() for name, parameter in model.named_parameters()}
