"""Time grids over a discrete table: the least-cost trajectory, DDIM's and FastDPM's choices.

A table has entries n = 1..N at increasing times; K steps visit K of them, from the last to the
first, and then sigma = 0. All grids come back as decreasing times, ready for a solver.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq

from shared.schedules import Schedule, VPDiscrete, as_time
from shared.solvers.grids import Grid
from shared.variance import Gamma


def least_cost_path(cost: np.ndarray, edges: int) -> list[int]:
    """The cheapest path from the first to the last node over exactly ``edges`` increasing edges.

    Args:
        cost: [n, n]; ``cost[s, t]`` of the edge s -> t; only s < t is read.
        edges: at least 1, at most n - 1.

    Raises:
        ValueError: no such path, or a cost on the way that is NaN.
    """
    n = len(cost)
    if not 1 <= edges <= n - 1:
        raise ValueError(f"least_cost_path: {edges} edges do not fit {n} nodes; use 1..{n - 1}.")
    forward = np.where(np.triu(np.ones((n, n), dtype=bool), 1), cost, np.inf)
    if np.isnan(forward).any():
        raise ValueError("least_cost_path: the cost holds NaN.")
    best, back = forward[0], []
    for _ in range(edges - 1):
        total = best[:, None] + forward
        back.append(total.argmin(0))
        best = total.min(0)
    if not np.isfinite(best[-1]):
        raise ValueError(f"least_cost_path: no path of {edges} edges with a finite cost.")
    path = [n - 1]
    for came_from in reversed(back):
        path.append(int(came_from[path[-1]]))
    return [0, *reversed(path)]


def variance_cost(schedule: Schedule, gamma: Gamma) -> np.ndarray:
    """cost[s, t] = log(1 - sigma_ts^2/sigma_t^2 Gamma_t) over the table's times: the part of the
    variational bound that depends on the trajectory, up to its factor (Bao et al. 2022a, Eq. 11).
    Infinite where t <= s, or Gamma > 1 makes it undefined."""
    log_snr = np.array([float(schedule.log_snr(t)) for t in gamma.times])
    share = -np.expm1(2.0 * (log_snr[None, :] - log_snr[:, None]))
    left = 1.0 - share * np.array(gamma.values)[None, :]
    usable = np.triu(left > 0.0, 1)
    return np.where(usable, np.log(np.where(usable, left, 1.0)), np.inf)


def least_cost_times(schedule: Schedule, gamma: Gamma, steps: int) -> list[float]:
    """Analytic-DPM's optimal trajectory through ``steps`` times of the table, then 0.

    From twice as far from the end as the first Gamma > 1 (no exact model has one) the estimates
    are not trusted: there the steps are spread evenly, 0.8 times as densely as in proportion
    (Bao et al. 2022a, Appendix G.3).

    Raises:
        ValueError: more steps than the table allows, or a table that is not usable.
    """
    n = len(gamma.times)
    over = [i for i, value in enumerate(gamma.values) if value > 1.0]
    tail = 2 * (n - over[0]) if over else 0
    if not 2 <= steps <= n or tail > n - 2 or (tail and steps < 3):
        raise ValueError(
            f"least_cost_times: {steps} steps over {n} times of which {tail} have no usable "
            "Gamma; use 3 or more steps, at most one per time, and estimate Gamma better."
        )
    head = n - tail
    first = min(math.ceil((1.0 - 0.8 * tail / n) * steps), head, steps - (tail > 0))
    first = max(first, steps - tail)
    cost = variance_cost(schedule, gamma)[:head, :head]
    visited = least_cost_path(cost, first - 1)
    even = [round(n - tail / (steps - first) * k) - 1 for k in range(steps - first)]
    visited += reversed(even)
    return [*(gamma.times[i] for i in reversed(visited)), 0.0]


def table_steps(entries: int, steps: int, spacing: str = "linear") -> list[int]:
    """``steps`` of the entries 1..``entries``, increasing: 'linear' rounds (Analytic-DPM), 'floor'
    rounds down (FastDPM), 'quadratic' is DDIM's, which ends near 0.8 ``entries`` as published.
    Entries that fall together (the first quadratic ones) are visited once: fewer steps then.

    Raises:
        ValueError: an unknown spacing, fewer than two steps or more than entries.
    """
    if spacing == "quadratic":
        found = [int(s) + 1 for s in np.linspace(0, math.sqrt(0.8 * entries), steps) ** 2]
    elif spacing in ("linear", "floor"):
        stride = (entries - 1) / max(steps - 1, 1)
        whole = round if spacing == "linear" else math.floor
        found = [whole(1.0 + i * stride) for i in range(steps)]
    else:
        raise ValueError(f"table_steps: '{spacing}' is not one of linear, floor, quadratic.")
    if not 2 <= steps <= entries:
        raise ValueError(f"table_steps: {steps} steps, a table of {entries}; use 2 or more.")
    return sorted(set(found))


def table_times(table: VPDiscrete, steps: int, spacing: str = "linear") -> list[float]:
    """The times of :func:`table_steps`, decreasing, then 0."""
    found = table_steps(table.steps, steps, spacing)
    return [*(n / table.steps for n in reversed(found)), 0.0]


def fastdpm_betas(table: VPDiscrete, steps: int, spacing: str = "quadratic") -> list[float]:
    """FastDPM's VAR noise levels eta_i, i < ``steps``, from beta_1 upwards with the product of
    1 - eta equal to the table's (Kong & Ping 2021, Section 3.2): 'linear' in i, or 'quadratic',
    beta_1 (1 + i x)^2 with x below 0.95 / (sqrt(beta_1) steps) as published; too few quadratic
    steps reach the bound and start from less noise.

    Raises:
        ValueError: an unknown spacing or fewer than two steps.
    """
    first, index = table.betas[0], np.arange(steps)
    if spacing not in ("linear", "quadratic") or steps < 2:
        raise ValueError("fastdpm_betas: needs 2 or more steps, 'linear' or 'quadratic'.")

    def levels(x: float) -> np.ndarray:
        if spacing == "linear":
            return np.linspace(first, x, steps)
        return first * (1.0 + index * x) ** 2

    def excess(x: float) -> float:
        return float(np.log1p(-levels(x)).sum() - np.log1p(-np.array(table.betas)).sum())

    low, high = (first, 0.99) if spacing == "linear" else (0.0, 0.95 / math.sqrt(first) / steps)
    x = high if excess(high) > 0.0 else brentq(excess, low, high, xtol=1e-14)
    return [float(eta) for eta in levels(x)]


def fastdpm_times(table: VPDiscrete, steps: int, spacing: str = "quadratic") -> list[float]:
    """The times with the noise of :func:`fastdpm_betas`, decreasing, then 0. The original finds
    them through an approximation of log alpha by gamma functions; here the table's own
    interpolation gives them exactly."""
    log_alpha = 0.5 * np.log1p(-np.array(fastdpm_betas(table, steps, spacing))).cumsum()
    times = [float(table.t_from_log_alpha(as_time(value))) for value in reversed(log_alpha)]
    return [*times, 0.0]


# -- as grids ---------------------------------------------------------------------------------


class TableGrid(Grid):
    """Decreasing times that end with 0; a table decides on its ends itself."""

    @abstractmethod
    def place(self, schedule: Schedule, intervals: int) -> list[float]: ...

    def __call__(
        self,
        schedule: Schedule,
        intervals: int,
        t_start: float | None = None,
        t_end: float | None = None,
    ) -> list[float]:
        """
        Raises:
            ValueError: ends asked for, or a schedule or number of intervals that does not fit.
        """
        if t_start is not None or t_end is not None:
            raise ValueError(
                f"time grid: {type(self).__name__} fixes its ends; drop t_start and t_end."
            )
        return self.place(schedule, intervals)


def _table(schedule: Schedule) -> VPDiscrete:
    if not isinstance(schedule, VPDiscrete):
        raise ValueError(
            f"time grid: steps of a table need a VPDiscrete schedule, not "
            f"{type(schedule).__name__}; choose another grid."
        )
    if schedule.from_zero:
        raise ValueError(
            "time grid: this table is noisy at time 0 already (from_zero); use PowerTimes."
        )
    return schedule


@dataclass(frozen=True)
class TableTimes(TableGrid):
    """:func:`table_times` of the schedule's own table."""

    spacing: str = "linear"

    def place(self, schedule: Schedule, intervals: int) -> list[float]:
        return table_times(_table(schedule), intervals, self.spacing)


@dataclass(frozen=True)
class FastDPMTimes(TableGrid):
    """:func:`fastdpm_times` of the schedule's own table."""

    spacing: str = "quadratic"

    def place(self, schedule: Schedule, intervals: int) -> list[float]:
        return fastdpm_times(_table(schedule), intervals, self.spacing)


@dataclass(frozen=True)
class LeastCostTimes(TableGrid):
    """:func:`least_cost_times`; of several fields' tables the first counts, that of the field
    which leads."""

    gamma: Gamma | Mapping[str, Gamma]

    def place(self, schedule: Schedule, intervals: int) -> list[float]:
        first = self.gamma if isinstance(self.gamma, Gamma) else next(iter(self.gamma.values()))
        return least_cost_times(schedule, first, intervals)
