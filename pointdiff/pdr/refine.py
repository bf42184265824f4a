"""The refinement network of PDR (Lyu et al. 2022, Section 3.3): small moves, and more points."""

from __future__ import annotations

import math

from torch import Tensor, cat, nn

from pointdiff.pdr.network import DualPath


def upsample(
    coarse: Tensor, moves: Tensor, factor: int, scale: float = 1e-3, centre: bool = False
) -> tuple[Tensor, Tensor]:
    """Moved points and ``factor`` times as many around them.

    Args:
        coarse: [batch, n, 3]. moves: [batch, n, 3 (factor + 1)], the first three for the point
            itself, or [batch, n, 3 factor] with ``centre``, which keeps the moved points and adds
            factor - 1 around each.
        scale: of all moves; those around a point are divided by sqrt(factor), too.

    Returns:
        [batch, factor n, 3] and the moved points [batch, n, 3].
    """
    moved = coarse + scale * moves[..., :3]
    around = moves[..., 3:].reshape(*coarse.shape[:2], -1, 3) * (scale / math.sqrt(factor))
    more = (moved[:, :, None] + around).flatten(1, 2)
    return (cat([more, moved], 1) if centre else more), moved


class Refiner(nn.Module):
    """A coarse completion [batch, n, 3] and the partial cloud [batch, m, 4] -> the refined one,
    [batch, factor n, 3]; ``factor`` 1 keeps the number of points.

    ``network``: without time, with 3 outputs for factor 1 and 3 (factor + 1) beyond.

    Raises:
        ValueError: a factor below 1, or a network with other outputs.
    """

    def __init__(self, network: DualPath, factor: int = 1, scale: float = 1e-3) -> None:
        super().__init__()
        out = 3 if factor == 1 else 3 * (factor + 1)
        if factor < 1 or network.head[-1].out_channels != out or network.time is not None:
            raise ValueError(
                f"Refiner: factor={factor} needs a network without time and with {out} outputs."
            )
        self.network, self.factor, self.scale = network, factor, scale

    def forward(self, coarse: Tensor, partial: Tensor, label: Tensor | None = None) -> Tensor:
        moves: Tensor = self.network(coarse, self.network.condition(partial), None, label)
        if self.factor == 1:
            return coarse + self.scale * moves
        return upsample(coarse, moves, self.factor, self.scale)[0]
