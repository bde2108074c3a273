"""The kinds of training that a stage of a recipe may be, and the questions that each of them answers."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:  # reading a recipe imports this file, but neither a model nor peft
    from torch import nn

    from mmgem.modeling_mmgem import MMGEMModel
    from mmgem.training.data.collator import MMGEMCollator
    from mmgem.training.recipes.batch_preview import Preview
    from mmgem.training.recipes.recipe import Stage
    from mmgem.training.trainer.arguments import MMGEMTrainingArguments
    from mmgem.training.trainer.trainer import MMGEMTrainer

# The section of a stage that holds the options of a kind, and the class of the kind. The first is the default.
STAGE_KINDS = {
    "objective": "mmgem.training.recipes.joint_stage.JointStage",
    "self_critical": "mmgem.training.self_critical.stage_kind.SelfCriticalStage",
    "reconstruction": "mmgem.training.reconstruction.stage_kind.ReconstructionStage",
}


class StageKind(ABC):
    """A kind of training, which answers a run's questions about one stage. A new kind is a file with a subclass, and a
    line in `STAGE_KINDS`.

    Args:
        stage: The stage, of this kind.

    Attributes:
        model_class: The class of the model that trains.
        losses: The losses that its trainer logs, by name, in words.
    """

    model_class: ClassVar[type["MMGEMModel"]]
    losses: ClassVar[Mapping[str, str]]

    def __init__(self, stage: "Stage"):
        self.stage = stage

    @abstractmethod
    def check(self) -> None:
        """Check the options of the kind, and that the stage has no arguments that mean nothing to it.

        Raises:
            ValueError: If they cannot be used; the message names the stage.
        """

    @abstractmethod
    def arguments(self) -> dict[str, Any]:
        """Return the training arguments that follow from the kind and its options."""

    @abstractmethod
    def trainer(
        self,
        model: "MMGEMModel",
        arguments: "MMGEMTrainingArguments",
        processor,
        collator: "MMGEMCollator",
        train_dataset,
        eval_dataset=None,
    ) -> "MMGEMTrainer":
        """Build the trainer of the stage.

        Args:
            model: The plain model that the stage begins with.
            arguments: The training arguments.
            processor: The `MMGEMProcessor`.
            collator: Makes batches for the joint loss.
            train_dataset: The rows of the stage, in order.
            eval_dataset: The rows to evaluate on, if any.
        """

    def extended(self, model: "MMGEMModel") -> "MMGEMModel":
        """Return the model of `model_class` that trains, with the modules of a plain one."""
        return model

    @abstractmethod
    def try_on_meta(self, model: "MMGEMModel") -> "nn.Module":
        """Do to a model without weights what the stage does to its model before training.

        Args:
            model: A plain model on the meta device.

        Returns:
            The model as it would train; `requires_grad` says which parameters do.

        Raises:
            TypeError: If the names of what trains are not a list.
            ValueError: If the stage and the model do not fit together.
        """

    def released(self, model: "nn.Module") -> "MMGEMModel":
        """Return the plain model that the stage leaves: LoRA merged, without anything that only training needs.

        Args:
            model: The model that trained, with LoRA if it has; it is used up.
        """
        from peft import PeftModel

        from mmgem.training.trainer.lora import merge_lora

        return merge_lora(model) if isinstance(model, PeftModel) else model  # type: ignore[return-value]

    @abstractmethod
    def preview(self, batch: Mapping[str, Any]) -> "Preview":
        """Return what `mmgem train --check` shows of a batch.

        Args:
            batch: A batch from the collator of the trainer.
        """

    def _check_options(self, options: type) -> None:
        """Refuse a section of the kind that is not of these options, a dataclass, or that it refuses."""
        from mmgem.training.argument_checks import check_arguments

        where = f"`{self.stage.kind}` of stage `{self.stage.name}`"
        check_arguments(self.stage.options, options, where)
        try:
            options(**self.stage.options)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    def _select_trained(self, model: "MMGEMModel") -> "nn.Module":
        """Freeze parts of a model and add LoRA, as the training arguments say."""
        from mmgem.training.trainer.lora import add_lora
        from mmgem.training.trainer.parameter_selection import set_trainable

        training = self.stage.training
        set_trainable(model, training.get("freeze"), training.get("train_only"))
        return model if training.get("lora") is None else add_lora(model, **training["lora"])


def stage_kind(stage: "Stage") -> StageKind:
    """Return the kind of a stage, which answers for this stage."""
    module, _, name = STAGE_KINDS[stage.kind].rpartition(".")
    return getattr(import_module(module), name)(stage)
