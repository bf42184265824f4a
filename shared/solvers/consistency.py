"""Sampling from consistency models: jump to x_0, add noise, jump again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shared.schedules import Schedule
from shared.solvers.base import PlanSolver
from shared.solvers.plan import Tape


@dataclass(frozen=True)
class Consistency(PlanSolver):
    """x_s = alpha_s x0_hat + sigma_s z with fresh noise z, and x0_hat at the end (Song et al.
    2023, Algorithm 1): for models whose x0_hat is the end of a trajectory, not the mean of many
    (:mod:`shared.distillation`). One interval is one call; the last ends at x0_hat, whatever the
    grid's last time."""

    order = 1
    stochastic = True

    def write(
        self, tape: Tape, schedule: Schedule, times: Sequence[float], lead: Schedule
    ) -> None:
        x = tape.start()
        for t, s in zip(times, times[1:], strict=False):
            x0, _ = tape.predict(x, t)
            if s == times[-1]:
                tape.step(x0, s)
                break
            x = tape.step(
                float(schedule.alpha(s)) * x0 + float(schedule.sigma(s)) * tape.draw(), s
            )
