"""The joint step written plainly: padded rows, the language model once for captions and once for texts."""

import torch
import torch.nn.functional as F

from mmgem import MMGEMModel
from mmgem.text_rows import IGNORED_LABEL


def two_pass_losses(
    model: MMGEMModel, pixel_values: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the packed joint step computes, through the methods that everyone calls: the reference that it is tested
    and measured against.

    Args:
        model: With a causal language model that has an end token and puts no token in front.
        pixel_values: (B, 3, H, W).
        input_ids, attention_mask: (B, L), one caption for each image, padded on the right; no two equal.

    Returns:
        Caption loss, the mean over all caption and end tokens, and InfoNCE of CLIP.
    """
    image = model.get_image_features(pixel_values)
    text = model.get_text_features(input_ids, attention_mask)
    image_embeds = F.normalize(image.pooler_output, dim=-1)  # (B, D)
    text_embeds = F.normalize(text.pooler_output, dim=-1)  # (B, D)
    logits = model.logit_scale.exp() * image_embeds @ text_embeds.T  # (B, B)
    target = torch.arange(len(logits), device=logits.device)
    contrastive_loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    captions, attention_mask = end_captions(input_ids, attention_mask, model.config.text_config.eos_token_id)
    visual_embeds = model.token_projection(image.last_hidden_state)  # (B, n, H)
    inputs_embeds = torch.cat([visual_embeds, model.get_input_embeddings()(captions)], dim=1)  # (B, n + L + 1, H)
    before = attention_mask.new_ones(visual_embeds.shape[:2])  # (B, n)
    labels = torch.cat([before * IGNORED_LABEL, captions.masked_fill(attention_mask == 0, IGNORED_LABEL)], dim=1)
    attention_mask = torch.cat([before, attention_mask], dim=1)
    caption_loss = model(inputs_embeds=inputs_embeds, attention_mask=attention_mask, labels=labels).loss
    return caption_loss, contrastive_loss


def end_captions(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, eos_token_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, L) captions padded on the right -> (B, L + 1), an end token after each, and their mask."""
    ended = F.pad(attention_mask, (1, 0), value=1)  # (B, L + 1)
    is_end = ended.cumsum(-1) == ended.sum(-1, keepdim=True)
    is_end &= ended == 1
    return F.pad(input_ids, (0, 1)).masked_fill(is_end, eos_token_id), ended
