"""Few pairs between two frozen encoders: their cached features mixed, and their neighbourhoods kept."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

LATENT_OPTIONS = ("fusemix", "structure")  # of an objective, for which both towers are to be frozen and cached
_TEMPERATURE = 0.07  # of neighbourhoods: cosines that differ by it are e times as near


def mix_latents(inputs: Mapping[str, Any], alpha: float) -> dict[str, Any]:
    """Mix each pair of a batch with another one (FuseMix, https://arxiv.org/abs/2312.10144).

    One share, drawn from Beta(alpha, alpha), holds for the whole batch and for both modalities, so that a mixed text
    still describes its mixed image. Images that no text describes stay as they are.

    Args:
        inputs: A batch for `MMGEMModel.forward` with `patch_features` (I, C, rows, columns), `text_states` (T, k, H),
            `image_index` and `contrastive_mask` (T,).
        alpha: Above 0; 1 draws all shares alike, smaller ones mix less.

    Returns:
        The batch with mixed features and states.

    Raises:
        ValueError: If it has no features and states, or has boxes, whose parts of a mixed image show nothing, or hard
            negatives.
    """
    features, states = _latents_of(inputs, "fusemix")
    if "boxes" in inputs or ("hard_negative_mask" in inputs and inputs["hard_negative_mask"].any()):
        raise ValueError("`fusemix` came with boxes or hard negatives; expected images and their texts alone.")
    compared = inputs["contrastive_mask"].nonzero()[:, 0]  # (Q,)
    compared = compared[inputs["image_index"][compared].argsort(stable=True)]  # texts of an image, one after the other
    image = inputs["image_index"][compared]  # (Q,)
    counts = image.bincount(minlength=len(features))  # (I,)
    described = counts.nonzero()[:, 0]
    partner = torch.arange(len(features), device=features.device)  # (I,)
    partner[described] = described[torch.randperm(len(described)).to(described.device)]
    first = counts.cumsum(0) - counts  # (I,), place of the first text of an image in `compared`
    number = (
        torch.arange(len(compared), device=image.device) - first[image]
    )  # (Q,), of a text among those of its image
    other = compared[first[partner[image]] + number % counts[partner[image]]]  # (Q,)
    share = torch.distributions.Beta(alpha, alpha).sample().item()
    mixed = states.clone()
    mixed[compared] = states[other].lerp(states[compared], share)
    return {**inputs, "patch_features": features[partner].lerp(features, share), "text_states": mixed}


def structure_loss(
    inputs: Mapping[str, Any], image_embeds: torch.Tensor, text_embeds: torch.Tensor, levels: int
) -> torch.Tensor:
    """How far neighbourhoods of embeddings are from those of the frozen features that they are made of, see
    [`neighbourhood_loss`]: the mean of that of images and that of texts, over the batch of this process.

    Args:
        inputs: The batch that was embedded, as for [`mix_latents`].
        image_embeds: (I, D) the embeddings of its images.
        text_embeds: (Q, D) those of the texts that are compared.
        levels: See [`neighbourhood_loss`].

    Raises:
        ValueError: If the batch has no features and states.
    """
    features, states = _latents_of(inputs, "structure")
    states = states[inputs["contrastive_mask"]].mean(dim=1)  # (Q, H)
    of_images = neighbourhood_loss(features.mean(dim=(2, 3)), image_embeds, levels)
    return (of_images + neighbourhood_loss(states, text_embeds, levels)) / 2


def neighbourhood_loss(latents: torch.Tensor, embeds: torch.Tensor, levels: int) -> torch.Tensor:
    """STRUCTURE (https://arxiv.org/abs/2506.16895): the divergence of the neighbourhoods of N vectors before and after
    they are projected.

    Unit vectors, less their mean, have as neighbourhood P the softmax of their similarities. At level l it is that of
    a walk of l steps, the power P^l:

        1/L * sum over l from 1 to L of  1/l * JS(P(latents)^l, P(embeds)^l)

    with the Jensen-Shannon divergence of each row, 0 to ln 2, in the mean.

    Args:
        latents: (N, C), without gradients.
        embeds: (N, D).
        levels: L, 1 or more.

    Returns:
        Scalar, float32; 0 where `embeds` are `latents`, rotated or scaled.
    """
    with torch.autocast(embeds.device.type, enabled=False):
        before, after = _neighbourhoods(latents.detach()), _neighbourhoods(embeds)  # (N, N)
        walk_before, walk_after, total = before, after, embeds.new_zeros((), dtype=torch.float32)
        for level in range(1, levels + 1):
            total = total + _divergence(walk_before, walk_after) / level
            walk_before, walk_after = walk_before @ before, walk_after @ after
    return total / levels


def _neighbourhoods(vectors: torch.Tensor) -> torch.Tensor:
    """(N, C) -> (N, N), each row a distribution."""
    unit = F.normalize(vectors.float(), dim=-1)
    centered = unit - unit.mean(dim=0)
    return (centered @ centered.T / _TEMPERATURE).softmax(dim=-1)


def _divergence(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon divergence of rows (N, N), in the mean."""
    tiny = torch.finfo(one.dtype).tiny
    middle = ((one + other) / 2).clamp(min=tiny).log()
    parts = [F.kl_div(middle, part.clamp(min=tiny), reduction="batchmean") for part in (one, other)]
    return (parts[0] + parts[1]) / 2


def _latents_of(inputs: Mapping[str, Any], option: str) -> tuple[torch.Tensor, torch.Tensor]:
    names = ("patch_features", "text_states")
    if missing := [name for name in names if name not in inputs]:
        raise ValueError(
            f"`{option}` came with a batch without `{missing[0]}`; expected features of frozen towers, by "
            "`cache_features: {texts: true}`."
        )
    return inputs[names[0]], inputs[names[1]]
