from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from shared.analytic import AnalyticDenoiser, Mixture
from shared.geometry import CentredPoints, Points, SymmetricEdges
from shared.guidance import (
    GaussianNoise,
    Guided,
    Inpainting,
    Known,
    Measurement,
    Norm,
    PoissonNoise,
    RePaint,
    Term,
    prior_spread,
)
from shared.guidance.inverse_problems import _forward
from shared.predictions import Prediction
from shared.process import Field, Process, State
from shared.randomness import Draws
from shared.schedules import Karras, RectifiedFlow, VPLinear
from shared.solvers.ancestral import DDIM, DDPM

F64 = torch.float64


@dataclass(frozen=True)
class Correlated:
    """The exact denoiser of N(mean [d], cov [d, d])."""

    process: Process
    mean: Tensor
    cov: Tensor

    def __call__(self, x: State, t: float, mask: object = None, cond: object = None) -> dict:
        alpha, sigma = float(self.process.lead.alpha(t)), float(self.process.lead.sigma(t))
        total = alpha**2 * self.cov + sigma**2 * torch.eye(len(self.mean), dtype=F64)
        white = torch.linalg.solve(total, (x["x"] - alpha * self.mean).T).T
        x0 = self.mean + alpha * white @ self.cov
        return {"x": Prediction(x["x"], alpha, sigma, x0=x0, eps=sigma * white)}


class Normals:
    """Draws of one generator, remembered by number; counts what was asked for."""

    def __init__(self, x: State, seed: int = 0) -> None:
        self.x, self.generator = x, torch.Generator().manual_seed(seed)
        self.made: dict[tuple[str, int], Tensor] = {}

    def __call__(self, name: str, j: int) -> Tensor:
        if (name, j) not in self.made:
            like = self.x[name]
            z = torch.randn(like.shape, generator=self.generator, dtype=F64)
            self.made[name, j] = z
        return self.made[name, j]


def grid(schedule: VPLinear | Karras, n: int) -> list[float]:
    ends = [float(schedule.log_snr(t)) for t in (schedule.t_max, schedule.t_min)]
    return [
        schedule.t_max,
        *schedule.t_from_log_snr(torch.linspace(*ends, n + 1, dtype=F64))[1:-1].tolist(),
        schedule.t_min,
    ]


COV = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=F64)


def repaint(resamples: int, schedule: VPLinear | Karras, n: int = 3000) -> Tensor:
    """Means of the free entry, given that the other is 1.5 in N(0, COV)."""
    process = Process.single(schedule)
    denoise = Correlated(process, torch.zeros(2, dtype=F64), COV)
    known = Known(
        {"x": torch.tensor([[1.5, 0.0]], dtype=F64)}, {"x": torch.tensor([[True, False]])}
    )
    x = {"x": torch.zeros(n, 2, dtype=F64)}
    draw = Normals(x)
    start = process.prior({"x": draw("x", -1)})
    solver = RePaint(DDPM(), known, jump=2, resamples=resamples)
    end = solver.solve(process, denoise, start, grid(schedule, 30), draw)["x"]
    assert bool((end[:, 0] == 1.5).all())
    return end[:, 1]


@pytest.mark.parametrize("schedule", [VPLinear(), Karras()])
def test_resampling_moves_replacement_to_the_conditional(schedule: VPLinear | Karras) -> None:
    plain, resampled = repaint(1, schedule), repaint(12, schedule)
    want = 0.9 * 1.5
    # replacement alone stays well away from the conditional mean; resampling comes close
    assert abs(float(plain.mean()) - want) > 0.1
    assert abs(float(resampled.mean()) - want) < 0.4 * abs(float(plain.mean()) - want)
    assert float(resampled.var()) == pytest.approx(1.0 - 0.81, abs=0.12)


@pytest.mark.parametrize("schedule", [VPLinear(), Karras(), RectifiedFlow()])
def test_going_back_up_follows_the_forward_process(schedule: VPLinear | Karras) -> None:
    process = Process.single(schedule)
    s, t = 0.2 * schedule.t_max, 0.7 * schedule.t_max
    zero, one = {"x": torch.zeros(1, dtype=F64)}, {"x": torch.ones(1, dtype=F64)}
    signal, fresh = (
        _forward(process, one, s, t, zero)["x"],
        _forward(process, zero, s, t, one)["x"],
    )
    torch.testing.assert_close(signal * schedule.alpha(s), schedule.alpha(t).reshape(1))
    variance = (signal * schedule.sigma(s)) ** 2 + fresh**2
    torch.testing.assert_close(variance, schedule.sigma(t).reshape(1) ** 2)


