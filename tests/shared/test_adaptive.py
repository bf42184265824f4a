"""Adaptive solvers: published step sequences, accuracy by tolerance, independence of the batch."""

from __future__ import annotations

import re

import pytest
import torch
from solver_checks import (
    SCHEDULES,
    deviation,
    golden_denoiser,
    mixture_start,
    no_draws,
    ode_reference,
    small_mixture,
)

from shared.analytic import AnalyticDenoiser, Mixture
from shared.predictions import Prediction
from shared.process import Field, Process
from shared.randomness import Draws
from shared.schedules import Karras, RectifiedFlow, VPCosine, VPDiscrete, VPLinear
from shared.solvers import RK45, AdaptiveSDE, DPMSolverAdaptive


def counted(denoise):
    calls = []

    def call(x, t, mask=None, cond=None):
        calls.append(t)
        return denoise(x, t)

    return call, calls


@pytest.mark.golden
@pytest.mark.parametrize(
    ("name", "schedule", "start"),
    [
        ("vp_linear", VPLinear(), 1.0),
        ("cosine_cont", VPCosine(), 0.9946),
        ("ddpm_discrete", VPDiscrete.linear(), 1.0),
    ],
)
def test_published_steps(golden, name, schedule, start):
    tensors, info = golden(f"05_dpm_solver_{name}")
    keys = [k for k in tensors if "/adaptive/" in k]
    for key in keys:
        form = "data" if "++" in key else "noise"
        tolerance = {"rtol": 0.01, "atol": 0.001} if "rtol" in key else {}
        order = int(re.search(r"/o(\d)", key)[1])
        solver = DPMSolverAdaptive(order, form, shared_steps=True, **tolerance)
        denoise, calls = counted(golden_denoiser(tensors, schedule))
        process = Process.single(schedule)
        got = solver.solve(process, denoise, {"x": tensors["x_T"]}, [start, 1e-3], no_draws)
        assert deviation(got["x"], tensors[key]) < 1e-8, key
        assert len(calls) == info["nfe"].get(key, len(calls))
    assert len(keys) == 8


def solve(solver, where, x, mixture=None, times=None, draw=no_draws, **hooks):
    schedule, start, end = SCHEDULES[where]
    denoise = AnalyticDenoiser.single(Process.single(schedule), mixture or small_mixture())
    times = times or [start, end]
    return solver.solve(denoise.process, denoise, {"x": x}, times, draw, **hooks)["x"]


@pytest.mark.parametrize("where", SCHEDULES)
@pytest.mark.parametrize(
    ("loose", "tight", "bound"),
    [
        (DPMSolverAdaptive(2), DPMSolverAdaptive(2, rtol=1e-3, atol=1e-4), 0.02),
        (DPMSolverAdaptive(3), DPMSolverAdaptive(3, rtol=1e-3, atol=1e-4), 0.01),
        (RK45(1e-3, 1e-3), RK45(1e-6, 1e-6), 1e-4),
    ],
)
def test_error_follows_the_tolerance(loose, tight, bound, where):
    schedule, start, end = SCHEDULES[where]
    x = mixture_start(schedule, start)
    truth = ode_reference(schedule, small_mixture(), x, start, end)
    errors = [float((solve(s, where, x) - truth).abs().max()) for s in (loose, tight)]
    assert errors[1] < bound
    assert errors[1] < 0.6 * errors[0]


@pytest.mark.parametrize("order", [2, 3])
def test_samples_do_not_see_their_batch(order):
    x = mixture_start(VPLinear(), 1.0)
    together = solve(DPMSolverAdaptive(order), "vp", x)
    for i in range(len(x)):
        alone = solve(DPMSolverAdaptive(order), "vp", x[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], rtol=1e-12, atol=1e-12)
    shared = solve(DPMSolverAdaptive(order, shared_steps=True), "vp", x)
    assert (shared - together).abs().max() > 1e-6


def draws_of(indices, like):
    numbers = Draws(3, indices)
    return lambda name, j: numbers.normal(name, j, like)


