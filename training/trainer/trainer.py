"""The joint training loop: a contrastive loss and captioning in one forward call, on transformers' Trainer."""

import errno
import math
import os
import shutil
from collections import defaultdict
from collections.abc import Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_optimizer import is_optimizer_factory
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from mmgem.modeling_mmgem import MAX_LOGIT_SCALE, MMGEMOutput
from mmgem.text_rows import IGNORED_LABEL, TextRows
from mmgem.text_sequences import count_labels
from mmgem.training.data.collator import MMGEMCollator
from mmgem.training.data.mixture import Mixture
from mmgem.training.distributed import adapt_to_fsdp, is_sharded, whole
from mmgem.training.evaluation.evaluate import evaluate_model
from mmgem.training.evaluation.metrics import CaptionJudge
from mmgem.training.trainer.arguments import MMGEMTrainingArguments
from mmgem.training.trainer.checkpoints import is_disk_full, last_complete_checkpoint, mark_complete, mark_unfinished
from mmgem.training.trainer.contrastive_losses import build_objective
from mmgem.training.trainer.data_position import DataPosition
from mmgem.training.trainer.grad_cache import GradCache, count_images, split_batch
from mmgem.training.trainer.parameter_selection import freeze_unused, parameter_groups, set_trainable
from mmgem.training.trainer.teacher import Teacher
from mmgem.training.trainer.weight_average import EMACallback
from mmgem.training.worker_memory import shared_with_workers


