"""Numbers of 4-node graphlets around every node, by matrix products instead of enumeration.

The 15 orbits of graphlets with 2 to 4 nodes are numbered as by Przulj (2007). Copies of a
graphlet as any subgraph follow from degrees, common neighbours and triangles; what a copy is as
an *induced* subgraph is then found from the densest graphlet down, because a copy of a sparse
graphlet lies in a known number of ways in each denser one (Hocevar & Demsar 2014).
"""

from __future__ import annotations

import numpy as np


def orbit_counts(adjacency: np.ndarray) -> np.ndarray:
    """Induced orbit counts of every node, integers [n, 15], of a 0/1 matrix [n, n] with zero
    diagonal. Time n^2 per edge."""
    a = np.asarray(adjacency, dtype=np.float64)
    degree = a.sum(1)
    common = a @ a
    np.fill_diagonal(common, 0.0)
    near = common * a  # triangles at an edge
    triangles = near.sum(1) / 2.0
    o = np.zeros((len(a), 15))
    o[:, 0] = degree
    o[:, 3] = triangles
    o[:, 2] = degree * (degree - 1) / 2 - triangles
    o[:, 1] = a @ (degree - 1) - 2 * triangles
    _four(o, a, degree, common, near, triangles)
    return np.rint(o).astype(np.int64)


def _four(
    o: np.ndarray,
    a: np.ndarray,
    degree: np.ndarray,
    common: np.ndarray,
    near: np.ndarray,
    triangles: np.ndarray,
) -> None:
    """Orbits 4 to 14, densest graphlet first; each line is (copies) - (copies in denser ones)."""
    o[:, 14] = _cliques(a)
    o[:, 13] = (a * common * (common - 1)).sum(1) / 2 - 3 * o[:, 14]
    tips = near - a  # further common neighbours of an edge's ends, at a triangle
    o[:, 12] = np.einsum("va,ab,vb->v", a, tips, a, optimize=True) / 2 - 3 * o[:, 14]
    o[:, 11] = triangles * (degree - 2) - 2 * o[:, 13] - 3 * o[:, 14]
    o[:, 10] = near @ (degree - 2) - 2 * o[:, 12] - 2 * o[:, 13] - 6 * o[:, 14]
    o[:, 9] = a @ triangles - near.sum(1) - 2 * o[:, 12] - 3 * o[:, 14]
    squares = (common * (common - 1)).sum(1) / 2
    o[:, 8] = squares - o[:, 12] - o[:, 13] - 3 * o[:, 14]
    claws = degree * (degree - 1) * (degree - 2) / 6
    o[:, 7] = claws - o[:, 11] - o[:, 13] - o[:, 14]
    leaves = a @ ((degree - 1) * (degree - 2) / 2)
    o[:, 6] = leaves - o[:, 9] - o[:, 10] - 2 * o[:, 12] - o[:, 13] - 3 * o[:, 14]
    middles = (degree - 1) * (a @ (degree - 1)) - near.sum(1)
    inner = 2 * o[:, 8] + o[:, 10] + 2 * o[:, 11] + 2 * o[:, 12] + 4 * o[:, 13] + 6 * o[:, 14]
    o[:, 5] = middles - inner
    ends = common @ (degree - 1) - 2 * triangles
    outer = 2 * o[:, 8] + 2 * o[:, 9] + o[:, 10] + 4 * o[:, 12] + 2 * o[:, 13] + 6 * o[:, 14]
    o[:, 4] = ends - outer


def _cliques(a: np.ndarray) -> np.ndarray:
    """Numbers of complete graphs of 4 nodes at every node, [n]."""
    first, second = np.nonzero(np.triu(a))
    shared = a[first] * a[second]  # [edges, n]
    at_edge = ((shared @ a) * shared).sum(1) / 2
    total = np.bincount(first, at_edge, len(a)) + np.bincount(second, at_edge, len(a))
    return total / 3.0
