"""Splitting of the reverse SDE into its linear part and its score (Jo et al. 2022, S4)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from shared.predictions import Prediction
from shared.process import Field, Process, State
from shared.schedules import Schedule, VariancePreserving
from shared.solvers.base import Solver, check_times
from shared.solvers.langevin import Langevin, check_published_times, forward_step
from shared.solvers.plan import After, Denoise, Draw, Project


@dataclass(frozen=True)
class SymmetricSplitting(Solver):
    """S4, one call of the denoiser per step: a Langevin correction, half a step of the linear
    part, a whole step of the score, half a step of the linear part; the correction and the score
    step use the score of the step's beginning (Jo et al. 2022, Algorithm 2).

    ``corrector``: its steps beyond one are not used; None leaves it out. ``denoise``: end with
    the mean of the last transition, as published. ``score_sde``: the published convention, on
    the grid of :class:`ScoreSDETimes`: steps of 1/N from each time, and half steps with the
    variance of the forward transition, which is right to first order; otherwise steps follow the
    grid and their variance is exact.

    Draws of step i: 3i corrects, 3i + 1 and 3i + 2 are those of the half steps.

    Raises:
        ValueError: (when run) times that do not fit.
    """

    corrector: Langevin | None = field(default_factory=Langevin)
    denoise: bool = True
    score_sde: bool = False

    order = 1
    stochastic = True

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
        if self.score_sde:
            check_published_times(times)
        for i in range(len(times) - 1):
            predictions: Mapping[str, Prediction] = denoise(x, times[i])
            x = {
                name: self._step(part, predictions[name], times, i, name, draw)
                for name, part in process.fields.items()
            }
            if project is not None:
                x = {name: project(name, value) for name, value in x.items()}
            if after is not None:
                x = after(x, times[i + 1])
        return x

    def _step(
        self,
        part: Field,
        prediction: Prediction,
        times: Sequence[float],
        i: int,
        name: str,
        draw: Draw,
    ) -> Tensor:
        schedule, t, steps = part.schedule, times[i], len(times) - 1
        dt = 1.0 / steps if self.score_sde else t - times[i + 1]
        x = prediction.x
        if self.corrector is not None:
            signal = forward_step(schedule, times, i, self.score_sde).alpha ** 2
            sigma = float(schedule.sigma(t))
            x = self.corrector.move(prediction, draw(name, 3 * i), part.geometry, sigma, signal)
        grow, std = self._half_step(schedule, t, t - dt / 2)
        x = grow * x + std * draw(name, 3 * i + 1)
        x = x + float(schedule.diffusion_squared(t)) * dt * prediction.score
        grow, std = self._half_step(schedule, t - dt / 2, t - dt)
        if self.denoise and i == steps - 1:
            return grow * x
        return grow * x + std * draw(name, 3 * i + 2)

    def _half_step(self, schedule: Schedule, t: float, s: float) -> tuple[float, float]:
        """Growth and standard deviation of dx = f x dt + g dw run backwards from ``t`` to ``s``.
        The published times end below zero, where the formulas of VP and VE still hold."""
        grow = math.exp(float(schedule.log_alpha(s) - schedule.log_alpha(t)))
        if isinstance(schedule, VariancePreserving):
            forward = -math.expm1(2.0 * float(schedule.log_alpha(t) - schedule.log_alpha(s)))
        else:
            forward = float(schedule.sigma(t)) ** 2 - (float(schedule.sigma(s)) / grow) ** 2
        std = math.sqrt(max(forward, 0.0))
        return grow, std if self.score_sde else grow * std
