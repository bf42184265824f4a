from __future__ import annotations

import math

import pytest
import torch

from shared.schedules import (
    Karras,
    LearnedGamma,
    Polynomial,
    RectifiedFlow,
    Schedule,
    SubVP,
    VarianceExploding,
    VPCosine,
    VPDiscrete,
    VPLinear,
)

ALL: list[Schedule] = [
    VPLinear(),
    VPCosine(),
    VPDiscrete.linear(),
    VPDiscrete.cosine(),
    Polynomial(),
    Polynomial(power=3.0, steps=25),
    VarianceExploding(),
    SubVP(),
    Karras(),
    RectifiedFlow(),
    LearnedGamma(),
]
VP = [s for s in ALL if type(s) in (VPLinear, VPCosine, VPDiscrete, Polynomial, LearnedGamma)]


def name(schedule: Schedule) -> str:
    return type(schedule).__name__


def inner_times(schedule: Schedule, n: int = 101) -> torch.Tensor:
    """Times strictly inside the interval, off the knots of the tables."""
    u = (torch.arange(n, dtype=torch.float64) + 0.437) / n
    return schedule.t_min + (schedule.t_max - schedule.t_min) * u


@pytest.mark.parametrize("schedule", ALL, ids=name)
def test_inverse_log_snr_returns_the_time(schedule: Schedule) -> None:
    t = inner_times(schedule)
    with torch.no_grad():
        back = schedule.t_from_log_snr(schedule.log_snr(t))
    assert back.dtype == torch.float64
    torch.testing.assert_close(back, t, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("schedule", ALL, ids=name)
def test_log_snr_decreases_and_matches_alpha_over_sigma(schedule: Schedule) -> None:
    t = inner_times(schedule)
    with torch.no_grad():
        log_snr = schedule.log_snr(t)
        ratio = torch.log(schedule.alpha(t) / schedule.sigma(t))
    assert bool((log_snr.diff() < 0).all())
    torch.testing.assert_close(log_snr, ratio, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", VP, ids=name)
def test_variance_is_preserved(schedule: Schedule) -> None:
    t = inner_times(schedule)
    with torch.no_grad():
        total = schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2
    torch.testing.assert_close(total, torch.ones_like(t), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("schedule", ALL, ids=name)
def test_rates_are_the_derivatives_of_the_marginals(schedule: Schedule) -> None:
    """d sigma^2/dt = 2 f sigma^2 + g^2 for every linear SDE."""
    t = inner_times(schedule, 17)
    h = 1e-6 * (schedule.t_max - schedule.t_min)
    with torch.no_grad():
        var_slope = (schedule.sigma(t + h) ** 2 - schedule.sigma(t - h) ** 2) / (2 * h)
        alpha_slope = (schedule.log_alpha(t + h) - schedule.log_alpha(t - h)) / (2 * h)
    f, g2 = schedule.log_alpha_rate(t), schedule.diffusion_squared(t)
    torch.testing.assert_close(f, alpha_slope, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(
            2 * f * schedule.sigma(t) ** 2 + g2, var_slope, rtol=2e-5, atol=1e-6
        )
    assert bool((g2 > 0).all())


def test_known_values_of_vp_linear() -> None:
    s = VPLinear()
    assert float(s.alpha(0.5)) == pytest.approx(0.28118288, abs=5e-9)
    assert float(s.log_snr(0.5)) == pytest.approx(-1.227568, abs=5e-7)
    assert float(s.log_snr(1e-4)) == pytest.approx(5.751510, abs=5e-7)
    assert float(s.sigma(1e-3)) == pytest.approx(0.01048542, abs=5e-9)


def test_small_noise_keeps_its_digits() -> None:
    """sigma(t)^2 ~ beta_min t near zero; 1 - alpha^2 in float64 would lose it."""
    t = 1e-14
    assert float(VPLinear().sigma(t)) ** 2 == pytest.approx(0.1 * t, rel=1e-9)


@pytest.mark.parametrize("s", [1e-3, 0.008, 0.02, 0.1])
def test_the_cosine_schedule_is_noiseless_at_time_zero(s: float) -> None:
    schedule = VPCosine(s=s)
    assert (float(schedule.alpha(0.0)), float(schedule.sigma(0.0))) == (1.0, 0.0)
    assert float(schedule.log_snr(0.0)) == math.inf
    # sigma^2 = 2 d tan(a) to first order in d = pi t / 2 (1 + s), a = pi s / 2 (1 + s)
    t, a = 1e-12, math.pi * s / (2 * (1 + s))
    first = 2 * math.pi * t / (2 * (1 + s)) * math.tan(a)
    assert float(schedule.sigma(t)) ** 2 == pytest.approx(first, rel=1e-6)


def test_discrete_table_of_ddpm() -> None:
    s = VPDiscrete.linear()
    bar = s.alpha(torch.tensor([1, 100, 500, 1000], dtype=torch.float64) / 1000) ** 2
    expected = torch.tensor([0.9999, 0.8970181457, 0.07858724288, 4.035829765e-5])
    torch.testing.assert_close(bar, expected.double(), rtol=2e-7, atol=0.0)
    assert (s.t_min, s.t_max) == (0.001, 1.0)
    same = VPDiscrete.from_alphas_cumprod(
        s.alpha(torch.arange(1, 1001, dtype=torch.float64) / 1000).square().tolist()
    )
    torch.testing.assert_close(same.log_alpha(0.3217), s.log_alpha(0.3217), rtol=1e-10, atol=0.0)


def test_terminal_zero_snr_shortens_the_time_axis() -> None:
    s = VPDiscrete.cosine()
    assert s.t_max < 1.0
    assert float(s.log_snr(s.t_max)) >= -5.1
    assert math.isfinite(s.prior_std())


def test_polynomial_matches_the_published_table(golden) -> None:
    tensors, _ = golden("02_edm_gamma_tables")
    t = torch.arange(1001, dtype=torch.float64) / 1000
    for key, schedule in [
        ("polynomial_2_T1000", Polynomial()),
        ("cosine_T1000", VPDiscrete.edm_cosine()),
    ]:
        gamma = -2.0 * schedule.log_snr(t)
        torch.testing.assert_close(gamma, tensors[f"{key}.gamma"], rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(schedule.sigma(t) ** 2, tensors[f"{key}.sigma2"])


def test_polynomial_matches_any_number_of_steps() -> None:
    """The published recipe, written out: cumulative products with clipped ratios."""
    for steps in (25, 100):
        a2 = (1 - (torch.arange(steps + 1, dtype=torch.float64) / steps) ** 2) ** 2
        ratio = torch.cat([a2[:1], a2[1:] / a2[:-1]]).clamp(1e-3, 1.0)
        a2 = (1 - 2e-5) * ratio.cumprod(0) + 1e-5
        schedule = Polynomial(steps=steps)
        t = torch.arange(steps + 1, dtype=torch.float64) / steps
        torch.testing.assert_close(schedule.alpha(t) ** 2, a2, rtol=1e-9, atol=1e-13)


def test_marginals_and_rates_of_score_sde(golden) -> None:
    tensors, _ = golden("11_score_sde_pc")
    t, x = tensors["table.t"], tensors["table.x"]
    for key, schedule in [("vp", VPLinear()), ("ve", VarianceExploding()), ("subvp", SubVP())]:
        torch.testing.assert_close(schedule.sigma(t), tensors[f"table.{key}.std"])
        torch.testing.assert_close(schedule.alpha(t)[:, None] * x, tensors[f"table.{key}.mean"])
        g = schedule.diffusion_squared(t).sqrt()
        torch.testing.assert_close(g, tensors[f"table.{key}.diffusion"])
        drift = schedule.log_alpha_rate(t)[:, None] * x
        torch.testing.assert_close(drift, tensors[f"table.{key}.drift"])


def test_marginals_and_rates_of_gdss(golden) -> None:
    tensors, _ = golden("04_gdss_sde_tables")
    t = tensors["t"]
    schedules = {"VP_.1_1": VPLinear(0.1, 1.0), "VE_.1_1": VarianceExploding(0.1, 1.0)}
    for key, schedule in schedules.items():
        torch.testing.assert_close(schedule.sigma(t), tensors[f"{key}.marginal_std"])
        g = schedule.diffusion_squared(t).sqrt()
        torch.testing.assert_close(g, tensors[f"{key}.diffusion"])


def test_learned_gamma_is_monotone_trains_and_keeps_its_ends() -> None:
    schedule = LearnedGamma(gamma_0=-6.0, gamma_1=8.0)
    ends = -2.0 * schedule.log_snr(torch.tensor([0.0, 1.0])).detach()
    torch.testing.assert_close(ends, torch.tensor([-6.0, 8.0], dtype=torch.float64))
    schedule.log_snr(torch.rand(16, generator=torch.Generator().manual_seed(1))).sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in schedule.parameters())


@pytest.mark.parametrize("schedule", [Karras(), VarianceExploding()], ids=name)
def test_unbounded_schedules_extrapolate_for_churn(schedule: Schedule) -> None:
    beyond = -math.log(1.4 * schedule.prior_std())
    t = schedule.t_from_log_snr(beyond)
    assert float(t) > schedule.t_max
    assert float(schedule.sigma(t)) == pytest.approx(1.4 * schedule.prior_std())


@pytest.mark.parametrize(
    "build",
    [
        lambda: VPDiscrete(()),
        lambda: VPDiscrete((0.1, 1.5)),
        lambda: VarianceExploding(1.0, 0.5),
        lambda: Karras(sigma_min=0.0),
        lambda: Polynomial(precision=0.0),
        lambda: LearnedGamma(1.0, -1.0),
    ],
)
def test_impossible_parameters_are_refused(build) -> None:
    with pytest.raises(ValueError, match="VP|Variance|Karras|Polynomial|LearnedGamma"):
        build()


def test_times_of_a_table_may_be_on_another_device() -> None:
    """The meta device refuses, as an accelerator does, to be mixed with the CPU."""
    there = torch.empty(3, dtype=torch.float64, device="meta")
    schedule = VPDiscrete.linear(steps=10)
    assert schedule.log_snr(there).device.type == "meta"
    assert schedule.t_from_log_snr(there).device.type == "meta"
