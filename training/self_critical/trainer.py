"""Self-critical training: the joint loss, and the reward of captions that the model draws."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import GenerationConfig

from mmgem.late_interaction import similarity
from mmgem.modeling_mmgem import MMGEMModel
from mmgem.training.inference import inference, to_model
from mmgem.training.self_critical.caption_reward import CaptionReward
from mmgem.training.trainer.trainer import MMGEMTrainer


@dataclass(frozen=True, kw_only=True)
class SelfCritical:
    """How captions are drawn, and how much their reward counts.

    Args:
        captions_drawn: Captions that are drawn for each image, 2 or more: each is compared with the mean of the
            others.
        reward_weight: The weight of the expected reward beside the joint loss, above 0.
        temperature: The temperature at which captions are drawn, and at which those of a high reward become more
            likely, above 0: the lower, the closer to what the model writes greedily.
        retrieval_weight: The weight, 0 or more, of how well a caption finds its image among those of the batch, beside
            CIDEr-D: the probability that the model gives to it. It keeps captions apart.
        max_new_tokens: The tokens at which a drawn caption is cut, 1 or more.

    Raises:
        ValueError: If a value is out of its range.
    """

    captions_drawn: int = 5
    reward_weight: float = 1.0
    temperature: float = 1.0
    retrieval_weight: float = 0.0
    max_new_tokens: int = 30

    def __post_init__(self):
        for name, least in (("captions_drawn", 2), ("max_new_tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` is {getattr(self, name)}; expected {least} or more.")
        for name in ("reward_weight", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` is {getattr(self, name)}; expected a number above 0.")
        if not 0 <= self.retrieval_weight < math.inf:
            raise ValueError(f"`retrieval_weight` is {self.retrieval_weight}; expected 0 or more.")


class SelfCriticalTrainer(MMGEMTrainer):
    """Trains an `MMGEMModel` on the joint loss of [`MMGEMTrainer`], less the expected CIDEr-D of the captions that it
    draws (self-critical sequence training, https://arxiv.org/abs/1612.00563, with the mean of the other captions of
    the image as the baseline, https://arxiv.org/abs/2003.09971).

    The reward trains the language model and the token projection. The vision tower and PoolAggregator train by the
    joint loss alone, and run once. The expected reward is a mean over the images with captions of all processes; it is
    averaged over accumulation steps, as the contrastive loss is.

    Args:
        model: An `MMGEMModel` that did not begin as a VLM.
        args: The training arguments, without `grad_cache_chunk_size`.
        processing_class: The `MMGEMProcessor`.
        data_collator: An [`MMGEMCollator`], by default one of the processor; its batches get their references.
        reward: Compares captions with references.
        options: How captions are drawn.
        kwargs: Further arguments of [`MMGEMTrainer`].

    Raises:
        ValueError: If the model began as a VLM, if neither the language model nor the token projection trains, or if
            `args` ask for GradCache or FSDP.
    """

    FIGURES = {**MMGEMTrainer.FIGURES, "caption_reward": "mean"}

    def __init__(
        self,
        model,
        args,
        processing_class,
        data_collator=None,
        *,
        reward: CaptionReward,
        options: SelfCritical | None = None,
        **kwargs,
    ):
        if args.grad_cache_chunk_size is not None:
            raise ValueError(
                f"`grad_cache_chunk_size` is {args.grad_cache_chunk_size}; expected None, since captions are drawn "
                "for a whole batch."
            )
        self.reward = reward
        self.options = SelfCritical() if options is None else options
        super().__init__(model, args, processing_class, data_collator, **kwargs)
        check_can_draw(self.model)
        # Without LoRA around it, which would keep settings of its own that `generate` does not read.
        self._writer = next(module for module in self.model.modules() if isinstance(module, MMGEMModel))
        if self.is_fsdp_enabled:
            raise ValueError("`fsdp` is on; expected DDP, since a sharded model would draw captions layer by layer.")
        self.data_collator.gives_references = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        references = inputs.pop("references")  # of each of I images
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        described = [number for number, own in enumerate(references) if own]
        num_described = torch.tensor(len(described), device=self.args.device)
        num_described = self.accelerator.gather(num_described).sum().clamp(min=1)
        if described:
            visual_tokens = outputs.visual_tokens[described].detach()  # (I', n, C)
            image_embeds = outputs.image_embeds[described].detach()  # (I', D) or (I', k, D)
            negative_reward = self._negative_reward(visual_tokens, image_embeds, [references[n] for n in described])
            share = self.accelerator.num_processes / num_described / self.current_gradient_accumulation_steps
            loss = loss + self.options.reward_weight * share * negative_reward
        else:
            self._keep(caption_reward=math.nan)  # which the log leaves out
        return (loss, outputs) if return_outputs else loss

    def _negative_reward(
        self, visual_tokens: torch.Tensor, image_embeds: torch.Tensor, references: Sequence[Sequence[str]]
    ) -> torch.Tensor:
        """A scalar whose gradient is that of the expected reward, downwards, summed over images.

        Args:
            visual_tokens: (I, n, C).
            image_embeds: (I, D) or (I, k, D) unit vectors.
            references: Of each image.
        """
        count = self.options.captions_drawn
        repeated = visual_tokens.repeat_interleave(count, dim=0)  # (I * K, n, C)
        prompt_ids = self._prompt_ids().repeat(len(repeated), 1)  # (I * K, P)
        drawn_ids = self._draw(prompt_ids, repeated)  # (I * K, L)
        is_end = torch.isin(drawn_ids, self._end_ids())  # (I * K, L)
        is_drawn = (is_end.cumsum(1) - is_end.long()) == 0  # (I * K, L), up to the first end, with it
        captions = self.processing_class.tokenizer.batch_decode(
            drawn_ids.where(is_drawn & ~is_end, self._pad_id), skip_special_tokens=True
        )
        rewards = self._rewards(captions, is_end.any(1).tolist(), references)  # (I, K)
        self._keep(caption_reward=rewards.mean())
        if self.options.retrieval_weight:
            rewards = rewards + self.options.retrieval_weight * self._found(captions, image_embeds)  # (I, K)
        others = (rewards.sum(1, keepdim=True) - rewards) / (count - 1)  # (I, K)
        advantages = rewards - others  # (I, K)

        input_ids = torch.cat([prompt_ids, drawn_ids], dim=1)  # (I * K, P + L)
        logits = self.model(  # not as DDP wraps it: a process without captions would be waited for
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            visual_tokens=repeated,
            logits_to_keep=drawn_ids.shape[1] + 1,
        ).logits[:, :-1]  # (I * K, L, vocabulary)
        logits = (logits.float() / self.options.temperature).index_fill(-1, self._never_drawn(), -torch.inf)
        losses = F.cross_entropy(logits.transpose(1, 2), drawn_ids, reduction="none")  # (I * K, L)
        return (advantages.flatten() * (losses * is_drawn).sum(1)).sum() / count

    def _draw(self, prompt_ids: torch.Tensor, visual_tokens: torch.Tensor) -> torch.Tensor:
        """(S, L) tokens after prompts (S, P), by the temperature alone, whatever the model usually writes."""
        usual = self._writer.generation_config
        self._writer.generation_config = GenerationConfig(
            do_sample=True,
            temperature=self.options.temperature,
            top_k=0,
            suppress_tokens=self._never_drawn().tolist(),
            max_new_tokens=self.options.max_new_tokens,
            eos_token_id=usual.eos_token_id,
            pad_token_id=self._pad_id,
        )
        try:
            with inference(self.model):
                drawn = self._writer.generate(
                    input_ids=prompt_ids, attention_mask=torch.ones_like(prompt_ids), visual_tokens=visual_tokens
                )
        finally:
            self._writer.generation_config = usual
        return drawn[:, prompt_ids.shape[1] :].clone()  # which is no tensor of inference mode

    def _rewards(
        self, captions: Sequence[str], are_whole: Sequence[bool], references: Sequence[Sequence[str]]
    ) -> torch.Tensor:
        """(I, K) rewards of I * K captions."""
        count = self.options.captions_drawn
        rewards = []
        for number, own in enumerate(references):
            part = slice(number * count, (number + 1) * count)
            rewards.append(self.reward(captions[part], are_whole[part], own))
        return torch.tensor(rewards, device=self.args.device)

    def _found(self, captions: Sequence[str], image_embeds: torch.Tensor) -> torch.Tensor:
        """(I, K) probabilities of the own image of I * K captions, among all images."""
        inputs = self.processing_class.tokenizer(list(captions), padding=True, return_tensors="pt")
        with inference(self.model):
            features = self.model.get_text_features(**to_model(self.model, inputs)).pooler_output
            text_embeds = F.normalize(features.float(), dim=-1)  # (I * K, D) or (I * K, k, D)
            scores = self.model.inverse_temperature() * similarity(text_embeds, image_embeds)  # (I * K, I)
            shares = scores.softmax(-1).view(len(image_embeds), -1, len(image_embeds))  # (I, K, I)
        return shares.diagonal(dim1=0, dim2=2).T.clone()

    def _prompt_ids(self) -> torch.Tensor:
        """(P,) tokens before a caption, with a placeholder for each visual token."""
        config = self.model.config
        one_each = torch.tensor(self.processing_class.prompt_ids(), device=self.args.device)
        is_image = one_each == config.image_token_id
        return one_each.repeat_interleave(torch.where(is_image, config.num_visual_tokens, 1))

    def _never_drawn(self) -> torch.Tensor:
        """(1,) the placeholder of images, which would ask for another one."""
        return torch.tensor([self.model.config.image_token_id], device=self.args.device)

    def _end_ids(self) -> torch.Tensor:
        return torch.tensor(self.model.generation_config.eos_token_id, device=self.args.device).reshape(-1)

    @property
    def _pad_id(self) -> int:
        return self.processing_class.tokenizer.pad_token_id


def check_can_draw(model) -> None:
    """Refuse a model whose captions cannot be drawn and trained.

    Args:
        model: An `MMGEMModel`, perhaps with LoRA; `requires_grad` says what trains.

    Raises:
        ValueError: If it began as a VLM, which writes in its own way, or nothing that writes trains.
    """
    if model.config.vlm_config is not None:
        raise ValueError("`self_critical` came with a model that began as a VLM; expected one composed of towers.")
    writers = ("language_model", "token_projection")
    if not any(p.requires_grad for name, p in model.named_parameters() if any(part in name for part in writers)):
        raise ValueError(f"nothing that writes trains; expected some of {', '.join(writers)} for `self_critical`.")
