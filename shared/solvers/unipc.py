"""UniPC (Zhao et al. 2023): a predictor and a corrector of any order at one evaluation a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from shared.schedules import Schedule
from shared.solvers.base import PlanSolver
from shared.solvers.exponential import (
    FORMS,
    Evaluation,
    Interval,
    check_choice,
    denoise_to_zero,
    evaluate,
    lagrange_weights,
    moments,
    nodes_at,
)
from shared.solvers.plan import Form, Tape


@dataclass(frozen=True)
class UniPC(PlanSolver):
    """The unified predictor-corrector. UniP-p interpolates p predictions; the corrector adds the
    one made at the predicted state and raises the order by one. The last step is not corrected.

    The function B(h) of the paper matters only in steps with two points (UniP-2 and the corrector
    of UniPC-1), whose moment c_1 it approximates; otherwise it cancels.

    Args:
        points: p, 1 to 4.
        form: 'data' or 'noise'.
        variant: 'bh1' (B = h) or 'bh2' (B = e^h - 1).
        corrector: False gives UniP.
        lower_final_below: lower the order of the last rows in grids with fewer intervals than
            this (published: always). 0: never. It caps the order of a run at 2.
        denoise_to_zero: one evaluation more at the end, which returns x0_hat.

    Raises:
        ValueError: an option out of range.
    """

    points: int = 3
    form: str = "data"
    variant: str = "bh2"
    corrector: bool = True
    lower_final_below: float = math.inf
    denoise_to_zero: bool = False
    stochastic = False

    def __post_init__(self) -> None:
        check_choice(
            self,
            points=(self.points, (1, 2, 3, 4)),
            form=(self.form, FORMS),
            variant=(self.variant, ("bh1", "bh2")),
        )

    @property
    def order(self) -> int:  # type: ignore[override]
        return self.points + self.corrector

    def intervals(self, nfe: int) -> int:
        return nfe - self.denoise_to_zero

    def write(
        self, tape: Tape, schedule: Schedule, times: Sequence[float], lead: Schedule
    ) -> None:
        nodes = nodes_at(schedule, times)
        x, left = tape.start(), len(nodes) - 1
        lowered = left < self.lower_final_below
        seen = [evaluate(tape, x, nodes[0])]
        for s, t in pairwise(nodes):
            interval = Interval(s, t, self.form)
            used = interval.usable(seen[:left] if lowered else seen)
            start = x
            x = tape.step(self._weigh(interval, start, used), t.time)
            left -= 1
            if left and not self.corrector:
                seen = [evaluate(tape, x, t), *seen][: self.points]
            elif left:
                new = evaluate(tape, x, t)
                if interval.finite:  # else the predicted state stands
                    x = tape.step(self._weigh(interval, start, [*used, new]), t.time)
                else:
                    x = tape.step(x, t.time)
                seen = [new, *seen][: self.points]
        if self.denoise_to_zero:
            denoise_to_zero(tape, x, nodes[-1])

    def _weigh(self, interval: Interval, x: Form, seen: Sequence[Evaluation]) -> Form:
        z, n = interval.z, len(seen)
        c = moments(z, n)
        if n == 2:
            c = [c[0], 0.5 * (z if self.variant == "bh1" else math.expm1(z))]
        return interval.advance(x, seen, lagrange_weights(c, interval.points(seen)))
