"""Corrections of the data prediction, for data of a known range.

They act on x0_hat alone; the raw eps_hat stays, because published samplers mix the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.predictions import Condition, Correction, Denoise, Prediction
from shared.process import State


@dataclass(frozen=True)
class Clamp:
    """Static thresholding: x0_hat clamped to [low, high].

    Raises:
        ValueError: low >= high.
    """

    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"Clamp: low = {self.low} must be below high = {self.high}.")

    def __call__(self, x0: Tensor) -> Tensor:
        return x0.clamp(self.low, self.high)


@dataclass(frozen=True)
class DynamicThreshold:
    """Dynamic thresholding (Saharia et al. 2022, Section 2.3): with s the ``ratio`` quantile of
    |x0_hat| over all entries of a sample, but at least ``max_value``, x0_hat is clamped to
    [-s, s] and divided by s.

    Raises:
        ValueError: ratio outside (0, 1] or max_value not positive.
    """

    ratio: float = 0.995
    max_value: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.ratio <= 1.0:
            raise ValueError(f"DynamicThreshold: ratio = {self.ratio} must lie in (0, 1].")
        if self.max_value <= 0.0:
            raise ValueError(f"DynamicThreshold: max_value = {self.max_value} must be above 0.")

    def __call__(self, x0: Tensor) -> Tensor:
        size = x0.abs().flatten(1)
        if size.dtype not in (torch.float32, torch.float64):
            size = size.float()  # quantile knows no half precision
        s = torch.quantile(size, self.ratio, dim=1).clamp(min=self.max_value)
        s = s.to(x0.dtype).reshape(-1, *(1,) * (x0.dim() - 1))
        return torch.minimum(torch.maximum(x0, -s), s) / s


@dataclass(frozen=True)
class Thresholded:
    """A denoiser whose x0_hat is corrected, per field; itself a ``Denoise``.

    Args:
        denoise: any denoiser, also a guided one.
        corrections: field -> correction; other fields stay as they are.
    """

    denoise: Denoise
    corrections: Mapping[str, Correction]

    def __call__(
        self,
        x: State,
        t: float | Tensor,
        mask: Tensor | None = None,
        cond: Condition | None = None,
    ) -> dict[str, Prediction]:
        predictions = self.denoise(x, t, mask, cond)
        unknown = self.corrections.keys() - predictions.keys()
        if unknown:
            raise ValueError(
                f"Thresholded: corrections for {sorted(unknown)}, but the denoiser predicts "
                f"{sorted(predictions)}; rename the corrections."
            )
        return {
            name: p.corrected(self.corrections[name]) if name in self.corrections else p
            for name, p in predictions.items()
        }
