"""The dual-path network of PDR (Lyu et al. 2022, Section 3.2 and Figure 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pointdiff.pdr.layers import (
    FeaturePropagation,
    FeatureTransfer,
    GlobalFeature,
    SetAbstraction,
    TimeCodeEmbedding,
)


@dataclass(frozen=True)
class Branch:
    """One PointNet++. Level i + 1 has ``points[i]`` points and features of ``widths[i + 1]``, made
    from balls of ``radii[i]`` with ``neighbours``; the decoder gives ``decoder[i]`` at level i.

    Raises:
        ValueError: numbers of levels that do not fit.
    """

    points: Sequence[int] = (1024, 256, 64, 16)
    radii: Sequence[float] = (0.1, 0.2, 0.4, 0.8)
    widths: Sequence[int] = (32, 64, 128, 256, 512)
    decoder: Sequence[int] = (128, 128, 256, 256, 512)
    neighbours: int = 32
    depth: int = 3
    decoder_depth: int = 2
    k: int = 8

    def __post_init__(self) -> None:
        levels = len(self.points)
        if not len(self.radii) == levels == len(self.widths) - 1 == len(self.decoder) - 1:
            raise ValueError(
                f"Branch: {levels} levels need as many radii and one more widths and decoder."
            )
        if self.widths[-1] != self.decoder[-1]:
            raise ValueError("Branch: the last of widths and of decoder must be equal.")
        if min(self.points) < self.k:
            raise ValueError(f"Branch: needs at least k={self.k} points at every level.")


PARTIAL = Branch(widths=(32, 32, 64, 64, 128), decoder=(32, 32, 64, 64, 128))


@dataclass(frozen=True)
class Transfer:
    """How features of the partial cloud reach the noisy one, level by level: widths and radii in
    the encoder and the decoder, neighbours, and layers."""

    encoder: Sequence[int] = (32, 32, 64, 64)
    decoder: Sequence[int] = (32, 32, 64, 64, 128)
    encoder_radii: Sequence[float] = (0.1, 0.2, 0.4, 0.8)
    decoder_radii: Sequence[float] = (0.1, 0.2, 0.4, 0.8, 1.6)
    neighbours: int = 32
    depth: int = 2


class Condition(NamedTuple):
    """What the noisy path needs of a partial cloud: per level points, encoder and decoder
    features, and the global feature."""

    points: list[Tensor]
    encoder: list[Tensor]
    decoder: list[Tensor]
    whole: Tensor


class DualPath(nn.Module):
    """Noisy points [batch, n, 3] and a partial cloud [batch, m, 4] (position; 1, or -1 for a
    mirrored point) -> [batch, n, ``out``].

    Args:
        noisy, partial, transfer: the two paths and what connects them.
        whole: widths of the two stages of the global feature.
        time: half the number of time frequencies; 0 for a network without time (refinement).
        classes: number of classes, 0 without; class_width: of their embedding.
    """

    def __init__(
        self,
        noisy: Branch | None = None,
        partial: Branch = PARTIAL,
        transfer: Transfer | None = None,
        whole: tuple[Sequence[int], Sequence[int]] = ((4, 128, 256), (512, 1024)),
        time: int = 128,
        classes: int = 0,
        class_width: int = 128,
        out: int = 3,
    ) -> None:
        super().__init__()
        noisy, transfer = noisy or Branch(), transfer or Transfer()
        self.time = TimeCodeEmbedding(time) if time else None
        self.label = nn.Embedding(classes, class_width) if classes else None
        self.whole = GlobalFeature(*whole)
        embeddings = (4 * time, whole[1][-1], class_width if classes else 0)
        self.partial_down = _encoder(partial, [4, *partial.widths[1:-1]], (0, 0, 0))
        self.partial_up = _decoder(partial, 4, [0] * len(partial.decoder), (0, 0, 0))
        inputs = [3, *noisy.widths[1:-1]]
        self.noisy_down = _encoder(
            noisy, [a + b for a, b in zip(inputs, transfer.encoder, strict=True)], embeddings
        )
        self.noisy_up = _decoder(noisy, 3, transfer.decoder, embeddings)
        self.transfer_down = _transfers(
            [4, *partial.widths[1:-1]], transfer.encoder, inputs, transfer.encoder_radii, transfer
        )
        self.transfer_up = _transfers(
            partial.decoder, transfer.decoder, noisy.decoder, transfer.decoder_radii, transfer
        )
        self.head = nn.Sequential(
            nn.Conv1d(noisy.decoder[0] + transfer.decoder[0] + 3, 128, 1),
            nn.GroupNorm(32, 128),
            nn.ReLU(),
            nn.Conv1d(128, out, 1),
        )

    def condition(self, partial: Tensor) -> Condition:
        """The features of a partial cloud, which do not depend on time."""
        points, features = [partial[..., :3]], [partial[..., [3, 0, 1, 2]].transpose(1, 2)]
        for down in self.partial_down:
            centres, found = down(points[-1], features[-1])
            points.append(centres)
            features.append(found)
        decoder = list(features)
        for i in reversed(range(len(self.partial_up))):
            decoder[i] = self.partial_up[i](points[i], features[i], points[i + 1], decoder[i + 1])
        return Condition(points, features, decoder, self.whole(partial.transpose(1, 2)))

    def forward(
        self,
        x: Tensor,
        condition: Condition,
        code: Tensor | None = None,
        label: Tensor | None = None,
    ) -> Tensor:
        """``code`` [batch] is the number of the step, ``label`` [batch] the class."""
        embeddings = (
            None if self.time is None or code is None else self.time(code),
            condition.whole,
            None if self.label is None or label is None else self.label(label),
        )
        points, features = [x], [x.transpose(1, 2)]
        for i, (move, down) in enumerate(zip(self.transfer_down, self.noisy_down, strict=True)):
            moved = move(condition.points[i], condition.encoder[i], points[i], features[i])
            h = torch.cat([moved, features[i]], 1)
            centres, found = down(points[i], h, *embeddings)
            points.append(centres)
            features.append(found)
        h = features[-1]
        for i in reversed(range(len(self.noisy_up))):
            h = self._met(i + 1, condition, points[i + 1], h)
            h = self.noisy_up[i](points[i], features[i], points[i + 1], h, *embeddings)
        h = torch.cat([self._met(0, condition, x, h), x.transpose(1, 2)], 1)
        out: Tensor = self.head(h).transpose(1, 2)
        return out

    def _met(self, level: int, condition: Condition, points: Tensor, h: Tensor) -> Tensor:
        """Decoder features of the partial cloud at this level, before the noisy path's own."""
        move = self.transfer_up[level]
        moved = move(condition.points[level], condition.decoder[level], points, h)
        return torch.cat([moved, h], 1)


