"""DEIS: the diffusion exponential integrator sampler (Zhang & Chen 2023)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from shared.schedules import Schedule
from shared.solvers.base import PlanSolver
from shared.solvers.exponential import (
    Evaluation,
    Interval,
    check_choice,
    evaluate,
    lagrange_weights,
    moments,
    nodes_at,
)
from shared.solvers.plan import Tape

_GAUSS, _GAUSS_WEIGHTS = np.polynomial.legendre.leggauss(40)


@dataclass(frozen=True)
class DEIS(PlanSolver):
    """Adams-Bashforth on the noise prediction: a row integrates exactly, against the
    exponential weight, the polynomial through the last ``order`` predictions.

    Args:
        order: 1 to 4; tAB0 to tAB3 of the paper.
        variable: the polynomial's variable. 'time' (tAB, moments by Gauss-Legendre quadrature;
            smooth schedules reach round-off), 'log_rho' (log sigma/alpha, closed form) or 'rho'
            (rhoAB).
        lower_final_below: lower the order of the last rows in grids with fewer intervals than
            this; 0: never.

    Raises:
        ValueError: an option out of range.
    """

    order: int = 3
    variable: str = "time"
    lower_final_below: float = 0
    stochastic = False

    def __post_init__(self) -> None:
        check_choice(
            self,
            order=(self.order, (1, 2, 3, 4)),
            variable=(self.variable, ("time", "log_rho", "rho")),
        )

    def write(
        self, tape: Tape, schedule: Schedule, times: Sequence[float], lead: Schedule
    ) -> None:
        nodes = nodes_at(schedule, times)
        x, seen = tape.start(), list[Evaluation]()
        left = len(nodes) - 1
        lowered = left < self.lower_final_below
        for s, t in pairwise(nodes):
            seen = [evaluate(tape, x, s), *seen][: self.order]
            interval = Interval(s, t, "noise")
            used = interval.usable(seen[:left] if lowered else seen)
            weights = lagrange_weights(*self._moments(schedule, interval, used))
            x = tape.step(interval.advance(x, used, weights), t.time)
            left -= 1

    def _moments(
        self, schedule: Schedule, interval: Interval, seen: Sequence[Evaluation]
    ) -> tuple[list[float], list[float]]:
        """Moments and places in the chosen variable, scaled to 0 at s and 1 at t."""
        n, z, s, t = len(seen), interval.z, interval.s, interval.t
        if n == 1 or self.variable == "log_rho":
            return moments(z, n), interval.points(seen)
        if self.variable == "rho":
            points = [math.expm1(-z * u) / math.expm1(-z) for u in interval.points(seen)]
            return [math.expm1(z) / (k + 1) for k in range(n)], points
        u = 0.5 * (_GAUSS + 1.0)
        inside = schedule.t_from_log_snr(torch.from_numpy(s.log_snr + u * interval.h)).numpy()
        tau = (inside - s.time) / (t.time - s.time)
        weight = 0.5 * _GAUSS_WEIGHTS * z * np.exp(z * (1.0 - u))
        points = [(e.node.time - s.time) / (t.time - s.time) for e in seen]
        return [float((weight * tau**k).sum()) for k in range(n)], points
