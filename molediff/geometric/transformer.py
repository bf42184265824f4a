"""A transformer for molecules in 3D, equivariant under rotations and reflections, whose messages
are cheap: everything wide is computed per node, and a pair of atoms costs one hidden layer of 64.

Scalars attend as in any transformer. Vectors ride along: they are attended with the same weights,
they move virtual points whose distances enter the pair features (so the network sees angles), and
they are gated by the scalars.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from molediff.geometric.embedding import ContextEmbedding, FourierEmbedding
from shared.geometry import CentredPoints, expand_mask
from shared.process import State


class Trunk(nn.Module):
    """Embedding and layers, which the networks below share.

    Args:
        features: name -> width of the invariant fields, such as ``{"types": 5}``.
        context: number of properties the network is told (0: unconditional); ``cond["context"]``
            [batch, context] is standardised, NaN where a property is not given.
        hide: in training, how the given properties are hidden; see :class:`ContextEmbedding`.
        width: scalars per node. vectors: vector channels per node. pairs: width of pair features.
        angstrom: length in Angstrom of one unit of the input positions; with Karras
            preconditioning the standard deviation of the data.
        pair_dtype: dtype of the pair features (``torch.bfloat16`` where it is fast); distances,
            coordinates and node features keep the dtype of the input.
    """

    def __init__(
        self,
        features: Mapping[str, int],
        *,
        context: int = 0,
        hide: tuple[float, float] = (0.15, 0.5),
        width: int = 192,
        layers: int = 6,
        heads: int = 8,
        vectors: int = 32,
        pairs: int = 64,
        angstrom: float = 1.0,
        pair_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if width % heads or vectors % heads:
            raise ValueError(
                f"transformer: width {width} and vectors {vectors} must be multiples of heads "
                f"{heads}."
            )
        self.features, self.angstrom = dict(features), angstrom
        self.radial = RadialBasis()
        self.embed = nn.Linear(sum(features.values()), width)
        self.time = FourierEmbedding(2 * pairs)
        self.context = ContextEmbedding(context, 2 * pairs, hide) if context else None
        self.width, self.vectors = width, vectors
        self.layers = nn.ModuleList(
            Layer(width, heads, vectors, pairs, self.radial.size, 2 * pairs, pair_dtype)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def run(
        self,
        inputs: State,
        code: Tensor,
        mask: Tensor | None = None,
        cond: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Normalised scalars [b, n, width] and vectors [b, n, 3, vectors] of the atoms."""
        x = inputs["positions"] * self.angstrom
        h = self.embed(torch.cat([inputs[name] for name in self.features], -1))
        # zero, but made of h: all layers look alike, so a compiled layer is compiled once
        v = h[:, :, None, :1] * h.new_zeros(3, self.vectors)
        code = self.time(code)
        if self.context is not None:
            code = code + self.context(None if cond is None else cond.get("context"), code)
        code = F.silu(code)
        delta = x[:, :, None] - x[:, None]
        distance = length(delta)
        radial, towards = self.radial(distance), delta / (distance[..., None] + 1.0)
        for layer in self.layers:
            h, v = layer(h, v, x, radial, towards, code, mask)
        return self.norm(h), v


class EquivariantTransformer(Trunk):
    """Backbone for fields of points: ``positions`` [batch, n, 3] and any invariant features;
    arguments as for :class:`Trunk`."""

    def __init__(self, features: Mapping[str, int], **options: Any) -> None:
        super().__init__(features, **options)
        self.readout = _zero(nn.Linear(self.width, sum(features.values())))
        self.shift = _zero(nn.Linear(self.vectors, 1, bias=False))

    def forward(
        self,
        inputs: State,
        code: Tensor,
        mask: Tensor | None = None,
        cond: Mapping[str, Tensor] | None = None,
    ) -> State:
        """Scaled inputs, field -> [batch, n, ...], and time code [batch] -> outputs per field:
        ``positions`` without mean over the real atoms, padding zero."""
        h, v = self.run(inputs, code, mask, cond)
        out = self.readout(h)
        if mask is not None:
            out = out * expand_mask(mask, out).to(out.dtype)
        parts = torch.split(out, list(self.features.values()), -1)
        invariant = dict(zip(self.features, parts, strict=True))
        moved = self.shift(v).squeeze(-1)
        return {"positions": CentredPoints().project(moved, mask), **invariant}


