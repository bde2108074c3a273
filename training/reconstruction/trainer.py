"""Training of the reconstruction stage."""

import torch
from torch import nn

from mmgem.modeling_mmgem import MMGEMModel
from mmgem.training.data.collator import MMGEMCollator
from mmgem.training.reconstruction.masking import MaskingCollator, Reconstruction
from mmgem.training.reconstruction.model import MMGEMForReconstruction
from mmgem.training.trainer.arguments import MMGEMTrainingArguments
from mmgem.training.trainer.parameter_selection import own_name
from mmgem.training.trainer.trainer import MMGEMTrainer

USED_PARTS = ("vision_tower", "pool_aggregator", "token_projection", "language_model", "reconstruction_head")
UNUSED_ARGUMENTS = ("caption_loss_weight", "contrastive_loss_weight", "contrastive_objective", "grad_cache_chunk_size")


class ReconstructionTrainer(MMGEMTrainer):
    """Trains an `MMGEMModel` to put back masked inputs, see [`MMGEMForReconstruction`]; its `model` is one.

    Each of the two losses is a mean over all masked tokens, or patches, of all processes and accumulation steps, so N
    processes with a batch of B, and N accumulation steps of B, give the gradient of one process with N * B. All else
    is as in [`MMGEMTrainer`], evaluation included.

    Args:
        model: An `MMGEMModel` with `text_attention="bidirectional"`; its modules are trained.
        args: The training arguments, of which `UNUSED_ARGUMENTS` have no meaning here.
        processing_class: The `MMGEMProcessor`.
        data_collator: An [`MMGEMCollator`], whose batches are masked; by default one of the processor.
        options: How much is masked, and the weight of the patches.
        kwargs: Further arguments of [`MMGEMTrainer`].

    Raises:
        ValueError: If the model is not bidirectional, `args` ask for a contrastive objective or GradCache, or nothing
            is left to train.
    """

    FIGURES = {"text_loss": "loss", "patch_loss": "loss", "effective_batch_size": "count"}

    def __init__(
        self,
        model: MMGEMModel,
        args: MMGEMTrainingArguments,
        processing_class,
        data_collator: MMGEMCollator | None = None,
        options: Reconstruction | None = None,
        **kwargs,
    ):
        for name in ("contrastive_objective", "grad_cache_chunk_size"):
            if getattr(args, name) is not None:
                raise ValueError(
                    f"`{name}` is {getattr(args, name)}; expected None, since reconstruction compares nothing."
                )
        self.options = Reconstruction() if options is None else options
        collator = MMGEMCollator(processing_class) if data_collator is None else data_collator
        super().__init__(
            MMGEMForReconstruction.from_model(model),
            args,
            processing_class,
            MaskingCollator(collator, model.config, self.options),
            **kwargs,
        )

    def _freeze_unused(self, model):
        super()._freeze_unused(model)
        freeze_read_out(model)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor:
        """(2,) masked tokens and patches of all processes and accumulation steps, each at least 1."""
        masks = ("text_mask", "patch_mask")
        counts = [sum(int(batch[mask].sum()) for batch in batch_samples if mask in batch) for mask in masks]
        return self.accelerator.gather(torch.tensor([counts], device=device)).sum(0).clamp(min=1)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        # The Trainer averages gradients over processes, but each loss is already divided by what all of them mask.
        shares = 1 if num_items_in_batch is None else self.accelerator.num_processes
        text_loss, patch_loss = shares * outputs.text_loss, shares * outputs.patch_loss
        if num_items_in_batch is not None:
            images = len(inputs["pixel_values"]) if "pixel_values" in inputs else 0
            self._keep(text_loss=text_loss.detach(), patch_loss=patch_loss.detach(), effective_batch_size=images)
        loss = text_loss + self.options.patch_loss_weight * patch_loss
        return (loss, outputs) if return_outputs else loss


def freeze_read_out(model: nn.Module) -> None:
    """Stop training the parts that play no role in reconstruction, for which a distributed run would wait.

    Args:
        model: An `MMGEMForReconstruction`, or one with LoRA.

    Raises:
        ValueError: If nothing is left to train.
    """
    for name, parameter in model.named_parameters():
        if own_name(name).partition(".")[0] not in USED_PARTS:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"nothing is left to train; expected some of {', '.join(USED_PARTS)} for reconstruction.")
