"""Layers of the score networks of GDSS (Jo et al. 2022), without loops over channels or heads.

Notation: b graphs padded to n nodes, F node features, C adjacency channels, H heads. The batch is
the last axis of every array (nodes ``[F, n, b]``, dense edges ``[C, n, n, b]``): the graphs are
small, and long contiguous rows over the batch cost less than thousands of tiny products.

What the networks do to an edge is element-wise and symmetric, and the diagonal of an adjacency
channel never matters (a graph convolution puts 1 there). So edges are kept as the list of pairs
i < j of real nodes, ``[C, pairs]``, which is less than half of the padded matrices.

The values of an attention enter the mixing of channels linearly: their weight and the first
weight of the mixing perceptron are multiplied first, and the values are never formed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LOG2_E = 1.0 / math.log(2.0)
LONG_ROW = 16
"""From this batch size on, products run over rows of the batch."""


# -- products over the batch ------------------------------------------------------------------


def propagate(adjacency: Tensor, x: Tensor) -> Tensor:
    """sum_j A[c, i, j] x[f, j] -> [C, F, n, b], of ``adjacency`` [C, n, n, b], ``x`` [F, n, b]."""
    channels, n, _, b = adjacency.shape
    if torch.is_grad_enabled() or b < LONG_ROW or n > 2 * LONG_ROW:
        rows = adjacency.permute(3, 0, 1, 2).reshape(b, channels * n, n)
        out = torch.bmm(rows, x.permute(2, 1, 0).contiguous())
        return out.reshape(b, channels, n, -1).permute(1, 3, 2, 0)
    first, *columns = adjacency[:, None].unbind(3)
    head, *rows_of_x = x[:, None].unbind(2)
    out = first * head
    for column, row in zip(columns, rows_of_x, strict=True):
        out.addcmul_(column, row)
    return out


def sum_of_sigmoids(q: Tensor, k: Tensor) -> Tensor:
    """The sum over the heads of 1 / (1 + 2^(q . k)), [C, n, n, b]; ``q``, ``k`` [C, H, d, n, b].
    This is sigmoid(-q . k log 2)."""
    if torch.is_grad_enabled() or q.shape[-1] < LONG_ROW:
        q, k = q.permute(0, 1, 4, 3, 2), k.permute(0, 1, 4, 2, 3)
        scores = (q.contiguous() @ k.contiguous()).permute(0, 1, 3, 4, 2)
    else:
        scores = q[:, :, 0, :, None] * k[:, :, 0, None]
        for d in range(1, q.shape[2]):
            scores.addcmul_(q[:, :, d, :, None], k[:, :, d, None])
        return scores.exp2_().add_(1.0).reciprocal_().sum(1)
    return torch.sigmoid(-scores / LOG2_E).sum(1)


def elu(x: Tensor) -> Tensor:
    """ELU as max(2^(min(x, 0) log2 e) - 1, x): exp2 takes half the time of exp, exp half of
    expm1."""
    if torch.is_grad_enabled():
        return F.elu(x)
    low = torch.mul(x, LOG2_E).clamp_(max=0.0).exp2_().sub_(1.0)
    return torch.maximum(low, x, out=low)


def normalised(looped: Tensor) -> Tensor:
    """D^-1/2 (A + I) D^-1/2 with degrees of at least 1 (noisy adjacencies can be negative);
    ``looped`` = A + I, [C, n, n, b], is overwritten where no gradient is needed."""
    scale = looped.sum(2).clamp(min=1.0).rsqrt()
    if torch.is_grad_enabled():
        return looped * scale[:, :, None] * scale[:, None]
    return looped.mul_(scale[:, :, None]).mul_(scale[:, None])


@dataclass(frozen=True)
class Pairs:
    """The pairs i < j of real nodes of a padded batch: positions of (i, j) and (j, i) in the
    flattened [n, n, b] array, and the mask [n, b] in the dtype of the features."""

    upper: Tensor
    lower: Tensor
    mask: Tensor

    @classmethod
    def of(cls, mask: Tensor, dtype: torch.dtype) -> Pairs:
        """The pairs of a batch with ``mask`` [b, n]."""
        real = mask.T  # [n, b]
        n, b = real.shape
        above = torch.ones(n, n, dtype=torch.bool, device=mask.device).triu(1)[..., None]
        upper = (above & real[:, None] & real[None]).flatten().nonzero().flatten()
        i, j, graph = upper // (n * b), upper // b % n, upper % b
        return cls(upper, (j * n + i) * b + graph, real.to(dtype))

    def gather(self, dense: Tensor) -> Tensor:
        """Symmetric [C, n, n, b] -> [C, pairs]."""
        return dense.flatten(1).index_select(1, self.upper)

    def both_ways(self, dense: Tensor) -> Tensor:
        """The sum of (i, j) and (j, i) of [C, n, n, b] -> [C, pairs]."""
        flat = dense.flatten(1)
        return flat.index_select(1, self.upper) + flat.index_select(1, self.lower)

    def scatter(self, edges: Tensor, diagonal: float = 0.0) -> Tensor:
        """[C, pairs] -> symmetric [C, n, n, b] with the given diagonal, zero elsewhere."""
        n, b = self.mask.shape
        dense = edges.new_zeros(len(edges), n * n, b)
        dense[:, :: n + 1] = diagonal
        dense = dense.reshape(len(edges), -1)
        dense = dense.index_copy_(1, self.upper, edges).index_copy_(1, self.lower, edges)
        return dense.reshape(-1, n, n, b)

    def powers(self, adjacency: Tensor, count: int) -> Tensor:
        """A, A^2, ..., A^count of ``adjacency`` [n, n, b] -> [count, pairs]."""
        powers = [adjacency]
        for _ in range(count - 1):
            powers.append(propagate(adjacency[None], powers[-1])[0])
        return self.gather(torch.stack(powers))


# -- layers -----------------------------------------------------------------------------------


class Perceptron(nn.Module):
    """Linear layers with ELU between them, on columns: [inputs, m] -> [outputs, m]."""

    def __init__(self, layers: int, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"Perceptron: {layers} layers; needs at least 1.")
        sizes = [inputs, *[hidden] * (layers - 1), outputs]
        self.linears = nn.ModuleList(
            nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.after_first(self._linear(0, x))

    def after_first(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """``scale`` times the rest, given the output of the first linear layer."""
        last = len(self.linears) - 1
        for k in range(1, last + 1):
            x = self._linear(k, elu(x), scale if k == last else 1.0)
        return x if last else scale * x

    def _linear(self, k: int, x: Tensor, scale: float = 1.0) -> Tensor:
        linear = self.linears[k]
        assert isinstance(linear, nn.Linear)
        return torch.addmm(linear.bias[:, None], linear.weight, x, beta=scale, alpha=scale)


def _glorot(*shape: int) -> nn.Parameter:
    bound = math.sqrt(6.0 / (shape[-2] + shape[-1]))
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


class GraphConvolution(nn.Module):
    """A X W + b with a normalised adjacency (Kipf & Welling 2017)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = _glorot(inputs, outputs)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        """``x`` [F, n, b], ``adjacency`` [1, n, n, b] normalised -> [outputs, n, b]."""
        sent = (self.weight.T @ x.flatten(1)).reshape(-1, *x.shape[1:])
        return propagate(adjacency, sent)[0] + self.bias[:, None, None]


