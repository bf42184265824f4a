"""A transformer over latents: the fast denoiser for completion.

A set of latent tokens reads the noisy points by attention, works together with tokens of the scan,
and writes back to the points (Jabri et al. 2023, "Scalable Adaptive Computation"; Huang et al.
2024, "PointInfinity"). The cost is linear in the number of points, any number of points will do,
and a model trained on few points completes with many.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pointdiff.ops import farthest_points, knn, take

OCTAVES = 5


def waves(x: Tensor, sigma: Tensor | None = None) -> Tensor:
    """Sines and cosines of positions [batch, n, 3] at wavelengths 4, 2, ..., [batch, n, 30].
    With the noise level ``sigma`` [batch] of the positions each is multiplied by its mean over the
    noise, so that frequencies the noise hides fade out (Barron et al. 2021)."""
    rates = 0.5 * math.pi * 2.0 ** torch.arange(OCTAVES, dtype=x.dtype, device=x.device)
    angle = (x[..., None] * rates).flatten(2)
    found = torch.cat([angle.sin(), angle.cos()], -1)
    if sigma is None:
        return found
    fade = torch.exp(-0.5 * (sigma[:, None] * rates).square()).repeat(1, 6)
    return found * fade[:, None]


class Attention(nn.Module):
    """Multi-head attention of tokens [b, n, query] to others [b, m, key]."""

    def __init__(self, query: int, key: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ask = nn.Linear(query, width, bias=False)
        self.tell = nn.Linear(key, 2 * width, bias=False)
        self.out = nn.Linear(width, query)

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        q = self.ask(query).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.tell(key).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.out(found.transpose(1, 2).flatten(2))
        return out


class Modulated(nn.Module):
    """Layer norm with scale and shift from an embedding [b, e] (None: its own)."""

    def __init__(self, width: int, embedding: int = 0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=not embedding)
        self.change = nn.Linear(embedding, 2 * width) if embedding else None
        if self.change is not None:
            nn.init.zeros_(self.change.weight)
            nn.init.zeros_(self.change.bias)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        h: Tensor = self.norm(x)
        if self.change is None or embedding is None:
            return h
        scale, shift = self.change(embedding)[:, None].chunk(2, -1)
        return torch.addcmul(h + shift, h, scale)


def feed_forward(width: int, ratio: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, ratio * width), nn.GELU(), nn.Linear(ratio * width, width)
    )


class Layer(nn.Module):
    """Tokens attend (to themselves and ``others``), then each passes a small network."""

    def __init__(self, width: int, heads: int, embedding: int = 0, ratio: int = 4) -> None:
        super().__init__()
        self.before, self.between = Modulated(width, embedding), Modulated(width, embedding)
        self.attention = Attention(width, width, width, heads)
        self.network = feed_forward(width, ratio)

    def forward(
        self, x: Tensor, others: Tensor | None = None, embedding: Tensor | None = None
    ) -> Tensor:
        h = self.before(x, embedding)
        x = x + self.attention(h, h if others is None else torch.cat([h, others], 1))
        out: Tensor = x + self.network(self.between(x, embedding))
        return out


class ScanEncoder(nn.Module):
    """A scan [batch, m, 4] -> tokens [batch, ``tokens``, ``width``], one for each of its farthest
    points, from the ``neighbours`` nearest points around."""

    def __init__(self, width: int, tokens: int, neighbours: int, layers: int, heads: int) -> None:
        super().__init__()
        self.tokens, self.neighbours = tokens, neighbours
        self.local = nn.Sequential(nn.Linear(7, 64), nn.GELU(), nn.Linear(64, width))
        self.place = nn.Linear(6 * OCTAVES + 3, width)
        self.mix = nn.Linear(width, width)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, partial: Tensor) -> Tensor:
        points = partial[..., :3].contiguous()
        centres = take(points, farthest_points(points, min(self.tokens, points.shape[1])))
        squared, index = knn(centres, points, min(self.neighbours, points.shape[1]))
        near = take(partial, index)
        gaps = near[..., :3] - centres[:, :, None]
        size = squared.mean(-1, keepdim=True).add(1e-6).sqrt()[..., None]
        ring = torch.cat([gaps / size, size.log().expand_as(gaps), near[..., 3:]], -1)
        h = self.mix(self.local(ring).amax(2))
        h = h + self.place(torch.cat([centres, waves(centres)], -1))
        for layer in self.layers:
            h = layer(h)
        out: Tensor = self.norm(h)
        return out


class Block(nn.Module):
    """Latents read the points, work together with the scan's tokens, and write back."""

    def __init__(self, points: int, width: int, heads: int, layers: int, embedding: int) -> None:
        super().__init__()
        self.seen = Modulated(points)
        self.reader = Modulated(width, embedding)
        self.read = Attention(width, points, width, heads)
        self.layers = nn.ModuleList(Layer(width, heads, embedding) for _ in range(layers))
        self.told = nn.LayerNorm(width)
        self.writer = Modulated(points, embedding)
        self.write = Attention(points, width, width, heads)
        self.between = Modulated(points, embedding)
        self.network = feed_forward(points, 4)

    def forward(
        self, h: Tensor, z: Tensor, scan: Tensor, embedding: Tensor
    ) -> tuple[Tensor, Tensor]:
        z = z + self.read(self.reader(z, embedding), self.seen(h))
        for layer in self.layers:
            z = layer(z, scan, embedding)
        h = h + self.write(self.writer(h, embedding), torch.cat([self.told(z), scan], 1))
        return h + self.network(self.between(h, embedding)), z


