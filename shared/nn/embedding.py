"""Features of a time code [batch] and the small network that every backbone puts behind them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def sinusoidal(
    code: Tensor,
    width: int,
    max_period: float = 10_000.0,
    cosine_first: bool = False,
    endpoint: bool = False,
) -> Tensor:
    """Sines and cosines of ``code`` at geometric frequencies from 1 down to 1 / ``max_period``,
    [batch, width] (Vaswani et al. 2017, Section 3.5).

    ``endpoint`` includes 1 / ``max_period`` itself. DDPM has sines first with the end point, ADM
    and U-ViT cosines first without it. An odd ``width`` ends in a zero.
    """
    half = width // 2
    exact = torch.promote_types(code.dtype, torch.float32)
    steps = torch.arange(half, dtype=exact, device=code.device)
    angle = code[:, None] * torch.exp(-math.log(max_period) * steps / max(1, half - endpoint))
    pair = (angle.cos(), angle.sin()) if cosine_first else (angle.sin(), angle.cos())
    return nn.functional.pad(torch.cat(pair, dim=1), (0, width % 2))


class Sinusoidal(nn.Module):
    """:func:`sinusoidal` as a layer; no parameters."""

    def __init__(
        self,
        width: int,
        max_period: float = 10_000.0,
        cosine_first: bool = False,
        endpoint: bool = False,
    ) -> None:
        super().__init__()
        self.width, self.max_period = width, max_period
        self.cosine_first, self.endpoint = cosine_first, endpoint

    def forward(self, code: Tensor) -> Tensor:
        return sinusoidal(code, self.width, self.max_period, self.cosine_first, self.endpoint)


class Fourier(nn.Module):
    """Sines and cosines at fixed random frequencies, 2 pi ``scale`` N(0, 1) (Song et al. 2021,
    Appendix G; Tancik et al. 2020), [batch, width]. The frequencies are saved with the weights."""

    frequencies: Tensor

    def __init__(self, width: int, scale: float = 16.0, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        frequencies = 2 * math.pi * scale * torch.randn(width // 2, generator=generator)
        self.register_buffer("frequencies", frequencies)

    def forward(self, code: Tensor) -> Tensor:
        angle = code[:, None] * self.frequencies
        return torch.cat([angle.sin(), angle.cos()], dim=1)


class TimeEmbedding(nn.Module):
    """Time code [batch] -> [batch, out]: ``features`` of ``width`` numbers, then two layers."""

    def __init__(
        self, width: int, out: int | None = None, features: nn.Module | None = None
    ) -> None:
        super().__init__()
        out = 4 * width if out is None else out
        self.features = features or Sinusoidal(width)
        self.layers = nn.Sequential(nn.Linear(width, out), nn.SiLU(), nn.Linear(out, out))

    def forward(self, code: Tensor) -> Tensor:
        embedded: Tensor = self.layers(self.features(code))
        return embedded
