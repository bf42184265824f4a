"""Runge-Kutta and multistep solvers of Karras et al. (2022) and their kin, for any schedule.

A :class:`Frame` says in which units and along which variable the probability-flow ODE is solved:
'sigma' is EDM's choice, y = x / alpha along sigma / alpha, where dy = eps_hat d(sigma / alpha);
'time' keeps x and t, where dx = (alpha' x0_hat + sigma' eps_hat) dt. The two agree on a
:class:`~shared.schedules.Karras` schedule. The slope is written with x and x0_hat, as published,
so that a corrected x0_hat moves it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from numpy.polynomial import polynomial
from torch import Tensor

from shared.schedules import Schedule, as_time
from shared.solvers.base import PlanSolver
from shared.solvers.plan import Form, Tape

VARIABLES = ("sigma", "time")


def _rate(fn: Callable[[Tensor], Tensor], t: float) -> float:
    with torch.enable_grad():
        at = as_time(t).requires_grad_(True)
        return float(torch.autograd.grad(fn(at), at)[0])


@dataclass(frozen=True)
class Frame:
    """Units and variable of one field; ``variable`` is 'sigma' or 'time'."""

    schedule: Schedule
    variable: str = "sigma"

    def unit(self, t: float) -> float:
        if self.variable == "time":
            return 1.0
        alpha = float(self.schedule.alpha(t))
        if alpha == 0.0:
            raise ValueError(
                f"time grid: alpha = 0 at t = {t:.6g}, where sigma / alpha is infinite; start "
                "later, or solve along the time (Euler and Heun: variable='time')."
            )
        return alpha

    def position(self, t: float) -> float:
        return t if self.variable == "time" else float(self.schedule.sigma(t)) / self.unit(t)

    def time(self, position: float) -> float:
        """The inverse of ``position``."""
        if self.variable == "time":
            return position
        return float(self.schedule.t_from_log_snr(-math.log(position)))

    def slope(self, x: Form, x0: Form, t: float) -> Form:
        """dy / d position at ``x`` and ``t``."""
        alpha, sigma = float(self.schedule.alpha(t)), float(self.schedule.sigma(t))
        if self.variable == "sigma":
            return (x - alpha * x0) / sigma
        growth = _rate(self.schedule.sigma, t) / sigma
        return growth * x + (_rate(self.schedule.alpha, t) - alpha * growth) * x0

    def move(self, x: Form, slope: Form, t: float, s: float) -> Form:
        """From ``t`` to ``s`` along a straight line."""
        unit = self.unit(s)
        return unit / self.unit(t) * x + unit * (self.position(s) - self.position(t)) * slope


@dataclass(frozen=True)
class _Churned(PlanSolver):
    """Fresh noise before each step (Karras et al. 2022, Algorithm 2): sigma / alpha grows by
    gamma = min(s_churn / steps, sqrt(2) - 1) where it lies in [s_min, s_max], but never beyond
    the schedule's t_max. All fields churn to the same time, chosen in the leading one.
    """

    s_churn: float = 0.0
    s_min: float = 0.0
    s_max: float = math.inf
    s_noise: float = 1.0

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        return self.s_churn > 0.0

    def _churn(
        self, tape: Tape, x: Form, t: float, steps: int, schedule: Schedule, lead: Schedule
    ) -> tuple[Form, float]:
        """The noisier state and its time."""
        if not self.s_churn > 0.0:
            return x, t
        z = tape.draw()
        level = -float(lead.log_snr(t))
        gamma = min(self.s_churn / steps, math.sqrt(2.0) - 1.0)
        if not self.s_min <= math.exp(level) <= self.s_max:
            return x, t
        later = min(float(lead.t_from_log_snr(-level - math.log1p(gamma))), lead.t_max)
        if later <= t:
            return x, t
        frame = Frame(schedule)
        added = frame.position(later) ** 2 - frame.position(t) ** 2
        unit = frame.unit(later)
        noisier = unit / frame.unit(t) * x + unit * math.sqrt(added) * self.s_noise * z
        return tape.step(noisier, later), later


def _check_variable(name: str, variable: str) -> None:
    if variable not in VARIABLES:
        raise ValueError(f"{name}: variable '{variable}' is not one of {', '.join(VARIABLES)}.")


@dataclass(frozen=True)
class Euler(_Churned):
    """Straight steps. In 'sigma' this is DDIM with the noise estimate re-derived from x0_hat; in
    'time' on a rectified flow it is the same.

    Raises:
        ValueError: an unknown variable.
    """

    variable: str = "sigma"

    order = 1

    def __post_init__(self) -> None:
        _check_variable("Euler", self.variable)

    def write(
        self, tape: Tape, schedule: Schedule, times: Sequence[float], lead: Schedule
    ) -> None:
        frame, x = Frame(schedule, self.variable), tape.start()
        for t, s in zip(times, times[1:], strict=False):
            x, t = self._churn(tape, x, t, len(times) - 1, schedule, lead)
            x0, _ = tape.predict(x, t)
            x = tape.step(frame.move(x, frame.slope(x, x0, t), t, s), s)


@dataclass(frozen=True)
class Heun(_Churned):
    """EDM's deterministic and stochastic samplers (Karras et al. 2022, Algorithms 1 and 2): an
    Euler step of length ``midpoint`` (1: Heun, 0.5: midpoint rule), then the weighted slopes.
    A step into sigma = 0 is Euler's. Churn at a fixed s_churn lowers the order of a sample, not
    that of its law.

    Raises:
        ValueError: an unknown variable, or ``midpoint`` outside (0, 1].
    """

    variable: str = "sigma"
    midpoint: float = 1.0

    order = 2

    def __post_init__(self) -> None:
        _check_variable("Heun", self.variable)
        if not 0.0 < self.midpoint <= 1.0:
            raise ValueError(f"Heun: midpoint = {self.midpoint} is outside (0, 1].")

    def intervals(self, nfe: int) -> int:
        return (nfe + 1) // 2

    def write(
        self, tape: Tape, schedule: Schedule, times: Sequence[float], lead: Schedule
    ) -> None:
        x = tape.start()
        frame, leader = Frame(schedule, self.variable), Frame(lead, self.variable)
        for t, s in zip(times, times[1:], strict=False):
            x, t = self._churn(tape, x, t, len(times) - 1, schedule, lead)
            x0, _ = tape.predict(x, t)
            first = frame.slope(x, x0, t)
            if float(lead.sigma(s)) == 0.0:
                x = tape.step(frame.move(x, first, t, s), s)
                continue
            near = s
            if self.midpoint < 1.0:
                gap = leader.position(s) - leader.position(t)
                near = leader.time(leader.position(t) + self.midpoint * gap)
            trial = frame.move(x, first, t, near)
            x0, _ = tape.predict(tape.step(trial, near), near)
            begin, end, there = (frame.position(u) for u in (t, s, near))
            weight = 0.5 * (end - begin) / (there - begin)
            slope = (1.0 - weight) * first + weight * frame.slope(trial, x0, near)
            x = tape.step(frame.move(x, slope, t, s), s)


def _down(frame: Frame, t: float, s: float, eta: float) -> tuple[float, float]:
    """Ancestral split of sigma / alpha at ``s``: where the ODE goes, and the noise on top
    (the DDPM posterior's share for eta = 1)."""
    noisy, clean = frame.position(t), frame.position(s)
    up = min(clean, eta * clean * math.sqrt(max(0.0, 1.0 - (clean / noisy) ** 2)))
    return math.sqrt(clean**2 - up**2), up


@dataclass(frozen=True)
class DPM2(_Churned):
    """Midpoint rule in 'sigma' with the midpoint in log-SNR (k-diffusion's ``dpm_2``; with
    ``eta`` > 0 its ancestral form, whose noise is that of :class:`DDIM`). A step into sigma = 0
    is Euler's.

    Raises:
        ValueError: eta outside [0, 1].
    """

    eta: float = 0.0

    order = 2

    def __post_init__(self) -> None:
        _check_eta("DPM2", self.eta)

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        return self.s_churn > 0.0 or self.eta > 0.0

    def intervals(self, nfe: int) -> int:
        return (nfe + 1) // 2

    def write(
        self, tape: Tape, schedule: Schedule, times: Sequence[float], lead: Schedule
    ) -> None:
        frame, leader, x = Frame(schedule), Frame(lead), tape.start()
        for t, s in zip(times, times[1:], strict=False):
            x, t = self._churn(tape, x, t, len(times) - 1, schedule, lead)
            x0, _ = tape.predict(x, t)
            slope = frame.slope(x, x0, t)
            (down, up), unit = _down(frame, t, s, self.eta), frame.unit(s)
            if float(lead.sigma(s)) > 0.0:
                middle = math.sqrt(leader.position(t) * _down(leader, t, s, self.eta)[0])
                near = leader.time(middle)
                trial = frame.move(x, slope, t, near)
                x0, _ = tape.predict(tape.step(trial, near), near)
                slope = frame.slope(trial, x0, near)
            end = unit / frame.unit(t) * x + unit * (down - frame.position(t)) * slope
            if self.eta > 0.0:
                end += unit * up * tape.draw()
            x = tape.step(end, s)


@dataclass(frozen=True)
class DPMpp2SAncestral(PlanSolver):
    """DPM-Solver++(2S) to the ancestral split, then noise (k-diffusion's
    ``dpmpp_2s_ancestral``): an exponential midpoint rule in log-SNR. A step into sigma = 0 is of
    first order.

    Raises:
        ValueError: eta outside [0, 1].
    """

    eta: float = 1.0

    order = 2

    def __post_init__(self) -> None:
        _check_eta("DPMpp2SAncestral", self.eta)

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        return self.eta > 0.0

    def intervals(self, nfe: int) -> int:
        return (nfe + 1) // 2

    def write(
        self, tape: Tape, schedule: Schedule, times: Sequence[float], lead: Schedule
    ) -> None:
        frame, leader, x = Frame(schedule), Frame(lead), tape.start()
        for t, s in zip(times, times[1:], strict=False):
            x0, _ = tape.predict(x, t)
            (down, up), unit = _down(frame, t, s, self.eta), frame.unit(s)
            noisy = frame.position(t)
            start = x / frame.unit(t)
            if float(lead.sigma(s)) > 0.0:
                near = leader.time(
                    math.sqrt(leader.position(t) * _down(leader, t, s, self.eta)[0])
                )
                keep = frame.position(near) / noisy
                trial = frame.unit(near) * (keep * start + (1.0 - keep) * x0)
                x0, _ = tape.predict(tape.step(trial, near), near)
            end = unit * (down / noisy * start + (1.0 - down / noisy) * x0)
            if self.eta > 0.0:
                end += unit * up * tape.draw()
            x = tape.step(end, s)


def _check_eta(name: str, eta: float) -> None:
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"{name}: eta = {eta} is outside [0, 1].")


