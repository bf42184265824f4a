"""Layers of the conditional PointNet++ of PDR (Lyu et al. 2022, "A Conditional Point
Diffusion-Refinement Paradigm for 3D Point Cloud Completion").

Points are [batch, n, 3], features [batch, channels, n]; a grouped feature is
[batch, channels, n, neighbours].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pointdiff.ops import ball_query, farthest_points, group, inverse_weights, knn, take


class Norm(nn.GroupNorm):
    """Group normalisation of the first channels, as many as fill the groups; the rest, which
    carry positions, pass unchanged."""

    def __init__(self, channels: int, groups: int = 32) -> None:
        groups = min(groups, channels)
        super().__init__(groups, channels - channels % groups)

    def forward(self, x: Tensor) -> Tensor:
        normed = super().forward(x[:, : self.num_channels])
        if x.shape[1] == self.num_channels:
            return normed
        return torch.cat([normed, x[:, self.num_channels :]], 1)


def _stage(widths: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in zip(widths, widths[1:], strict=False):
        layers += [nn.Conv2d(before, after, 1), Norm(after), nn.ReLU()]
    return nn.Sequential(*layers)


class PointMlp(nn.Module):
    """The same layers for every point, [batch, widths[0], n, k] -> [batch, widths[-1], n, k].
    Embeddings are added after the first (time), the second (condition) and the last layer."""

    def __init__(
        self,
        widths: Sequence[int],
        time: int = 0,
        condition: int = 0,
        second: int = 0,
        residual: bool = True,
    ) -> None:
        super().__init__()
        self.first, self.second = _stage(widths[:2]), _stage(widths[1:3])
        self.rest = _stage(widths[2:])
        self.time = nn.Linear(time, widths[1]) if time else None
        self.condition = nn.Linear(condition, widths[2]) if condition else None
        self.second_condition = nn.Linear(second, widths[-1]) if second else None
        self.residual = residual
        wide = residual and widths[0] != widths[-1]
        self.shortcut = nn.Conv2d(widths[0], widths[-1], 1) if wide else None

    def forward(
        self,
        x: Tensor,
        time: Tensor | None = None,
        condition: Tensor | None = None,
        second: Tensor | None = None,
    ) -> Tensor:
        h = _shift(self.first(x), self.time, time)
        h = _shift(self.second(h), self.condition, condition)
        h = _shift(self.rest(h), self.second_condition, second)
        if not self.residual:
            return h
        return h + (x if self.shortcut is None else self.shortcut(x))


def _shift(h: Tensor, layer: nn.Linear | None, embedding: Tensor | None) -> Tensor:
    if layer is None or embedding is None:
        return h
    shift: Tensor = layer(embedding)[..., None, None]
    return h + shift


class AttentionPool(nn.Module):
    """Weighted sum over the neighbours, with weights per channel from the query and the keys
    (Section 3.3 of the paper); neighbours beyond ``count`` have none."""

    def __init__(self, query: int, key: int, out: int) -> None:
        super().__init__()
        wide = max(query, 32) + max(key, 32)
        narrow = min(wide, out)
        self.query = nn.Conv2d(query, max(query, 32), 1)
        self.key = nn.Conv2d(key, max(key, 32), 1)
        self.score = nn.Sequential(
            nn.ReLU(), Norm(wide), nn.Conv2d(wide, narrow, 1),
            nn.ReLU(), Norm(narrow), nn.Conv2d(narrow, out, 1),
        )  # fmt: skip
        self.value = nn.Sequential(nn.Conv2d(out, out, 1), Norm(out), nn.ReLU())

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, count: Tensor | None = None
    ) -> Tensor:
        """``query`` [batch, q, n], ``key`` [batch, c, n, k], ``value`` [batch, out, n, k],
        ``count`` [batch, n] (None: all k) -> [batch, out, n]."""
        neighbours = key.shape[-1]
        asked = self.query(query[..., None]).expand(-1, -1, -1, neighbours)
        scores = self.score(torch.cat([asked, self.key(key)], 1))
        if count is not None:
            real = torch.arange(neighbours, device=key.device) < count.clamp(min=1)[..., None]
            scores = scores.masked_fill(~real[:, None], -1e9)
        pooled: Tensor = (self.value(value) * scores.softmax(-1)).sum(-1)
        return pooled


def ball_group(
    centres: Tensor, points: Tensor, features: Tensor, radius: float, k: int, subset: bool
) -> tuple[Tensor, Tensor]:
    """Features, relative, absolute and centre coordinates of ``k`` neighbours in a ball,
    [batch, c + 9, m, k], and how many are real [batch, m]. Unless the centres are a ``subset`` of
    the points a ball may be empty: it then holds its centre with zero features."""
    index, count = ball_query(centres, points, radius, k)
    centre = centres.transpose(1, 2)[..., None].expand(-1, -1, -1, k)
    absolute, found = group(points.transpose(1, 2), index), group(features, index)
    if not subset:
        empty = (count == 0)[:, None, :, None]
        absolute = torch.where(empty, centre, absolute)
        found = found.masked_fill(empty, 0.0)
    return torch.cat([found, absolute - centre, absolute, centre], 1), count


def knn_group(query: Tensor, points: Tensor, features: Tensor, k: int) -> Tensor:
    """Features, squared distance, its normalised inverse, absolute, relative and query
    coordinates of the ``k`` nearest points, [batch, c + 11, m, k]."""
    squared, index = knn(query, points, k)
    absolute = group(points.transpose(1, 2), index)
    centre = query.transpose(1, 2)[..., None].expand(-1, -1, -1, k)
    distances = torch.stack([squared, inverse_weights(squared)], 1)
    return torch.cat([group(features, index), distances, absolute, absolute - centre, centre], 1)


class SetAbstraction(nn.Module):
    """Features of ``points`` farthest points, each from a ball of neighbours."""

    def __init__(
        self,
        widths: Sequence[int],
        points: int,
        radius: float,
        neighbours: int,
        embeddings: tuple[int, int, int] = (0, 0, 0),
    ) -> None:
        super().__init__()
        self.points, self.radius, self.neighbours = points, radius, neighbours
        self.mlp = PointMlp([widths[0] + 9, *widths[1:]], *embeddings)
        self.attention = AttentionPool(widths[0], widths[0] + 9, widths[-1])

    def forward(
        self, points: Tensor, features: Tensor, *embeddings: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """[batch, n, 3] and [batch, widths[0], n] -> centres [batch, m, 3] and their features
        [batch, widths[-1], m]."""
        chosen = farthest_points(points, self.points, skip_origin=True)
        centres = take(points, chosen)
        keys, count = ball_group(
            centres, points, features, self.radius, self.neighbours, subset=True
        )
        values = self.mlp(keys, *embeddings)
        return centres, self.attention(group(features, chosen), keys, values, count)


class FeatureTransfer(nn.Module):
    """Carries features of one cloud to the points of another, from a ball around each."""

    def __init__(self, widths: Sequence[int], query: int, radius: float, neighbours: int) -> None:
        super().__init__()
        self.radius, self.neighbours = radius, neighbours
        self.mlp = PointMlp([widths[0] + 9, *widths[1:]])
        self.attention = AttentionPool(query, widths[0] + 9, widths[-1])

    def forward(self, points: Tensor, features: Tensor, to: Tensor, query: Tensor) -> Tensor:
        """[batch, m, 3], [batch, widths[0], m] -> [batch, widths[-1], n] at ``to`` [batch, n, 3],
        whose own features ``query`` [batch, q, n] ask."""
        keys, count = ball_group(to, points, features, self.radius, self.neighbours, subset=False)
        pooled: Tensor = self.attention(query, keys, self.mlp(keys), count)
        return pooled


class FeaturePropagation(nn.Module):
    """Carries features of few points back to many, from the nearest ``k`` of the few."""

    def __init__(
        self,
        widths: Sequence[int],
        skip: int,
        k: int,
        embeddings: tuple[int, int, int] = (0, 0, 0),
    ) -> None:
        super().__init__()
        self.k = k
        time, condition, second = embeddings
        inner = [widths[0] + 11, *widths[1:]]
        self.gather = PointMlp(inner, 0, second)
        self.attention = AttentionPool(skip, inner[0], widths[-1])
        self.mlp = PointMlp([widths[-1] + skip + 3, *widths[1:]], time, condition)

    def forward(
        self,
        points: Tensor,
        skip: Tensor,
        few: Tensor,
        features: Tensor,
        time: Tensor | None = None,
        condition: Tensor | None = None,
        second: Tensor | None = None,
    ) -> Tensor:
        """``points`` [batch, n, 3] with encoder features ``skip``, and ``few`` [batch, m, 3] with
        ``features`` [batch, widths[0], m] -> [batch, widths[-1], n]."""
        keys = knn_group(points, few, features, self.k)
        values = self.gather(keys, None, second)
        pooled = self.attention(skip, keys, values)
        h = torch.cat([pooled, skip, points.transpose(1, 2)], 1)[..., None]
        out: Tensor = self.mlp(h, time, condition)[..., 0]
        return out


class GlobalFeature(nn.Module):
    """One vector [batch, last[-1]] of a whole cloud [batch, first[0], n]: a PointNet in two
    stages, the second of which also sees the maximum over the first (Yuan et al. 2018)."""

    def __init__(self, first: Sequence[int], last: Sequence[int]) -> None:
        super().__init__()
        self.first = PointMlp(first, residual=False)
        self.last = PointMlp([2 * first[-1], *last], residual=False)

    def forward(self, cloud: Tensor) -> Tensor:
        h = self.first(cloud[..., None])
        h = self.last(torch.cat([h, h.amax(2, keepdim=True).expand_as(h)], 1))
        return torch.flatten(h.amax(2), 1)


def time_features(code: Tensor, width: int) -> Tensor:
    """Sines, then cosines of ``code`` [batch] at frequencies from 1 to 1/10,000, in its dtype."""
    steps = torch.arange(width // 2, dtype=code.dtype, device=code.device)
    angle = code[:, None] * 1e4 ** (-steps / (width // 2 - 1))
    return torch.cat([angle.sin(), angle.cos()], 1)


class TimeCodeEmbedding(nn.Module):
    """Time code [batch] -> [batch, 4 ``width``]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.first, self.last = nn.Linear(width, 4 * width), nn.Linear(4 * width, 4 * width)

    def forward(self, code: Tensor) -> Tensor:
        return F.silu(self.last(F.silu(self.first(time_features(code, self.width)))))
