"""Of the texts that beam search writes about an image, which one says best what it shows: the model, which embeds too,
reads them again. Captions are ranked so by CLIP (https://arxiv.org/abs/2104.08718); here one model does both."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn.functional import normalize

from .late_interaction import similarity
from .text_rows import first_token_id, is_first_token


def rank_candidates(
    text_embeds: torch.Tensor, image_embeds: torch.Tensor, beam_scores: torch.Tensor, weight: float
) -> torch.Tensor:
    """Rank texts by the score of their beam plus the weighted similarity of both embeddings.

    Args:
        text_embeds: (B * c, D) or (B * c, k, D), of c candidates for each of B images, image after image.
        image_embeds: (B, D) or (B, k, D). The texts ask, where there are several vectors.
        beam_scores: (B * c,), by default the mean log probability of a token.
        weight: The weight of the similarity, which is from -1 to 1.

    Returns:
        (B, c) numbers of the candidates of each image, the best first; of equal ones the first.
    """
    texts = normalize(text_embeds.float(), dim=-1).unflatten(0, (len(image_embeds), -1))  # (B, c, D) or (B, c, k, D)
    images = normalize(image_embeds.float(), dim=-1)  # (B, D) or (B, k, D)
    similarities = torch.cat([similarity(own, image[None]).T for own, image in zip(texts, images, strict=True)])
    scores = beam_scores.view_as(similarities) + weight * similarities  # (B, c)
    return scores.argsort(dim=1, descending=True, stable=True)


def why_not_ranked(model, settings: Mapping[str, Any]) -> str | None:
    """What stands in the way of `generate_ranked`, if anything does.

    Args:
        model: The `MMGEMModel`.
        settings: Arguments of `generate`, and those of its configuration.
    """
    obstacles = {
        "`num_beams` is 1": (settings.get("num_beams") or 1) == 1,
        "`return_dict_in_generate` is True": settings.get("return_dict_in_generate"),
        "the model began as a VLM, which writes in its own way": model.vlm is not None,
        "there are no `input_ids` with images": settings.get("input_ids") is None
        or settings.get("inputs_embeds") is not None
        or all(settings.get(name) is None for name in ("pixel_values", "visual_tokens")),
    }
    return next((name for name, stands in obstacles.items() if stands), None)


def is_caption_prompt(model, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """(B, P) -> (B,), True for one image and no words. An answer to words need not be like the image."""
    is_image = input_ids == model.config.image_token_id  # (B, P)
    is_bos = is_first_token(input_ids, attention_mask, model.config.text_config.bos_token_id)  # (B, P)
    has_words = (attention_mask.bool() & ~is_image & ~is_bos).any(1)  # (B,)
    return (is_image.sum(1) == model.config.num_visual_tokens) & ~has_words


def generate_ranked(
    model, generate: Callable, weight: float, settings: Mapping[str, Any], options: dict[str, Any]
) -> torch.Tensor:
    """Generate by beam search, and return of all beams the captions that `rank_candidates` puts first. For other
    prompts than those of `is_caption_prompt` the first beams are returned.

    Args:
        model: The `MMGEMModel`.
        generate: Its `GenerationMixin.generate`.
        weight: As for `rank_candidates`.
        settings: As for `why_not_ranked`, which finds nothing.
        options: Arguments of `generate`, with `input_ids` and `attention_mask` (B, P), padded on the left, and
            `visual_tokens` (units, n, C).

    Returns:
        (B * num_return_sequences, P + L) token ids.
    """
    input_ids, mask, tokens = (options[name] for name in ("input_ids", "attention_mask", "visual_tokens"))
    num_beams, num_returned = settings["num_beams"], settings.get("num_return_sequences") or 1
    details = {"return_dict_in_generate": True, "output_scores": True}
    outputs = generate(**options | details | {"num_return_sequences": num_beams})
    new_ids = outputs.sequences[:, input_ids.shape[1] :]  # (B * c, L)
    end_ids = settings.get("eos_token_id")
    is_end = torch.isin(new_ids, torch.as_tensor([] if end_ids is None else end_ids, device=new_ids.device))
    is_written = is_end.cumsum(1) == 0  # (B * c, L)

    bos_token_id = model.config.text_config.bos_token_id
    has_bos = is_first_token(input_ids, mask, bos_token_id).any(1, keepdim=True)  # (B, 1)
    bos = torch.full_like(new_ids[:, :1], max(first_token_id(bos_token_id), 0))  # (B * c, 1)
    text_ids = torch.cat([bos, new_ids], dim=1)  # (B * c, 1 + L)
    is_word = is_written & (new_ids != model.config.image_token_id)  # (B * c, L)
    text_mask = torch.cat([has_bos.repeat_interleave(num_beams, dim=0), is_word], dim=1).long()  # (B * c, 1 + L)
    text_ids = text_ids.masked_fill(text_mask == 0, 0)
    limit = model.config.max_sequence_length
    room = None if limit is None else limit - len(model._read_out_embeds())
    text_embeds = model.get_text_features(text_ids[:, :room], text_mask[:, :room]).pooler_output

    units = (input_ids == model.config.image_token_id).sum(1) // tokens.shape[1]  # (B,)
    first_unit = (units.cumsum(0) - units).clamp(max=len(tokens) - 1)  # (B,)
    image_embeds = model._calibrated(model._embed_visual_tokens(tokens), "image")[first_unit]  # (B, D) or (B, k, D)
    order = rank_candidates(text_embeds, image_embeds, outputs.sequences_scores, weight)  # (B, c)
    as_written = torch.arange(num_beams, device=order.device)  # (c,)
    order = order.where(is_caption_prompt(model, input_ids, mask)[:, None], as_written)[:, :num_returned]  # (B, r)
    chosen = (order + num_beams * torch.arange(len(order), device=order.device)[:, None]).flatten()  # (B * r,)
    length = input_ids.shape[1] + int(is_written[chosen].sum(1).max()) + 1  # with what ends the longest
    return outputs.sequences[chosen, :length]
