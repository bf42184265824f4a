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
    zero with its flag off, so the network learns what to do without it.

    In training it hides properties, so that one network serves conditional, unconditional and
    classifier-free sampling: all of a molecule with probability ``hide[0]``, all but one with
    ``hide[1]``, else a random number of them.
    """

    def __init__(
        self, properties: int, width: int, hide: tuple[float, float] = (0.15, 0.5)
    ) -> None:
        super().__init__()
        self.properties, self.hide = properties, tuple(hide)
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
        if self.training:
            given = given & self._told(context)
        values = torch.where(given, context, 0.0).to(like.dtype)
        out: Tensor = self.net(torch.cat([values, given.to(like.dtype)], -1))
        return out

    def _told(self, context: Tensor) -> Tensor:
        """Which properties are not hidden, [batch, properties]."""
        none, one = self.hide
        u = torch.rand(len(context), 1, device=context.device)
        more = 2.0 + (self.properties - 1) * (u - none - one) / max(1.0 - none - one, 1e-6)
        count = torch.where(u < none, 0.0, torch.where(u < none + one, 1.0, more.floor()))
        rank = torch.rand(context.shape, device=context.device).argsort(1).argsort(1)
        return rank < count