class LatentTransformer(nn.Module):
    """Noisy points [b, n, 3] and tokens of a scan [b, k, width] -> [b, n, 3].

    Args:
        points: width of the features of a point. width, heads: of the tokens.
        latents: how many. blocks: read-work-write rounds; layers: of work in each.
        sigma_data: with it positions are scaled back from the denoiser's input.
        classes: number of classes; 0 without.
    """

    def __init__(
        self,
        points: int = 64,
        width: int = 128,
        heads: int = 4,
        latents: int = 64,
        blocks: int = 3,
        layers: int = 1,
        tokens: int = 96,
        neighbours: int = 16,
        scan_layers: int = 2,
        sigma_data: float = 0.5,
        classes: int = 0,
    ) -> None:
        super().__init__()
        self.sigma_data = sigma_data
        self.label = nn.Embedding(classes, width) if classes else None
        self.encoder = ScanEncoder(width, tokens, neighbours, scan_layers, heads)
        self.enter = nn.Sequential(
            nn.Linear(6 * OCTAVES + 3, 2 * points), nn.GELU(), nn.Linear(2 * points, points)
        )
        self.time = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width))
        self.whole = nn.Linear(width, width)
        self.latents = nn.Parameter(torch.randn(latents, width) * 0.5)
        self.blocks = nn.ModuleList(
            Block(points, width, heads, layers, width) for _ in range(blocks)
        )
        self.leave = Modulated(points, width)
        self.head = nn.Linear(points, 3)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def condition(self, partial: Tensor) -> Tensor:
        """The tokens of a scan, which do not depend on time."""
        tokens: Tensor = self.encoder(partial)
        return tokens

    def forward(
        self, x: Tensor, scan: Tensor, code: Tensor, label: Tensor | None = None
    ) -> Tensor:
        sigma = torch.exp(-code)
        place = x * (sigma.square() + self.sigma_data**2).sqrt()[:, None, None]
        h = self.enter(torch.cat([x, waves(place, sigma)], -1))
        rates = torch.exp(torch.linspace(-2, 1.5, 16, dtype=x.dtype, device=x.device))
        angle = code[:, None] * rates
        embedding = self.time(torch.cat([angle.sin(), angle.cos()], 1))
        if self.label is not None and label is not None:
            embedding = embedding + self.label(label)
        embedding = F.silu(embedding + self.whole(scan.amax(1)))
        z = self.latents.expand(len(x), -1, -1)
        for block in self.blocks:
            h, z = block(h, z, scan, embedding)
        out: Tensor = self.head(self.leave(h, embedding))
        return out
