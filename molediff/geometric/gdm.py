"""GDM, EDM's baseline without equivariance (Hoogeboom et al. 2022, Section 5): message passing on
positions and features alike."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from molediff.geometric.egnn import EGNNOptions, MessageLayer, Pairs, masked, node_inputs
from shared.geometry import CentredPoints
from shared.process import State


class GDM(nn.Module):
    """Backbone that treats positions as three more features of an atom.

    Args:
        features: name -> width of the invariant fields. context: see
            :class:`molediff.geometric.egnn.EGNN`.
        augment: in training, see every molecule under a random rotation or reflection and turn
            the output back, which equals rotating data and noise (GDM-aug).
        options: width, layers, attention and aggregation; those about coordinates have no effect.
    """

    def __init__(
        self,
        features: Mapping[str, int],
        *,
        context: int = 0,
        augment: bool = True,
        options: EGNNOptions | None = None,
    ) -> None:
        super().__init__()
        self.features, self.context, self.augment = dict(features), context, augment
        self.options = options = options or EGNNOptions()
        total = 3 + sum(features.values())
        self.embedding = nn.Linear(total + 1 + context, options.width)
        self.layers = nn.ModuleList(
            MessageLayer(options, 0) for _ in range(options.layers * options.sublayers)
        )
        self.readout = nn.Linear(options.width, total)

    def forward(
        self,
        inputs: State,
        code: Tensor,
        mask: Tensor | None = None,
        cond: Mapping[str, Tensor] | None = None,
    ) -> State:
        """Scaled inputs, field -> [batch, n, ...], and time code [batch] -> outputs per field."""
        x = inputs["positions"]
        turn = random_rotations(len(x)).to(x) if self.augment and self.training else None
        seen = x if turn is None else x @ turn
        nodes = node_inputs(inputs, self.features, code, cond, self.context)
        h = self.embedding(torch.cat([seen, nodes], -1))
        pairs = Pairs.of(x, mask, self.options).without_scalars()
        for layer in self.layers:
            h = layer(h, pairs)
        sizes = [3, *self.features.values()]
        moved, *invariant = torch.split(masked(self.readout(h), mask), sizes, -1)
        moved = moved if turn is None else moved @ turn.mT
        out = {"positions": CentredPoints().project(moved, mask)}
        return out | dict(zip(self.features, invariant, strict=True))


def random_rotations(n: int, generator: torch.Generator | None = None) -> Tensor:
    """Rotations and reflections, uniform on O(3), float64 [n, 3, 3]: the orthogonal part of
    normal matrices with the signs of R's diagonal moved over (Mezzadri 2007)."""
    q, r = torch.linalg.qr(torch.randn(n, 3, 3, generator=generator, dtype=torch.float64))
    signs = torch.diagonal(r, dim1=1, dim2=2).sign()
    return torch.mul(q, signs[:, None])
