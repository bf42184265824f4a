"""Embeddings of the noise level and of wanted properties, shared by the networks for molecules."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FourierEmbedding(nn.Module):
    """Sines and cosines of the time code (half log-SNR, about -6 to 6), then a small network."""

    frequencies: Tensor

    def __init__(self, width: int, waves: int = 32, low: float = 0.1, high: float = 10.0) -> None:
        super().__init__()
        steps = torch.linspace(0.0, 1.0, waves, dtype=torch.float64)
        self.register_buffer("frequencies", low * (high / low) ** steps, persistent=False)
        self.net = nn.Sequential(nn.Linear(2 * waves, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, code: Tensor) -> Tensor:
        """[batch] -> [batch, width]."""
        angles = code[:, None] * self.frequencies.to(code)
        out: Tensor = self.net(torch.cat([angles.sin(), angles.cos()], -1))
        return out


class ContextEmbedding(nn.Module):
    """Standardised properties, each of which may be absent (NaN): a value that is not given is
    zero with its flag off, so the network learns what to do without it."""

    def __init__(self, properties: int, width: int) -> None:
        super().__init__()
        self.properties = properties
        self.net = nn.Sequential(
            nn.Linear(2 * properties, width), nn.SiLU(), nn.Linear(width, width)
        )

    def forward(self, context: Tensor | None, like: Tensor) -> Tensor:
        """context [batch, properties] or None (nothing given) -> [batch, width]; ``like``
        [batch, ...] gives batch size and dtype.

        Raises:
            ValueError: a context with another number of properties.
        """
        if context is None:
            context = like.new_full((len(like), self.properties), torch.nan)
        if context.shape != (len(like), self.properties):
            raise ValueError(
                f"cond['context'] has shape {tuple(context.shape)}; this network was built for "
                f"{self.properties} properties of {len(like)} samples: give NaN for a property "
                "that is free."
            )
        given = ~context.isnan()
        values = torch.where(given, context, 0.0).to(like.dtype)
        out: Tensor = self.net(torch.cat([values, given.to(like.dtype)], -1))
        return out
