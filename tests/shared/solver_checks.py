"""Checks of solvers without a network, shared by the tests of all solver families.

A plan is affine when the denoiser is. Running the loop on basis vectors of (x_T, 1, z_0, z_1, ...)
with the exact denoiser of a Gaussian yields the affine map and its covariance themselves: orders
and variances are then measured without a single random number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from shared.analytic import AnalyticDenoiser, Mixture
from shared.predictions import Prediction
from shared.process import Process, State
from shared.schedules import Karras, RectifiedFlow, Schedule, VPLinear
from shared.solvers.base import PlanSolver, Solver
from shared.solvers.plan import Plan, run

# schedule and the ends of an integration on which its log-SNR is finite
SCHEDULES: dict[str, tuple[Schedule, float, float]] = {
    "vp": (VPLinear(), 1.0, 1e-3),
    "ve": (Karras(), 80.0, 0.002),
    "flow": (RectifiedFlow(), 0.999, 1e-3),
}


def uniform_log_snr(schedule: Schedule, n: int, start: float, end: float) -> list[float]:
    """n + 1 times, uniform in log-SNR."""
    first, last = schedule.log_snr(start), schedule.log_snr(end)
    unit = torch.linspace(0.0, 1.0, n + 1, dtype=torch.float64)
    times = schedule.t_from_log_snr(first + unit * (last - first))
    return [start, *times[1:-1].tolist(), end]


def graded(schedule: Schedule, n: int, start: float, end: float, extra: int = 3) -> list[float]:
    """The same with ``extra`` nodes at distances ~h^2 after the start, so that the low-order
    first rows of a multistep solver cost no asymptotic order."""
    times = uniform_log_snr(schedule, n, start, end)
    first, second = float(schedule.log_snr(times[0])), float(schedule.log_snr(times[1]))
    step = min(second - first, 0.5) * (second - first)
    gaps = [step / (extra + 1) * (i + 1) for i in range(extra)]
    near = [float(schedule.t_from_log_snr(first + gap)) for gap in gaps]
    return [start, *near, *times[1:]]


def no_draws(name: str, j: int) -> Tensor:
    raise AssertionError(f"a deterministic solver asked for draw {j} of '{name}'")


def replay(noise: Tensor) -> Callable[[str, int], Tensor]:
    """Draw j is noise[j]."""
    return lambda name, j: noise[j]


@dataclass(frozen=True)
class Affine:
    """x_end = gain * x_start + offset + sum_j noise[j] z_j."""

    gain: float
    offset: float
    noise: list[float]

    @property
    def variance(self) -> float:
        return math.fsum(c * c for c in self.noise)


def gaussian_forms(
    schedule: Schedule, t: float, mean: float, var: float
) -> tuple[float, float, float]:
    """alpha, sigma and the variance of x_t for data N(mean, var)."""
    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
    return alpha, sigma, alpha**2 * var + sigma**2


def affine_map(plan: Plan, schedule: Schedule, mean: float, var: float) -> Affine:
    """The map of a plan for data N(mean, var) and the exact denoiser."""
    one = torch.zeros(1, 2 + plan.draws, dtype=torch.float64)
    one[0, 1] = 1.0

    def denoise(x: State, t: float) -> dict[str, Prediction]:
        alpha, sigma, total = gaussian_forms(schedule, t, mean, var)
        centred = x["x"] - alpha * mean * one
        x0, eps = mean * one + alpha * var / total * centred, sigma / total * centred
        learned = torch.full_like(one, var * sigma**2 / total)
        return {"x": Prediction(x["x"], alpha, sigma, x0=x0, eps=eps, var=learned)}

    def draw(name: str, j: int) -> Tensor:
        basis = torch.zeros_like(one)
        basis[0, 2 + j] = 1.0
        return basis

    start = torch.zeros_like(one)
    start[0, 0] = 1.0
    gain, offset, *noise = run({"x": plan}, denoise, {"x": start}, draw)["x"][0].tolist()
    return Affine(gain, offset, noise)


def gaussian_ode_error(
    solver: PlanSolver,
    schedule: Schedule,
    times: Sequence[float],
    mean: float = 0.7,
    var: float = 0.3,
) -> float:
    """Error of gain and offset against x_t = alpha mu + sqrt(V_t / V_T) (x_T - alpha_T mu);
    the gain is weighted by the standard deviation of the start."""
    got = affine_map(solver.plan(schedule, times), schedule, mean, var)
    alpha_0, _, v_0 = gaussian_forms(schedule, times[0], mean, var)
    alpha_1, _, v_1 = gaussian_forms(schedule, times[-1], mean, var)
    gain = math.sqrt(v_1 / v_0)
    offset = alpha_1 * mean - gain * alpha_0 * mean
    return abs(got.gain - gain) * math.sqrt(v_0) + abs(
        got.offset - offset + (got.gain - gain) * alpha_0 * mean
    )


def gaussian_sde_error(
    solver: PlanSolver,
    schedule: Schedule,
    times: Sequence[float],
    mean: float = 0.7,
    var: float = 0.3,
) -> tuple[float, float]:
    """(mean error, variance error) at the end, started from the exact marginal."""
    got = affine_map(solver.plan(schedule, times), schedule, mean, var)
    alpha_0, _, v_0 = gaussian_forms(schedule, times[0], mean, var)
    alpha_1, _, v_1 = gaussian_forms(schedule, times[-1], mean, var)
    end_mean = got.gain * alpha_0 * mean + got.offset
    return abs(end_mean - alpha_1 * mean), abs(got.gain**2 * v_0 + got.variance - v_1)


def dirac_error(solver: PlanSolver, schedule: Schedule, times: Sequence[float]) -> float:
    """Largest deviation, over all rows with a known time, from the exact law of a point mass.

    Of x_T = alpha_T mu + sigma_T z a sampler must make alpha_t mu + (noise of variance
    sigma_t^2) at every time t, at any number of steps: the means must agree, and the gain and
    the noise must add up to the variance.
    """
    mean = 0.7
    plan = solver.plan(schedule, times)
    alpha_0, sigma_0, _ = gaussian_forms(schedule, times[0], mean, 0.0)
    worst = 0.0
    for i, row in enumerate(plan.rows):
        if row.time is None:
            continue
        head = _truncated(plan, i + 1)
        got = affine_map(head, schedule, mean, 0.0)
        alpha, sigma, _ = gaussian_forms(schedule, row.time, mean, 0.0)
        off = abs(got.gain * alpha_0 * mean + got.offset - alpha * mean)
        spread = math.hypot(got.gain * sigma_0, math.sqrt(got.variance))
        worst = max(worst, off, abs(spread - sigma) / max(1.0, sigma))
    return worst


def _truncated(plan: Plan, rows: int) -> Plan:
    """The first rows; an evaluation used only later is dropped with its ``at``."""
    head = plan.rows[:rows]
    used = {k for row in head for k in (*row.x0, *row.eps)}
    used |= {std.row for row in head for std in row.z.values() if hasattr(std, "row")}
    kept = tuple(row if i in used else replace(row, at=None) for i, row in enumerate(head))
    return Plan(kept, plan.draws)


def small_mixture() -> Mixture:
    """Two components in two dimensions, far enough apart to be non-linear."""
    return Mixture(
        torch.tensor([0.4, 0.6], dtype=torch.float64),
        torch.tensor([[-0.9, 0.3], [0.8, -0.5]], dtype=torch.float64),
        torch.tensor([[0.15, 0.3], [0.25, 0.1]], dtype=torch.float64),
    )


def ode_reference(
    schedule: Schedule, mixture: Mixture, x: Tensor, start: float, end: float, rtol: float = 1e-12
) -> Tensor:
    """DOP853 solution of the probability-flow ODE d(x/alpha)/d lambda = -(sigma/alpha) eps."""

    def slope(log_snr: float, y: np.ndarray) -> np.ndarray:
        t = schedule.t_from_log_snr(log_snr)
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        state = alpha * torch.from_numpy(y).reshape(x.shape)
        return (-sigma / alpha * mixture.eps_mean(state, alpha, sigma)).flatten().numpy()

    span = float(schedule.log_snr(start)), float(schedule.log_snr(end))
    begin = (x / schedule.alpha(start)).flatten().numpy()
    found = solve_ivp(slope, span, begin, method="DOP853", rtol=rtol, atol=1e-13)
    return torch.from_numpy(found.y[:, -1]).reshape(x.shape) * schedule.alpha(end)


def mixture_start(schedule: Schedule, start: float, n: int = 4) -> Tensor:
    """Fixed starts [n, 2] of about the scale of x at ``start``."""
    grid = torch.linspace(-1.3, 1.4, 2 * n, dtype=torch.float64).reshape(n, 2)
    return grid * schedule.sigma(start)


def mixture_ode_errors(
    make_times: Callable[[int], list[float]],
    solver: Solver,
    schedule: Schedule,
    steps: Sequence[int],
) -> list[float]:
    """Largest error on :func:`small_mixture` for each number of steps."""
    mixture = small_mixture()
    process = Process.single(schedule)
    denoise = AnalyticDenoiser.single(process, mixture)
    times = make_times(steps[0])
    x = mixture_start(schedule, times[0])
    truth = ode_reference(schedule, mixture, x, times[0], times[-1])
    ends = [solver.solve(process, denoise, {"x": x}, make_times(n), no_draws) for n in steps]
    return [float((end["x"] - truth).abs().max()) for end in ends]


def measured_order(steps: Sequence[int], errors: Sequence[float], floor: float = 1e-11) -> float:
    """Slope of log error against log steps over the last pair above the round-off floor."""
    kept = [(n, e) for n, e in zip(steps, errors, strict=True) if e > floor]
    if len(kept) < 2:
        raise AssertionError(f"errors {errors} are at round-off: use fewer steps")
    (n0, e0), (n1, e1) = kept[-2:]
    return math.log(e0 / e1) / math.log(n1 / n0)


# -- published outputs ------------------------------------------------------------------------


def golden_mixture(tensors: dict[str, Tensor]) -> Mixture:
    return Mixture(tensors["gmm.weight"], tensors["gmm.mean"], tensors["gmm.var"])


def golden_denoiser(tensors: dict[str, Tensor], schedule: Schedule) -> AnalyticDenoiser:
    return AnalyticDenoiser.single(Process.single(schedule), golden_mixture(tensors))


def deviation(got: Tensor, want: Tensor) -> float:
    """Largest deviation relative to max(1, |x|)."""
    return float(((got - want).abs() / want.abs().clamp(min=1.0)).max())


def trajectory(
    solver: Solver,
    denoise: AnalyticDenoiser,
    x: Tensor,
    times: Sequence[float],
    draw: Callable[[str, int], Tensor] = no_draws,
) -> tuple[Tensor, list[Tensor]]:
    """The end, and the states at the grid's times (start included)."""  # fmt: skip
    seen = {times[0]: x}

    def after(state: State, time: float | None) -> State:
        if time is not None:
            seen[time] = state["x"]  # the last one at this time: corrected, if a solver corrects
        return state

    end = solver.solve(denoise.process, denoise, {"x": x}, times, draw, after=after)["x"]
    return end, [seen[t] for t in times]
