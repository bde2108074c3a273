"""Several vectors of one image, without the language model."""

import torch
from torch import nn


class ImageVectors(nn.Module):
    """
    k learned queries, each of which attends to the visual tokens of an image or region (the attention pooling of
    Set Transformer, https://arxiv.org/abs/1810.00825) and adds what it finds to their mean. The output starts at zero,
    so that at first all vectors are the mean. None of them depends on the others: the first r are what r queries give.

    Args:
        hidden_size: C of the visual tokens.
        num_heads: of the attention.
        num_vectors: k.
    """

    def __init__(self, hidden_size: int, num_heads: int, num_vectors: int):
        super().__init__()
        self.queries = nn.Parameter(torch.empty(num_vectors, hidden_size))
        self.norm = nn.LayerNorm(hidden_size)
        self.key_value = nn.Linear(hidden_size, 2 * hidden_size)
        self.output = nn.Linear(hidden_size, hidden_size)
        self.num_heads = num_heads

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(..., n, C) visual tokens -> (..., k, C)"""
        flat = tokens.flatten(0, -3)  # (B, n, C)
        key, value = self.key_value(self.norm(flat)).chunk(2, dim=-1)
        query = self.queries.to(key.dtype).expand(len(flat), -1, -1)  # (B, k, C)
        query, key, value = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (query, key, value))
        found = nn.functional.scaled_dot_product_attention(query, key, value)  # (B, heads, k, C / heads)
        found = self.output(found.transpose(1, 2).flatten(2))  # (B, k, C)
        vectors = flat.mean(dim=1, keepdim=True) + found
        return vectors.unflatten(0, tokens.shape[:-2])
