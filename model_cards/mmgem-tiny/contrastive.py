"""InfoNCE over the global batch, with gradients through the gather and several captions per image."""

import torch
import torch.distributed as dist
import torch.nn.functional as F


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gather_sizes(size: int, device: torch.device) -> list[int]:
    """Number of rows that each process holds, in the order of ranks."""
    if not is_distributed():
        return [size]
    sizes = torch.empty(dist.get_world_size(), dtype=torch.long, device=device)
    dist.all_gather_single(sizes, torch.tensor([size], device=device))
    return sizes.tolist()


def gather_rows(rows: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """
    Concatenate the rows of all processes, in the order of ranks; gradients flow back to the process they came from.

    Args:
        rows: (N_rank, ...), N_rank may differ between processes.
        sizes: N_rank of every process, from [`gather_sizes`].

    Returns:
        (sum of N_rank, ...), on every process.
    """
    if not is_distributed():
        return rows
    from torch.distributed._functional_collectives import all_gather_single, all_gather_single_autograd

    padded = torch.cat([rows, rows.new_zeros(max(sizes) - len(rows), *rows.shape[1:])]).contiguous()
    gather = all_gather_single_autograd if rows.requires_grad else all_gather_single
    gathered = gather(padded, 0, dist.group.WORLD).view(len(sizes), max(sizes), *rows.shape[1:])
    return torch.cat([gathered[rank, :size] for rank, size in enumerate(sizes)])


def token_row_ids(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """
    A 64-bit fingerprint of each token row, equal for equal texts whatever their padding.

    Args:
        input_ids: (T, L); attention_mask: (T, L).

    Returns:
        (T,) long.
    """
    multiplier = 6364136223846793005  # of Knuth's MMIX generator; odd, so no power of it vanishes modulo 2**64
    power = torch.where(attention_mask.bool(), multiplier, 1).cumprod(-1)
    return ((input_ids + 1) * power * attention_mask).sum(-1)


def contrastive_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    logit_scale: torch.Tensor,
    text_to_image: torch.Tensor,
    image_ids: torch.Tensor,
    text_ids: torch.Tensor,
) -> torch.Tensor:
    """
    Symmetric InfoNCE (CLIP, https://arxiv.org/abs/2103.00020) over the images and texts of all processes.

    Each text is pulled to its image; against it stand all images that it does not describe, and against its image
    all texts that do not describe it. A text describes an image if it is one of the captions of an image with that
    id, or says the same as one of them. With one caption per image this is CLIP's loss.

    Args:
        image_embeds: (I, D) unit vectors of this process's images (or regions).
        text_embeds: (T, D) unit vectors of this process's texts.
        logit_scale: scalar, the inverse temperature.
        text_to_image: (T,) long, row of `image_embeds` that each text was written for.
        image_ids: (I,) long, equal for copies of one image, different for different images on any process.
        text_ids: (T,) long, equal for equal texts.

    Returns:
        Scalar: the mean over the texts of the whole batch; 0 if there are none.
    """
    device = image_embeds.device
    image_sizes, text_sizes = gather_sizes(len(image_embeds), device), gather_sizes(len(text_embeds), device)
    if sum(text_sizes) == 0:
        return (image_embeds.sum() + text_embeds.sum()) * 0.0
    first_image = sum(image_sizes[: dist.get_rank()]) if is_distributed() else 0
    image_embeds, image_ids = gather_rows(image_embeds, image_sizes), gather_rows(image_ids, image_sizes)
    text_embeds, text_ids = gather_rows(text_embeds, text_sizes), gather_rows(text_ids, text_sizes)
    text_to_image = gather_rows(text_to_image + first_image, text_sizes)  # (T,) into the gathered images
    written_for = image_ids[:, None] == image_ids[text_to_image]  # (I, T)
    same_text = text_ids[:, None] == text_ids  # (T, T)
    describes = written_for.float() @ same_text.float() > 0  # (I, T)

    logits = logit_scale * image_embeds @ text_embeds.T  # (I, T)
    target = torch.arange(len(text_embeds), device=device)
    lowest = torch.finfo(logits.dtype).min
    other_image = describes.T & (torch.arange(len(image_embeds), device=device) != text_to_image[:, None])  # (T, I)
    other_text = describes[text_to_image] & (target != target[:, None])  # (T, T)
    text_to_image_loss = F.cross_entropy(logits.T.masked_fill(other_image, lowest), text_to_image)
    image_to_text_loss = F.cross_entropy(logits[text_to_image].masked_fill(other_text, lowest), target)
    return (text_to_image_loss + image_to_text_loss) / 2
