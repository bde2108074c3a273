"""Several vectors of one image, without the language model."""

import torch
import torch.nn.functional as F
from torch import nn

QUERY_STD = 3.0  # at the beginning, so that no two queries look at the same


class ImageVectors(nn.Module):
    """k vectors of an image or region, each a weighted mean of its visual tokens, as the vector of a region is. The
    first weighs all of them alike: it is what an image with a single vector has. Each further one has a learned query,
    by which it takes a share of every token and leaves the rest to those after it (the stick-breaking of
    https://arxiv.org/abs/2410.17980, from query to query). So they are about different parts of the image, and the
    first r of them are what r queries give.

    Args:
        hidden_size: C of the visual tokens.
        num_vectors: Number k of the vectors.
    """

    def __init__(self, hidden_size: int, num_vectors: int):
        super().__init__()
        self.queries = nn.Parameter(torch.empty(num_vectors - 1, hidden_size))
        self.norm = nn.LayerNorm(hidden_size)
        self.key = nn.Linear(hidden_size, hidden_size, bias=False)

    def weights(self, tokens: torch.Tensor) -> torch.Tensor:
        """(..., n, C) visual tokens -> (..., k, n), the weight of each of them in each vector"""
        keys = self.key(self.norm(tokens))  # (..., n, C)
        scores = (self.queries @ keys.transpose(-1, -2)).float() / keys.shape[-1] ** 0.5  # (..., k - 1, n)
        # The logarithm of a sigmoid is -softplus(-x), which no export turns into one of 0.
        leaves = -F.softplus(scores)  # (..., k - 1, n)
        left = leaves.cumsum(-2) - leaves  # (..., k - 1, n), of each token, by the queries before
        weights = (left - F.softplus(-scores)).softmax(-1)  # (..., k - 1, n)
        first = torch.full_like(tokens[..., :1], 1 / tokens.shape[-2]).transpose(-1, -2)  # (..., 1, n)
        return torch.cat([first, weights.to(tokens.dtype)], dim=-2)  # (..., k, n)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(..., n, C) visual tokens -> (..., k, C)"""
        return self.weights(tokens) @ tokens
