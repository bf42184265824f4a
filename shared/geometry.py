"""Geometries: the linear subspaces that data live in, as orthogonal projections.

A geometry is stateless; the node mask of a batch is an argument. ``mask`` is boolean
``[batch, nodes]`` (True = a real node) or None when nothing is padded. Padding is exactly zero
after every operation here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


def expand_mask(mask: Tensor, x: Tensor) -> Tensor:
    """``mask`` [batch, nodes] with trailing axes added to broadcast against ``x``."""
    return mask.reshape(*mask.shape, *(1,) * (x.dim() - mask.dim()))


class Geometry(ABC):
    """A subspace of the dense array of one field."""

    @abstractmethod
    def project(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The orthogonal projection of ``x`` [batch, ...] onto the subspace."""

    @abstractmethod
    def dim(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Degrees of freedom of each sample, float64 [batch]."""

    def noise(self, white: Tensor, mask: Tensor | None = None) -> Tensor:
        """A standard normal on the subspace, made of white noise of the full shape."""
        return self.project(white, mask)

    def inner(self, x: Tensor, y: Tensor) -> Tensor:
        """Inner product of each sample [batch] over its degrees of freedom, for arrays on the
        subspace."""
        return (x * y).flatten(1).sum(1)

    def norm_squared(self, x: Tensor) -> Tensor:
        """Squared length of each sample [batch] over its degrees of freedom; chi-squared with
        ``dim`` degrees for :meth:`noise`. ``x`` must lie on the subspace."""
        return self.inner(x, x)

    def gradient(self, slopes: Tensor, mask: Tensor | None = None) -> Tensor:
        """The gradient over the degrees of freedom, given the derivatives of a function by every
        entry of the array as if all were free."""
        return self.project(slopes, mask)

    def extent(self, shape: tuple[int, ...], nodes: int | None) -> tuple[int, ...]:
        """Shape of one sample with ``nodes`` real nodes, cut out of its padded ``shape``."""
        return shape if nodes is None else (nodes, *shape[1:])


def _mean_free(x: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return x - x.mean(1, keepdim=True)
    weight = expand_mask(mask, x).to(x.dtype)
    x = x * weight
    count = weight.sum(1, keepdim=True).clamp(min=1.0)
    return x - weight * (x.sum(1, keepdim=True) / count)


def _count(x: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None:
        return mask.sum(1).to(torch.float64)
    return torch.full((x.shape[0],), float(x.shape[1]), dtype=torch.float64, device=x.device)


@dataclass(frozen=True)
class Euclidean(Geometry):
    """The whole space: images, vectors."""

    def project(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x

    def dim(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        size = float(x[0].numel())
        return torch.full((x.shape[0],), size, dtype=torch.float64, device=x.device)

    def extent(self, shape: tuple[int, ...], nodes: int | None) -> tuple[int, ...]:
        return shape


@dataclass(frozen=True)
class Points(Geometry):
    """Features of a padded set of nodes, ``[batch, nodes, features]``."""

    def project(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x if mask is None else x * expand_mask(mask, x).to(x.dtype)

    def dim(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return _count(x, mask) * x[0, 0].numel()


@dataclass(frozen=True)
class CentredPoints(Geometry):
    """Positions with zero centre of mass, ``[batch, nodes, 3]`` (Hoogeboom et al. 2022, Eq. 6):
    (n - 1) * 3 degrees of freedom."""

    def project(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return _mean_free(x, mask)

    def dim(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return (_count(x, mask) - 1.0).clamp(min=0.0) * x[0, 0].numel()


@dataclass(frozen=True)
class SymmetricEdges(Geometry):
    """Symmetric matrices with zero diagonal, ``[batch, nodes, nodes]`` or
    ``[batch, nodes, nodes, features]``.

    Noise mirrors the upper triangle (Jo et al. 2022, GDSS): every edge is a standard normal,
    while projecting a full Gaussian matrix would halve its variance.
    """

    def project(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self._hollow(0.5 * (x + x.transpose(1, 2)), mask)

    def noise(self, white: Tensor, mask: Tensor | None = None) -> Tensor:
        nodes = white.shape[1]
        upper = torch.ones(nodes, nodes, dtype=white.dtype, device=white.device).triu(1)
        upper = white * upper.reshape(1, nodes, nodes, *(1,) * (white.dim() - 3))
        return self._hollow(upper + upper.transpose(1, 2), mask)

    def inner(self, x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (x * y).flatten(1).sum(1)  # every edge stands twice

    def gradient(self, slopes: Tensor, mask: Tensor | None = None) -> Tensor:
        return 2.0 * self.project(slopes, mask)  # both entries of an edge move with it

    def dim(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        n = _count(x, mask)
        return n * (n - 1.0) / 2.0 * x[0, 0, 0].numel()

    def extent(self, shape: tuple[int, ...], nodes: int | None) -> tuple[int, ...]:
        return shape if nodes is None else (nodes, nodes, *shape[2:])

    @staticmethod
    def _hollow(x: Tensor, mask: Tensor | None) -> Tensor:
        nodes = x.shape[1]
        off_diagonal = ~torch.eye(nodes, dtype=torch.bool, device=x.device)[None]
        pairs = off_diagonal if mask is None else off_diagonal & mask[:, :, None] & mask[:, None]
        return x * expand_mask(pairs, x).to(x.dtype)
