"""DPM-Solver and DPM-Solver++ (Lu et al. 2022a, 2022b), their SDE forms and ancestral variants.

``form='noise'`` is DPM-Solver, ``form='data'`` is DPM-Solver++. All of them use one evaluation for
each interval of the time grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from shared.schedules import Schedule
from shared.solvers.base import PlanSolver
from shared.solvers.exponential import (
    FORMS,
    Evaluation,
    Interval,
    Node,
    check_choice,
    denoise_to_zero,
    evaluate,
    lagrange_weights,
    moments,
    nodes_at,
)
from shared.solvers.plan import Form, Tape

SOLVER_TYPES = ("dpmsolver", "taylor")


def _second_moments(z: float, solver_type: str) -> list[float]:
    """The moments of a two-point step: 'taylor' is exact; 'dpmsolver' replaces c_1 by c_0 / 2, the
    exponential midpoint rule ('midpoint' of the SDE solvers, where 'taylor' is called 'heun')."""
    c = moments(z, 2)
    return c if solver_type == "taylor" else [c[0], 0.5 * c[0]]


@dataclass(frozen=True)
class DPMSolverMultistep(PlanSolver):
    """Multistep DPM-Solver and DPM-Solver++ (2M, 3M), and SDE-DPM-Solver++ with ``eta`` > 0.

    Args:
        points: predictions that a row combines, 1 to 3.
        form: 'data' (DPM-Solver++) or 'noise' (DPM-Solver).
        solver_type: the two-point rule, 'dpmsolver' or 'taylor' (Lu et al. 2022a, Appendix).
        published: the three-point step as its authors coded it, with half of the second
            derivative: second order, so ``order`` is 2. False: the whole one, third order.
        eta: 0 is the ODE; 1 is the reverse SDE, for which Lu et al. 2022b state the 1- and
            2-point steps; the k-diffusion library has the 3-point one.
        lower_final_below: lower the order of the last rows in grids with fewer intervals than
            this (published: 10). 0: never; inf: always. It caps the order of a run at 2.
        denoise_to_zero: one evaluation more at the end, which returns x0_hat.
        increasing: invert, from data to noise, over increasing times.

    Raises:
        ValueError: an option out of range.
    """

    points: int = 2
    form: str = "data"
    solver_type: str = "dpmsolver"
    published: bool = True
    eta: float = 0.0
    lower_final_below: float = 10
    denoise_to_zero: bool = False
    increasing: bool = False

    def __post_init__(self) -> None:
        check_choice(
            self,
            points=(self.points, (1, 2, 3)),
            form=(self.form, FORMS),
            solver_type=(self.solver_type, SOLVER_TYPES),
            eta=(self.eta, (0.0,) if self.increasing else (self.eta,)),
        )
        _check_eta(self, self.eta, self.form)

    @property
    def order(self) -> int:  # type: ignore[override]
        halved = self.published or self.eta > 0.0
        return min(self.points, 2) if halved else self.points

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        return self.eta > 0.0

    def intervals(self, nfe: int) -> int:
        return nfe - self.denoise_to_zero

    def write(
        self, tape: Tape, schedule: Schedule, times: Sequence[float], lead: Schedule
    ) -> None:
        nodes = nodes_at(schedule, times)
        x, seen = tape.start(), list[Evaluation]()
        left = len(nodes) - 1
        lowered = left < self.lower_final_below
        for s, t in pairwise(nodes):
            seen = [evaluate(tape, x, s), *seen][: self.points]
            interval = Interval(s, t, self.form, self.eta)
            used = interval.usable(seen[:left] if lowered else seen)
            weights = lagrange_weights(self._moments(interval.z, len(used)), interval.points(used))
            form = interval.advance(x, used, weights)
            if self.eta:
                form = form + tape.draw() * interval.noise_std
            x = tape.step(form, t.time)
            left -= 1
        if self.denoise_to_zero:
            denoise_to_zero(tape, x, nodes[-1])

    def _moments(self, z: float, n: int) -> list[float]:
        if n == 2:
            return _second_moments(z, self.solver_type)
        c = moments(z, n)
        return [*c[:2], 0.5 * c[2]] if n == 3 and self.published else c


@dataclass(frozen=True)
class DPMSolverSinglestep(PlanSolver):
    """Singlestep DPM-Solver and DPM-Solver++ (2S, 3S).

    A step of order p takes p intervals of the grid and evaluates at the grid's own times inside
    them, so a grid of n intervals costs n evaluations. The third-order 'dpmsolver' step wants
    its last evaluation at 2/3 of the step in log-SNR, which smooth grids give asymptotically;
    'taylor' allows any place.

    Args:
        order: 1 to 3.
        form: 'data' (DPM-Solver++) or 'noise' (DPM-Solver).
        solver_type: 'dpmsolver' or 'taylor'.
        fast: end with steps of lower order as published ('DPM-Solver-fast'); False: only what
            does not fill a whole step is of lower order.
        denoise_to_zero: one evaluation more at the end, which returns x0_hat.

    Raises:
        ValueError: an option out of range.
    """

    order: int = 3
    form: str = "data"
    solver_type: str = "dpmsolver"
    fast: bool = True
    denoise_to_zero: bool = False
    stochastic = False

    def __post_init__(self) -> None:
        check_choice(
            self,
            order=(self.order, (1, 2, 3)),
            form=(self.form, FORMS),
            solver_type=(self.solver_type, SOLVER_TYPES),
        )

    def intervals(self, nfe: int) -> int:
        return nfe - self.denoise_to_zero

    def write(
        self, tape: Tape, schedule: Schedule, times: Sequence[float], lead: Schedule
    ) -> None:
        nodes = nodes_at(schedule, times)
        x, first = tape.start(), 0
        for order in singlestep_orders(nodes_at(lead, times), self.order, self.fast):
            x = self._step(tape, x, nodes[first : first + order + 1])
            first += order
        if self.denoise_to_zero:
            denoise_to_zero(tape, x, nodes[-1])

    def _step(self, tape: Tape, x: Form, nodes: Sequence[Node]) -> Form:
        """One step from nodes[0] to nodes[-1] with an evaluation at all but the last."""
        if not all(math.isfinite(n.log_snr) for n in nodes):
            return _euler_through(tape, x, nodes, self.form)
        s, t, start = nodes[0], nodes[-1], x
        seen = [evaluate(tape, start, s)]
        for node in nodes[1:-1]:
            interval = Interval(s, node, self.form)
            x = tape.step(self._weigh(interval, start, seen, "taylor"), node.time)
            seen.append(evaluate(tape, x, node))
        rule = self.solver_type
        if len(seen) == 3 and rule == "dpmsolver":
            seen, rule = [seen[0], seen[2]], "taylor"
        return tape.step(self._weigh(Interval(s, t, self.form), start, seen, rule), t.time)

    def _weigh(self, interval: Interval, x: Form, seen: Sequence[Evaluation], rule: str) -> Form:
        n = len(seen)
        c = _second_moments(interval.z, rule) if n == 2 else moments(interval.z, n)
        return interval.advance(x, seen, lagrange_weights(c, interval.points(seen)))


@dataclass(frozen=True)
class DPMSolverSDE(PlanSolver):
    """The two-stage stochastic solver 'dpmpp_sde' of the k-diffusion library: both stages are
    ancestral steps of DPM-Solver++. A step takes two intervals of the grid and evaluates at the
    time between them; an interval left over is a first-order step.

    Args:
        eta: 1 is the reverse SDE, 0 gives DPM-Solver++(2S).
        coherent: both stages see one Brownian path: the variance is of second order. False, as
            published with independent draws: first order.

    Raises:
        ValueError: eta out of range.
    """

    eta: float = 1.0
    coherent: bool = True

    def __post_init__(self) -> None:
        _check_eta(self, self.eta, "data")

    @property
    def order(self) -> int:  # type: ignore[override]
        return 2 if self.coherent or self.eta == 0.0 else 1

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        return self.eta > 0.0

    def write(
        self, tape: Tape, schedule: Schedule, times: Sequence[float], lead: Schedule
    ) -> None:
        nodes = nodes_at(schedule, times)
        x, first = tape.start(), 0
        for order in singlestep_orders(nodes_at(lead, times), 2, True):
            x = self._step(tape, x, nodes[first : first + order + 1])
            first += order

    def _step(self, tape: Tape, x: Form, nodes: Sequence[Node]) -> Form:
        s, end = nodes[0], nodes[-1]
        if len(nodes) == 2 or not all(math.isfinite(n.log_snr) for n in nodes):
            return _euler_through(tape, x, nodes, "data", self.eta)
        middle, start, first = nodes[1], x, evaluate(tape, x, s)
        below, t = _below(s, middle, self.eta), _below(s, end, self.eta)
        early = _noise_between(tape, below, middle)
        x = tape.step(Interval(s, below, "data").euler(start, first) + early, middle.time)
        seen = [first, evaluate(tape, x, middle)]
        interval = Interval(s, t, "data")
        points = Interval(s, end, "data").points(seen)
        weights = lagrange_weights(_second_moments(interval.z, "dpmsolver"), points)
        if self.coherent and self.eta:  # what the first stage added, carried on, and the rest
            carried = Interval(middle, _below(middle, end, self.eta), "data").decay
            known = carried**2 * (middle.sigma**2 - below.sigma**2)
            rest = max(end.sigma**2 - t.sigma**2 - known, 0.0)
            late = early * carried + tape.draw() * math.sqrt(rest)
        else:
            late = _noise_between(tape, t, end)
        return tape.step(interval.advance(start, seen, weights) + late, end.time)


def singlestep_orders(nodes: Sequence[Node], order: int, fast: bool) -> list[int]:
    """Orders of the steps that use up all intervals. An interval with infinite log-SNR at an end
    is a step of its own.

    ``fast`` (Lu et al. 2022a, Appendix C.4): steps of order 3, then 2 and 1 or what is left, so
    that the last step is never of order 3.
    """
    head = [1] if not math.isfinite(nodes[0].log_snr) else []
    tail = [1] if len(nodes) > 2 and not math.isfinite(nodes[-1].log_snr) else []
    whole, rest = divmod(len(nodes) - 1 - len(head) - len(tail), order)
    if fast and order == 3 and rest == 0 and whole > 0:
        return [*head, *[3] * (whole - 1), 2, 1, *tail]
    return [*head, *[order] * whole, *([rest] if rest else []), *tail]


def _euler_through(
    tape: Tape, x: Form, nodes: Sequence[Node], form: str, eta: float = 0.0
) -> Form:
    """First order from node to node, where this field's log-SNR is infinite at one of them."""
    for s, end in pairwise(nodes):
        t = _below(s, end, eta)
        step = Interval(s, t, form).euler(x, evaluate(tape, x, s))
        x = tape.step(step + _noise_between(tape, t, end), end.time)
    return x


def _below(s: Node, t: Node, eta: float) -> Node:
    """The node with the time and alpha of ``t`` and the smaller sigma that a deterministic step
    goes to before noise brings it back to sigma_t (Song et al. 2021, DDIM Eq. 16)."""
    if not eta or t.sigma == 0.0:
        return t
    kept = 1.0 + eta**2 * math.expm1(-2.0 * (t.log_snr - s.log_snr))
    sigma = t.sigma * math.sqrt(kept)
    log_snr = t.log_snr - 0.5 * math.log(kept) if kept else math.inf
    return replace(t, sigma=sigma, log_snr=log_snr)


def _noise_between(tape: Tape, below: Node, t: Node) -> Form:
    variance = t.sigma**2 - below.sigma**2
    return tape.draw() * math.sqrt(variance) if variance else Form({})


def _check_eta(owner: object, eta: float, form: str) -> None:
    name = type(owner).__name__
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"{name}: eta is {eta}; it must lie in [0, 1].")
    if eta and form != "data":
        raise ValueError(f"{name}: eta = {eta} needs form='data' (or choose eta=0).")
