"""A second model that embeds every batch beside the one in training, for objectives that ask a teacher."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

from mmgem.contrastive_batch import ContrastiveBatch
from mmgem.text_rows import IGNORED_LABEL
from mmgem.training.loading import load_checkpoint
from mmgem.training.trainer.grad_cache import concatenate
from mmgem.training.trainer.weight_average import move_averages, trained_parameters

TEACHER_WEIGHTS_NAME = "teacher.safetensors"


class Teacher(TrainerCallback):
    """A frozen checkpoint, or a moving average of the model in training (momentum distillation: MoCo,
    https://arxiv.org/abs/1911.05722; ALBEF, https://arxiv.org/abs/2107.07651). Every process holds all of it.

    Args:
        model: The model in training, not yet wrapped or sharded.
        processor: The processor of the model; the teacher takes the same inputs.
        momentum: The share of the teacher's weights that stays at each step, in [0, 1].
        pretrained: The folder of a checkpoint, instead.

    Raises:
        ValueError: If the checkpoint takes other tokens or other pixels than the model.
    """

    def __init__(self, model: nn.Module, processor, momentum: float | None = None, pretrained: str | None = None):
        self.momentum = momentum
        if pretrained is None:
            self.model = copy.deepcopy(model)
        else:
            self.model, own_processor = load_checkpoint(pretrained)
            _check_same_inputs(processor, own_processor, pretrained)
        self.model.requires_grad_(False).eval()

    @torch.no_grad()
    def embed(self, chunks: Sequence[Mapping[str, Any]]) -> ContrastiveBatch:
        """Embed the texts and targets of a batch, in one or several chunks, without gradients."""
        batches = []
        for chunk in chunks:
            inputs = {**chunk, "labels": torch.full_like(chunk["input_ids"], IGNORED_LABEL)}
            batches.append(self.model(**inputs, return_contrastive_batch=True).contrastive_batch)
        return concatenate(batches)

    def on_train_begin(self, args, state, control, **kwargs):
        self.model.to(args.device)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.momentum is None:
            return
        own, trained = dict(self.model.named_parameters()), trained_parameters(model)
        move_averages({name: own[name] for name in trained}, trained, self.momentum)

    def save(self, folder: str | Path, should_save: bool):
        """Keep a moving average with a checkpoint; a frozen teacher stays where it is."""
        if self.momentum is not None and should_save:
            state = {name: tensor.contiguous() for name, tensor in self._own_tensors().items()}
            save_file(state, Path(folder) / TEACHER_WEIGHTS_NAME)

    def load(self, folder: str | Path):
        """Take the moving average of a checkpoint.

        Raises:
            FileNotFoundError: If the checkpoint has none.
        """
        if self.momentum is None:
            return
        saved, own = load_file(Path(folder) / TEACHER_WEIGHTS_NAME), self._own_tensors()
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(saved[name])

    def _own_tensors(self) -> dict[str, torch.Tensor]:
        """Every parameter once, tied ones under their first name."""
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}


def _check_same_inputs(processor, teacher_processor, name: str):
    if processor.tokenizer.get_vocab() != teacher_processor.tokenizer.get_vocab():
        raise ValueError(f"the teacher {name!r} has another vocabulary than the model; expected the same tokenizer.")
    own, other = processor.image_processor, teacher_processor.image_processor
    for field in ("size", "crop_size", "image_mean", "image_std", "rescale_factor"):
        values = [getattr(image_processor, field, None) for image_processor in (own, other)]
        if values[0] != values[1]:
            raise ValueError(
                f"the teacher {name!r} sees images with `{field}` {values[1]}, the model with {values[0]}; expected "
                "the same image processor."
            )
