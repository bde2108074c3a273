"""The parts that reconstruction adds to a model: vectors for masked inputs, and a decoder of pixels."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mmgem.configuration_mmgem import MMGEMConfig
from mmgem.pool_aggregator import attention_heads

_FREQUENCIES = 16  # of the waves that tell a place, along each axis


class ReconstructionHead(nn.Module):
    """Vectors that stand for masked tokens and patches, and a decoder of pixels.

    The decoder is one block in which masked patches, known by their place, attend to the states of the visual tokens
    (CrossMAE, https://arxiv.org/abs/2401.14391). Places are relative to the image, so images of any size can be
    decoded. The head ends with the stage.

    Args:
        config: The configuration of the model.
    """

    def __init__(self, config: MMGEMConfig):
        super().__init__()
        text_config: Any = config.text_config
        grid = config.grid
        size, text_size = grid.hidden_size, text_config.hidden_size
        patch_shape = grid.num_channels, *grid.stride
        self.mask_embedding = nn.Parameter(torch.empty(text_size))
        self.mask_patch = nn.Parameter(torch.empty(patch_shape))
        self.state_norm = nn.LayerNorm(text_size)
        self.state_projection = nn.Linear(text_size, size)
        self.place_projection = nn.Linear(4 * _FREQUENCIES, size)
        self.query_norm, self.token_norm = nn.LayerNorm(size), nn.LayerNorm(size)
        self.attention = nn.MultiheadAttention(size, attention_heads(config.vision_config, size), batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(size), nn.Linear(size, 4 * size), nn.GELU(), nn.Linear(4 * size, size))
        self.pixels = nn.Sequential(nn.LayerNorm(size), nn.Linear(size, math.prod(patch_shape)))

    def forward(self, states: torch.Tensor, patch_mask: torch.Tensor) -> torch.Tensor:
        """Predict the pixels of masked patches.

        Args:
            states: (I, n, H), states of the visual tokens.
            patch_mask: (I, rows, columns) bool, True for masked patches.

        Returns:
            (M, channels * patch height * patch width), pixels of the masked patches in the order of the mask.
        """
        grid_size = math.isqrt(states.shape[1])
        tokens = self.state_projection(self.state_norm(states))  # (I, n, C)
        places = self.place_projection(_places(grid_size, grid_size, tokens))  # (n, C)
        tokens = self.token_norm(tokens + places)
        rows, columns = patch_mask.shape[1:]
        query = self.place_projection(_places(rows, columns, tokens)).expand(len(tokens), -1, -1)  # (I, P, C)
        found, _ = self.attention(self.query_norm(query), tokens, tokens, need_weights=False)  # (I, P, C)
        found = (query + found)[patch_mask.flatten(1)]  # (M, C)
        return self.pixels(found + self.mlp(found))


def normalized_patches(pixels: torch.Tensor) -> torch.Tensor:
    """Normalize (M, p) pixels of patches, each patch to mean 0 and variance 1; one of a single color to zeros."""
    return F.layer_norm(pixels, pixels.shape[-1:], eps=1e-6)


def _places(rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
    """(rows * columns, 4 * frequencies) sines and cosines of where the cells of a grid have their centers."""
    frequencies = math.pi * 2 ** torch.linspace(0, 6, _FREQUENCIES, device=like.device)
    axes = [(torch.arange(size, device=like.device) + 0.5) / size for size in (rows, columns)]
    waves = [torch.cat([(axis[:, None] * frequencies).sin(), (axis[:, None] * frequencies).cos()], 1) for axis in axes]
    by_row, by_column = waves[0][:, None].expand(-1, columns, -1), waves[1][None].expand(rows, -1, -1)
    return torch.cat([by_row, by_column], dim=-1).flatten(0, 1).to(like.dtype)
