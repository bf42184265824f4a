"""The score networks of GDSS (Jo et al. 2022), dense and masked; their layers and the layout of
arrays are described in :mod:`molediff.graphs.layers`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from molediff.graphs.layers import (
    LONG_ROW,
    GraphConvolution,
    Pairs,
    Perceptron,
    attention_stack,
    normalised,
)
from shared.predictions import Condition
from shared.process import State, version

CHUNK = 30_000
"""Matrix entries at a time when no gradient is needed: what a processor's cache holds."""


class NodeConvolutionNetwork(nn.Module):
    """ScoreNetworkX: graph convolutions, all layers concatenated, a perceptron."""

    def __init__(self, features: int, depth: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            GraphConvolution(hidden if k else features, hidden) for k in range(depth)
        )
        width = features + depth * hidden
        self.final = Perceptron(3, width, 2 * width, features)

    def forward(self, x: Tensor, adjacency: Tensor, pairs: Pairs) -> Tensor:
        """``x`` [F, n, b], ``adjacency`` [n, n, b] -> [F, n, b]."""
        loops = torch.eye(len(adjacency)).to(adjacency)[..., None]
        norm, seen = normalised((adjacency + loops)[None]), [x]
        for layer in self.layers:
            seen.append(torch.tanh(layer(seen[-1], norm)))
        out: Tensor = self.final(torch.cat(seen).flatten(1))
        return out.reshape(x.shape) * pairs.mask


class NodeAttentionNetwork(nn.Module):
    """ScoreNetworkX in its attention form (the second ZINC250k checkpoint). The features of a
    layer go through tanh twice, as published."""

    def __init__(
        self,
        features: int,
        depth: int,
        hidden: int,
        attention: int,
        channels: tuple[int, int, int] = (2, 8, 4),
        linears: int = 2,
        heads: int = 4,
    ) -> None:
        super().__init__()
        self.powers = channels[0]
        self.layers = attention_stack(
            depth, features, hidden, attention, channels, linears, heads, "nodes"
        )
        width = features + depth * hidden
        self.final = Perceptron(3, width, 2 * width, features)

    def forward(self, x: Tensor, adjacency: Tensor, pairs: Pairs) -> Tensor:
        """``x`` [F, n, b], ``adjacency`` [n, n, b] -> [F, n, b]."""
        edges, seen = pairs.powers(adjacency, self.powers), [x]
        for layer in self.layers:
            nodes, edges = layer(seen[-1], edges, pairs)
            seen.append(torch.tanh(nodes))
        out: Tensor = self.final(torch.cat(seen).flatten(1))
        return out.reshape(x.shape) * pairs.mask


class EdgeNetwork(nn.Module):
    """ScoreNetworkA: attention layers on powers of the adjacency, the channels of all layers
    concatenated, a perceptron on every pair."""

    def __init__(
        self,
        features: int,
        depth: int,
        hidden: int,
        attention: int,
        channels: tuple[int, int, int] = (2, 8, 4),
        linears: int = 2,
        heads: int = 4,
    ) -> None:
        super().__init__()
        first, middle, last = channels
        self.powers = first
        self.layers = attention_stack(
            depth, features, hidden, attention, channels, linears, heads, "edges"
        )
        width = first + middle * (depth - 1) + last
        self.final = Perceptron(3, width, 2 * width, 1)

    def forward(self, x: Tensor, adjacency: Tensor, pairs: Pairs) -> Tensor:
        """``x`` [F, n, b], ``adjacency`` [n, n, b] -> [n, n, b], symmetric and hollow."""
        seen = [pairs.powers(adjacency, self.powers)]
        for layer in self.layers:
            x, edges = layer(x, seen[-1], pairs)
            seen.append(edges)
        return pairs.scatter(self.final(torch.cat(seen)))[0]


class GraphScoreNetwork(nn.Module):
    """A network for the nodes and one for the edges, as one backbone.

    Inputs and outputs: 'nodes' [b, n, F] and 'edges' [b, n, n]. The published networks know
    nothing of the time and of conditions.
    """

    def __init__(self, nodes: nn.Module, edges: nn.Module) -> None:
        super().__init__()
        self.nodes, self.edges = nodes, edges
        self._seen: tuple[Tensor | None, int, list[Pairs]] = (None, 0, [])

    @classmethod
    def build(
        cls,
        features: int,
        node_depth: int = 3,
        edge_depth: int = 5,
        hidden: int = 32,
        attention: int = 32,
        channels: tuple[int, int, int] = (2, 8, 4),
        linears: int = 2,
        heads: int = 4,
        node_attention: bool = False,
    ) -> GraphScoreNetwork:
        """The published pair of networks; ``node_attention`` chooses the attention form.

        Raises:
            ValueError: a width that the heads do not divide, or a size below 1.
        """
        first, middle, last = channels
        if min(features, node_depth, edge_depth, hidden, attention, heads, *channels) < 1:
            raise ValueError("GraphScoreNetwork: every size must be at least 1.")
        wide = (hidden, attention, (first, middle, last), linears, heads)
        nodes: nn.Module = NodeConvolutionNetwork(features, node_depth, hidden)
        if node_attention:
            nodes = NodeAttentionNetwork(features, node_depth, *wide)
        return cls(nodes, EdgeNetwork(features, edge_depth, *wide))

    def forward(
        self,
        inputs: Mapping[str, Tensor],
        code: Tensor,
        mask: Tensor | None = None,
        cond: Condition | None = None,
    ) -> State:
        x, adjacency = inputs["nodes"], inputs["edges"]
        if mask is None:
            mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        count = round(len(x) / max(LONG_ROW, CHUNK // x.shape[1] ** 2))
        count = 1 if torch.is_grad_enabled() or x.device.type != "cpu" else max(count, 1)
        pairs = self._pairs(mask, count, x.dtype)
        parts = zip(
            torch.tensor_split(x, count), torch.tensor_split(adjacency, count), pairs, strict=True
        )
        scores = [self._score(*part) for part in parts]
        if count == 1:
            return scores[0]
        return {name: torch.cat([score[name] for score in scores]) for name in scores[0]}

    def _pairs(self, mask: Tensor, count: int, dtype: torch.dtype) -> list[Pairs]:
        """The pairs of every chunk; a sampler asks with the same mask again and again."""
        known, seen, pairs = self._seen
        if known is mask and seen == version(mask) and len(pairs) == count:
            if pairs[0].mask.dtype == dtype:
                return pairs
        pairs = [Pairs.of(part, dtype) for part in torch.tensor_split(mask, count)]
        self._seen = (mask, version(mask), pairs)
        return pairs

    def _score(self, x: Tensor, adjacency: Tensor, pairs: Pairs) -> State:
        x, adjacency = x.permute(2, 1, 0).contiguous(), adjacency.permute(1, 2, 0).contiguous()
        return {
            "nodes": self.nodes(x, adjacency, pairs).permute(2, 1, 0).contiguous(),
            "edges": self.edges(x, adjacency, pairs).permute(2, 0, 1).contiguous(),
        }
