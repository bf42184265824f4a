"""Point operations in plain torch: neighbours, farthest points, grouping and interpolation.

Points are [batch, n, 3], features [batch, channels, n]. Distances are sums of squared differences
(no cancellation), computed in blocks of rows: nothing of size n x m is ever kept. Indices carry no
gradient; distances, groups and interpolations do.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pointdiff import accelerated

BLOCK = 1 << 18
"""Distances kept at a time."""


def _blocks(query: Tensor, points: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the queries with their squared distances [batch, rows, n] to all points."""
    rows = max(1, BLOCK // max(1, len(points) * points.shape[1]))
    for start in range(0, max(1, query.shape[1]), rows):
        part = slice(start, start + rows)
        yield part, squared_distances(query[:, part], points)


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """|a_i - b_j|^2 of [batch, n, 3] and [batch, m, 3], the full matrix [batch, n, m]."""
    total = (a[:, :, None, 0] - b[:, None, :, 0]).square_()
    for axis in range(1, a.shape[-1]):
        gap = a[:, :, None, axis] - b[:, None, :, axis]
        total.addcmul_(gap, gap)
    return total


def knn(query: Tensor, points: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """The ``k`` nearest ``points`` of every query, nearest first: squared distances (with their
    gradient) and indices, both [batch, m, k].

    Raises:
        ValueError: fewer than ``k`` points.
    """
    if not 0 < k <= points.shape[1]:
        raise ValueError(f"knn: k={k} neighbours of {points.shape[1]} points.")
    with torch.no_grad():
        if accelerated.available(query):
            index = accelerated.knn(query, points, k)
        else:
            parts = [_nearest(d, k) for _, d in _blocks(query.detach(), points.detach())]
            index = torch.cat(parts, 1)
    gaps = query[:, :, None] - take(points, index)
    return gaps.square().sum(-1), index


def _nearest(distances: Tensor, k: int) -> Tensor:
    if k == 1:
        return distances.argmin(-1, keepdim=True)
    return distances.topk(k, dim=-1, largest=False).indices


@torch.no_grad()
def ball_query(query: Tensor, points: Tensor, radius: float, k: int) -> tuple[Tensor, Tensor]:
    """The first ``k`` points in index order with |p - q| < ``radius``: indices [batch, m, k],
    padded with the first one, or 0 where there are none, and how many are real [batch, m] (the
    convention of PointNet++, Qi et al. 2017)."""
    if accelerated.available(query):
        return accelerated.ball_query(query, points, radius, k)
    found = [_first_hits(d < radius * radius, k) for _, d in _blocks(query, points)]
    index, count = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    padding = torch.arange(k, device=index.device) >= count[..., None]
    return torch.where(padding, index[..., :1], index), count


def _first_hits(inside: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Columns of the first ``k`` true entries of every row of [batch, rows, n], and how many."""
    rank = inside.cumsum(-1, dtype=torch.int32)
    index = torch.zeros(*inside.shape[:2], k, dtype=torch.long, device=inside.device)
    batch, row, column = torch.nonzero(inside & (rank <= k), as_tuple=True)
    index[batch, row, rank[batch, row, column].long() - 1] = column
    return index, rank[..., -1].clamp(max=k).long()


@torch.no_grad()
def farthest_points(points: Tensor, n: int, skip_origin: bool = False) -> Tensor:
    """Indices [batch, n] of farthest point sampling from point 0 on; ties go to the lowest index.

    Args:
        skip_origin: never choose points with |x|^2 <= 1e-3 (other than point 0), as the published
            CUDA kernel of PointNet++ does.

    Raises:
        ValueError: more than there are.
    """
    if not 0 < n <= points.shape[1]:
        raise ValueError(f"farthest_points: {n} of {points.shape[1]} points.")
    if accelerated.available(points) and not skip_origin:
        return accelerated.farthest_points(points, n)
    columns = points.unbind(-1)
    nearest = torch.full_like(columns[0], torch.inf)
    if skip_origin:
        nearest[points.square().sum(-1) <= 1e-3] = -torch.inf
    chosen = torch.zeros(len(points), n, dtype=torch.long, device=points.device)
    last = chosen[:, :1]
    for i in range(1, n):
        distance = torch.zeros_like(nearest)
        for column in columns:
            gap = column - column.gather(1, last)
            distance.addcmul_(gap, gap)
        torch.minimum(nearest, distance, out=nearest)
        last = nearest.argmax(1, keepdim=True)
        chosen[:, i] = last[:, 0]
    return chosen


def take(points: Tensor, index: Tensor) -> Tensor:
    """Rows of ``points`` [batch, n, c]: index [batch, ...] -> [batch, ..., c]."""
    flat = index.flatten(1)[..., None].expand(-1, -1, points.shape[-1])
    return points.gather(1, flat).reshape(*index.shape, points.shape[-1])


def group(features: Tensor, index: Tensor) -> Tensor:
    """Columns of ``features`` [batch, c, n]: index [batch, ...] -> [batch, c, ...]."""
    flat = index.flatten(1)[:, None].expand(-1, features.shape[1], -1)
    return features.gather(2, flat).reshape(*features.shape[:2], *index.shape[1:])


def inverse_weights(distances: Tensor) -> Tensor:
    """1 / (d + 1e-8), normalised over the last axis."""
    weights = 1.0 / (distances + 1e-8)
    return weights / weights.sum(-1, keepdim=True)


def interpolate(query: Tensor, points: Tensor, features: Tensor, k: int = 3) -> Tensor:
    """Features [batch, c, m] at the queries: the mean of those [batch, c, n] of the ``k`` nearest
    points, weighted with their inverse distances (PointNet++, Eq. 2 with p = 1)."""
    squared, index = knn(query, points, k)
    # a query on a point has no slope there; 0 instead of NaN
    distances = torch.where(squared > 0, squared, 1.0).sqrt() * (squared > 0)
    return (group(features, index) * inverse_weights(distances)[:, None]).sum(-1)
