"""The benchmark of the paper's size, in a size for tests, without an accelerator."""

from functools import partial

import pytest
import torch

from benchmarks.paper_size import gemm_rate, joint_steps, measured, uses
from benchmarks.setting import build_batch, build_model, micro_setting, paper_setting

pytestmark = pytest.mark.slow
CPU = "cpu"


def test_every_kind_of_work_is_measured_at_every_batch_size():
    ceiling = gemm_rate(CPU, torch.float32, 64, 1)

    measure = partial(measured, rounds=1, ceiling=ceiling, device=CPU)
    setting = micro_setting()
    model = build_model(setting)
    steps = joint_steps(model, setting, [2, 3], [9, 18], measure, "eager")
    rows = [*steps, *uses(model, setting, [2], measure)]
    work = [(name, size) for name, size, *_ in rows]
    assert work == [
        ("joint step", 2),
        ("joint step", 3),
        ("joint step, texts of up to 9 tokens, sdpa", 2),
        ("joint step, texts of up to 18 tokens, sdpa", 2),
        ("joint step, texts of up to 9 tokens, eager", 2),
        ("joint step, texts of up to 18 tokens, eager", 2),
        ("embed images", 2),
        ("embed texts", 2),
        ("write captions", 2),
        ("write captions, static cache", 2),
    ]
    assert model.language_model.config._attn_implementation == "sdpa"
    for _, size, milliseconds, rate, *_ in rows:
        assert float(rate) == pytest.approx(1e3 * size / float(milliseconds), rel=0.1, abs=1)


def test_a_batch_that_does_not_fit_leaves_the_others():
    def step():
        raise torch.OutOfMemoryError

    assert measured("joint step", 8, step, rounds=1, ceiling=1.0, device=CPU)[:3] == ("joint step", 8, "out of memory")


def test_the_towers_are_those_of_the_paper():
    setting = paper_setting()
    assert setting.num_patches == 576
    assert build_batch(setting)["pixel_values"].shape[1:] == (3, 336, 336)
