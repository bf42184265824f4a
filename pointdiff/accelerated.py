"""The same neighbours from pytorch3d's kernels, where it is installed and tensors are on a GPU."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def library() -> Any:
    """``pytorch3d.ops``, or None."""
    try:
        return importlib.import_module("pytorch3d.ops")
    except ImportError:
        return None


def available(x: Tensor) -> bool:
    """Whether the kernels serve this tensor."""
    return x.is_cuda and library() is not None


def knn(query: Tensor, points: Tensor, k: int) -> Tensor:
    """Indices [batch, m, k], nearest first."""
    found: Tensor = library().knn_points(query, points, K=k).idx
    return found


def ball_query(query: Tensor, points: Tensor, radius: float, k: int) -> tuple[Tensor, Tensor]:
    """Indices [batch, m, k] and counts [batch, m] as :func:`pointdiff.ops.ball_query`."""
    index = library().ball_query(query, points, K=k, radius=radius, return_nn=False).idx
    count = (index >= 0).sum(-1)  # it pads with -1
    return torch.where(index >= 0, index, index[..., :1].clamp(min=0)), count


def farthest_points(points: Tensor, n: int) -> Tensor:
    """Indices [batch, n], from point 0 on."""
    found: Tensor = library().sample_farthest_points(points, K=n, random_start_point=False)[1]
    return found
