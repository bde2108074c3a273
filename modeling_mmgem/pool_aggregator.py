"""PoolAggregator: a patch grid becomes g x g visual tokens, for the whole image and for any box in it."""

import math

import torch
import torch.nn.functional as F
from torch import nn


def attention_heads(vision_config, hidden_size: int) -> int:
    """Heads for features of a vision tower: as many as it has itself, or else of about 64 channels."""
    heads = getattr(vision_config, "num_attention_heads", None)
    if isinstance(heads, int) and hidden_size % heads == 0:
        return heads
    return max(count for count in range(1, max(1, hidden_size // 64) + 1) if hidden_size % count == 0)


def adaptive_windows(size: int, bins: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows of `F.adaptive_avg_pool1d` along one axis.

    Args:
        size: Cells along the axis.
        bins: Windows wanted.

    Returns:
        `index` (bins, width) of the cells of each window, and `valid` (bins, width), False where a window is
        narrower than the widest one.
    """
    bin_ids = torch.arange(bins, device=device)
    start = bin_ids * size // bins
    end = -(-(bin_ids + 1) * size // bins)
    width = max(-(-(i + 1) * size // bins) - i * size // bins for i in range(bins))
    index = start[:, None] + torch.arange(width, device=device)
    valid = index < end[:, None]
    return index.clamp(max=size - 1), valid


def roi_align(grid: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Resample every box to a grid of the full size (RoIAlign, https://arxiv.org/abs/1703.06870, aligned, one
    bilinear sample per cell). The box (0, 0, 1, 1) gives the grid back.

    Args:
        grid: (B, C, h, w) patch features.
        boxes: (B, R, 4) xyxy in [0, 1] of the image.

    Returns:
        (B * R, C, h, w).
    """
    (batch, channels, height, width), num_boxes = grid.shape, boxes.shape[1]
    boxes = boxes.float()
    x0, y0, x1, y1 = boxes[..., None].unbind(-2)  # each (B, R, 1)
    centre_x = (torch.arange(width, device=grid.device) + 0.5) / width  # (w,)
    centre_y = (torch.arange(height, device=grid.device) + 0.5) / height  # (h,)
    sample_x = (x0 + (x1 - x0) * centre_x)[:, :, None, :].expand(-1, -1, height, -1)  # (B, R, h, w)
    sample_y = (y0 + (y1 - y0) * centre_y)[:, :, :, None].expand(-1, -1, -1, width)  # (B, R, h, w)
    samples = torch.stack([sample_x, sample_y], dim=-1) * 2 - 1  # (B, R, h, w, 2) in [-1, 1]
    samples = samples.reshape(batch, num_boxes * height, width, 2)
    # One call for all boxes of all images.
    aligned = F.grid_sample(
        grid.float(), samples, mode="bilinear", padding_mode="border", align_corners=False
    )  # (B, C, R * h, w)
    aligned = aligned.view(batch, channels, num_boxes, height, width).transpose(1, 2)  # (B, R, C, h, w)
    return aligned.reshape(batch * num_boxes, channels, height, width).to(grid.dtype)


class PoolAggregator(nn.Module):
    """Average pooling that looks again (MM-GEM, https://arxiv.org/abs/2405.19333): the grid is pooled to g x g tokens
    by adaptive average pooling, then each token attends to the patches of its own window and adds what it finds.
    The output layer starts at zero, so an untrained aggregator *is* average pooling. A box goes through the same
    parameters, on the grid that RoIAlign cuts out of the patch grid.

    Args:
        hidden_size: Channels C of the patch features.
        num_heads: Attention heads; divides the width of the attention.
        num_visual_tokens: Number n = g * g of tokens per image or box.
        attention_size: Width A of the attention, a multiple of `num_heads`; by default `hidden_size`.
    """

    def __init__(self, hidden_size: int, num_heads: int, num_visual_tokens: int, attention_size: int | None = None):
        super().__init__()
        attention_size = hidden_size if attention_size is None else attention_size
        self.grid_size = math.isqrt(num_visual_tokens)
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(hidden_size)
        self.query = nn.Linear(hidden_size, attention_size)
        self.key_value = nn.Linear(hidden_size, 2 * attention_size)
        self.output = nn.Linear(attention_size, hidden_size)

    def forward(
        self, grid: torch.Tensor, boxes: torch.Tensor | None = None, sizes: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Pool a patch grid, for whole images or for boxes in them.

        Args:
            grid: (B, C, h, w) patch features.
            boxes: (B, R, 4) xyxy in [0, 1] of the image, or None for the whole image.
            sizes: (B, 2) rows and columns of each grid, where they differ and what is beyond them is padding.

        Returns:
            (B, n, C), or (B, R, n, C) with boxes.
        """
        if sizes is not None:  # images of one size at a time
            order, tokens = [], []
            for size in sizes.unique(dim=0):
                rows = (sizes == size).all(-1).nonzero()[:, 0]  # (S,)
                height, width = size.tolist()
                order.append(rows)
                tokens.append(self(grid[rows, :, :height, :width], None if boxes is None else boxes[rows]))
            return torch.cat(tokens)[torch.cat(order).argsort()]
        if boxes is not None:
            tokens = self(roi_align(grid, boxes))  # (B * R, n, C)
            return tokens.view(*boxes.shape[:2], *tokens.shape[1:])  # (B, R, n, C)

        windows, valid, _ = self._windows(grid)  # (B, n, W, C), (n, W)
        pooled = (_average(valid, windows)[:, None] @ windows).squeeze(2)  # (B, n, C)
        normed, query = self.norm(windows), self._query(pooled)  # (B, n, W, C), (B, n, heads, d)
        if _is_here(self.key_value, normed):
            # A window has one query, which goes through the weights of the keys in place of all patches, and the
            # patches are summed before they go through those of the values. A softmax does not feel the bias of keys.
            key_weight, value_weight = self.key_value.weight.unflatten(0, (2, self.num_heads, -1))  # (heads, d, C)
            value_bias = self.key_value.bias.unflatten(0, (2, self.num_heads, -1))[1]  # (heads, d)
            scores = torch.einsum("bnhd,hdc->bnhc", query, key_weight) @ normed.transpose(-1, -2)  # (B, n, heads, W)
            looked_at = self._attention(scores, valid) @ normed  # (B, n, heads, C)
            looked_up = torch.einsum("bnhc,hdc->bnhd", looked_at, value_weight) + value_bias  # (B, n, heads, d)
        else:
            key, value = self._keys_values(normed)  # (B, n, W, heads, d)
            scores = torch.einsum("bnhd,bnwhd->bnhw", query, key)
            looked_up = torch.einsum("bnhw,bnwhd->bnhd", self._attention(scores, valid), value)
        return pooled + self.output(looked_up.flatten(2))  # (B, n, A) -> (B, n, C)

    def contributions(self, grid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Take the tokens of whole images apart into what each patch of their windows brings, with the weights of the
        attention as they are.

        Args:
            grid: (B, C, h, w) patch features.

        Returns:
            (B, n, W, C), which with a bias (C,) sum over W to what `forward` returns; (n, W), the patches from 0 to
            h * w - 1 that they come from, row by row; and the bias. Zeros are beyond narrower windows.
        """
        windows, valid, patches = self._windows(grid)  # (B, n, W, C), (n, W), (n, W)
        average = _average(valid, windows)  # (n, W)
        pooled = (average[:, None] @ windows).squeeze(2)  # (B, n, C)
        key, value = self._keys_values(self.norm(windows))  # (B, n, W, heads, d)
        scores = torch.einsum("bnhd,bnwhd->bnhw", self._query(pooled), key)
        attention = self._attention(scores, valid).transpose(-1, -2)  # (B, n, W, heads)
        looked_up = (attention[..., None] * value).flatten(3)  # (B, n, W, A)
        bias = self.output(torch.zeros_like(looked_up[0, 0, :1]))[0]  # (C,)
        return average[..., None] * windows + linear_of_rows(self.output, looked_up) - bias, patches, bias

    def _windows(self, grid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, C, h, w) -> (B, n, W, C) patches of each token's window, (n, W) False beyond it, (n, W) their numbers"""
        (height, width), g = grid.shape[2:], self.grid_size
        rows, row_valid = adaptive_windows(height, g, grid.device)
        columns, column_valid = adaptive_windows(width, g, grid.device)
        valid = row_valid[:, None, :, None] & column_valid[None, :, None, :]  # (g, g, wh, ww)
        patches = rows[:, None, :, None] * width + columns[None, :, None, :]  # (g, g, wh, ww)
        patches = patches.view(g * g, -1)  # (n, W)
        windows = grid.flatten(2).transpose(1, 2)[:, patches]  # (B, n, W, C)
        return windows, valid.view(g * g, -1), patches

    def _query(self, pooled: torch.Tensor) -> torch.Tensor:
        """(B, n, C) -> (B, n, heads, d), divided by the root of d"""
        query = self.query(self.norm(pooled)).unflatten(-1, (self.num_heads, -1))
        return query / query.shape[-1] ** 0.5

    def _keys_values(self, normed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, n, W, C) -> twice (B, n, W, heads, d)"""
        key_value = linear_of_rows(self.key_value, normed)  # (B, n, W, 2A)
        key_value = key_value.unflatten(-1, (2, self.num_heads, -1))  # (B, n, W, 2, heads, d)
        return key_value[..., 0, :, :], key_value[..., 1, :, :]

    def _attention(self, scores: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """(B, n, heads, W) and (n, W) -> (B, n, heads, W), the weight of each patch of the window"""
        return scores.masked_fill(~valid[:, None], -torch.inf).softmax(-1, torch.float32).to(scores.dtype)


def linear_of_rows(linear: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """(B, n, W, C) -> (B, n, W, A); the 8-bit layers of bitsandbytes take from two to three dimensions."""
    return linear(inputs.flatten(1, 2)).unflatten(1, inputs.shape[1:3])


def _is_here(linear: nn.Linear, inputs: torch.Tensor) -> bool:
    """Whether the weights of a layer are all that it is: not with LoRA, quantized, pruned, elsewhere or in shards."""
    weight = linear.weight
    is_plain = type(linear) is nn.Linear and type(weight) is nn.Parameter
    return is_plain and weight.device == inputs.device and weight.shape[-1:] == inputs.shape[-1:]


def _average(valid: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
    """(n, W) weights of the patches of each window in its mean."""
    return (valid / valid.sum(-1, keepdim=True)).to(windows.dtype)
