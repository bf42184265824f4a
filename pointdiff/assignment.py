"""One-to-one assignments of least cost: exact, or within a guaranteed share of the optimum."""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment


def assign(cost: np.ndarray, tolerance: float | None = None) -> np.ndarray:
    """The column [n] given to every row of ``cost`` [n, n], non-negative.

    Args:
        tolerance: None: the best assignment; else one whose total is at most (1 + tolerance)
            times the best, by the auction algorithm.

    Raises:
        ValueError: a tolerance that is not positive.
    """
    if tolerance is None:
        return np.asarray(linear_sum_assignment(cost)[1])
    if not tolerance > 0:
        raise ValueError(f"assign: tolerance={tolerance}; give a positive number or None.")
    # every row pays at least its cheapest column, and every column its cheapest row
    bound = max(cost.min(1).mean(), cost.min(0).mean())
    if bound == 0:
        return np.asarray(linear_sum_assignment(cost)[1])
    return auction(cost, tolerance * bound)


def auction(cost: np.ndarray, bid: float) -> np.ndarray:
    """The auction algorithm in rounds (Bertsekas 1988) with decreasing steps: all rows without a
    column bid at once, and the total is at most n ``bid`` above the optimum."""
    prices = np.zeros(len(cost))
    step = max(bid, float(cost.mean()) / 4)
    while True:
        owner = _settle(cost, prices, step)
        if step <= bid:
            return owner
        step = max(bid, step / 5)


def _settle(cost: np.ndarray, prices: np.ndarray, step: float) -> np.ndarray:
    """Columns of all rows, each within ``step`` of its best at ``prices`` [n], which rise."""
    n = len(cost)
    column, row = np.full(n, -1), np.full(n, -1)
    free = np.arange(n)
    while len(free):
        net = cost[free] + prices
        best = net.argmin(1)
        first = net[np.arange(len(free)), best]
        net[np.arange(len(free)), best] = np.inf
        second = net.min(1) if n > 1 else first
        offers = prices[best] + second - first + step
        order = np.argsort(offers, kind="stable")  # the highest offer for a column comes last
        row_before = row[best]
        row[best[order]] = free[order]
        prices[best[order]] = offers[order]
        losers = row_before[row_before >= 0]
        column[losers] = -1
        winners = row[best] == free
        column[free[winners]] = best[winners]
        free = np.union1d(free[~winners], losers)
    return column
