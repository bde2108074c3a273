import time
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import measure


def backward(compute):
    """`compute` and its gradient."""
    return lambda: compute().sum().backward()


def test_flops_of_products_are_two_for_each_multiplication():
    a, b = torch.randn(3, 4, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    assert measure.count_flops(lambda: a @ b) == 2 * 3 * 4 * 5
    assert measure.count_flops(backward(lambda: a @ b)) == 3 * 2 * 3 * 4 * 5


def test_flops_of_attention_are_counted_on_the_cpu():
    query, key, value = torch.randn(3, 2, 4, 16, 8, requires_grad=True).unbind(0)  # 2 rows, 4 heads, 16 tokens
    forward = 2 * (2 * 2 * 4 * 16 * 16 * 8)  # scores, and the sum of values
    assert measure.count_flops(lambda: F.scaled_dot_product_attention(query, key, value)) == forward
    both = measure.count_flops(backward(lambda: F.scaled_dot_product_attention(query, key, value)))
    assert both == pytest.approx(3.5 * forward)  # the scores are computed again


@pytest.mark.parametrize("frozen", [False, True])
def test_flops_of_the_chunked_loss_are_those_of_the_plain_one(frozen):
    states, weight = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=not frozen)
    labels, options = torch.arange(6), nn.LinearCrossEntropyOptions(batch_chunk_size=4, chunking_method=None)
    plain = backward(lambda: F.cross_entropy(F.linear(states, weight), labels))
    chunked = backward(lambda: F.linear_cross_entropy(states, weight, labels, options=options))
    assert measure.count_flops(chunked) == measure.count_flops(plain) > 0


def test_peak_memory_is_that_of_what_lives_at_once():
    def step():
        a = torch.zeros(1000, 1000)  # 4 MB
        b = a + 1
        del a
        c = b + 1
        del b
        return c

    assert measure.peak_memory(step) == pytest.approx(8e6, rel=0.01)


def test_steps_of_a_round_follow_one_another():
    """By a clock that the steps themselves set."""
    order = []
    steps = {name: partial(order.append, name) for name in ("a", "bbb")}
    seconds = measure.time_alternately(steps, rounds=3, clock=lambda: float(sum(map(len, order))))
    assert seconds == {"a": [1.0] * 3, "bbb": [3.0] * 3}
    assert order == ["a", "bbb"] * 3


def test_ratio_is_taken_within_rounds():
    assert measure.median_ratio([1.0, 10.0, 3.0], [2.0, 20.0, 1.0]) == 0.5


def test_gemm_rates_are_those_of_the_products_of_a_step():
    a, b = torch.randn(64, 128), torch.randn(128, 256)
    fastest, weighted = measure.gemm_rates(lambda: a @ b, repetitions=50)
    assert fastest == weighted > 0
    start = time.perf_counter()
    for _ in range(20):
        a @ b
    rate = 20 * 2 * 64 * 128 * 256 / (time.perf_counter() - start)
    assert fastest > rate / 10


def test_table_is_markdown():
    assert measure.markdown_table(("a", "b"), [("x", 1)]) == "| a | b |\n| --- | ---: |\n| x | 1 |"
