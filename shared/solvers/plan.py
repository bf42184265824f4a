"""Plans: fixed-time samplers as tables of numbers, and the one loop that runs them.

Row i of a plan takes state i to state i+1: evaluate the denoiser at state i or not, then

    x_{i+1} = a x_base + sum_k b_k x0_hat_k + sum_k c_k eps_hat_k + sum_j d_j z_j + const

with the predictions of earlier rows and numbered standard normals z_j. A plan never looks at the
data, so its order, its noise and its memory are properties of the table. Solvers write tables with
a :class:`Tape`, whose linear forms read like the equations of their papers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from shared.predictions import Prediction
from shared.process import State

Coef = float | Tensor
Denoise = Callable[[State, float], Mapping[str, Prediction]]


class LearnedStd(ABC):
    """A noise coefficient that the variance head of row ``row`` completes at run time."""

    row: int

    @abstractmethod
    def std(self, variance: Tensor) -> Tensor:
        """The coefficient, given the head's output at that row."""


@dataclass(frozen=True)
class LinearVariance(LearnedStd):
    """sqrt(min(small + gain * cov, cap)), ``cov`` = the head's variance of x0 given x_t
    (Bao et al. 2022, Extended Analytic-DPM)."""

    row: int
    small: float
    gain: float
    cap: float = math.inf

    def std(self, variance: Tensor) -> Tensor:
        return (self.small + self.gain * variance).clamp(max=self.cap).sqrt()


@dataclass(frozen=True)
class LogVariance(LearnedStd):
    """exp(v log_large + (1 - v) log_small) of variances, square root taken, with the head's
    fraction v (Nichol & Dhariwal 2021, Eq. 15)."""

    row: int
    log_small: float
    log_large: float

    def std(self, variance: Tensor) -> Tensor:
        log_variance = variance * self.log_large + (1.0 - variance) * self.log_small
        return (0.5 * log_variance).exp()


@dataclass(frozen=True)
class Stage:
    """One row; see the module's formula. ``time`` is the time of the new state, if it has one."""

    at: float | None
    base: int | None
    a: Coef
    x0: Mapping[int, Coef]
    eps: Mapping[int, Coef]
    z: Mapping[int, Coef | LearnedStd]
    const: Coef | None = None
    time: float | None = None


@dataclass(frozen=True)
class Plan:
    """A validated table of stages; ``draws`` = how many normals it numbers.

    Raises:
        ValueError: a coefficient is not finite, a row reads what does not exist yet, or an
            evaluation is never used.
    """

    rows: tuple[Stage, ...]
    draws: int = 0

    def __post_init__(self) -> None:
        if not self.rows:
            raise ValueError("Plan: no rows; a sampler needs at least one step.")
        used: set[int] = set()
        for i, row in enumerate(self.rows):
            _check_row(i, row, self.rows)
            used |= _reads(row)
        idle = [i for i, row in enumerate(self.rows) if row.at is not None and i not in used]
        if idle:
            raise ValueError(f"Plan: the evaluations of rows {idle} are never used.")

    @property
    def nfe(self) -> int:
        """Number of denoiser evaluations."""
        return sum(row.at is not None for row in self.rows)

    @cached_property
    def last_use(self) -> Mapping[tuple[str, int], int]:
        """('state' | 'x0' | 'eps' | 'var', index) -> the last row that reads it."""
        last: dict[tuple[str, int], int] = {}
        for i, row in enumerate(self.rows):
            if row.base is not None:
                last["state", row.base] = i
            if row.at is not None:
                last["state", i] = max(i, last.get(("state", i), i))
            last |= {("x0", k): i for k in row.x0} | {("eps", k): i for k in row.eps}
            last |= {("var", s.row): i for s in row.z.values() if isinstance(s, LearnedStd)}
        return last

    def keeps(self, kind: str, i: int) -> bool:
        """Whether this form of row i's prediction must be stored: a later row reads it, or it
        is a variance."""
        return self.last_use.get((kind, i), -1) > (i - 1 if kind == "var" else i)

    @cached_property
    def memory(self) -> int:
        """Arrays of the field's size alive at once: states plus stored predictions."""
        born = {key: key[1] for key in self.last_use}
        return max(
            1 + sum(born[key] <= i <= last for key, last in self.last_use.items())
            for i in range(len(self.rows))
        )

    @property
    def gain(self) -> float:
        """Largest sum of |coefficients| of the predictions in one row: how much a row can amplify
        the denoiser's errors. Above about 100 the grid has nodes too close for the order."""
        return max(sum(map(_size, (*r.x0.values(), *r.eps.values()))) for r in self.rows)

    def __str__(self) -> str:
        return "\n".join(f"{i:4d}  {_formula(i, row)}" for i, row in enumerate(self.rows))


