from __future__ import annotations

import pytest
import torch

from shared.losses import (
    DataError,
    Likelihood,
    MinSNR,
    NormalLogSNR,
    TimeSampler,
    UniformTime,
    Vlb,
)
from shared.schedules import Karras, Polynomial, RectifiedFlow, VPLinear

T = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)


def test_continuous_bound_is_the_limit_of_the_discrete_one() -> None:
    for schedule in (VPLinear(), Polynomial()):
        limit = Vlb()(schedule, T, T)
        coarse, fine = (Vlb(steps)(schedule, T, T) / limit - 1 for steps in (1_000, 10_000))
        assert float(fine.abs().max()) < 0.01
        assert float(coarse.abs().max() / fine.abs().max()) == pytest.approx(10.0, rel=0.15)


def test_likelihood_weight_is_minus_the_slope_of_log_snr() -> None:
    for schedule in (VPLinear(), RectifiedFlow()):
        h = 1e-6
        slope = (schedule.log_snr(T + h) - schedule.log_snr(T - h)) / (2 * h)
        torch.testing.assert_close(Likelihood()(schedule, T, T), -slope, rtol=1e-6, atol=1e-6)


def test_min_snr_caps_the_weight_of_the_data_error() -> None:
    schedule = VPLinear()
    snr = torch.exp(2 * schedule.log_snr(T))
    on_data = MinSNR(5.0)(schedule, T, T) * snr
    torch.testing.assert_close(on_data, snr.clamp(max=5.0))
    torch.testing.assert_close(DataError()(schedule, T, T) * snr, torch.ones_like(T))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("times", [UniformTime(), NormalLogSNR()], ids=["uniform", "normal"])
def test_strata_cover_the_range_once_each(times: TimeSampler) -> None:
    schedule = Karras() if isinstance(times, NormalLogSNR) else VPLinear()
    edges = times.from_uniform(schedule, torch.arange(1, 64).double() / 64).sort().values
    drawn = times(schedule, 64, generator()).sort().values
    assert torch.equal(torch.searchsorted(edges, drawn), torch.arange(64))


def test_times_follow_the_generator_and_are_shuffled() -> None:
    a, b = (UniformTime()(VPLinear(), 32, generator(1)) for _ in range(2))
    assert torch.equal(a, b)
    assert not torch.equal(a, UniformTime()(VPLinear(), 32, generator(2)))
    assert not torch.equal(a, a.sort().values)


def test_discrete_times_lie_on_the_grid() -> None:
    t = UniformTime(steps=10)(VPLinear(), 1000, generator())
    assert sorted(set((t * 10).round().int().tolist())) == list(range(1, 11))
    torch.testing.assert_close(t * 10, (t * 10).round())


def test_log_normal_times_are_edms() -> None:
    log_sigma = NormalLogSNR(1.2, 1.2)(Karras(), 4096, generator()).log()
    assert float(log_sigma.mean()) == pytest.approx(-1.2, abs=0.01)
    assert float(log_sigma.std()) == pytest.approx(1.2, abs=0.02)
