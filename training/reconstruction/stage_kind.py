"""Reconstruction as a stage of a recipe."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from mmgem.modeling_mmgem import MMGEMModel
from mmgem.text_rows import IGNORED_LABEL
from mmgem.training.recipes.batch_preview import Preview
from mmgem.training.recipes.stage_kinds import StageKind
from mmgem.training.reconstruction.masking import Reconstruction
from mmgem.training.reconstruction.model import MMGEMForReconstruction
from mmgem.training.reconstruction.trainer import UNUSED_ARGUMENTS, ReconstructionTrainer, freeze_read_out


class ReconstructionStage(StageKind):
    """A stage that learns to put back masked tokens and patches. Its options are those of [`Reconstruction`]."""

    model_class = MMGEMForReconstruction
    losses = {"text_loss": "loss of masked text", "patch_loss": "loss of masked patches"}

    def check(self) -> None:
        self._check_options(Reconstruction)
        if unused := [name for name in UNUSED_ARGUMENTS if name in self.stage.training]:
            raise ValueError(
                f"`reconstruction` and `{unused[0]}` of stage `{self.stage.name}` exclude each other; expected one of "
                "them."
            )

    def arguments(self) -> dict[str, Any]:
        return {"contrastive_loss_weight": 0.0}  # nothing is compared, so a batch of 1 will do

    def trainer(
        self, model, arguments, processor, collator, train_dataset, eval_dataset=None
    ) -> ReconstructionTrainer:
        return ReconstructionTrainer(
            model,
            arguments,
            processing_class=processor,
            data_collator=collator,
            options=Reconstruction(**self.stage.options),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
        )

    def extended(self, model: MMGEMModel) -> MMGEMForReconstruction:
        return MMGEMForReconstruction.from_model(model)

    def try_on_meta(self, model: MMGEMModel) -> nn.Module:
        trained = self._select_trained(self.extended(model))
        freeze_read_out(trained)
        return trained

    def released(self, model: nn.Module) -> MMGEMModel:
        merged = super().released(model)
        assert isinstance(merged, MMGEMForReconstruction)
        return merged.released()

    def preview(self, batch: Mapping[str, Any]) -> Preview:
        text_mask = batch["text_mask"]  # (T, L)
        shown = {
            **batch,
            "labels": batch["input_ids"].masked_fill(~text_mask, IGNORED_LABEL),
            "contrastive_mask": text_mask.new_zeros(len(text_mask)),
        }
        return Preview(shown, use="put back", legend="[[what it puts back]]", hidden_patches=batch.get("patch_mask"))
