"""Intervals of statistics that are not means."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy import stats

from shared.metrics import Estimate


def jackknife(
    statistic: Callable[[np.ndarray], float], values: np.ndarray, groups: int = 10
) -> Estimate:
    """A statistic of ``values`` [n, ...] with the 95 % interval of the jackknife that leaves out
    one of ``groups`` parts at a time (Efron & Tibshirani 1993, An Introduction to the Bootstrap,
    Section 11.5). For smooth statistics; its bias, if it has one, stays.

    NaN ends where there are fewer than two values per group.
    """
    n = len(values)
    value = float(statistic(values)) if n else math.nan
    if n < 2 * groups:
        return Estimate(value, n, math.nan, math.nan)
    part = np.arange(n) % groups
    left = np.array([statistic(values[part != g]) for g in range(groups)])
    error = math.sqrt((groups - 1) / groups * float(np.square(left - left.mean()).sum()))
    half = float(stats.t.ppf(0.975, groups - 1)) * error
    return Estimate(value, n, value - half, value + half)