def adams_bashforth(nodes: Sequence[float], end: float) -> list[float]:
    """Weights w_k with integral_{nodes[0]}^{end} p = sum_k w_k p(nodes[k]) for polynomials of
    lower degree than there are nodes; exact integration, in units of the step."""
    span = end - nodes[0]
    scaled = [(node - nodes[0]) / span for node in nodes]
    weights = []
    for k, centre in enumerate(scaled):
        others = [node for j, node in enumerate(scaled) if j != k]
        area = polynomial.polyint(polynomial.polyfromroots(others)).sum()
        weights.append(span * float(area) / math.prod(centre - node for node in others))
    return weights


@dataclass(frozen=True)
class LMS(PlanSolver):
    """Linear multistep (Adams-Bashforth) in sigma / alpha on the raw eps_hat (k-diffusion's
    ``lms``). The first rows have lower order; on grids uniform in log-SNR with a graded start the
    measured slopes between 80 and 160 steps are 1.9, 2.8 and 3.7 for orders 2, 3 and 4.

    Raises:
        ValueError: order outside 1..4.
    """

    order: int = 4

    stochastic = False

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3, 4):
            raise ValueError(f"LMS: order {self.order} is not one of 1, 2, 3, 4.")

    def write(
        self, tape: Tape, schedule: Schedule, times: Sequence[float], lead: Schedule
    ) -> None:
        frame, x = Frame(schedule), tape.start()
        past: list[tuple[float, Form]] = []
        for t, s in zip(times, times[1:], strict=False):
            past = [(frame.position(t), tape.predict(x, t)[1]), *past][: self.order]
            weights = adams_bashforth([position for position, _ in past], frame.position(s))
            unit = frame.unit(s)
            end = unit / frame.unit(t) * x
            for weight, (_, eps) in zip(weights, past, strict=True):
                end += unit * weight * eps
            x = tape.step(end, s)