def test_stochastic_samples_do_not_see_their_batch():
    mixture = Mixture.gaussian(torch.zeros(20).double(), torch.ones(20).double())
    x = Draws(0, range(3)).normal("x", 0, torch.zeros(3, 20, dtype=torch.float64))
    solver = AdaptiveSDE(rtol=0.1)
    together = solve(solver, "vp", x, mixture, draw=draws_of(range(3), x))
    alone = solve(solver, "vp", x[1:2], mixture, draw=draws_of([1], x[1:2]))
    torch.testing.assert_close(alone[0], together[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("where", ["vp", "ve"])
def test_adaptive_sde_has_the_right_moments(where):
    """n = 8000 entries: standard errors 0.005 of the mean, 0.016 of the variance ratio."""
    schedule, start, _ = SCHEDULES[where]
    mixture = Mixture.gaussian(torch.full((200,), 0.3).double(), torch.full((200,), 0.2).double())
    shape = torch.zeros(40, 200, dtype=torch.float64)
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(shape.shape, generator=gen, dtype=torch.float64) * schedule.sigma(start)
    y = solve(
        AdaptiveSDE(rtol=0.05),
        where,
        x,
        mixture,
        draw=lambda name, j: torch.randn(shape.shape, generator=gen, dtype=torch.float64),
    )
    assert abs(float(y.mean()) - 0.3) < 0.02
    assert abs(float((y - 0.3).square().mean()) / 0.2 - 1.0) < 0.06


@pytest.mark.parametrize("solver", [DPMSolverAdaptive(2), RK45(), AdaptiveSDE(rtol=0.2)])
def test_hooks_and_padding(solver):
    """Hooks act at the grid's times; padding stays zero and does not count in the error."""
    x = torch.zeros(2, 30, dtype=torch.float64)
    x[:, :20] = torch.linspace(-1.0, 1.0, 20, dtype=torch.float64)
    mixture = Mixture.gaussian(torch.zeros(30).double(), torch.full((30,), 0.3).double())
    keep = torch.arange(30) < 20
    narrow = Mixture.gaussian(torch.zeros(20).double(), torch.full((20,), 0.3).double())
    seen = []

    def after(state, time):
        seen.append(time)
        return state

    def draw(name, j):
        return torch.full_like(x, 0.1 * (-1) ** j) * keep

    y = solve(
        solver,
        "vp",
        x,
        mixture,
        [1.0, 0.5, 0.1],
        draw,
        project=lambda name, v: v * keep,
        after=after,
    )
    assert seen == [0.5, 0.1]
    assert (y[:, 20:] == 0.0).all()
    cut = solve(
        solver, "vp", x[:, :20], narrow, [1.0, 0.5, 0.1], lambda name, j: draw(name, j)[:, :20]
    )
    tolerance = 1e-4 if isinstance(solver, RK45) else 1e-12  # torchdiffeq counts the padding
    torch.testing.assert_close(y[:, :20], cut, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("solver", [DPMSolverAdaptive(3, rtol=1e-3, atol=1e-4), RK45()])
def test_two_fields(solver):
    """Independent fields with schedules of their own each follow their own ODE."""
    vp, flow = VPLinear(t_min=1e-3, t_max=0.99), RectifiedFlow(t_min=1e-3, t_max=0.99)
    process = Process({"a": Field(vp), "b": Field(flow)})
    mixture = small_mixture()
    x = {"a": mixture_start(vp, 0.99), "b": mixture_start(flow, 0.99)}
    denoise = AnalyticDenoiser(process, {"a": mixture, "b": mixture})
    got = solver.solve(process, denoise, x, [0.99, 1e-3], no_draws)
    for name, schedule in (("a", vp), ("b", flow)):
        truth = ode_reference(schedule, mixture, x[name], 0.99, 1e-3)
        assert (got[name] - truth).abs().max() < 5e-3


def test_intervals():
    assert all(s.intervals(50) == 1 for s in (DPMSolverAdaptive(), RK45(), AdaptiveSDE()))


@pytest.mark.parametrize("solver", [DPMSolverAdaptive(), AdaptiveSDE()])
def test_nan_is_reported(solver):
    def denoise(x, t, mask=None, cond=None):
        bad = torch.zeros_like(x["x"])
        bad[1] = torch.nan
        return {"x": Prediction(x["x"], 0.5, 0.5, eps=bad)}

    x = {"x": torch.ones(3, 2, dtype=torch.float64)}
    with pytest.raises(FloatingPointError, match=r"1 of 3 samples \(first: \[1\]\)"):
        solver.solve(Process.single(VPLinear()), denoise, x, [1.0, 0.1], lambda n, j: x["x"])


def test_refusals():
    x = torch.ones(1, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="order is 4"):
        DPMSolverAdaptive(4)
    with pytest.raises(RuntimeError, match="max_steps"):
        solve(DPMSolverAdaptive(max_steps=2), "vp", x)
    for solver in (DPMSolverAdaptive(), RK45(), AdaptiveSDE()):
        denoise = AnalyticDenoiser.single(Process.single(Karras()), small_mixture())
        with pytest.raises(ValueError, match="infinite log-SNR"):
            solver.solve(denoise.process, denoise, {"x": x}, [80.0, 0.0], no_draws)
