"""Discretised reverse SDEs and Langevin correctors (Song et al. 2021b).

The predictors are tables like the other solvers. A Langevin step depends on the state through its
signal-to-noise rule, so :class:`PredictorCorrector` wraps the loop and puts the corrector between
the predictor's rows. One call of the denoiser serves all fields, which may have different SDEs:
each field is corrected with its own score, all from the same state, as in GDSS (Jo et al. 2022).

The published code (score_sde, GDSS) evaluates at linspace(1, eps, N) but steps by 1/N through
tables of N noise levels. ``score_sde=True`` follows that convention, on the grid of
:class:`ScoreSDETimes`; otherwise steps follow the grid's own times.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from shared.geometry import Geometry
from shared.predictions import Prediction
from shared.process import Process, State
from shared.schedules import Schedule, VarianceExploding, VPLinear
from shared.solvers.ancestral import transitions
from shared.solvers.base import PlanSolver, Solver, check_times
from shared.solvers.grids import Grid
from shared.solvers.plan import After, Denoise, Draw, Plan, Project, Tape, run


@dataclass(frozen=True)
class ScoreSDETimes(Grid):
    """N evaluation times from t_max to ``eps``, evenly, and the end 0 that the published code does
    not name. ``eps`` is 1e-3 for VP, 1e-5 for VE, 1e-4 in GDSS."""

    eps: float = 1e-3

    def __call__(
        self,
        schedule: Schedule,
        intervals: int,
        t_start: float | None = None,
        t_end: float | None = None,
    ) -> list[float]:
        start = schedule.t_max if t_start is None else t_start
        end = self.eps if t_end is None else t_end
        return [*torch.linspace(start, end, intervals, dtype=torch.float64).tolist(), 0.0]


def check_published_times(times: Sequence[float]) -> None:
    """Refuse a grid whose evaluation times are not even, as the published steps of 1/N are.

    Raises:
        ValueError: names the grid to use.
    """
    gaps = [a - b for a, b in pairwise(times[:-1])]
    if gaps and max(gaps) - min(gaps) > 1e-6 * max(gaps):
        raise ValueError(
            "time grid: score_sde=True steps evenly in time; use grid score_sde (ScoreSDETimes), "
            "or score_sde=False."
        )


class Forward(NamedTuple):
    """A forward transition: x_t = ``alpha`` x_s + sqrt(``variance``) z; sigma_t^2 = ``level``."""

    alpha: float
    variance: float
    level: float


def forward_step(
    schedule: Schedule, times: Sequence[float], i: int, score_sde: bool = False
) -> Forward:
    """The forward transition that step ``i`` of the grid reverses: the exact one between the
    grid's times, or that of score_sde's tables."""
    if score_sde:
        return _published_step(schedule, times[i], len(times) - 1, i)
    step = next(transitions(schedule, times[i : i + 2]))
    return Forward(step.alpha_t / step.alpha_s, step.forward, step.sigma_t**2)


def _published_step(schedule: Schedule, t: float, n: int, i: int) -> Forward:
    level = n - 1 - i  # the published index, trunc(t (N - 1))
    if isinstance(schedule, VPLinear):
        rise = (schedule.beta_max - schedule.beta_min) * level / max(n - 1, 1)
        beta = (schedule.beta_min + rise) / n
        if beta >= 1.0:
            raise ValueError(
                f"score_sde=True: {n} steps are too few, its noise level {beta:.3g} must be below "
                f"1; take more than beta_max = {schedule.beta_max:g} steps, or score_sde=False."
            )
        return Forward(math.sqrt(1.0 - beta), beta, float(schedule.sigma(t)) ** 2)
    if isinstance(schedule, VarianceExploding):
        here, below = (float(schedule.sigma(k / max(n - 1, 1))) ** 2 for k in (level, level - 1))
        return Forward(1.0, here - (below if level else 0.0), here)
    return _euler_step(schedule, t, 1.0 / n)


def _euler_step(schedule: Schedule, t: float, dt: float) -> Forward:
    drift, diffusion = float(schedule.log_alpha_rate(t)), float(schedule.diffusion_squared(t))
    return Forward(1.0 + drift * dt, diffusion * dt, float(schedule.sigma(t)) ** 2)


@dataclass(frozen=True)
class _ReverseSDE(PlanSolver):
    """Common options.

    ``eta``: 1 the reverse SDE, 0 the probability-flow ODE, between them less noise:
    dx = (f x - (1 + eta^2)/2 g^2 score) dt + eta g dw.
    ``denoise``: leave the noise of the last step out, as published, also where sigma > 0.
    ``score_sde``: the published convention, see the module.

    Raises:
        ValueError: a negative eta.
    """

    eta: float = 1.0
    denoise: bool = True
    score_sde: bool = False

    order = 1

    def __post_init__(self) -> None:
        if self.eta < 0.0:
            raise ValueError(f"{type(self).__name__}: eta = {self.eta} must be at least 0.")

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        return self.eta > 0.0

    @abstractmethod
    def _coefficients(
        self, schedule: Schedule, times: Sequence[float], i: int
    ) -> tuple[float, float, float]:
        """Of x, of the score, and of the noise."""

    def write(
        self, tape: Tape, schedule: Schedule, times: Sequence[float], lead: Schedule
    ) -> None:
        if self.score_sde:
            check_published_times(times)
        x, last = tape.start(), len(times) - 2
        for i, t in enumerate(times[:-1]):
            _, eps = tape.predict(x, t)
            keep, drift, noise = self._coefficients(schedule, times, i)
            new = keep * x - drift / float(schedule.sigma(t)) * eps
            if self.stochastic and not (self.denoise and i == last):
                new += noise * tape.draw()
            x = tape.step(new, times[i + 1])


@dataclass(frozen=True)
class ReverseDiffusion(_ReverseSDE):
    """x_s = (2 - alpha_ts) x + sigma_ts^2 score + sigma_ts z, with the coefficients of the forward
    transition (Song et al. 2021b, Eq. 46)."""

    def _coefficients(
        self, schedule: Schedule, times: Sequence[float], i: int
    ) -> tuple[float, float, float]:
        alpha, variance, _ = forward_step(schedule, times, i, self.score_sde)
        half = 0.5 * (1.0 + self.eta**2)
        return 2.0 - alpha, half * variance, self.eta * math.sqrt(variance)


@dataclass(frozen=True)
class EulerMaruyama(_ReverseSDE):
    """The Euler-Maruyama scheme in t: reverse diffusion with the forward step
    alpha_ts = 1 + f dt, sigma_ts^2 = g^2 dt at ``t``."""

    def _coefficients(
        self, schedule: Schedule, times: Sequence[float], i: int
    ) -> tuple[float, float, float]:
        dt = 1.0 / (len(times) - 1) if self.score_sde else times[i] - times[i + 1]
        alpha, variance, _ = _euler_step(schedule, times[i], dt)
        half = 0.5 * (1.0 + self.eta**2)
        return 2.0 - alpha, half * variance, self.eta * math.sqrt(variance)


@dataclass(frozen=True)
class AncestralSDE(_ReverseSDE):
    """x_s = (x + sigma_ts^2 score) / alpha_ts + noise: the published ancestral predictor, DDPM's
    mean with the noise 'beta' for VP and 'beta_tilde' where alpha = 1 (Song et al. 2021b,
    Appendix F). With exact transitions it is :class:`DDPM`, whose form in x0_hat is kinder to
    clamps; use it with ``score_sde``.

    Raises:
        ValueError: eta other than 1.
    """

    def __post_init__(self) -> None:
        if self.eta != 1.0:
            raise ValueError("AncestralSDE: eta is 1; for less noise use DDIM with eta.")

    def _coefficients(
        self, schedule: Schedule, times: Sequence[float], i: int
    ) -> tuple[float, float, float]:
        alpha, variance, level = forward_step(schedule, times, i, self.score_sde)
        noise = variance * (level - variance) / level if alpha == 1.0 else variance
        return 1.0 / alpha, variance / alpha, math.sqrt(max(noise, 0.0))


# -- correctors -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Langevin:
    """``steps`` Langevin steps x + e score + sqrt(2 e) ``noise_scale`` z at a fixed time.

    ``rule`` sets e = 2 a (``snr`` r)^2, a = alpha_ts^2 of the predictor's step, with r =
    'sample': ||z|| / ||score|| of every sample (default); 'batch': the published ratio of the
    batch's mean norms, which makes a sample depend on its neighbours; 'annealed': sigma(t), no
    norm at all (Song & Ermon 2019; Song et al. 2021b, Algorithms 4 and 5). The ratio of a single
    sample is random, which widens the law that many steps reach: by (1 + 2/dim)^2 in variance on
    a Gaussian.

    Raises:
        ValueError: an unknown rule, or a signal-to-noise ratio or number of steps not positive.
    """

    snr: float = 0.16
    steps: int = 1
    noise_scale: float = 1.0
    rule: str = "sample"

    def __post_init__(self) -> None:
        if self.rule not in ("sample", "batch", "annealed"):
            raise ValueError(f"Langevin: rule '{self.rule}' is not sample, batch or annealed.")
        if not self.snr > 0.0 or self.steps < 1:
            raise ValueError("Langevin: snr must be positive and steps at least 1.")

    def move(
        self, prediction: Prediction, z: Tensor, geometry: Geometry, sigma: float, signal: float
    ) -> Tensor:
        """The state after one step from ``prediction.x``; ``signal`` is a."""
        ratio = self._ratio(prediction.score, z, geometry, sigma)
        size = 2.0 * signal * (self.snr * ratio.reshape(-1, *(1,) * (z.dim() - 1))) ** 2
        noise = (2.0 * size).sqrt() * self.noise_scale * z
        return prediction.x + size * prediction.score + noise

    def _ratio(self, score: Tensor, z: Tensor, geometry: Geometry, sigma: float) -> Tensor:
        """r of each sample, [batch]."""
        if self.rule == "annealed":
            return torch.full((len(z),), sigma, dtype=z.dtype, device=z.device)
        noise, signal = (geometry.norm_squared(value).sqrt() for value in (z, score))
        if self.rule == "batch":
            noise, signal = (norm.mean().expand(len(z)) for norm in (noise, signal))
        # a sample without degrees of freedom has no score, and stays where it is
        return torch.where(signal > 0.0, noise / signal, torch.zeros_like(noise))


@dataclass(frozen=True)
class PredictorCorrector(Solver):
    """At every time of the grid but the last: correct, then predict (Song et al. 2021b,
    Algorithm 1). Without a predictor this is annealed Langevin dynamics (Song & Ermon 2019).

    ``predictor``: any table with one row per step. The corrector's draws are numbered after
    those of the predictor. ``after`` sees the predicted states, before they are corrected.

    Raises:
        ValueError: (when run) a predictor with several rows per step, or times that do not fit.
    """

    predictor: PlanSolver | None = field(default_factory=ReverseDiffusion)
    corrector: Langevin = field(default_factory=Langevin)

    order = 1
    stochastic = True

    def intervals(self, nfe: int) -> int:
        return nfe // (self.corrector.steps + (self.predictor is not None))

    def solve(
        self,
        process: Process,
        denoise: Denoise,
        x: State,
        times: Sequence[float],
        draw: Draw,
        project: Project | None = None,
        after: After | None = None,
    ) -> State:
        check_times(process.lead, times)
        plans = {} if self.predictor is None else self.predictor.plans(process, times)
        for plan in plans.values():
            _check_one_row_per_step(plan, len(times) - 1)
        offset = max((plan.draws for plan in plans.values()), default=0)

        def correct(x: State, i: int) -> State:
            for k in range(self.corrector.steps):
                j = offset + i * self.corrector.steps + k
                moved = self._correct(process, denoise(x, times[i]), times, i, draw, j)
                x = {n: v if project is None else project(n, v) for n, v in moved.items()}
            return x

        steps = iter(range(1, len(times)))

        def between(x: State, time: float | None) -> State:
            x, i = x if after is None else after(x, time), next(steps)
            return x if i == len(times) - 1 else correct(x, i)

        x = correct(x, 0)
        if plans:
            return run(plans, denoise, x, draw, project, between)
        for time in times[1:]:
            x = between(x, time)
        return x

    def _correct(
        self,
        process: Process,
        predictions: Mapping[str, Prediction],
        times: Sequence[float],
        i: int,
        draw: Draw,
        j: int,
    ) -> State:
        """One Langevin step of every field, all from the state of ``predictions``."""
        published = getattr(self.predictor, "score_sde", False)
        moved = {}
        for name, field_ in process.fields.items():
            signal = forward_step(field_.schedule, times, i, published).alpha ** 2
            sigma = float(field_.schedule.sigma(times[i]))
            moved[name] = self.corrector.move(
                predictions[name], draw(name, j), field_.geometry, sigma, signal
            )
        return moved


def _check_one_row_per_step(plan: Plan, steps: int) -> None:
    if len(plan.rows) != steps or any(
        row.at is None or row.base not in (None, i) for i, row in enumerate(plan.rows)
    ):
        raise ValueError(
            "PredictorCorrector: the predictor must take one row per step, such as "
            "ReverseDiffusion, EulerMaruyama, DDPM or DDIM."
        )
