"""Corrections of x0: published values, and what they leave alone."""

from __future__ import annotations

import pytest
import torch
from solver_checks import deviation, golden_denoiser, no_draws

from shared.predictions import Prediction
from shared.schedules import VPCosine, VPDiscrete, VPLinear
from shared.solvers import DPMSolverMultistep, LogSNRTimes
from shared.thresholding import Clamp, DynamicThreshold, Thresholded


@pytest.mark.golden
@pytest.mark.parametrize(
    ("name", "schedule", "start"),
    [
        ("vp_linear", VPLinear(), 1.0),
        ("cosine_cont", VPCosine(), 0.9946),
        ("ddpm_discrete", VPDiscrete.linear(), 1.0),
    ],
)
def test_published_dynamic_thresholding(golden, name, schedule, start):
    tensors, _ = golden(f"05_dpm_solver_{name}")
    keys = [k for k in tensors if "dynamic_thresholding_max.5_ratio.9" in k]
    denoise = golden_denoiser(tensors, schedule)
    corrected = Thresholded(denoise, {"x": DynamicThreshold(0.9, 0.5)})
    times = LogSNRTimes()(schedule, 10, start, 1e-3)
    for key in keys:
        start_x = {"x": tensors["x_T"]}
        got = DPMSolverMultistep(2).solve(denoise.process, corrected, start_x, times, no_draws)
        assert deviation(got["x"], tensors[key]) < 1e-10
        raw = DPMSolverMultistep(2).solve(denoise.process, denoise, start_x, times, no_draws)
        assert deviation(raw["x"], tensors[key]) > 1e-3
    assert keys


def test_clamp():
    x0 = torch.tensor([[-3.0, 0.5], [0.2, 1.5]])
    assert Clamp()(x0).tolist() == [[-1.0, 0.5], [torch.tensor(0.2).item(), 1.0]]
    assert Clamp(0.0, 2.0)(x0)[0, 0] == 0.0
    assert x0[0, 0] == -3.0


def test_dynamic_threshold_is_per_sample():
    inside = torch.tensor([[0.1, -0.9, 0.5, 0.3]])
    outside = torch.tensor([[4.0, -2.0, 0.5, 1.0]])
    both = DynamicThreshold(ratio=0.5)(torch.cat([inside, outside]))
    torch.testing.assert_close(both[:1], inside)  # s = 1: nothing happens
    torch.testing.assert_close(both[1:], outside.clamp(-1.5, 1.5) / 1.5)  # median of |x0| = 1.5
    half = DynamicThreshold()(outside.to(torch.bfloat16).reshape(1, 2, 2))
    assert half.dtype == torch.bfloat16
    assert half.abs().max() <= 1.0


def test_only_the_named_field_and_only_x0_change():
    x = torch.full((2, 3), 2.0)

    def denoise(state, t, mask=None, cond=None):
        return {k: Prediction(v, 0.5, 0.5, eps=torch.zeros_like(v)) for k, v in state.items()}

    out = Thresholded(denoise, {"a": Clamp()})({"a": x, "b": x}, 0.3)
    assert (out["a"].x0 == 1.0).all()
    assert (out["a"].raw_x0 == 4.0).all()
    assert (out["a"].eps == 0.0).all()
    assert (out["b"].x0 == 4.0).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Clamp(1.0, -1.0), "low = 1.0"),
        (lambda: DynamicThreshold(ratio=1.5), "ratio = 1.5"),
        (lambda: DynamicThreshold(max_value=0.0), "max_value = 0.0"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_unknown_field_is_refused():
    denoise = Thresholded(lambda x, t, mask, cond: {}, {"pos": Clamp()})
    with pytest.raises(ValueError, match="pos"):
        denoise({}, 0.5)
