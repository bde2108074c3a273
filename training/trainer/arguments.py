"""Arguments of a training run, beyond transformers' `TrainingArguments`."""

import logging
import math
from dataclasses import dataclass, field, fields

import torch
from transformers import TrainingArguments

logger = logging.getLogger(__name__)

# Arguments of the library that it takes whatever they are, with the least and the most that they may be.
RANGES: dict[str, tuple[float, float]] = {
    "per_device_train_batch_size": (1, 1 << 20),
    "per_device_eval_batch_size": (1, 1 << 20),
    "gradient_accumulation_steps": (1, math.inf),
    "dataloader_num_workers": (0, 1024),  # processes, each with a copy of the data's pages that it writes into
    "weight_decay": (0, math.inf),
    "max_grad_norm": (0, math.inf),
    "adam_beta1": (0, 1),
    "adam_beta2": (0, 1),
    "adam_epsilon": (0, math.inf),
    "warmup_steps": (0, math.inf),
    "logging_steps": (0, math.inf),
    "seed": (0, 2**32 - 1),
    "neftune_noise_alpha": (0, math.inf),
    "eval_accumulation_steps": (1, math.inf),
    "ddp_timeout": (1, math.inf),
}


@dataclass
class MMGEMTrainingArguments(TrainingArguments):
    """`TrainingArguments` with those of the joint loss.

    Args:
        caption_loss_weight: The weight of the caption loss, 0 or more. At 0 the loss is not computed.
        contrastive_loss_weight: The weight of the contrastive loss, 0 or more. At 0 the loss is not computed.
        contrastive_objective: Options of [`mmgem.training.trainer.contrastive_losses.build_objective`]; by default
            plain InfoNCE.
        grad_cache_chunk_size: Images whose graph is held at a time (GradCache, https://arxiv.org/abs/2101.06983); by
            default the whole batch.
        freeze: Parts of the model that do not train, see
            [`mmgem.training.trainer.parameter_selection.set_trainable`].
        train_only: The only parts of the model that train, see there.
        learning_rates: Learning rates of single parts, see
            [`mmgem.training.trainer.parameter_selection.parameter_groups`].
        lora: Arguments of [`mmgem.training.trainer.lora.add_lora`].
        ema_decay: The decay of the exponential moving average of the weights, in (0, 1), with which the model is
            evaluated and ends; by default there is none.

    Raises:
        ValueError: If a value is out of its range.
    """

    caption_loss_weight: float = field(default=1.0, metadata={"help": "Weight of the captioning loss."})
    contrastive_loss_weight: float = field(default=1.0, metadata={"help": "Weight of the contrastive loss."})
    contrastive_objective: dict | None = field(default=None, metadata={"help": "Options of the contrastive loss."})
    grad_cache_chunk_size: int | None = field(default=None, metadata={"help": "Images in a chunk of GradCache."})
    freeze: list[str] | None = field(default=None, metadata={"help": "Parts of the model that are not trained."})
    train_only: list[str] | None = field(default=None, metadata={"help": "The only parts that are trained."})
    learning_rates: dict | None = field(default=None, metadata={"help": "Learning rates of single parts."})
    lora: dict | None = field(default=None, metadata={"help": "LoRA on the towers."})
    ema_decay: float | None = field(default=None, metadata={"help": "Decay of the average of the weights."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "The collator reads all columns."})

    def __post_init__(self):
        for one in fields(self):  # of which True would be 1
            is_number = isinstance(one.default, int | float) and not isinstance(one.default, bool)
            if (is_number or one.name in (*RANGES, "grad_cache_chunk_size")) and isinstance(
                getattr(self, one.name), bool
            ):
                raise ValueError(f"`{one.name}` is {getattr(self, one.name)}; expected a number.")
        for name, (least, most) in RANGES.items():
            value = getattr(self, name)
            if isinstance(value, int | float) and not (least <= value <= most and math.isfinite(value)):
                expected = f"{least} or more" if most == math.inf else f"{least} to {most}"
                raise ValueError(f"`{name}` is {value}; expected {expected}.")
        if not self.save_steps > 0:
            raise ValueError(f"`save_steps` is {self.save_steps}; expected a number above 0.")
        if self.max_steps != -1 and self.max_steps < 1:
            raise ValueError(f"`max_steps` is {self.max_steps}; expected 1 or more, or -1 for `num_train_epochs`.")
        if self.max_steps == -1 and not 0 < self.num_train_epochs < math.inf:
            raise ValueError(f"`num_train_epochs` is {self.num_train_epochs}; expected a number above 0.")
        if self.label_smoothing_factor:
            raise ValueError(
                f"`label_smoothing_factor` is {self.label_smoothing_factor}; expected 0, as no loss reads it."
            )
        if self.remove_unused_columns:
            raise ValueError("`remove_unused_columns` is True; expected False, as the collator reads all columns.")
        super().__post_init__()
        if self.accelerator_config.dispatch_batches is None:
            # Each process reads its own rows of a stream; accelerate would cut batches, whose parts differ in length.
            self.accelerator_config.dispatch_batches = False
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every parameter that trains has a part in every step
        weights = ("caption_loss_weight", "contrastive_loss_weight")
        for name in weights:
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` is {getattr(self, name)}; expected 0 or more.")
        if not any(getattr(self, name) for name in weights):
            raise ValueError("`caption_loss_weight` and `contrastive_loss_weight` are both 0; expected one above it.")
        if self.grad_cache_chunk_size is not None and self.grad_cache_chunk_size < 1:
            raise ValueError(f"`grad_cache_chunk_size` is {self.grad_cache_chunk_size}; expected 1 or more, or None.")
        if not 0 <= self.learning_rate < math.inf:
            raise ValueError(f"`learning_rate` is {self.learning_rate}; expected 0 or more.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"`ema_decay` is {self.ema_decay}; expected a number between 0 and 1, such as 0.999.")
        if self.contrastive_loss_weight and self.train_batch_size * self.world_size < 2:
            raise ValueError(
                "`per_device_train_batch_size` is 1 on one process; expected 2 or more for in-batch negatives, or "
                "`contrastive_loss_weight` 0."
            )
        instructions = [is_there for name, is_there in torch.cpu.get_capabilities().items() if "bf16" in name]
        if self.bf16 and self.device.type == "cpu" and instructions and not any(instructions):
            logger.warning("`bf16` is True, for which this processor has no instructions; it is faster without.")