def _size(coef: Coef) -> float:
    return float(coef.abs().max()) if isinstance(coef, Tensor) else abs(coef)


def _reads(row: Stage) -> set[int]:
    """The rows whose predictions a row uses."""
    heads = {std.row for std in row.z.values() if isinstance(std, LearnedStd)}
    return {*row.x0, *row.eps} | heads


def _check_row(i: int, row: Stage, rows: tuple[Stage, ...]) -> None:
    linear = [row.a, *row.x0.values(), *row.eps.values()]
    linear += [c for c in row.z.values() if not isinstance(c, LearnedStd)]
    if row.const is not None:
        linear.append(row.const)
    if not all(math.isfinite(_size(c)) for c in linear):
        raise ValueError(
            f"Plan: row {i} (evaluated at t={row.at}) has a coefficient that is not finite; the "
            "solver cannot use this time grid with this schedule (a point with alpha = 0 or "
            "sigma = 0?). Choose t_start and t_end inside the schedule."
        )
    if (row.base is not None and row.base > i) or any(
        k > i or rows[k].at is None for k in _reads(row)
    ):
        raise ValueError(f"Plan: row {i} reads a state or a prediction that does not exist.")


def _formula(i: int, row: Stage) -> str:
    def term(coef: Coef | LearnedStd, name: str) -> str:
        number = coef if isinstance(coef, LearnedStd) else format(_size(coef), ".6g")
        sign = "-" if isinstance(coef, float) and coef < 0 else "+"
        return f"{sign} {number} {name}"

    terms = [] if row.base is None else [term(row.a, f"x[{row.base}]")]
    terms += [term(c, f"x0[{k}]") for k, c in row.x0.items()]
    terms += [term(c, f"eps[{k}]") for k, c in row.eps.items()]
    terms += [term(c, f"z[{j}]") for j, c in row.z.items()]
    terms += [] if row.const is None else [term(row.const, "")]
    at = "" if row.at is None else f"   (predict at t={row.at:.6g})"
    return f"x[{i + 1}] = {' '.join(terms).removeprefix('+ ')}{at}"


