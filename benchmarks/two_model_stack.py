"""What a joint step replaces: a contrastive step of a `CLIPModel` and a captioning step of a LLaVA."""

import torch
import torch.nn.functional as F
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from benchmarks.setting import IMAGE_TOKEN_ID, Setting
from benchmarks.two_pass import end_captions
from mmgem.text_rows import IGNORED_LABEL

CLIP_VOCABULARY = 49408
CLIP_CONTEXT = 77
CLIP_BOS, CLIP_EOS = 49406, 49407


def build_clip(setting: Setting) -> CLIPModel:
    """Random weights. The text tower is the one that CLIP ships with such a vision tower, not one of the size of our
    language model: half the layers, three quarters of the width, as in CLIP ViT-L/14. It is what a user has, and it
    is the cheaper choice.
    """
    torch.manual_seed(0)
    width = setting.vision["hidden_size"] * 3 // 4
    text = CLIPTextConfig(
        vocab_size=CLIP_VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=setting.vision["num_hidden_layers"] // 2,
        num_attention_heads=setting.vision["num_attention_heads"],
        max_position_embeddings=CLIP_CONTEXT,
        bos_token_id=CLIP_BOS,
        eos_token_id=CLIP_EOS,
        pad_token_id=CLIP_EOS,
    )
    config = CLIPConfig(
        vision_config=setting.vision_config().to_dict(),
        text_config=text.to_dict(),
        projection_dim=setting.projection_dim,
    )
    return CLIPModel(config).train()


def build_llava(setting: Setting) -> LlavaForConditionalGeneration:
    """Random weights; the same vision tower and language model, every patch a visual token, as LLaVA has it."""
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=setting.vision_config().to_dict(),
        text_config=setting.text_config().to_dict(),
        image_token_index=IMAGE_TOKEN_ID,
        image_seq_length=setting.num_patches,
    )
    return LlavaForConditionalGeneration(config).train()


def clip_inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch of `build_batch` as CLIP's tokenizer pads it to its longest caption: start, text, end."""
    input_ids, attention_mask = end_captions(batch["input_ids"], batch["attention_mask"], CLIP_EOS)
    return {
        "pixel_values": batch["pixel_values"],
        "input_ids": F.pad(input_ids.masked_fill(attention_mask == 0, CLIP_EOS), (1, 0), value=CLIP_BOS),
        "attention_mask": F.pad(attention_mask, (1, 0), value=1),
    }


def llava_inputs(batch: dict[str, torch.Tensor], llava: LlavaForConditionalGeneration) -> dict[str, torch.Tensor]:
    """A batch of `build_batch` after image placeholders, with labels on the captions and their end tokens."""
    eos_token_id, num_patches = llava.config.text_config.eos_token_id, llava.config.image_seq_length
    captions, attention_mask = end_captions(batch["input_ids"], batch["attention_mask"], eos_token_id)
    labels = captions.masked_fill(attention_mask == 0, IGNORED_LABEL)
    return {
        "pixel_values": batch["pixel_values"],
        "input_ids": F.pad(captions, (num_patches, 0), value=IMAGE_TOKEN_ID),
        "attention_mask": F.pad(attention_mask, (num_patches, 0), value=1),
        "labels": F.pad(labels, (num_patches, 0), value=IGNORED_LABEL),
    }
