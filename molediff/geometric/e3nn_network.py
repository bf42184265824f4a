"""A tensor-product denoiser on e3nn: convolutions with spherical harmonics of the directions
between all atoms and learned radial weights (Thomas et al. 2018; Batzner et al. 2022), equivariant
under rotations and reflections by construction.

Slower than the other networks and richer per layer: features of any angular momentum interact.
Build it under the dtype it shall run in (``torch.set_default_dtype``): coupling coefficients are
made in that dtype.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

try:
    from e3nn import o3
    from e3nn.nn import Gate
except ImportError as error:
    raise ImportError(
        "TensorProductNetwork needs e3nn: pip install 'molediff[equivariant]'."
    ) from error

from molediff.geometric.egnn import masked
from molediff.geometric.embedding import ContextEmbedding, FourierEmbedding
from molediff.geometric.transformer import RadialBasis
from shared.geometry import CentredPoints
from shared.process import State


class TensorProductNetwork(nn.Module):
    """Backbone for ``positions`` [batch, n, 3] and invariant fields of points.

    Args:
        features: name -> width of the invariant fields. context: see
            :class:`molediff.geometric.transformer.EquivariantTransformer`.
        scalars, vectors, tensors: channels of angular momentum 0, 1 and 2.
        angstrom: length in Angstrom of one unit of the input positions.
        neighbours: sums over atoms are divided by the square root of this typical number.
    """

    def __init__(
        self,
        features: Mapping[str, int],
        *,
        context: int = 0,
        scalars: int = 64,
        vectors: int = 24,
        tensors: int = 8,
        layers: int = 4,
        angstrom: float = 1.0,
        neighbours: float = 18.0,
    ) -> None:
        super().__init__()
        self.features, self.angstrom = dict(features), angstrom
        total = sum(features.values())
        self.time = FourierEmbedding(scalars)
        self.context = ContextEmbedding(context, scalars) if context else None
        self.embed = nn.Linear(total + scalars, scalars)
        self.radial = RadialBasis()
        self.directions = o3.Irreps.spherical_harmonics(2)
        wide = o3.Irreps(f"{scalars}x0e + {vectors}x1o + {tensors}x2e")
        shapes = [o3.Irreps(f"{scalars}x0e"), *[wide] * layers]
        self.layers = nn.ModuleList(
            Convolution(a, b, self.directions, self.radial.size, neighbours)
            for a, b in zip(shapes, shapes[1:], strict=False)
        )
        self.readout = o3.Linear(wide, o3.Irreps(f"{total}x0e + 1x1o"))

    def forward(
        self,
        inputs: State,
        code: Tensor,
        mask: Tensor | None = None,
        cond: Mapping[str, Tensor] | None = None,
    ) -> State:
        """Scaled inputs, field -> [batch, n, ...], and time code [batch] -> outputs per field."""
        x = inputs["positions"] * self.angstrom
        told = self.time(code)
        if self.context is not None:
            told = told + self.context(None if cond is None else cond.get("context"), told)
        nodes = [inputs[name] for name in self.features]
        h = self.embed(torch.cat([*nodes, told[:, None].expand(-1, x.shape[1], -1)], -1))
        delta = x[:, None] - x[:, :, None]
        harmonics = o3.spherical_harmonics(self.directions, delta, True, "component")
        radial = self.radial((delta.square().sum(-1) + 1e-12).sqrt())
        present = 1.0 - torch.eye(x.shape[1], dtype=x.dtype, device=x.device)[None]
        if mask is not None:
            present = present * mask[:, None].to(x.dtype)
        for layer in self.layers:
            h = layer(h, harmonics, radial, present[..., None])
        sizes = [*self.features.values(), 3]
        *invariant, moved = torch.split(masked(self.readout(h), mask), sizes, -1)
        out = {"positions": CentredPoints().project(moved, mask)}
        return out | dict(zip(self.features, invariant, strict=True))


class Convolution(nn.Module):
    """h_i -> gate(L h_i + sum_j W(d_ij) [h_j x Y(r_ij)]), x the tensor product."""

    def __init__(
        self,
        inner: o3.Irreps,
        outer: o3.Irreps,
        directions: o3.Irreps,
        radial: int,
        neighbours: float,
    ) -> None:
        super().__init__()
        self.scale = neighbours**-0.5
        scalars = o3.Irreps([(mul, ir) for mul, ir in outer if ir.l == 0])
        higher = o3.Irreps([(mul, ir) for mul, ir in outer if ir.l > 0])
        gates = o3.Irreps(f"{higher.num_irreps}x0e")
        self.gate = Gate(scalars, [nn.functional.silu], gates, [torch.sigmoid], higher)
        self.before = o3.Linear(inner, inner)
        self.product = _couplings(inner, directions, outer)
        self.weights = nn.Sequential(
            nn.Linear(radial, 64), nn.SiLU(), nn.Linear(64, self.product.weight_numel)
        )
        self.after = o3.Linear(self.product.irreps_out.simplify(), self.gate.irreps_in)
        self.skip = o3.Linear(inner, self.gate.irreps_in)

    def forward(self, h: Tensor, harmonics: Tensor, radial: Tensor, present: Tensor) -> Tensor:
        senders = self.before(h)[:, None].expand(-1, h.shape[1], -1, -1)
        messages = self.product(senders, harmonics, self.weights(radial)) * present
        out: Tensor = self.gate(self.skip(h) + self.after(messages.sum(2) * self.scale))
        return out


def _couplings(inner: o3.Irreps, directions: o3.Irreps, outer: o3.Irreps) -> o3.TensorProduct:
    """Every path from ``inner`` times ``directions`` to an angular momentum of ``outer``, with
    one weight per channel."""
    kinds = [ir for _, ir in outer]
    paths: list[tuple[int, int, int, str, bool]] = []
    products: list[tuple[int, o3.Irrep]] = []
    for i, (mul, ir) in enumerate(inner):
        for j, (_, ir_direction) in enumerate(directions):
            for product in ir * ir_direction:
                if product in kinds:
                    paths.append((i, j, len(products), "uvu", True))
                    products.append((mul, product))
    found, order, _ = o3.Irreps(products).sort()
    paths = [(i, j, order[k], mode, train) for i, j, k, mode, train in paths]
    return o3.TensorProduct(inner, directions, found, paths, shared_weights=False)
