"""EGNN, the denoiser of EDM (Satorras et al. 2021; Hoogeboom et al. 2022, Appendix B), on dense
padded batches.

The edge networks read [h_i, h_j, d_ij], which is never built: their first layer is linear, so its
node parts are computed per node and added per pair. Without gradients, pairs are worked through
in blocks that stay in the cache, so peak memory does not depend on the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.geometry import CentredPoints, expand_mask
from shared.process import State

BLOCK_BYTES = 2**21
"""Size of the widest array of pairs that inference works on at once."""

Block = tuple[slice, slice]


@dataclass(frozen=True)
class EGNNOptions:
    """What EDM lets one choose.

    Args:
        width: features per node. layers: blocks. sublayers: message layers per block.
        attention: gate every message by a learned sigmoid.
        tanh: bound every coordinate step by ``coords_range``.
        norm_constant: added to the distance that normalises directions.
        sin_embedding: sines of distances in place of squared distances (no gradient through
            them, as published).
        aggregation: 'sum' divides by ``normalization_factor``; 'mean' by the number of atoms of
            the padded batch, as published, so that its results depend on the padding.
        matmul_dtype: dtype of the wide products over pairs (``torch.bfloat16`` where hardware
            multiplies it); coordinates, distances and node features keep theirs.
    """

    width: int = 256
    layers: int = 9
    sublayers: int = 1
    attention: bool = True
    tanh: bool = True
    norm_constant: float = 1.0
    coords_range: float = 15.0
    sin_embedding: bool = False
    aggregation: Literal["sum", "mean"] = "sum"
    normalization_factor: float = 1.0
    matmul_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.aggregation not in ("sum", "mean"):
            raise ValueError(f"EGNN: aggregation '{self.aggregation}' is neither sum nor mean.")
        if min(self.width, self.layers, self.sublayers) < 1 or self.normalization_factor <= 0:
            raise ValueError(
                "EGNN: width, layers, sublayers and normalization_factor must be positive."
            )

    @property
    def distance_features(self) -> int:
        """Numbers that describe one distance."""
        return 2 * len(_WAVES) if self.sin_embedding else 1


class EGNN(nn.Module):
    """Backbone for ``positions`` [batch, n, 3] and invariant fields of points.

    Args:
        features: name -> width of the invariant fields, such as ``{"types": 5, "charges": 1}``.
        context: properties per molecule, ``cond["context"]`` [batch, context], given to all atoms.
    """

    def __init__(
        self,
        features: Mapping[str, int],
        *,
        context: int = 0,
        options: EGNNOptions | None = None,
    ) -> None:
        super().__init__()
        self.features, self.context = dict(features), context
        self.options = options = options or EGNNOptions()
        total = sum(features.values())
        self.embedding = nn.Linear(total + 1 + context, options.width)
        self.blocks = nn.ModuleList(EGNNBlock(options) for _ in range(options.layers))
        self.readout = nn.Linear(options.width, total)

    def forward(
        self,
        inputs: State,
        code: Tensor,
        mask: Tensor | None = None,
        cond: Mapping[str, Tensor] | None = None,
    ) -> State:
        """Scaled inputs, field -> [batch, n, ...], and time code [batch] -> outputs per field:
        the displacement of the positions without mean, and features; padding is zero.

        Raises:
            ValueError: the context is missing or has another width.
        """
        x = start = inputs["positions"]
        h = self.embedding(node_inputs(inputs, self.features, code, cond, self.context))
        first = Pairs.of(x, mask, self.options)
        pairs = first
        for k, block in enumerate(self.blocks):
            pairs = first if k == 0 else Pairs.of(x, mask, self.options)
            h, x = block(h, x, pairs.beside(first))
        out = masked(self.readout(h), mask)
        parts = torch.split(out, list(self.features.values()), -1)
        invariant = dict(zip(self.features, parts, strict=True))
        return {"positions": CentredPoints().project(x - start, mask), **invariant}


class InvariantEGNN(nn.Module):
    """Message passing on fixed positions and a sum over atoms: one number or more per molecule.
    With a time it is the energy network of EEGSDE (Bao et al. 2023), without one the property
    classifier of EDM.

    Args:
        timed: read a time code. repeated: describe every distance twice, as EEGSDE does (the
            current one and that of the input, which are the same here).
    """

    def __init__(
        self,
        features: Mapping[str, int],
        *,
        outputs: int = 1,
        timed: bool = False,
        repeated: bool = False,
        options: EGNNOptions | None = None,
    ) -> None:
        super().__init__()
        self.features, self.timed, self.repeated = dict(features), timed, repeated
        self.options = options = options or EGNNOptions(width=128, layers=7)
        width, scalars = options.width, options.distance_features * (1 + repeated)
        self.embedding = nn.Linear(sum(features.values()) + timed, width)
        self.layers = nn.ModuleList(
            MessageLayer(options, scalars) for _ in range(options.layers * options.sublayers)
        )
        self.node = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.molecule = nn.Sequential(
            nn.Linear(width, width), nn.SiLU(), nn.Linear(width, outputs)
        )

    def forward(
        self, inputs: State, code: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Fields [batch, n, ...] and, if timed, time code [batch] -> [batch, outputs].

        Raises:
            ValueError: a time code for a network without one, or none for a network with one.
        """
        if (code is not None) != self.timed:
            raise ValueError(
                f"InvariantEGNN: built {'with' if self.timed else 'without'} a time input, called "
                f"{'without' if code is None else 'with'} one."
            )
        x = inputs["positions"]
        h = self.embedding(node_inputs(inputs, self.features, code))
        pairs = Pairs.of(x, mask, self.options)
        pairs = pairs.beside(pairs) if self.repeated else pairs
        for layer in self.layers:
            h = layer(h, pairs)
        out: Tensor = self.molecule(masked(self.node(h), mask).sum(1))
        return out