def test_plain_replacement_runs_the_whole_grid_once() -> None:
    calls = []

    class Spy(DDPM):
        def solve(self, process, denoise, x, times, draw, project=None, after=None):
            calls.append(list(times))
            return super().solve(process, denoise, x, times, draw, project, after)

    process = Process.single(VPLinear())
    denoise = Correlated(process, torch.zeros(2, dtype=F64), COV)
    known = Known({"x": torch.ones(1, 2, dtype=F64)}, {"x": torch.tensor([[True, False]])})
    x = {"x": torch.zeros(2, 2, dtype=F64)}
    times = grid(VPLinear(), 5)
    RePaint(Spy(), known, jump=2, resamples=1).solve(process, denoise, x, times, Normals(x))
    RePaint(Spy(), known, jump=2, resamples=2).solve(process, denoise, x, times, Normals(x))
    assert calls[0] == times
    # stretches of two intervals counted from the end: 1 + 2 + 2
    assert calls[1:] == [s for s in (times[:2], times[1:4], times[3:]) for _ in range(2)]
    assert RePaint(DDPM(), known, resamples=4).intervals(100) == 25


def test_a_sample_does_not_depend_on_its_batch() -> None:
    process = Process.single(VPLinear())
    denoise = Correlated(process, torch.zeros(2, dtype=F64), COV)
    known = Known({"x": torch.ones(1, 2, dtype=F64)}, {"x": torch.tensor([[True, False]])})

    def sample(indices: list[int]) -> Tensor:
        draws, like = Draws(3, indices), torch.zeros(len(indices), 2, dtype=F64)
        return RePaint(DDPM(), known, 2, 2).solve(
            process,
            denoise,
            {"x": like},
            grid(VPLinear(), 4),
            lambda name, j: draws.normal(name, j, like),
        )["x"]

    torch.testing.assert_close(sample([4, 7, 9])[1], sample([7])[0], rtol=0, atol=1e-14)
    assert (sample([7]) - sample([8])).abs()[0, 1] > 1e-3


def test_known_parts_of_points_and_edges() -> None:
    process = Process(
        {
            "x": Field(VPLinear(), CentredPoints()),
            "h": Field(VPLinear(), Points()),
            "a": Field(VPLinear(), SymmetricEdges()),
        }
    )
    gen = torch.Generator().manual_seed(0)
    nodes = torch.tensor([[True, True, True, False]])
    white = {
        "x": torch.randn(1, 4, 3, generator=gen, dtype=F64),
        "h": torch.randn(1, 4, 2, generator=gen, dtype=F64),
        "a": torch.randn(1, 4, 4, generator=gen, dtype=F64),
    }
    x = process.noise(white, nodes)
    value = process.noise({n: v.flip(-1) for n, v in white.items()}, nodes)
    keep = torch.tensor([[True, True, False, False]])
    known = Known(value, dict.fromkeys(value, keep))
    got = known.replaced(process, x, value)
    for name, v in process.project(got, nodes).items():
        torch.testing.assert_close(v, got[name])
    # positions relative to each other, and the free node where it was
    torch.testing.assert_close(
        got["x"][0, 1] - got["x"][0, 0], value["x"][0, 1] - value["x"][0, 0]
    )
    torch.testing.assert_close(got["x"][0, 2], x["x"][0, 2])
    torch.testing.assert_close(got["h"][0, :2], value["h"][0, :2])
    assert got["a"][0, 0, 1] == value["a"][0, 0, 1]
    assert got["a"][0, 0, 2] == x["a"][0, 0, 2]
    torch.testing.assert_close(known.replaced(process, got, value), got)
    square = Inpainting(process, known, std=0.5)(x, 0.3)
    missing = known.missing(process, x, value)
    norms = [missing["x"].square().sum(), missing["h"].square().sum(), missing["a"][0, 0, 1] ** 2]
    torch.testing.assert_close(square[0], sum(norms) / 0.5)


def test_wrong_masks() -> None:
    process = Process.single(VPLinear(), CentredPoints())
    value = {"x": torch.zeros(1, 4, 3)}
    with pytest.raises(ValueError, match=r"keep-mask of 'x' has shape \(1, 4, 3\).*per node"):
        Known(value, {"x": torch.ones(1, 4, 3, dtype=torch.bool)}).missing(process, value, value)
    with pytest.raises(ValueError, match=r"values for \['x'\], keep-masks for \['h'\]"):
        Known(value, {"h": torch.ones(1, 4)})
    with pytest.raises(ValueError, match="resamples=0"):
        RePaint(DDPM(), Known(value, value), resamples=0)


