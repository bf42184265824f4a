"""The symmetric splitting of the reverse SDE."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from solver_checks import gaussian_forms, replay, small_mixture

from shared.analytic import AnalyticDenoiser
from shared.predictions import Prediction
from shared.process import Process
from shared.schedules import (
    Karras,
    Schedule,
    SubVP,
    VarianceExploding,
    VariancePreserving,
    VPLinear,
)
from shared.solvers import Langevin, ScoreSDETimes, SymmetricSplitting

SPLIT = SymmetricSplitting(corrector=None, denoise=False)


def moments(
    solver: SymmetricSplitting, schedule: Schedule, times: list[float]
) -> tuple[float, float]:
    """Errors of mean and variance for data N(0.7, 0.3), from the map itself: the run on the
    basis (x_T, 1, z_0, z_1, ...) is the affine map."""
    mean, var, draws = 0.7, 0.3, 3 * (len(times) - 1)
    basis = torch.eye(2 + draws, dtype=torch.float64)

    def denoise(x: dict, t: float) -> dict:
        alpha, sigma, total = gaussian_forms(schedule, t, mean, var)
        centred = x["x"] - alpha * mean * basis[None, 1]
        return {"x": Prediction(x["x"], alpha, sigma, eps=sigma / total * centred)}

    process = Process.single(schedule)
    end = solver.solve(
        process, denoise, {"x": basis[None, 0]}, times, lambda name, j: basis[None, 2 + j]
    )["x"][0]
    alpha_0, _, v_0 = gaussian_forms(schedule, times[0], mean, var)
    alpha_1, _, v_1 = gaussian_forms(schedule, times[-1], mean, var)
    found = end[0] * alpha_0 * mean + end[1], end[0] ** 2 * v_0 + end[2:].square().sum()
    return abs(float(found[0]) - alpha_1 * mean), abs(float(found[1]) - v_1)


@pytest.mark.parametrize(
    ("schedule", "start", "end"),
    [(VPLinear(), 1.0, 0.01), (SubVP(), 1.0, 0.05), (Karras(), 5.0, 0.5)],
    ids=["vp", "sub_vp", "ve"],
)
def test_mean_is_exact_and_weak_order_one(schedule: Schedule, start: float, end: float) -> None:
    errors = [
        moments(SPLIT, schedule, torch.linspace(start, end, n + 1).double().tolist())
        for n in (160, 320, 640)
    ]
    assert max(mean for mean, _ in errors) < 1e-12  # the score vanishes there: only exact parts
    assert abs(math.log2(errors[1][1] / errors[2][1]) - 1.0) < 0.1, errors


def test_published_half_steps_are_right_to_first_order() -> None:
    schedule = VPLinear()
    grid = ScoreSDETimes(eps=1e-4)
    errors = [
        moments(replace(SPLIT, score_sde=True), schedule, grid(schedule, n)) for n in (200, 800)
    ]
    assert errors[1][1] < errors[0][1] / 3.0


def test_published_times_run_below_zero() -> None:
    """The last half step of the published grid ends at a negative time."""
    process = Process.single(VPLinear(0.1, 1.0, t_min=1e-5))
    denoise = AnalyticDenoiser.single(process, small_mixture())
    gen = torch.Generator().manual_seed(0)
    noise = torch.randn(90, 3, 2, generator=gen, dtype=torch.float64)
    times = ScoreSDETimes(eps=1e-4)(process.lead, 30)
    solver = SymmetricSplitting(Langevin(snr=0.1), score_sde=True)
    end = solver.solve(process, denoise, {"x": noise[0]}, times, replay(noise))["x"]
    assert bool(torch.isfinite(end).all())


def test_draws_steps_and_hooks() -> None:
    process = Process.single(VPLinear())
    denoise = AnalyticDenoiser.single(process, small_mixture())
    asked, seen = [], []

    def draw(name: str, j: int) -> torch.Tensor:
        asked.append(j)
        return torch.zeros(2, 2, dtype=torch.float64)

    def after(x: dict, time: float | None) -> dict:
        seen.append(time)
        return x

    x = {"x": torch.ones(2, 2, dtype=torch.float64)}
    times = [1.0, 0.6, 0.2]
    SymmetricSplitting(Langevin()).solve(process, denoise, x, times, _nonzero(draw), after=after)
    assert asked == [0, 1, 2, 3, 4]  # the last half step adds no noise
    assert seen == times[1:]
    assert SPLIT.intervals(7) == 7
    with pytest.raises(ValueError, match="decrease"):
        SPLIT.solve(process, denoise, x, [0.2, 0.6], draw)


def _nonzero(draw):
    return lambda name, j: draw(name, j) + 1.0


def test_per_sample_rule_ignores_neighbours() -> None:
    process = Process.single(VPLinear())
    denoise = AnalyticDenoiser.single(process, small_mixture())
    gen = torch.Generator().manual_seed(1)
    noise = torch.randn(20, 4, 2, generator=gen, dtype=torch.float64)
    times = torch.linspace(1.0, 0.05, 6).double().tolist()

    def run(rule: str, rows: slice) -> torch.Tensor:
        solver = SymmetricSplitting(Langevin(rule=rule))
        draw = lambda name, j: noise[1 + j][rows]  # noqa: E731
        return solver.solve(process, denoise, {"x": noise[0][rows]}, times, draw)["x"]

    both = slice(0, 4), slice(0, 2)
    assert torch.allclose(run("sample", both[0])[:2], run("sample", both[1]), atol=1e-12)
    assert not torch.allclose(run("batch", both[0])[:2], run("batch", both[1]), atol=1e-6)


def test_half_step_of_published_tables(golden) -> None:
    """The published transitions over dt/2, dt = 1/1000 and 1/20."""
    tensors, about = golden("04_gdss_sde_tables")
    x = tensors["x"]
    for name, spec in about["specs"].items():
        low, high = spec["beta_min"], spec["beta_max"]
        kind = VPLinear if spec["type"] == "VP" else VarianceExploding
        schedule = kind(low, high)
        assert isinstance(schedule, VariancePreserving) == (spec["type"] == "VP")
        solver = SymmetricSplitting(score_sde=True)
        for key, dt in (("transition", 1e-3), ("transition20", 0.05)):
            for row, t in enumerate(tensors["t"].tolist()):
                grow, std = solver._half_step(schedule, t, t - dt / 2)
                wanted = tensors[f"{name}.{key}_std"][row]
                assert (
                    float((grow * x[row] - tensors[f"{name}.{key}_mean"][row]).abs().max()) < 1e-12
                )
                assert abs(std - float(wanted)) < 1e-10