class Layer(nn.Module):
    """Attention over atoms for scalars and vectors together, then a feed-forward per atom."""

    POINTS = 8

    def __init__(
        self,
        width: int,
        heads: int,
        vectors: int,
        pairs: int,
        radial: int,
        code: int,
        pair_dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.heads, self.pairs, self.pair_dtype = heads, pairs, pair_dtype
        self.modulate = _zero(nn.Linear(code, 4 * width))
        self.points = nn.Linear(vectors, self.POINTS, bias=False)
        self.nodes = nn.Linear(width, 2 * pairs + width)
        self.edges = nn.Linear(radial + self.POINTS, pairs, bias=False)
        self.mix = nn.Linear(pairs, pairs)
        self.logits = nn.Linear(pairs, heads, bias=False)
        self.scalars_out = nn.Linear(width + pairs, width)
        self.vectors_out = nn.Linear(vectors + pairs, vectors, bias=False)
        self.hidden = nn.Linear(width + vectors, 4 * width)
        self.update = nn.Linear(4 * width, width + vectors)
        self.turn = nn.Linear(vectors, vectors, bias=False)

    def forward(
        self,
        h: Tensor,
        v: Tensor,
        x: Tensor,
        radial: Tensor,
        towards: Tensor,
        code: Tensor,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """h [b, n, width], v [b, n, 3, vectors], x [b, n, 3] in Angstrom, radial [b, n, n, r],
        towards [b, n, n, 3] -> new h and v."""
        b, n, width = h.shape
        scale, shift, scale_2, shift_2 = self.modulate(code)[:, None].chunk(4, -1)
        u = F.layer_norm(h, (width,)) * (1.0 + scale) + shift
        unit = _soften(v)
        a, c, values = self.nodes(u).split([self.pairs, self.pairs, width], -1)
        pair = self._pair(x, unit, radial, a, c)
        pair = pair if mask is None else pair * (mask[:, None, :, None]).to(pair.dtype)
        attended, turned = self._attend(self._weights(pair, mask), values, unit)
        # one product sums the pair features alone (softmax loses how many neighbours there are)
        # and along the directions
        frame = torch.cat([torch.ones_like(towards[..., :1]), towards], -1)
        sums = torch.einsum("bijd,bijc->bidc", frame, pair.to(h.dtype)) * 0.1
        h = h + self.scalars_out(torch.cat([attended, sums[:, :, 0]], -1))
        v = v + self.vectors_out(torch.cat([turned, sums[:, :, 1:]], -1))
        u = F.layer_norm(h, (width,)) * (1.0 + scale_2) + shift_2
        unit = _soften(v)
        grown = self.update(F.silu(self.hidden(torch.cat([u, length(unit.mT)], -1))))
        step, gate = grown.split([width, v.shape[-1]], -1)
        return h + step, v + self.turn(unit) * gate[:, :, None]

    def _pair(self, x: Tensor, unit: Tensor, radial: Tensor, a: Tensor, c: Tensor) -> Tensor:
        """z_ij [b, n, n, pairs] from distances of atoms and of points that the vectors move."""
        points = x[..., None] + self.points(unit)
        between = points[:, :, None] - points[:, None]
        apart = length(between.mT)
        dtype = self.pair_dtype or a.dtype
        edges = F.linear(torch.cat([radial, apart], -1).to(dtype), self.edges.weight.to(dtype))
        pair = F.silu(edges + a[:, :, None].to(dtype) + c[:, None].to(dtype))
        return F.silu(F.linear(pair, self.mix.weight.to(dtype), self.mix.bias.to(dtype)))

    def _weights(self, pair: Tensor, mask: Tensor | None) -> Tensor:
        """Attention weights [b, heads, n, n]."""
        logits = F.linear(pair, self.logits.weight.to(pair.dtype)).to(self.logits.weight.dtype)
        logits = logits.permute(0, 3, 1, 2)
        if mask is not None:
            logits = logits.masked_fill(~mask[:, None, None], torch.finfo(logits.dtype).min)
        return logits.softmax(-1)

    def _attend(self, weights: Tensor, values: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
        """Scalars [b, n, width] and vectors [b, n, 3, vectors] in one batched product."""
        b, n, width = values.shape
        scalars = values.reshape(b, n, self.heads, -1)
        vectors = unit.reshape(b, n, 3, self.heads, -1).transpose(2, 3).flatten(3)
        both = torch.cat([scalars, vectors], -1).transpose(1, 2)
        attended = (weights @ both).transpose(1, 2)
        sizes = [width // self.heads, vectors.shape[-1]]
        scalars, vectors = torch.split(attended, sizes, -1)
        vectors = vectors.reshape(b, n, self.heads, 3, -1).transpose(2, 3).flatten(3)
        return scalars.flatten(2), vectors


class RadialBasis(nn.Module):
    """Gaussians of the distance: every 0.15 Angstrom where bonds and angles are (0.6 to 3.0),
    every 0.9 up to 9.3."""

    centres: Tensor
    widths: Tensor

    def __init__(self) -> None:
        super().__init__()
        fine = 0.6 + 0.15 * torch.arange(17, dtype=torch.float64)
        coarse = 3.9 + 0.9 * torch.arange(7, dtype=torch.float64)
        self.register_buffer("centres", torch.cat([fine, coarse]), persistent=False)
        widths = torch.cat([torch.full((17,), 0.15), torch.full((7,), 0.9)]).to(torch.float64)
        self.register_buffer("widths", widths, persistent=False)

    @property
    def size(self) -> int:
        return len(self.centres)

    def forward(self, distance: Tensor) -> Tensor:
        """Distance [...] in Angstrom -> [..., size]."""
        offset = distance[..., None] - self.centres.to(distance)
        return torch.exp(-0.5 * (offset / self.widths.to(distance)).square())


def length(x: Tensor) -> Tensor:
    """Length over the last axis, with a finite gradient at zero."""
    return (x.square().sum(-1) + 1e-8).sqrt()


def _soften(v: Tensor) -> Tensor:
    """Vectors [b, n, 3, c] scaled to at most unit root mean square over the channels."""
    return v * (1.0 + v.square().sum(-2, keepdim=True).mean(-1, keepdim=True)).rsqrt()


def _zero(layer: Any) -> Any:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