class LogitScaleClamp(TrainerCallback):
    """Keeps the learned inverse temperature at 100 or less after each step, as CLIP does."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)


class MMGEMTrainer(Trainer):
    """Trains an `MMGEMModel` on rows of images and captions (see [`MMGEMCollator`] for the columns).

    The caption loss is a mean over the caption tokens of all processes and accumulation steps; the contrastive loss is
    taken over the gathered batch of all processes and averaged over accumulation steps. So N processes with a batch of
    B give the gradient of one process with N * B. A larger contrastive batch than fits comes from
    `grad_cache_chunk_size`, not from accumulation.

    `evaluate` measures recall, zero-shot accuracy and captions (see
    [`mmgem.training.evaluation.evaluate.evaluate_model`]).

    Args:
        model: An `MMGEMModel`.
        args: The training arguments.
        processing_class: The `MMGEMProcessor`.
        data_collator: Makes the batches; by default an [`MMGEMCollator`] of the processor.
        caption_judge: Tells right captions from wrong ones in `evaluate`, as for `evaluate_model`.
        kwargs: Further arguments of `Trainer`.

    Raises:
        ValueError: If arguments do not fit together, or not to the model; when a run is resumed, if a step has another
            number of rows than before.
        FloatingPointError: While training, if a loss or gradient is no finite number; it names the rows of the batch.
            Nothing is saved after it.
        MemoryError: While training, if a step does not fit; it says what to lower.
    """

    # The figures that are logged, and how those of many forward calls become one.
    FIGURES = {
        "caption_loss": "loss",
        "contrastive_loss": "loss",
        "image_norm": "mean",
        "text_norm": "mean",
        "effective_batch_size": "count",
        "contrastive_queries": "count",
    }

    def __init__(
        self,
        model,
        args: MMGEMTrainingArguments,
        processing_class,
        data_collator=None,
        caption_judge: CaptionJudge | None = None,
        **kwargs,
    ):
        self.caption_judge = caption_judge
        if data_collator is None:
            data_collator = MMGEMCollator(processing_class)
        if args.lora is not None:
            from mmgem.training.trainer.lora import add_lora  # peft is needed only here

            model = add_lora(model, **args.lora)
        if args.freeze is not None or args.train_only is not None:
            set_trainable(model, args.freeze, args.train_only)
        self.objective = build_objective(**(args.contrastive_objective or {}))
        self.objective.check(model.config)
        if self.objective.structure and args.grad_cache_chunk_size:
            raise ValueError(
                f"`structure` is {self.objective.structure} and `grad_cache_chunk_size` {args.grad_cache_chunk_size}; "
                "expected one of them."
            )
        self.grad_cache = GradCache(args.grad_cache_chunk_size) if args.grad_cache_chunk_size else None
        self.teacher = Teacher(model, processing_class, **self.objective.teacher) if self.objective.teacher else None
        self.ema = EMACallback(args.ema_decay) if args.ema_decay is not None else None
        self._freeze_unused(model)
        super().__init__(model, args, data_collator=data_collator, processing_class=processing_class, **kwargs)
        for callback in (LogitScaleClamp(), self.teacher, self.ema):  # the averages come last
            if callback is not None:
                self.add_callback(callback)
        self.data_position = DataPosition(self.train_dataset)
        self._row_keys: list[str] = []
        self._figures: dict[str, list[torch.Tensor]] = defaultdict(list)

    def train(self, *args, **kwargs):
        """As of every trainer; with workers, memory stays shared with them."""
        with shared_with_workers() if self.args.dataloader_num_workers else nullcontext():
            return super().train(*args, **kwargs)

    def _freeze_unused(self, model):
        freeze_unused(model)

    # Data and optimizer

    def _get_train_sampler(self, train_dataset=None):
        train_dataset = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(train_dataset, Mixture):  # which is shuffled as it is, and resumes by position
            return SequentialSampler(train_dataset)
        return super()._get_train_sampler(train_dataset)

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ):
        accumulation_steps = self.args.gradient_accumulation_steps
        rows_of_processes = self.get_total_train_batch_size(self.args) // accumulation_steps
        self.data_position.begin(
            self._train_batch_size,
            rows_of_processes // self._train_batch_size,
            accumulation_steps,
            self.args.dataloader_num_workers,
            None if self.args.ignore_data_skip else resume_from_checkpoint,
        )
        epochs, steps = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if self.state.global_step >= max_steps:  # A run that was killed as it ended would take one more step.
            return num_train_epochs, 0
        return epochs, steps

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            groups = parameter_groups(
                model,
                self.args.learning_rate,
                self.args.learning_rates,
                self.args.weight_decay,
                self.get_decay_parameter_names(model),
            )
            optimizer_class, arguments = self.get_optimizer_cls_and_kwargs(self.args, model)
            if is_optimizer_factory(optimizer_class) or arguments.keys() & {"params", "model", "optimizer_dict"}:
                if self.args.learning_rates:
                    raise ValueError(
                        f"`optim` is {self.args.optim}, which groups parameters in its own way; expected another one, "
                        "or no `learning_rates`."
                    )
            else:
                self.optimizer = optimizer_class(groups, **arguments)
        return super().create_optimizer(model)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor:
        """Caption tokens of all processes and accumulation steps, with the end tokens that the model appends."""
        count = sum(count_caption_tokens(batch, self.model.config) for batch in batch_samples)
        return self.accelerator.gather(torch.as_tensor(count, device=device)).sum()

    def _prepare_for_training(self, *args, **kwargs):
        checkpointing = self.args.gradient_checkpointing_kwargs or {}
        if not checkpointing.get("use_reentrant", False):
            # Only that kind needs inputs with gradients, for which a frozen tower would be run backward.
            self.model.disable_input_require_grads()
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.is_fsdp_enabled:
            adapt_to_fsdp(self.model)
        return prepared

    # One step

    def training_step(self, model, inputs, num_items_in_batch=None):
        self._row_keys = inputs.pop("row_keys", [])
        with _memory_advice(self.args):
            if self.grad_cache is None:
                loss = super().training_step(model, inputs, num_items_in_batch)
            else:
                loss = self._cached_step(model, inputs, num_items_in_batch)
        self._check_finite(loss, "the loss")
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = self.objective.mixed(self._without_unweighted(inputs))
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch, return_contrastive_batch=True)
        teacher = None if self.teacher is None else self.teacher.embed([inputs])
        contrastive_loss = self.objective(outputs.contrastive_batch, teacher)
        contrastive_loss = contrastive_loss + self.objective.regularization(
            inputs, outputs.image_embeds, outputs.text_embeds
        )
        self._note(outputs, contrastive_loss, num_items_in_batch)
        loss = self._weigh(outputs.caption_loss, contrastive_loss, num_items_in_batch)
        # With nothing to compare the scale has no part in the loss, which DDP would wait for.
        loss = loss + 0.0 * outputs.contrastive_batch.logit_scale
        return (loss, outputs) if return_outputs else loss

    def _cached_step(self, model, inputs, num_items_in_batch):
        """Forward and backward, `grad_cache_chunk_size` images at a time; gradients meet in the last chunk's pass."""
        model.train()
        inputs = self.objective.mixed(self._without_unweighted(self._prepare_inputs(inputs)))
        chunks = split_batch(inputs, self.grad_cache.chunk_size)
        with self.compute_loss_context_manager():
            batches, random_states = self.grad_cache.embed(model, chunks)
            teacher = None if self.teacher is None else self.teacher.embed(chunks)
        contrastive_loss, gradients = self.grad_cache.loss_and_gradients(
            batches, partial(self.objective, teacher=teacher)
        )
        del batches, teacher

        total = self._weigh(0.0, contrastive_loss, num_items_in_batch)
        is_boundary = self.accelerator.sync_gradients
        options = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}  # as in Trainer.training_step
        for number, (chunk, random_state, gradient) in enumerate(zip(chunks, random_states, gradients, strict=True)):
            is_last = number == len(chunks) - 1
            # DeepSpeed takes the optimizer's step in `backward`, unless it knows that more is to come.
            self.accelerator.gradient_state._set_sync_gradients(is_boundary and is_last)
            with nullcontext() if is_last else self.accelerator.no_sync(model):
                with random_state.replayed(), self.compute_loss_context_manager():
                    outputs = model(**chunk, num_items_in_batch=num_items_in_batch, return_contrastive_batch=True)
                    surrogate = self.grad_cache.surrogate(outputs.contrastive_batch, gradient)
                    loss = self._weigh(outputs.caption_loss, surrogate, num_items_in_batch)
                self.accelerator.backward(loss, **options)
            self._note(outputs, contrastive_loss / len(chunks), num_items_in_batch)
            total = total + self._weigh(outputs.caption_loss.detach(), 0.0, num_items_in_batch)
        return total

    def _without_unweighted(self, inputs: Mapping) -> dict:
        """Without the parts of a loss that has no weight, which is then not computed."""
        inputs = dict(inputs)
        if not self.args.caption_loss_weight:
            inputs["labels"] = torch.full_like(inputs["labels"], IGNORED_LABEL)
        if not self.args.contrastive_loss_weight:
            inputs["contrastive_mask"] = torch.zeros_like(inputs["contrastive_mask"])
        return inputs

    def _weigh(self, caption_loss, contrastive_loss, num_items_in_batch):
        """The Trainer averages gradients over processes but sums them over accumulation steps. The caption loss is
        already divided by the tokens of them all; the contrastive loss is, on each process, that of all of them.
        """
        if num_items_in_batch is not None:
            caption_loss = caption_loss * self.accelerator.num_processes
            contrastive_loss = contrastive_loss / self.current_gradient_accumulation_steps
        return self.args.caption_loss_weight * caption_loss + self.args.contrastive_loss_weight * contrastive_loss

    # Bad numbers, no memory, no disk

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if not self.args.fp16:  # whose scaler expects, and skips, a step now and then
            self._check_finite(whole(torch.as_tensor(grad_norm)), "the gradient")
        return grad_norm

    def _check_finite(self, value: torch.Tensor, name: str):
        is_finite = self.accelerator.gather(torch.isfinite(value).to(self.args.device).reshape(1))
        if is_finite.all():
            return
        kept = last_complete_checkpoint(self.args.output_dir)
        raise FloatingPointError(
            f"{name} of step {self.state.global_step + 1} is {value.item()} on process {self.args.process_index}; the "
            f"batch has the rows {', '.join(self._row_keys) or 'without keys'}. "
            + (f"The last good checkpoint is {kept}." if kept else "There is no checkpoint yet.")
        )

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        model = self.model if model is None else model
        if isinstance(model, PreTrainedModel) and not is_sharded(model):
            # Some towers are saved under other names than they have, which only `from_pretrained` undoes.
            saved = type(model).from_pretrained(resume_from_checkpoint, dtype=model.dtype)
            model.load_state_dict(saved.state_dict())
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        if self.ema is not None:
            self.ema.load(checkpoint, self.model)
        if self.teacher is not None:
            self.teacher.load(checkpoint)

    def _save_checkpoint(self, model, trial):
        folder = os.path.join(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        mark_unfinished(folder)
        # Old checkpoints go only once the new one is known to be whole.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
            self.data_position.save(folder, self.args.should_save)
            if self.ema is not None:
                self.ema.save(folder)
            if self.teacher is not None:
                self.teacher.save(folder, self.args.should_save)
            mark_complete(folder)
        except Exception as error:
            if is_disk_full(error):
                shutil.rmtree(folder, ignore_errors=True)
                kept = last_complete_checkpoint(self.args.output_dir)
                raise OSError(
                    errno.ENOSPC, f"no space left to save; the last whole checkpoint is {kept}", folder
                ) from error
            raise
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            rotate_checkpoints(
                self.args.output_dir, limit, best_model_checkpoint=self.state.best_model_checkpoint, use_mtime=True
            )

    # Figures

    def _note(self, outputs: MMGEMOutput, contrastive_loss: torch.Tensor, num_items_in_batch):
        """Keep the figures of one forward call for the log. The losses are shares of an optimizer step."""
        if num_items_in_batch is None:
            return
        self._keep(
            caption_loss=outputs.caption_loss.detach() * self.accelerator.num_processes,
            contrastive_loss=contrastive_loss.detach() / self.current_gradient_accumulation_steps,
            image_norm=outputs.image_norm,
            text_norm=outputs.text_norm,
            effective_batch_size=outputs.image_embeds.shape[0],
            contrastive_queries=outputs.contrastive_batch.query_embeds.shape[0],
        )

    def _keep(self, **figures: torch.Tensor | float):
        """Keep figures of one forward call, those of `FIGURES`, for the log."""
        if not self._figures:
            self._steps_before_figures = self.state.global_step
        for name, value in figures.items():
            self._figures[name].append(torch.as_tensor(value, dtype=torch.float32, device=self.args.device))

    def log(self, logs, start_time=None):
        if "loss" in logs and self._figures:
            steps = self.state.global_step - self._steps_before_figures
            for name, kind in self.FIGURES.items():
                values = torch.stack(self._figures[name])
                if kind == "mean":
                    mean = self.accelerator.gather(values.nanmean()).nanmean().item()
                    if not math.isnan(mean):  # which it is of no image, or of no text
                        logs[name] = mean
                else:  # adds up to that of an optimizer step, of a loss on each process to its share
                    sums = self.accelerator.gather(values.sum())
                    logs[name] = (sums.mean() if kind == "loss" else sums.sum()).item() / steps
            self._figures.clear()
            logs["temperature"] = whole(self.model.logit_scale).neg().exp().item()
        super().log(logs, start_time)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("`eval_dataset` is None; expected a data set of images and captions to evaluate on.")
        averaged = nullcontext() if self.ema is None else self.ema.averaged(self.model)
        with averaged:
            metrics = evaluate_model(
                self.model,
                self.processing_class,
                dataset,
                batch_size=self.args.per_device_eval_batch_size,
                caption_judge=self.caption_judge,
            )
        prefix = f"{metric_key_prefix}_" if metric_key_prefix else ""
        metrics = {f"{prefix}{name}": value for name, value in metrics.items()}
        self.log(dict(metrics))  # which adds to what it is given
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def count_caption_tokens(batch: Mapping[str, Any], config) -> int:
    """Labels of the joint loss in a batch, with the end tokens that the model appends.

    Args:
        batch: As for `MMGEMModel.forward`.
        config: Of the model.
    """
    return count_labels(TextRows.from_columns(batch, count_images(batch), batch.get("boxes")), config)


@contextmanager
def _memory_advice(args: MMGEMTrainingArguments):
    """Turns running out of memory into an error that says what to lower."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and "not enough memory" not in str(error):
            raise
        advice = (
            f"lower `grad_cache_chunk_size` ({args.grad_cache_chunk_size})"
            if args.grad_cache_chunk_size
            else f"set `grad_cache_chunk_size` below `per_device_train_batch_size` ({args.train_batch_size})"
        )
        more = "" if args.gradient_checkpointing else ", set `gradient_checkpointing`"
        raise MemoryError(
            f"a training step does not fit into memory: {advice}{more}, lower `per_device_train_batch_size`, "
            "train in bf16, freeze a tower or use `lora`."
        ) from error