def _encoder(
    branch: Branch, inputs: Sequence[int], embeddings: tuple[int, int, int]
) -> nn.ModuleList:
    return nn.ModuleList(
        SetAbstraction(
            [inputs[i], *[branch.widths[i]] * (branch.depth - 1), branch.widths[i + 1]],
            points,
            branch.radii[i],
            branch.neighbours,
            embeddings,
        )
        for i, points in enumerate(branch.points)
    )


def _decoder(
    branch: Branch, features: int, extra: Sequence[int], embeddings: tuple[int, int, int]
) -> nn.ModuleList:
    skips = [features, *branch.widths[1:-1]]
    return nn.ModuleList(
        FeaturePropagation(
            [branch.decoder[i + 1] + extra[i + 1], *[branch.decoder[i]] * branch.decoder_depth],
            skip,
            branch.k,
            embeddings,
        )
        for i, skip in enumerate(skips)
    )


def _transfers(
    inputs: Sequence[int],
    outputs: Sequence[int],
    queries: Sequence[int],
    radii: Sequence[float],
    transfer: Transfer,
) -> nn.ModuleList:
    return nn.ModuleList(
        FeatureTransfer([width, *[out] * transfer.depth], query, radius, transfer.neighbours)
        for width, out, query, radius in zip(inputs, outputs, queries, radii, strict=True)
    )
