"""Time grids: published values, ends, and refusals."""

from __future__ import annotations

import pytest
import torch

from shared.schedules import (
    Karras,
    LearnedGamma,
    Polynomial,
    RectifiedFlow,
    VPCosine,
    VPDiscrete,
    VPLinear,
    as_time,
)
from shared.solvers.grids import GivenTimes, Grid, KarrasTimes, LogSNRTimes, PowerTimes

GRIDS = [PowerTimes(), PowerTimes(2.0), LogSNRTimes(), LogSNRTimes(2.0), KarrasTimes()]
SKIP_TYPES = {
    "time_uniform": PowerTimes(),
    "time_quadratic": PowerTimes(2.0),
    "logSNR": LogSNRTimes(),
}
SCHEDULES = {
    "vp_linear": (VPLinear(), 1.0),
    "cosine_cont": (VPCosine(), 0.9946),
    "ddpm_discrete": (VPDiscrete.linear(), 1.0),
}


@pytest.mark.golden
@pytest.mark.parametrize("name", SCHEDULES)
def test_published_times(golden, name):
    tensors, _ = golden(f"05_dpm_solver_{name}")
    schedule, start = SCHEDULES[name]
    keys = [k for k in tensors if k.startswith("timesteps/")]
    assert len(keys) == 18
    for key in keys:
        _, skip, n = key.split("/")
        times = SKIP_TYPES[skip](schedule, int(n), start, 1e-3)
        torch.testing.assert_close(as_time(times), tensors[key], rtol=1e-11, atol=1e-12)


@pytest.mark.golden
def test_published_sigmas(golden):
    tensors, _ = golden("05_sigma_samplers")
    grids = {
        "karras": KarrasTimes(final_zero=True),
        "exponential": LogSNRTimes(final_zero=True),
        "polyexponential_rho2": LogSNRTimes(2.0, final_zero=True),
    }
    keys = [k for k in tensors if k.startswith("sigmas/")]
    for key in keys:
        _, name, n = key.split("/")
        if name == "vp":  # sigma / alpha of the VP schedule at uniform times
            times = PowerTimes()(VPLinear(), int(n) - 1, 1.0, 1e-3)
            sigmas = [*torch.exp(-VPLinear().log_snr(as_time(times))).tolist(), 0.0]
        else:
            sigmas = grids[name](Karras(), int(n))
        torch.testing.assert_close(as_time(sigmas), tensors[key], rtol=1e-11, atol=1e-12)
    assert keys


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(
    "schedule", [VPLinear(), VPCosine(), VPDiscrete.cosine(), Polynomial(), Karras()]
)
def test_ends_are_exact_and_times_decrease(grid: Grid, schedule):
    for intervals in (1, 2, 37):
        times = grid(schedule, intervals)
        assert len(times) == intervals + 1
        assert times[0] == schedule.t_max
        assert times[-1] == schedule.t_min
        assert all(a > b for a, b in zip(times, times[1:], strict=False))


def test_grids_differ_and_space_as_they_say():
    schedule = VPLinear()
    steps = schedule.log_snr(LogSNRTimes()(schedule, 9)).diff()
    torch.testing.assert_close(steps, steps.mean().expand(9))
    t = as_time(PowerTimes(2.0)(schedule, 9)).sqrt().diff()
    torch.testing.assert_close(t, t.mean().expand(9))
    middles = [grid(schedule, 2)[1] for grid in GRIDS]
    assert len({round(m, 3) for m in middles}) == len(GRIDS)


def test_own_ends_and_final_zero():
    grid = KarrasTimes(t_start=10.0, t_end=0.1, final_zero=True)
    assert grid(Karras(), 3)[0] == 10.0
    assert grid(Karras(), 3)[-2:] == [0.1, 0.0]
    assert grid(Karras(), 3, t_start=5.0)[0] == 5.0
    assert LogSNRTimes()(LearnedGamma(width=4), 3)[0] == 1.0  # no gradient escapes


@pytest.mark.parametrize(
    ("grid", "schedule", "intervals", "options", "message"),
    [
        (PowerTimes(), VPLinear(), 0, {}, "at least 1"),
        (KarrasTimes(final_zero=True), Karras(), 1, {}, "at least 2"),
        (PowerTimes(), VPLinear(), 5, {"t_start": 0.1, "t_end": 0.5}, "t_start > t_end"),
        (PowerTimes(), VPLinear(), 5, {"t_start": 0.5, "t_end": 0.5}, "t_start > t_end"),
        (PowerTimes(), VPLinear(), 5, {"t_start": 1.5}, "leaves the schedule"),
        (PowerTimes(), VPLinear(), 5, {"t_end": -0.5}, "leaves the schedule"),
        (PowerTimes(final_zero=True), RectifiedFlow(), 5, {}, "> 0"),
        (LogSNRTimes(), RectifiedFlow(), 5, {}, "infinite"),
        (KarrasTimes(), RectifiedFlow(), 5, {"t_end": 0.01}, "infinite"),
    ],
)
def test_refusals(grid, schedule, intervals, options, message):
    with pytest.raises(ValueError, match=message):
        grid(schedule, intervals, **options)


def test_given_times():
    grid = GivenTimes([1.0, 0.6, 0.1])
    assert grid(VPLinear()) == grid(VPLinear(), 2) == [1.0, 0.6, 0.1]
    for options, message in [
        ({"intervals": 3}, "intervals = 3"),
        ({"t_end": 0.2}, "t_end = 0.2"),
    ]:
        with pytest.raises(ValueError, match=message):
            grid(VPLinear(), **options)
    with pytest.raises(ValueError, match="decrease"):
        GivenTimes([0.1, 0.6])(VPLinear())
    with pytest.raises(ValueError, match="at least one step"):
        GivenTimes([0.1])(VPLinear())