# -- by gradient --------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [VPLinear(), Karras(), RectifiedFlow(t_min=1e-3, t_max=0.99)])
def test_gradient_with_the_prior_spread_is_the_exact_posterior(schedule) -> None:
    var, std = 0.8, 0.3
    process = Process.single(schedule)
    prior = Mixture.gaussian(torch.zeros(2, dtype=F64), torch.full((2,), var, dtype=F64))
    row = torch.tensor([0.6, 0.8], dtype=F64)  # unit length
    noise = GaussianNoise(std, prior_spread(var**0.5))
    energy = Measurement(process, lambda x: x["x"] @ row[:, None], torch.tensor([1.2]), noise)
    guided = Guided(
        AnalyticDenoiser.single(process, prior), process, [Term(energy, at="estimate")]
    )
    cov = torch.linalg.inv(torch.eye(2, dtype=F64) / var + torch.outer(row, row) / std**2)
    posterior = Correlated(process, cov @ row * 1.2 / std**2, cov)
    x = {"x": torch.randn(4, 2, generator=torch.Generator().manual_seed(1), dtype=F64)}
    t = 0.5 * schedule.t_max
    got, want = guided(x, t)["x"], posterior(x, t)["x"]
    # the measured value is float32
    torch.testing.assert_close(got.eps, want.eps, rtol=1e-6, atol=1e-7)


def test_mean_of_posterior_sampling_on_a_linear_problem() -> None:
    """A run of the deterministic sampler from the mean of the start ends at the posterior mean."""
    var, std, y = 0.8, 0.3, torch.tensor([1.2], dtype=F64)
    process = Process.single(VPLinear())
    prior = Mixture.gaussian(torch.zeros(2, dtype=F64), torch.full((2,), var, dtype=F64))
    base = AnalyticDenoiser.single(process, prior)
    want = y * var / (var + std**2)
    start = {"x": float(VPLinear().alpha(1.0)) * torch.tensor([[float(want), 0.0]], dtype=F64)}

    def mean(noise: GaussianNoise, condition: bool) -> Tensor:
        observed = "y" if condition else y
        energy = Measurement(process, lambda x: x["x"][:, :1], observed, noise)
        guided = Guided(base, process, [Term(energy, at="estimate")])
        cond = {"y": y[None]} if condition else None
        with torch.no_grad():
            return DDIM().solve(
                process,
                lambda x, t: guided(x, t, None, cond),
                start,
                grid(VPLinear(), 100),
                lambda name, j: y,
            )["x"][0]

    exact = mean(GaussianNoise(std, prior_spread(var**0.5)), condition=True)
    torch.testing.assert_close(
        exact, torch.tensor([float(want), 0.0], dtype=F64), atol=2e-3, rtol=0
    )
    torch.testing.assert_close(mean(GaussianNoise(std, prior_spread(var**0.5)), False), exact)
    # without the spread (DPS) the measurement is trusted too much
    assert float(mean(GaussianNoise(std), True)[0]) > float(want) + 0.05


def test_inpainting_by_gradient_gives_the_conditional_mean() -> None:
    process = Process.single(VPLinear())
    denoise = Correlated(process, torch.zeros(2, dtype=F64), COV)
    known = Known(
        {"x": torch.tensor([[1.5, 0.0]], dtype=F64)}, {"x": torch.tensor([[True, False]])}
    )

    def spread(alpha: float, sigma: float) -> float:
        """Var[x_0 | x_t] of the given entry."""
        total = alpha**2 * COV + sigma**2 * torch.eye(2, dtype=F64)
        return float((COV - alpha**2 * COV @ torch.linalg.solve(total, COV))[0, 0])

    energy = Inpainting(process, known, std=0.1, spread=spread)
    guided = Guided(denoise, process, [Term(energy, at="estimate")])
    x = {"x": torch.zeros(1, 2, dtype=F64)}
    with torch.no_grad():
        end = DDIM().solve(process, guided, x, grid(VPLinear(), 200), lambda n, j: x["x"])["x"][0]
    torch.testing.assert_close(end, 1.5 / 1.01 * COV[0], atol=0.02, rtol=0)


def test_noise_models() -> None:
    y, a = torch.tensor([[4.0, 0.0]]), torch.tensor([[2.0, 1.0]])
    assert GaussianNoise(0.5)(y, a, 1.0, 0.0).item() == 10.0
    assert Norm()(y, a, 1.0, 0.0).item() == pytest.approx(5.0**0.5)
    assert PoissonNoise(2.0)(y, a, 1.0, 0.0).item() == 2.0
    with pytest.raises(ValueError, match="std=0"):
        GaussianNoise(0.0)
    process = Process.single(VPLinear())
    wrong = Measurement(process, lambda x: x["x"], "y", GaussianNoise(1.0))
    with pytest.raises(ValueError, match=r"observed \(1, 2\), the operator gives \(3, 2\)"):
        wrong({"x": torch.zeros(3, 2)}, 0.5, None, {"y": y})