# -- the tape ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """A linear form in states ('x', i), predictions ('x0' | 'eps', k), draws ('z', j) and the
    constant ('1', 0). Supports + - with forms and * / with numbers."""

    terms: Mapping[tuple[str, int], Coef | LearnedStd]

    def __add__(self, other: Form) -> Form:
        total = dict(self.terms)
        for key, coef in other.terms.items():
            total[key] = _add(total[key], coef) if key in total else coef
        return Form(total)

    def __mul__(self, factor: Coef) -> Form:
        return Form({key: _times(coef, factor) for key, coef in self.terms.items()})

    __rmul__ = __mul__

    def __neg__(self) -> Form:
        return self * -1.0

    def __sub__(self, other: Form) -> Form:
        return self + -other

    def __truediv__(self, factor: Coef) -> Form:
        return self * (1.0 / factor)


def _add(a: Coef | LearnedStd, b: Coef | LearnedStd) -> Coef:
    if isinstance(a, LearnedStd) or isinstance(b, LearnedStd):
        raise TypeError("Form: a learned noise coefficient cannot be added to another.")
    return a + b


def _times(a: Coef | LearnedStd, factor: Coef) -> Coef | LearnedStd:
    if isinstance(a, LearnedStd):
        raise TypeError("Form: a learned noise coefficient cannot be scaled; put it in last.")
    return a * factor


@dataclass
class Tape:
    """Writes a plan row by row: ``predict`` at the current state, ``step`` to the next one."""

    _rows: list[Stage] = field(default_factory=list)
    _at: float | None = None
    _draws: int = 0

    @property
    def row(self) -> int:
        """The number of the row being written."""
        return len(self._rows)

    def start(self) -> Form:
        """State 0."""
        return Form({("x", 0): 1.0})

    def predict(self, x: Form, t: float) -> tuple[Form, Form]:
        """Evaluate the denoiser at the current state ``x`` and time ``t`` -> (x0_hat, eps_hat)."""
        if dict(x.terms) != {("x", self.row): 1.0}:
            raise ValueError("Tape: predict takes the current state; step to it first.")
        if self._at is not None:
            raise ValueError("Tape: this state has been evaluated already.")
        self._at = float(t)
        return Form({("x0", self.row): 1.0}), Form({("eps", self.row): 1.0})

    def draw(self) -> Form:
        """A new standard normal."""
        self._draws += 1
        return Form({("z", self._draws - 1): 1.0})

    def learned_noise(self, std: LearnedStd) -> Form:
        """A new standard normal times a learned coefficient."""
        self._draws += 1
        return Form({("z", self._draws - 1): std})

    def constant(self, value: Coef) -> Form:
        return Form({("1", 0): value})

    def step(self, form: Form, time: float | None = None) -> Form:
        """Close the row: the next state is ``form``."""
        kinds = ("x", "x0", "eps", "z", "1")
        by_kind: dict[str, dict[int, Any]] = {kind: {} for kind in kinds}
        for (kind, index), coef in form.terms.items():
            if isinstance(coef, LearnedStd | Tensor) or coef != 0.0:
                by_kind[kind][index] = coef
        if len(by_kind["x"]) > 1:
            raise ValueError("Tape: a row starts from one state; rewrite the step.")
        base, a = next(iter(by_kind["x"].items()), (None, 0.0))
        x0, eps, z, const = by_kind["x0"], by_kind["eps"], by_kind["z"], by_kind["1"].get(0)
        self._rows.append(
            Stage(self._at, base, a, x0, eps, z, const, None if time is None else float(time))
        )
        self._at = None
        return Form({("x", self.row): 1.0})

    def plan(self) -> Plan:
        if self._at is not None:
            raise ValueError("Tape: the last evaluation was not followed by a step.")
        return Plan(tuple(self._rows), self._draws)


# -- the loop ---------------------------------------------------------------------------------

Draw = Callable[[str, int], Tensor]
Project = Callable[[str, Tensor], Tensor]
After = Callable[[State, float | None], State]
Resample = Callable[[Mapping[str, Prediction], float], Tensor | None]


def run(
    plans: Mapping[str, Plan],
    denoise: Denoise,
    x: State,
    draw: Draw,
    project: Project | None = None,
    after: After | None = None,
    resample: Resample | None = None,
) -> State:
    """Run one plan per field, with one denoiser call per evaluating row.

    Args:
        plans: field -> plan; the fields' evaluation times must agree row by row.
        denoise: ``(state, t) -> {field: Prediction}``.
        x: the start, field -> [batch, ...].
        draw: ``(field, j) -> z_j`` of the field's shape, on its geometry.
        project: ``(field, x) -> x`` onto the field's geometry, after every row.
        after: ``(state, time) -> state`` after every row (replacement, callbacks).
        resample: ``(predictions, t) -> rows`` after every evaluation: the rows of the batch that
            take the places 0, 1, ..., or None; stored states and predictions follow.

    Raises:
        ValueError: the plans do not fit together or the state.
        FloatingPointError: the denoiser gave NaN or infinity; says which samples and when.
    """
    lead = _check_plans(plans, x)
    states: dict[int, State] = {0: x}
    stored: dict[tuple[str, int], dict[str, Tensor]] = {}
    for i, row in enumerate(lead.rows):
        fresh: Mapping[str, Prediction] = {}
        if row.at is not None:
            fresh = denoise(states[i], row.at)
            rows = None if resample is None else resample(fresh, row.at)
            if rows is not None:
                states = {k: _take(v, rows) for k, v in states.items()}
                stored = {k: _take(v, rows) for k, v in stored.items()}
                fresh = {k: v.map(partial(_rows, rows=rows)) for k, v in fresh.items()}
            for kind in ("x0", "eps", "var"):
                later = {n: fresh[n].form(kind) for n, p in plans.items() if p.keeps(kind, i)}
                if later:
                    stored[kind, i] = later
        new = {
            name: _apply(plan.rows[i], name, states, stored, fresh, draw)
            for name, plan in plans.items()
        }
        if project is not None:
            new = {name: project(name, y) for name, y in new.items()}
        if after is not None:
            new = after(new, row.time)
        if i % 8 == 0 or i + 1 == len(lead.rows):  # every row would cost a pass over the state
            _check_finite(new, row, i)
        states[i + 1] = new
        for key in [k for k in stored if _dead(plans, k, i)]:
            del stored[key]
        for s in [s for s in states if s <= i and _dead(plans, ("state", s), i)]:
            del states[s]
    return states[len(lead.rows)]


def _dead(plans: Mapping[str, Plan], key: tuple[str, int], i: int) -> bool:
    """Whether no row after ``i`` reads what ``key`` of ``last_use`` names."""
    return all(plan.last_use.get(key, -1) <= i for plan in plans.values())


def _rows(value: Tensor, rows: Tensor) -> Tensor:
    return value[rows]


def _take(values: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    return {name: value[rows] for name, value in values.items()}


def _apply(
    row: Stage,
    name: str,
    states: Mapping[int, State],
    stored: Mapping[tuple[str, int], Mapping[str, Tensor]],
    fresh: Mapping[str, Prediction],
    draw: Draw,
) -> Tensor:
    terms = [] if row.base is None else [(row.a, states[row.base][name])]
    now = {"x0": 0.0, "eps": 0.0}
    for kind, coefs in (("x0", row.x0), ("eps", row.eps)):
        for k, coef in coefs.items():
            if name in stored.get((kind, k), {}):
                terms.append((coef, stored[kind, k][name]))
            elif isinstance(coef, Tensor):
                terms.append((coef, fresh[name].form(kind)))
            else:
                now[kind] = coef
    if any(now.values()):
        terms += fresh[name].weighted(**now)
    y = _sum(terms) if terms else torch.zeros_like(next(iter(states.values()))[name])
    for j, std in row.z.items():
        if isinstance(std, LearnedStd):
            y = y.addcmul_(std.std(stored["var", std.row][name]), draw(name, j))
        else:
            y = _add_scaled(y, draw(name, j), std)
    return y if row.const is None else y.add_(_as(row.const, y))


def _sum(terms: list[tuple[Coef, Tensor]]) -> Tensor:
    """The weighted sum as a new array, in one pass for each array that occurs."""
    totals: dict[int, tuple[Coef, Tensor]] = {}
    for coef, value in terms:
        before = totals[id(value)][0] if id(value) in totals else 0.0
        totals[id(value)] = before + coef, value
    (coef, first), *rest = totals.values()
    y = first * _as(coef, first)
    for coef, value in rest:
        y = _add_scaled(y, value, coef)
    return y


def _as(coef: Coef, like: Tensor) -> Coef:
    return coef.to(like) if isinstance(coef, Tensor) else coef


def _add_scaled(y: Tensor, value: Tensor, coef: Coef) -> Tensor:
    if isinstance(coef, Tensor):
        return y.addcmul_(coef.to(y), value)
    return y.add_(value, alpha=coef)


def _check_plans(plans: Mapping[str, Plan], x: State) -> Plan:
    if plans.keys() != x.keys():
        raise ValueError(f"run: the plans are for {sorted(plans)}, the state has {sorted(x)}.")
    lead = next(iter(plans.values()))
    times = [row.at for row in lead.rows]
    for name, plan in plans.items():
        if [row.at for row in plan.rows] != times:
            raise ValueError(f"run: the plan of field '{name}' evaluates at other times.")
    return lead


def _check_finite(state: State, row: Stage, i: int) -> None:
    for name, y in state.items():
        if not math.isfinite(float(y.detach().sum())):
            bad = (~torch.isfinite(y.detach()).flatten(1).all(1)).nonzero().flatten().tolist()
            raise FloatingPointError(
                f"sampling: field '{name}' is NaN or infinite by step {i} (t={row.at}) for "
                f"{len(bad)} of {len(y)} samples (first: {bad[:5]}). The denoiser's output is not "
                "finite there: check the checkpoint, the precision and the guidance scale."
            )