class EGNNBlock(nn.Module):
    """Message layers, then one step of the positions, all with the same distances."""

    def __init__(self, options: EGNNOptions) -> None:
        super().__init__()
        scalars = 2 * options.distance_features
        self.messages = nn.ModuleList(
            MessageLayer(options, scalars) for _ in range(options.sublayers)
        )
        self.step = StepLayer(options, scalars)

    def forward(self, h: Tensor, x: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
        for layer in self.messages:
            h = layer(h, pairs)
        return h, self.step(h, x, pairs)


class EdgeNetwork(nn.Module):
    """silu(L2 silu(L1 [h_i, h_j, scalars_ij])), with L1 in parts. L1 is stored whole, so its
    initial scale is that of the whole."""

    def __init__(self, options: EGNNOptions, scalars: int) -> None:
        super().__init__()
        self.width, self.dtype = options.width, options.matmul_dtype
        self.first = nn.Linear(2 * options.width + scalars, options.width)
        self.second = nn.Linear(options.width, options.width)

    def forward(
        self, h: Tensor, pairs: Pairs, reduce: Callable[[Tensor, Block], Tensor], size: int
    ) -> Tensor:
        """``reduce(hidden [b', i', n, width], block)`` -> [b', i', size], over all blocks."""
        sizes = [self.width, self.width, pairs.scalars.shape[-1]]
        centre, neighbour, scalar = torch.split(self.first.weight, sizes, 1)
        a, c = F.linear(h, centre, self.first.bias), F.linear(h, neighbour)
        if torch.is_grad_enabled():
            whole = slice(None), slice(None)
            return reduce(self._hidden(a, c, pairs.scalars, scalar), whole)
        out = h.new_empty(*h.shape[:2], size)
        for rows, atoms in _blocks(h, self.width):
            hidden = self._hidden(a[rows, atoms], c[rows], pairs.scalars[rows, atoms], scalar)
            out[rows, atoms] = reduce(hidden, (rows, atoms))
        return out

    def _hidden(self, a: Tensor, c: Tensor, scalars: Tensor, weight: Tensor) -> Tensor:
        inplace = not torch.is_grad_enabled()
        pair = a[:, :, None] + c[:, None]
        flat = pair.view(-1, self.width)
        flat = flat.addmm_(scalars.flatten(0, 2), weight.T)
        dtype = self.dtype or flat.dtype
        flat = F.silu(flat.to(dtype), inplace)
        flat = F.linear(flat, self.second.weight.to(dtype), self.second.bias.to(dtype))
        return F.silu(flat, inplace).view(pair.shape)


class MessageLayer(nn.Module):
    """h_i += MLP[h_i, sum_j gate_ij m_ij / normalisation] (Hoogeboom et al. 2022, Eq. 12)."""

    def __init__(self, options: EGNNOptions, scalars: int) -> None:
        super().__init__()
        width = options.width
        self.edge = EdgeNetwork(options, scalars)
        self.attention = nn.Linear(width, 1) if options.attention else None
        self.node = nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, h: Tensor, pairs: Pairs) -> Tensor:
        gathered = self.edge(h, pairs, lambda m, block: self._sum(m, pairs, block), h.shape[-1])
        return masked(h + self.node(torch.cat([h, gathered], -1)), pairs.mask)

    def _sum(self, messages: Tensor, pairs: Pairs, block: Block) -> Tensor:
        weights = pairs.weights[block].to(messages.dtype)
        if self.attention is not None:
            weight, bias = self.attention.weight, self.attention.bias
            gate = F.linear(messages, weight.to(messages.dtype), bias.to(messages.dtype))
            weights = weights * gate.squeeze(-1).sigmoid()
        return (weights[:, :, None] @ messages).squeeze(2).to(pairs.weights.dtype)


