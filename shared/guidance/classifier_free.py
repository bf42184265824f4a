"""Classifier-free guidance (Ho & Salimans 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shared.geometry import Euclidean, Geometry
from shared.guidance.energies import check_condition
from shared.guidance.guided import Interval
from shared.predictions import Condition, Denoise, Prediction
from shared.process import Process, State, alpha_sigma, version


@dataclass(frozen=True, eq=False)
class ClassifierFree:
    """eps_null + scale (eps_cond - eps_null): 1 is the conditional model, 0 the unconditional one
    (``scale`` = 1 + w of the paper). One call of the denoiser on twice the batch; one plain call
    where scale is 1 or the time lies outside the interval.

    Args:
        null: the values that stand for "no condition", [1, ...] or [batch, ...]; conditions that
            are not named here are the same on both sides.
        negative: conditions to move away from, in place of the null ones.
        interval: half log-SNR (low, high) of the leading field in which guidance acts
            (Kynkaanniemi et al. 2024).
        rescale: phi of Lin et al. (2024, Eqs. 15-16): how much of the standard deviation that
            guidance added to x0_hat is taken back, 0 to 1. On a subspace or with padding it is
            the root mean square over the degrees of freedom.

    Raises (on call):
        ValueError: a condition is missing or has the wrong shape.
    """

    denoise: Denoise
    process: Process
    null: Mapping[str, Tensor]
    scale: float = 2.0
    negative: Mapping[str, Tensor] = field(default_factory=dict)
    interval: tuple[float, float] | None = None
    rescale: float = 0.0
    _kept: list[Any] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0.0 <= self.rescale <= 1.0:
            raise ValueError(f"ClassifierFree: rescale={self.rescale} is outside [0, 1].")

    def __call__(
        self,
        x: State,
        t: float | Tensor,
        mask: Tensor | None = None,
        cond: Condition | None = None,
    ) -> dict[str, Prediction]:
        batch = next(iter(x.values()))
        n = len(batch)
        scale = self._scale(t, batch)
        given = self._doubled(dict(cond or {}), n)
        if scale is None:
            return self.denoise(x, t, mask, cond)
        both = self.denoise(
            {name: torch.cat([v, v]) for name, v in x.items()},
            torch.cat([t, t]) if isinstance(t, Tensor) else t,
            None if mask is None else torch.cat([mask, mask]),
            given,
        )
        return {name: self._guide(name, p, scale, mask) for name, p in both.items()}

    def _doubled(self, given: Condition, n: int) -> Condition:
        """Both sides' conditions [2 batch, ...]: the very same tensors for as long as the given
        ones are, so that a network may keep what it makes of them."""
        states = {name: version(value) for name, value in given.items()}
        if self._kept:
            known, before, doubled = self._kept
            if before == states and all(known[name] is value for name, value in given.items()):
                return dict(doubled)
        other = self._against(given, n)
        doubled = {name: torch.cat([given[name], other[name]]) for name in given}
        if not any(value.requires_grad for value in doubled.values()):
            self._kept[:] = given, states, doubled
        return doubled

    def _scale(self, t: float | Tensor, batch: Tensor) -> Tensor | None:
        """The scale [batch] or []; None where guidance does nothing."""
        inside = Interval(*(self.interval or ()))
        alpha, sigma = alpha_sigma(self.process.lead, t, batch.new_empty(len(batch)))
        scale = 1.0 + (self.scale - 1.0) * inside(alpha, sigma)
        if not isinstance(scale, Tensor):
            return None if scale == 1.0 else batch.new_tensor(scale)
        return scale

    def _against(self, given: Condition, n: int) -> dict[str, Tensor]:
        """The conditions of the other side, [batch, ...]."""
        check_condition(given, n)
        replaced = {**self.null, **self.negative}
        for name, value in replaced.items():
            if name not in given:
                raise ValueError(
                    f"ClassifierFree: there is no condition '{name}' to compare with its null "
                    f"value; given: {sorted(given)}."
                )
            if value.shape[1:] != given[name].shape[1:] or value.shape[:1] not in ((1,), (n,)):
                raise ValueError(
                    f"ClassifierFree: the null value of '{name}' has shape {tuple(value.shape)}, "
                    f"the condition {tuple(given[name].shape)}; give [1, ...] or [batch, ...]."
                )
        return {
            name: replaced[name].to(v).expand(v.shape) if name in replaced else v
            for name, v in given.items()
        }

    def _guide(
        self, name: str, both: Prediction, scale: Tensor, mask: Tensor | None
    ) -> Prediction:
        n = len(both.x) // 2
        yes, no = both.map(lambda v: v[:n]), both.map(lambda v: v[n:])
        scale = scale.to(both.x).reshape(-1, *(1,) * (both.x.dim() - 1))
        guided = Prediction.blend([yes, no], [scale, 1.0 - scale])
        if self.rescale == 0.0:
            return guided
        geometry = self.process.fields[name].geometry
        # the ratio of deviations is applied as a blend with 0 = the prediction of x0_hat = 0
        ratio = _deviation(geometry, yes.raw_x0, mask) / _deviation(geometry, guided.raw_x0, mask)
        factor = self.rescale * ratio + 1.0 - self.rescale
        shape = (-1, *(1,) * (both.x.dim() - 1))
        empty = Prediction(yes.x, yes.alpha, yes.sigma, x0=torch.zeros_like(yes.x))
        factor = factor.to(both.x).reshape(shape)
        return Prediction.blend([guided, empty], [factor, 1.0 - factor])


def _deviation(geometry: Geometry, x: Tensor, mask: Tensor | None) -> Tensor:
    """Standard deviation of each sample's entries [batch]."""
    if isinstance(geometry, Euclidean):
        return x.flatten(1).std(1).clamp(min=1e-12)
    dim = geometry.dim(x, mask).to(x).clamp(min=1.0)
    return (geometry.norm_squared(x) / dim).sqrt().clamp(min=1e-12)
