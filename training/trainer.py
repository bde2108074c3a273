"""The joint training loop: InfoNCE and captioning in one forward call, on transformers' Trainer."""

from dataclasses import dataclass, field

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from mmgem.modeling_mmgem import IGNORED_LABEL, MAX_LOGIT_SCALE, first_token_id
from mmgem.training.collator import MMGEMCollator
from mmgem.training.evaluation import evaluate_model


@dataclass
class MMGEMTrainingArguments(TrainingArguments):
    """
    `TrainingArguments` with the weights of the two losses.

    Raises:
        ValueError: if a weight is negative.
    """

    caption_loss_weight: float = field(default=1.0, metadata={"help": "Weight of the captioning loss."})
    contrastive_loss_weight: float = field(default=1.0, metadata={"help": "Weight of the InfoNCE loss."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "The collator reads all columns."})

    def __post_init__(self):
        super().__post_init__()
        for name in ("caption_loss_weight", "contrastive_loss_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` is {getattr(self, name)}; expected 0 or more.")


class LogitScaleClamp(TrainerCallback):
    """Keeps the learned inverse temperature at 100 or less after each step, as CLIP does."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)


class MMGEMTrainer(Trainer):
    """
    Trains an `MMGEMModel` on rows of images and captions (see [`MMGEMCollator`] for the columns).

    The caption loss is a mean over the caption tokens of all processes and accumulation steps; the contrastive loss is
    taken over the gathered batch of all processes and averaged over accumulation steps. So N processes with a batch of
    B give the gradient of one process with N * B.

    `evaluate` measures what the model is for: recall, zero-shot accuracy, captions (see
    [`mmgem.training.evaluation.evaluate_model`]).

    Args:
        model, args, train_dataset, eval_dataset, processing_class, kwargs: as in `Trainer`; `processing_class` is the
            `MMGEMProcessor`, and the default `data_collator` an [`MMGEMCollator`] of it.
    """

    def __init__(self, model, args, processing_class, data_collator=None, **kwargs):
        if data_collator is None:
            data_collator = MMGEMCollator(processing_class)
        super().__init__(model, args, data_collator=data_collator, processing_class=processing_class, **kwargs)
        self.add_callback(LogitScaleClamp())
        self._logged_losses: dict[str, list[torch.Tensor]] = {"caption_loss": [], "contrastive_loss": []}

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor:
        """Caption tokens of all processes and accumulation steps, with the end tokens that the model appends."""
        text_config = self.model.config.text_config
        ends = text_config.eos_token_id, text_config.bos_token_id
        count = sum(count_caption_tokens(batch["input_ids"], batch["labels"], *ends) for batch in batch_samples)
        return self.accelerator.gather(torch.as_tensor(count, device=device)).sum()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        # The Trainer averages gradients over processes but sums them over accumulation steps. The caption loss is
        # already divided by the tokens of them all; the contrastive loss is, on each process, that of all of them.
        caption_loss, contrastive_loss = outputs.caption_loss, outputs.contrastive_loss
        if num_items_in_batch is not None:
            caption_loss = caption_loss * self.accelerator.num_processes
            contrastive_loss = contrastive_loss / self.current_gradient_accumulation_steps
            self._logged_losses["caption_loss"].append(caption_loss.detach())
            self._logged_losses["contrastive_loss"].append(contrastive_loss.detach())
        loss = self.args.caption_loss_weight * caption_loss + self.args.contrastive_loss_weight * contrastive_loss
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, start_time=None):
        if "loss" in logs:
            for name, losses in self._logged_losses.items():
                if losses:
                    # Each is its share of an optimizer step, which accumulation makes of several forward calls.
                    mean = self.accelerator.gather(torch.stack(losses).mean()).mean().item()
                    logs[name] = mean * self.args.gradient_accumulation_steps
                losses.clear()
            logs["temperature"] = self.model.logit_scale.detach().neg().exp().item()
        super().log(logs, start_time)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("`eval_dataset` is None; expected a data set of images and captions to evaluate on.")
        metrics = evaluate_model(
            self.model, self.processing_class, dataset, batch_size=self.args.per_device_eval_batch_size
        )
        prefix = f"{metric_key_prefix}_" if metric_key_prefix else ""
        metrics = {f"{prefix}{name}": value for name, value in metrics.items()}
        self.log(dict(metrics))  # which adds to what it is given
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def count_caption_tokens(
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    eos_token_id: int | list[int] | None,
    bos_token_id: int | list[int] | None = None,
) -> int:
    """
    Labels of the joint loss in a batch: the given ones without a leading [BOS], which goes before the image, and an
    appended end token for each text generated to its end.

    Args:
        input_ids, labels: (T, L), as for `MMGEMModel.forward`.
        eos_token_id, bos_token_id: of the language model.
    """
    is_label = labels != IGNORED_LABEL  # (T, L)
    is_generated = is_label.any(-1)  # (T,)
    first_label = labels.gather(1, is_label.long().argmax(-1, keepdim=True))[:, 0]  # (T,)
    starts = is_generated & (first_label == first_token_id(bos_token_id))
    eos = first_token_id(eos_token_id)
    appends_eos = is_generated & ~(is_label & (input_ids == eos)).any(-1) & (eos >= 0)
    return int(is_label.sum() - starts.sum() + appends_eos.sum())
