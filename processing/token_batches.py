"""Texts of many lengths in batches of about one length, each of at most so many tokens."""

from collections.abc import Iterator, Sequence

import torch

# Padding included. On a processor, whose caches hold small batches, by `benchmarks.text_batches`.
TOKENS_ON_CPU, TOKENS_ELSEWHERE = 512, 8192


def tokens_at_a_time(device: torch.device) -> int:
    """How many tokens of texts, padding included, suit a device."""
    return TOKENS_ON_CPU if device.type == "cpu" else TOKENS_ELSEWHERE


def batches_of_tokens(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Yields the numbers of texts of these lengths, in batches of about one length, the longest first.

    Args:
        lengths: Tokens of each text.
        batch_tokens: Of a batch, padding included; a text that is longer is alone.
    """
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if batch and (len(batch) + 1) * max(1, lengths[batch[0]]) > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    yield batch


def restore(parts: Sequence[torch.Tensor], batches: Sequence[Sequence[int]]) -> torch.Tensor:
    """What was computed of such batches, (B, ...) each, as one tensor in the order of the texts."""
    order = torch.tensor([row for batch in batches for row in batch], device=parts[0].device)
    return torch.cat(list(parts))[order.argsort()]
