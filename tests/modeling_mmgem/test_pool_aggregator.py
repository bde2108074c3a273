import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmgem.pool_aggregator import PoolAggregator, roi_align


@pytest.fixture(params=[(4, 4, 4), (6, 6, 16), (7, 5, 9), (3, 4, 16)], ids=str)
def grid_and_tokens(request):
    height, width, num_visual_tokens = request.param
    torch.manual_seed(0)
    return torch.randn(2, 8, height, width), num_visual_tokens


class PerturbedLinear(nn.Linear):
    """A layer that its weights do not tell all about."""

    def forward(self, inputs):
        return super().forward(inputs) + inputs.sum(-1, keepdim=True) * self.bias.cos()


def test_untrained_aggregator_is_average_pooling(grid_and_tokens):
    grid, num_visual_tokens = grid_and_tokens
    aggregator = PoolAggregator(8, 2, num_visual_tokens)
    torch.nn.init.zeros_(aggregator.output.weight)
    torch.nn.init.zeros_(aggregator.output.bias)
    expected = F.adaptive_avg_pool2d(grid, aggregator.grid_size).flatten(2).transpose(1, 2)
    torch.testing.assert_close(aggregator(grid), expected)


def test_box_of_whole_image_gives_whole_image_tokens(grid_and_tokens):
    grid, num_visual_tokens = grid_and_tokens
    aggregator = PoolAggregator(8, 2, num_visual_tokens)
    whole = torch.tensor([[[0.0, 0.0, 1.0, 1.0]]]).expand(2, -1, -1)
    torch.testing.assert_close(aggregator(grid, whole)[:, 0], aggregator(grid), rtol=0, atol=1e-5)


def test_token_attends_to_its_own_window_only():
    torch.manual_seed(0)
    aggregator = PoolAggregator(8, 2, num_visual_tokens=4)
    grid = torch.randn(1, 8, 6, 6, requires_grad=True)
    aggregator(grid)[0, 1].sum().backward()  # the token at the top right
    seen = grid.grad.abs().sum(1)[0] > 0
    expected = torch.zeros(6, 6, dtype=torch.bool)
    expected[:3, 3:] = True
    assert torch.equal(seen, expected)


@pytest.mark.parametrize("is_wrapped", [False, True])
@pytest.mark.parametrize("width", [None, 6])
def test_attention_equals_plain_reference(width, is_wrapped):
    """Also where the layer of keys and values is more than its weights, as with LoRA."""
    torch.manual_seed(0)
    aggregator = PoolAggregator(8, 2, num_visual_tokens=4, attention_size=width)
    if is_wrapped:
        aggregator.key_value = PerturbedLinear(8, 2 * (width or 8))
    head = (width or 8) // 2
    grid = torch.randn(1, 8, 4, 4)
    window = grid[0, :, 2:, :2].flatten(1).T  # (4, 8), of the token at the bottom left
    pooled = window.mean(0)
    query = aggregator.query(aggregator.norm(pooled)).view(2, head)
    key, value = aggregator.key_value(aggregator.norm(window)).view(4, 2, 2, head).unbind(1)
    weights = torch.softmax(torch.einsum("hd,whd->hw", query, key) / head**0.5, dim=-1)
    expected = pooled + aggregator.output(torch.einsum("hw,whd->hd", weights, value).flatten())
    torch.testing.assert_close(aggregator(grid)[0, 2], expected)


def test_roi_align_samples_a_linear_ramp_exactly():
    width = 8
    ramp = ((torch.arange(width) + 0.5) / width).expand(1, 1, width, width)
    aligned = roi_align(ramp, torch.tensor([[[0.25, 0.25, 0.75, 0.5]]]))
    expected = 0.25 + 0.5 * (torch.arange(width) + 0.5) / width
    torch.testing.assert_close(aligned[0, 0, 0], expected)


def test_boxes_are_independent_of_each_other():
    torch.manual_seed(0)
    aggregator = PoolAggregator(8, 2, num_visual_tokens=4)
    grid = torch.randn(2, 8, 4, 4)
    boxes = torch.tensor([[[0.1, 0.2, 0.6, 0.9], [0.5, 0.0, 1.0, 0.3]], [[0.0, 0.0, 0.5, 0.5], [0.3, 0.3, 0.8, 0.7]]])
    together = aggregator(grid, boxes)
    for image in range(2):
        for box in range(2):
            alone = aggregator(grid[image : image + 1], boxes[image : image + 1, box : box + 1])
            torch.testing.assert_close(together[image, box], alone[0, 0])
