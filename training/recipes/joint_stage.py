"""The joint stage: a contrastive loss and captioning in one forward call."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from mmgem.modeling_mmgem import MMGEMModel
from mmgem.training.recipes.batch_preview import Preview
from mmgem.training.recipes.stage_kinds import StageKind
from mmgem.training.trainer.contrastive_losses import build_objective
from mmgem.training.trainer.trainer import MMGEMTrainer


class JointStage(StageKind):
    """A stage of the joint loss. Its options are those of the contrastive objective."""

    model_class = MMGEMModel
    losses = {"caption_loss": "caption loss", "contrastive_loss": "contrastive loss"}

    def check(self) -> None:
        try:
            build_objective(**self.stage.options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"`objective` of stage `{self.stage.name}`: {error}") from error

    def arguments(self) -> dict[str, Any]:
        return {"contrastive_objective": dict(self.stage.options)}

    def trainer(self, model, arguments, processor, collator, train_dataset, eval_dataset=None) -> MMGEMTrainer:
        return MMGEMTrainer(
            model,
            arguments,
            processing_class=processor,
            data_collator=collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
        )

    def try_on_meta(self, model: MMGEMModel) -> nn.Module:
        build_objective(**self.stage.options).check(model.config)
        return self._select_trained(model)

    def preview(self, batch: Mapping[str, Any]) -> Preview:
        return Preview(batch, use="generated", legend="[[what it learns to write]], each with an end token")