class StepLayer(nn.Module):
    """x_i += sum_j (x_i - x_j) / (d_ij + norm_constant) * phi_ij (Hoogeboom et al. 2022)."""

    def __init__(self, options: EGNNOptions, scalars: int) -> None:
        super().__init__()
        self.edge = EdgeNetwork(options, scalars)
        self.length = nn.Linear(options.width, 1, bias=False)
        nn.init.xavier_uniform_(self.length.weight, gain=0.001)
        self.range = options.coords_range if options.tanh else None

    def forward(self, h: Tensor, x: Tensor, pairs: Pairs) -> Tensor:
        moved = x + self.edge(h, pairs, lambda m, block: self._sum(m, pairs, block), 3)
        return masked(moved, pairs.mask)

    def _sum(self, hidden: Tensor, pairs: Pairs, block: Block) -> Tensor:
        length = F.linear(hidden, self.length.weight.to(hidden.dtype)).squeeze(-1)
        length = length.to(pairs.directions.dtype)
        if self.range is not None:
            length = length.tanh() * self.range
        return ((length * pairs.weights[block])[..., None] * pairs.directions[block]).sum(2)


@dataclass(frozen=True)
class Pairs:
    """What the layers need to know about all pairs of atoms: ``scalars`` [b, n, n, s],
    ``directions`` [b, n, n, 3] and ``weights`` [b, n, n], zero for self-pairs and padding,
    otherwise the normalisation of sums."""

    scalars: Tensor
    directions: Tensor
    weights: Tensor
    mask: Tensor | None

    @classmethod
    def of(cls, x: Tensor, mask: Tensor | None, options: EGNNOptions) -> Pairs:
        delta = x[:, :, None] - x[:, None]
        square = delta.square().sum(-1, keepdim=True)
        length = (square + 1e-8).sqrt()
        scalars = _sines(length) if options.sin_embedding else square
        n = x.shape[1]
        weights = 1.0 - torch.eye(n, dtype=x.dtype, device=x.device).expand(len(x), n, n)
        if mask is not None:
            weights = weights * (mask[:, :, None] & mask[:, None]).to(x.dtype)
        weights = weights / (n if options.aggregation == "mean" else options.normalization_factor)
        return cls(scalars, delta / (length + options.norm_constant), weights, mask)

    def without_scalars(self) -> Pairs:
        """These pairs, described by nothing."""
        return replace(self, scalars=self.scalars[..., :0])

    def beside(self, first: Pairs) -> Pairs:
        """These pairs, their distances followed by those of ``first``."""
        return replace(self, scalars=torch.cat([self.scalars, first.scalars], -1))


_WAVES = tuple(2.0 * torch.pi * 4.0**k / 15.0 for k in range(6))


def _sines(length: Tensor) -> Tensor:
    angles = length.detach() * torch.tensor(_WAVES, dtype=length.dtype, device=length.device)
    return torch.cat([angles.sin(), angles.cos()], -1)


def _blocks(h: Tensor, width: int) -> Iterator[Block]:
    """(molecules, atoms) such that pairs of these atoms with all others fit in a block: several
    molecules, or some atoms of one. On an accelerator everything is one block."""
    b, n, _ = h.shape
    atoms = max(1, BLOCK_BYTES // (n * width * h.element_size())) if h.is_cpu else b * n
    molecules = max(1, atoms // n)
    for i in range(0, b, molecules):
        for k in range(0, n, min(n, atoms)):
            yield slice(i, i + molecules), slice(k, k + min(n, atoms))


def node_inputs(
    inputs: State,
    features: Mapping[str, int],
    code: Tensor | None,
    cond: Mapping[str, Tensor] | None = None,
    context: int = 0,
) -> Tensor:
    """[features, time, context] of every atom, in EDM's order, [batch, n, ...]."""
    nodes, like = [inputs[name] for name in features], inputs["positions"]
    nodes += [] if code is None else [_per_node(code[:, None], like)]
    nodes += [_per_node(_context(cond, context), like)] if context else []
    return torch.cat(nodes, -1)


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * expand_mask(mask, x).to(x.dtype)


def _per_node(value: Tensor, x: Tensor) -> Tensor:
    """[batch, c] -> [batch, n, c]."""
    return value[:, None].expand(-1, x.shape[1], -1).to(x.dtype)


def _context(cond: Mapping[str, Tensor] | None, width: int) -> Tensor:
    if cond is None or "context" not in cond:
        raise ValueError("EGNN: this conditional network needs cond['context'] [batch, context].")
    context = cond["context"]
    if context.dim() != 2 or context.shape[1] != width:
        raise ValueError(
            f"EGNN: cond['context'] has shape {tuple(context.shape)}, expected [batch, {width}]."
        )
    if bool(context.isnan().any()):
        raise ValueError("EGNN: this network has no token for a property that is not given.")
    return context