class AttentionLayer(nn.Module):
    """Graph multi-head attention (Baek et al. 2021) on every adjacency channel, then mixing of
    the channels: new node features and new channels, or one of them where ``nodes`` or ``edges``
    is False (the last layer of a network).

    The attention scores are divided by the root of the width of the values, as published.
    """

    def __init__(
        self,
        linears: int,
        inputs: int,
        attention: int,
        outputs: int,
        channels_in: int,
        channels_out: int,
        heads: int,
        nodes: bool = True,
        edges: bool = True,
    ) -> None:
        super().__init__()
        if attention % heads:
            raise ValueError(
                f"AttentionLayer: attention width {attention} is not a multiple of {heads} heads."
            )
        self.heads, self.outputs = heads, outputs
        hidden = 2 * max(channels_in, channels_out)
        if nodes:
            self.value = _glorot(channels_in, inputs, outputs)
            self.value_bias = nn.Parameter(torch.zeros(channels_in, outputs))
            self.mix_nodes = Perceptron(2, channels_in * outputs, hidden, outputs)
        if edges:
            self.query = _glorot(channels_in, inputs, attention)
            self.key = _glorot(channels_in, inputs, attention)
            self.query_bias = nn.Parameter(torch.zeros(channels_in, attention))
            self.key_bias = nn.Parameter(torch.zeros(channels_in, attention))
            self.mix_edges = Perceptron(linears, 2 * channels_in, hidden, channels_out)
        self.to_nodes, self.to_edges = nodes, edges

    def forward(self, x: Tensor, edges: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """``x`` [F, n, b], ``edges`` [C, pairs] -> new ones, or what came where none are made."""
        heard = propagate(normalised(pairs.scatter(edges, 1.0)), x).flatten(2)  # [C, F, n b]
        shape = x.shape
        if self.to_nodes:
            mixed = torch.tanh(self.mix_nodes.after_first(self._mixed_values(heard)))
            x = mixed.reshape(-1, *shape[1:]) * pairs.mask
        if self.to_edges:
            sums = pairs.both_ways(sum_of_sigmoids(*self._queries_and_keys(heard, shape)))
            edges = self.mix_edges.after_first(self._mixed_edges(sums, edges), scale=2.0)
        return x, edges

    def _mixed_edges(self, sums: Tensor, edges: Tensor) -> Tensor:
        """The first linear map of ``mix_edges`` on the attention scores sums / heads - 1 (tanh(s
        / 2) = 2 sigmoid(s) - 1) and on the channels, [hidden, pairs]."""
        linear = self.mix_edges.linears[0]
        assert isinstance(linear, nn.Linear)
        ours, theirs = torch.split(linear.weight, len(edges), 1)
        first = torch.addmm((linear.bias - ours.sum(1))[:, None], ours / self.heads, sums)
        return torch.addmm(first, theirs, edges)

    def _mixed_values(self, heard: Tensor) -> Tensor:
        """The first linear map of ``mix_nodes`` on the values of all channels, [hidden, n b]."""
        linear = self.mix_nodes.linears[0]
        assert isinstance(linear, nn.Linear)
        first = linear.weight.reshape(-1, len(self.value), self.outputs)  # [hidden, C, outputs]
        weight = torch.einsum("cfo,hco->hcf", self.value, first).flatten(1)
        bias = linear.bias + torch.einsum("co,hco->h", self.value_bias, first)
        return torch.addmm(bias[:, None], weight, heard.reshape(weight.shape[1], -1))

    def _queries_and_keys(self, heard: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Both [C, H, d, n, b]; a query times a key is -2 log2 e times the published score, as
        :func:`sum_of_sigmoids` wants it: tanh costs several times as much."""
        scale = -2.0 * LOG2_E / math.sqrt(self.outputs)
        weight = torch.cat([scale * self.query, self.key], -1).transpose(1, 2)
        bias = torch.cat([scale * self.query_bias, self.key_bias], -1)[..., None]
        both = torch.baddbmm(bias, weight, heard)
        split = both.reshape(len(both), 2, self.heads, -1, *shape[1:])
        return split[:, 0], split[:, 1]


def attention_stack(
    depth: int,
    features: int,
    hidden: int,
    attention: int,
    channels: tuple[int, int, int],
    linears: int,
    heads: int,
    wanted: str,
) -> nn.ModuleList:
    """Layers with channels (first, middle, last) and attention width ``hidden`` in the first. Of
    the last layer only what is ``wanted``, 'nodes' or 'edges', is made."""
    first, middle, last = channels
    layers = nn.ModuleList()
    for k in range(depth):
        end = k == depth - 1 and k > 0
        layers.append(
            AttentionLayer(
                linears,
                hidden if k else features,
                attention if k else hidden,
                hidden,
                middle if k else first,
                last if end else middle,
                heads,
                nodes=wanted == "nodes" or k < depth - 1,
                edges=wanted == "edges" or k < depth - 1,
            )
        )
    return layers
