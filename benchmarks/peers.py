"""The contestants of the experiment, behind one interface: an `MMGEMModel`, a dual encoder (transformers' `CLIPModel`)
and a captioner (transformers' `LlavaForConditionalGeneration`), all around the same vision tower.

Every one of them reads the batches of `MMGEMCollator`, and is asked for what it can do: a dual encoder cannot write, a
captioner cannot embed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPConfig, CLIPModel, LlavaConfig, LlavaForConditionalGeneration

from mmgem.configuration_mmgem import MMGEMConfig
from mmgem.contrastive import ContrastiveObjective
from mmgem.contrastive_batch import IMAGE, ContrastiveBatch, token_row_ids
from mmgem.modeling_mmgem import MAX_LOGIT_SCALE, MMGEMModel
from mmgem.text_rows import IGNORED_LABEL

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class TowerSizes:
    """What the towers of all contestants have in common.

    Args:
        image_size, patch_size: Pixels.
        vision_layers, text_layers: Transformer layers.
        width: Of both towers and of the shared embedding space; heads: attention heads of both towers.
        vocabulary: Rows of the token embeddings.
        max_text_length: Positions of the language model, visual tokens included.
        attention: `attn_implementation` of transformers.
    """

    image_size: int
    patch_size: int
    vision_layers: int
    text_layers: int
    width: int
    heads: int
    vocabulary: int
    max_text_length: int = 256
    attention: str = "eager"

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    def vision_config(self) -> dict:
        """A CLIP vision tower: one class token, then the patches."""
        return {
            "model_type": "clip_vision_model",
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "hidden_size": self.width,
            "intermediate_size": 4 * self.width,
            "num_hidden_layers": self.vision_layers,
            "num_attention_heads": self.heads,
            "projection_dim": self.width,
        }

    def text_config(self, eos_token_id: int) -> dict:
        """A Llama whose gated MLP has as many weights as an ungated one of four times the width."""
        return {
            "model_type": "llama",
            "vocab_size": self.vocabulary,
            "hidden_size": self.width,
            "intermediate_size": 4 * self.width * 2 // 3,
            "num_hidden_layers": self.text_layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "max_position_embeddings": self.max_text_length,
            "tie_word_embeddings": True,
            "initializer_range": 0.05,  # the usual 0.02 is meant for towers several times as wide
            "bos_token_id": None,
            "eos_token_id": eos_token_id,
            "pad_token_id": eos_token_id,
        }


class MMGEMContestant:
    """MM-GEM, with parts of it switched off.

    Args:
        sizes: Of the towers.
        eos_token_id, image_token_id: Of the tokenizer.
        num_visual_tokens: Per image.
        attends: False freezes the PoolAggregator at its start, where it is average pooling.
        embeds, writes: Which of the two objectives is trained.
    """

    def __init__(
        self,
        sizes: TowerSizes,
        eos_token_id: int,
        image_token_id: int,
        num_visual_tokens: int = 16,
        attends: bool = True,
        embeds: bool = True,
        writes: bool = True,
    ):
        config = MMGEMConfig(
            vision_config=sizes.vision_config(),
            text_config=sizes.text_config(eos_token_id),
            projection_dim=sizes.width,
            num_visual_tokens=num_visual_tokens,
            image_token_id=image_token_id,
        )
        self.model = MMGEMModel(config)
        self.model.set_attn_implementation(sizes.attention)
        self.model.pool_aggregator.requires_grad_(attends)
        self.embeds, self.writes = embeds, writes
        self.prompt = [image_token_id] * num_visual_tokens

    def losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        """`contrastive_loss` and `caption_loss` (mean over the caption tokens), scalars, of those that are trained."""
        batch = dict(batch)
        if not self.embeds:
            batch["contrastive_mask"] = torch.zeros_like(batch["contrastive_mask"])
        if not self.writes:
            batch["labels"] = torch.full_like(batch["labels"], IGNORED_LABEL)
        outputs = self.model(**batch, return_loss=True)
        losses = {}
        if self.embeds:
            losses["contrastive_loss"] = outputs.contrastive_loss
        if self.writes:
            losses["caption_loss"] = outputs.caption_loss
        return losses

    def embed_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(I, 3, H, W) -> (I, D) unit vectors."""
        return F.normalize(self.model.get_image_features(pixel_values).pooler_output.float(), dim=-1)

    def embed_texts(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """(T, L) padded on the right -> (T, D) unit vectors."""
        return F.normalize(self.model.get_text_features(input_ids, attention_mask).pooler_output.float(), dim=-1)

    def write(self, pixel_values: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
        """(I, 3, H, W) -> (I, max_new_tokens or fewer) tokens of greedy captions."""
        return _write(self.model, self.prompt, pixel_values, max_new_tokens)


class CLIPContestant:
    """A dual encoder of the same size that reads `max_length` tokens of a text and no more, trained on the same
    contrastive loss: captions of one image, long ones too, are never each other's negatives.

    Args:
        sizes: Of the towers; the text tower has about as many weights as the language model.
        eos_token_id: Of the tokenizer; ends every text, cut ones too, and is where the text is read out.
        max_length: Positions of the text tower; 77 in CLIP (https://arxiv.org/abs/2103.00020).
    """

    embeds, writes = True, False

    def __init__(self, sizes: TowerSizes, eos_token_id: int, max_length: int = 77):
        text_config = {
            "vocab_size": sizes.vocabulary,
            "hidden_size": sizes.width,
            "intermediate_size": 4 * sizes.width,
            "num_hidden_layers": sizes.text_layers,
            "num_attention_heads": sizes.heads,
            "max_position_embeddings": max_length,
            "projection_dim": sizes.width,
            "bos_token_id": None,
            "eos_token_id": eos_token_id,
            "pad_token_id": eos_token_id,
        }
        config = CLIPConfig(text_config=text_config, vision_config=sizes.vision_config(), projection_dim=sizes.width)
        self.model = CLIPModel(config)
        self.model.set_attn_implementation(sizes.attention)
        self.eos_token_id, self.max_length = eos_token_id, max_length

    def losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        """`contrastive_loss`, a scalar."""
        embedded = batch["contrastive_mask"]
        input_ids, attention_mask = batch["input_ids"][embedded], batch["attention_mask"][embedded]
        images, texts = self.embed_images(batch["pixel_values"]), self.embed_texts(input_ids, attention_mask)
        contrastive_batch = ContrastiveBatch(
            query_embeds=texts,
            target_embeds=images,
            target_index=batch["image_index"][embedded],
            query_ids=token_row_ids(input_ids, attention_mask),
            target_ids=batch["image_ids"],
            query_modality=torch.full((len(texts),), IMAGE, device=texts.device),
            target_modality=torch.full((len(images),), IMAGE, device=images.device),
            logit_scale=self.model.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp(),
        )
        return {"contrastive_loss": ContrastiveObjective()(contrastive_batch)}

    def embed_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(I, 3, H, W) -> (I, D) unit vectors."""
        return F.normalize(self.model.get_image_features(pixel_values).pooler_output.float(), dim=-1)

    def embed_texts(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """(T, L) padded on the right -> (T, D) unit vectors, of the first `max_length - 1` tokens of each."""
        input_ids, attention_mask = self.cut(input_ids, attention_mask)
        features = self.model.get_text_features(input_ids, attention_mask).pooler_output
        return F.normalize(features.float(), dim=-1)

    def cut(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(T, L) padded on the right -> (T, <= max_length), each text ending in the end token."""
        kept = self.max_length - 1
        input_ids, attention_mask = input_ids[:, :kept], attention_mask[:, :kept]
        end = attention_mask.sum(-1, keepdim=True)  # (T, 1)
        input_ids = F.pad(input_ids, (0, 1)).scatter(1, end, self.eos_token_id)
        attention_mask = F.pad(attention_mask, (0, 1)).scatter(1, end, 1)
        used = attention_mask.any(0)  # (L,)
        return input_ids[:, used], attention_mask[:, used]


class LlavaContestant:
    """A captioner of the same size: all patches of the same vision tower, through an MLP, before the same language
    model (LLaVA, https://arxiv.org/abs/2304.08485); everything is trained.

    Args:
        sizes: Of the towers.
        eos_token_id, image_token_id: Of the tokenizer.
    """

    embeds, writes = False, True

    def __init__(self, sizes: TowerSizes, eos_token_id: int, image_token_id: int):
        config = LlavaConfig(
            vision_config=sizes.vision_config(),
            text_config=sizes.text_config(eos_token_id),
            image_token_id=image_token_id,
            vision_feature_layer=-1,  # as deep as the other contestants' towers
            vision_feature_select_strategy="default",  # without the class token
            image_seq_length=sizes.num_patches,
            tie_word_embeddings=True,
        )
        self.model = LlavaForConditionalGeneration(config)
        self.model.set_attn_implementation(sizes.attention)
        self.eos_token_id = eos_token_id
        self.prompt = [image_token_id] * sizes.num_patches

    def losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        """`caption_loss`, a scalar: mean over the caption tokens, the end tokens among them."""
        generated = (batch["labels"] != IGNORED_LABEL).any(-1)  # (T,)
        labels = batch["labels"][generated]  # (S, L)
        length = (labels != IGNORED_LABEL).sum(-1, keepdim=True)  # (S, 1)
        labels = F.pad(labels, (0, 1), value=IGNORED_LABEL).scatter(1, length, self.eos_token_id)  # (S, L + 1)
        labels = labels[:, : int(length.max()) + 1]
        is_token = labels != IGNORED_LABEL
        prompt = torch.tensor(self.prompt, device=labels.device).expand(len(labels), -1)  # (S, n)
        outputs = self.model.model(
            input_ids=torch.cat([prompt, labels.masked_fill(~is_token, self.eos_token_id)], dim=1),
            attention_mask=torch.cat([torch.ones_like(prompt), is_token.long()], dim=1),
            pixel_values=batch["pixel_values"][batch["image_index"][generated]],
            use_cache=False,
        )
        states = outputs.last_hidden_state[:, len(self.prompt) - 1 : -1]  # (S, L + 1, H), each before its label
        logits = self.model.lm_head(states[is_token])  # (N, vocabulary)
        return {"caption_loss": F.cross_entropy(logits.float(), labels[is_token])}

    def write(self, pixel_values: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
        """(I, 3, H, W) -> (I, max_new_tokens or fewer) tokens of greedy captions."""
        return _write(self.model, self.prompt, pixel_values, max_new_tokens)


Contestant = MMGEMContestant | CLIPContestant | LlavaContestant


def _write(model: nn.Module, prompt: Sequence[int], pixel_values: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
    input_ids = torch.tensor(prompt, device=pixel_values.device).repeat(len(pixel_values), 1)
    tokens = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        pixel_values=pixel_values,
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    return tokens[:, len(prompt) :]
