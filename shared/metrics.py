"""Estimates with their size and uncertainty; the statistics that every report uses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Estimate:
    """A measured value with the number of samples behind it and a 95 % interval."""

    value: float
    n: int
    low: float
    high: float

    def __str__(self) -> str:
        known = math.isfinite(self.low) or math.isfinite(self.high)
        interval = f" [{self.low:.4g}, {self.high:.4g}]" if known else ""
        return f"{self.value:.4g}{interval} (n={self.n})"

    def __float__(self) -> float:
        return self.value

    def as_json(self) -> dict[str, float | int | None]:
        """JSON has no NaN: an undefined value is null."""
        value, low, high = (
            x if math.isfinite(x) else None for x in (self.value, self.low, self.high)
        )
        return {"value": value, "n": self.n, "low": low, "high": high}


def proportion(successes: int, n: int) -> Estimate:
    """A rate with its Wilson interval; NaN for n = 0.

    Raises:
        ValueError: ``successes`` is not between 0 and ``n``.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"proportion: {successes} successes of {n}.")
    if n == 0:
        return Estimate(math.nan, 0, math.nan, math.nan)
    interval = stats.binomtest(successes, n).proportion_ci(method="wilson")
    return Estimate(successes / n, n, float(interval.low), float(interval.high))


def mean(values: Sequence[float] | np.ndarray) -> Estimate:
    """A mean with its Student interval (no width at n = 1: NaN ends). NaN values give NaN."""
    x = np.asarray(values, dtype=np.float64)
    n = x.size
    if n == 0:
        return Estimate(math.nan, 0, math.nan, math.nan)
    centre = float(x.mean())
    if n == 1:
        return Estimate(centre, 1, math.nan, math.nan)
    half = float(stats.t.ppf(0.975, n - 1) * x.std(ddof=1) / math.sqrt(n))
    return Estimate(centre, n, centre - half, centre + half)
