"""Putting what was measured in place of what was generated."""

from __future__ import annotations

import torch
from torch import Tensor

from pointdiff.clouds import Cloud
from pointdiff.ops import farthest_points, knn, take

REACH = 5.0
"""Generated points count as lying on the scan up to so many times the median distance between
neighbours of it."""


@torch.no_grad()
def merge(generated: Tensor, scan: Tensor, reach: float = REACH) -> Tensor:
    """``generated`` [n, 3] with the points that lie on the ``scan`` [m, 3] replaced by as many
    farthest points of the scan: [n, 3]. What was seen is kept exactly, and the density is that of
    the generated cloud.
    """
    scan = torch.unique(scan, dim=0)
    if len(scan) < 2:
        return generated
    spacing = knn(scan[None], scan[None], 2)[0][0, :, 1].sqrt().median()
    distance = knn(generated[None], scan[None])[0][0, :, 0].sqrt()
    # no more than the scan has points: the nearest give way first
    order = distance.argsort(stable=True)
    count = min(int((distance < reach * spacing).sum()), len(scan))
    if count == 0:
        return generated
    kept = take(scan[None], farthest_points(scan[None], count))[0]
    return torch.cat([kept, generated[order[count:].sort().values]])


def kept(cloud: Cloud, scan: Cloud) -> Cloud:
    """:func:`merge` of arrays [n, 3] and [m, 3]."""
    merged: Cloud = merge(torch.from_numpy(cloud), torch.from_numpy(scan)).numpy()
    return merged
