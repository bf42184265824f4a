"""Data distributions whose perturbed densities and denoisers are known exactly.

Under x_t = alpha x_0 + sigma eps a Gaussian mixture stays one, so its score, noise and data
predictions are exact at every time: ground truth for solvers, guidance and likelihoods.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.predictions import Condition, Prediction
from shared.process import Process, Scale, State, alpha_sigma


@dataclass(frozen=True)
class Mixture:
    """A mixture of diagonal Gaussians: ``weight`` [k], ``mean`` [k, d], ``var`` [k, d]."""

    weight: Tensor
    mean: Tensor
    var: Tensor

    @classmethod
    def gaussian(cls, mean: Tensor, var: Tensor) -> Mixture:
        """One component: ``mean`` [d], ``var`` [d]."""
        return cls(torch.ones(1, dtype=mean.dtype), mean[None], var[None])

    def _component_log_prob(self, x: Tensor, alpha: Scale, sigma: Scale) -> tuple[Tensor, Tensor]:
        """Joint log densities [n, k] and variances [n or 1, k, d] at scale (alpha, sigma)."""
        alpha, sigma = _column(alpha, x), _column(sigma, x)
        var = alpha**2 * self.var + sigma**2
        square = (x[:, None] - alpha * self.mean) ** 2 / var
        log_normal = -0.5 * (square + torch.log(2 * math.pi * var)).sum(-1)
        return torch.log(self.weight) + log_normal, var

    def log_prob(self, x: Tensor, alpha: Scale = 1.0, sigma: Scale = 0.0) -> Tensor:
        """log p_t(x) [n] of ``x`` [n, d]."""
        return self._component_log_prob(x, alpha, sigma)[0].logsumexp(-1)

    def x0_mean(self, x: Tensor, alpha: Scale, sigma: Scale) -> Tensor:
        """E[x_0 | x_t], [n, d]."""
        log_joint, var = self._component_log_prob(x, alpha, sigma)
        alpha = _column(alpha, x)
        posterior = self.mean + alpha * self.var / var * (x[:, None] - alpha * self.mean)
        return (log_joint.softmax(-1)[..., None] * posterior).sum(1)

    def x0_variance(self, x: Tensor, alpha: Scale, sigma: Scale) -> Tensor:
        """Var[x_0 | x_t] per dimension, [n, d]."""
        log_joint, var = self._component_log_prob(x, alpha, sigma)
        share = log_joint.softmax(-1)[..., None]
        a = _column(alpha, x)
        posterior = self.mean + a * self.var / var * (x[:, None] - a * self.mean)
        within = self.var * _column(sigma, x) ** 2 / var
        centre = (share * posterior).sum(1, keepdim=True)
        return (share * (within + (posterior - centre) ** 2)).sum(1)

    def eps_mean(self, x: Tensor, alpha: Scale, sigma: Scale) -> Tensor:
        """E[eps | x_t] = -sigma score, [n, d]; finite at sigma = 0."""
        log_joint, var = self._component_log_prob(x, alpha, sigma)
        a, s = _column(alpha, x), _column(sigma, x)
        posterior = s / var * (x[:, None] - a * self.mean)
        return (log_joint.softmax(-1)[..., None] * posterior).sum(1)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """``n`` independent draws, [n, d]."""
        component = torch.multinomial(self.weight, n, replacement=True, generator=generator)
        z = torch.randn(n, self.mean.shape[1], generator=generator, dtype=self.mean.dtype)
        return self.mean[component] + self.var[component].sqrt() * z


def _column(scale: Scale, x: Tensor) -> Scale:
    """Per-sample scales [n] or [n, 1] shaped to broadcast against [n, k, d]."""
    return scale.reshape(-1, 1, 1) if isinstance(scale, Tensor) else scale


@dataclass(frozen=True)
class AnalyticDenoiser:
    """The exact denoiser of a mixture per field; follows the ``Denoise`` protocol. A field's
    arrays may have any shape [n, ...] with the mixture's d entries per sample. Fields are
    independent. ``variance`` adds Var[x0 | x_t] as the output of a variance head."""

    process: Process
    mixtures: dict[str, Mixture]
    variance: bool = False

    @classmethod
    def single(
        cls, process: Process, mixture: Mixture, variance: bool = False
    ) -> AnalyticDenoiser:
        return cls(process, {next(iter(process.fields)): mixture}, variance)

    def __call__(
        self,
        x: State,
        t: float | Tensor,
        mask: Tensor | None = None,
        cond: Condition | None = None,
    ) -> dict[str, Prediction]:
        out = {}
        for name, mixture in self.mixtures.items():
            value = x[name]
            alpha, sigma = alpha_sigma(self.process.fields[name].schedule, t, value)
            flat = value.flatten(1)
            var = (
                mixture.x0_variance(flat, alpha, sigma).reshape(value.shape)
                if self.variance
                else None
            )
            out[name] = Prediction(
                value,
                alpha,
                sigma,
                var=var,
                x0=mixture.x0_mean(flat, alpha, sigma).reshape(value.shape),
                eps=mixture.eps_mean(flat, alpha, sigma).reshape(value.shape),
            )
        return out
