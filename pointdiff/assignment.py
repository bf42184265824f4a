"""One-to-one assignments of points of least cost: exact, or exact in blocks of neighbours."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from scipy.spatial.transform import Rotation

from shared.randomness import stream

BLOCK = 128
"""Points of a block: smaller ones are quicker, larger ones nearer to the optimum."""


def assign(
    a: np.ndarray, b: np.ndarray, sweeps: int | None = None, squared: bool = False
) -> np.ndarray:
    """The row of ``b`` [n, 3] given to every row of ``a`` [n, 3], with the smallest sum of
    distances (or their squares).

    Args:
        sweeps: None: the optimum, which takes O(n^3) time and O(n^2) memory; else so often all
            pairs are parted into blocks of neighbours, turned anew each time, in which the
            partners are exchanged in the best way. O(n) memory, and O(n log n) time for a sweep.

    Raises:
        ValueError: a negative number of sweeps.
    """
    if sweeps is None:
        return _best(a, b, squared)
    if sweeps < 0:
        raise ValueError(f"assign: sweeps={sweeps}; give 0 or more, or None for the optimum.")
    partner = np.empty(len(a), np.int64)
    for rows, columns in _blocks(a, b):
        partner[rows] = columns[_best(a[rows], b[columns], squared)]
    generator = stream(0, 0, "assignment", 0)
    for _ in range(sweeps):
        share, turn = generator.random(), Rotation.random(random_state=generator).as_matrix()
        between = (a + share * (b[partner] - a)) @ turn
        for rows, _ in _blocks(between, between):
            columns = partner[rows]
            partner[rows] = columns[_best(a[rows], b[columns], squared)]
    return partner


def _best(a: np.ndarray, b: np.ndarray, squared: bool) -> np.ndarray:
    cost = cdist(a, b, "sqeuclidean" if squared else "euclidean")
    return np.asarray(linear_sum_assignment(cost)[1])


def _blocks(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows of two clouds of one size, halved along the longest side of both until there are at
    most :data:`BLOCK` in a part."""
    parts = [(np.arange(len(x)), np.arange(len(y)))]
    while parts:
        rows, columns = parts.pop()
        if len(rows) <= BLOCK:
            yield rows, columns
            continue
        axis = int(np.ptp(np.concatenate([x[rows], y[columns]]), axis=0).argmax())
        halves = (_halved(rows, x[rows, axis]), _halved(columns, y[columns, axis]))
        parts += zip(*halves, strict=True)


def _halved(index: np.ndarray, along: np.ndarray) -> list[np.ndarray]:
    half = len(index) // 2
    return np.split(index[np.argpartition(along, half)], [half])
