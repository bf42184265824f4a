"""Loss weights and how training times are drawn."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.schedules import Schedule


class Weighting(ABC):
    """A weight w(t) on the squared error of the noise, ||eps - eps_hat||^2."""

    @abstractmethod
    def __call__(self, schedule: Schedule, t: Tensor, eps_gain: Tensor) -> Tensor:
        """Float64 [batch] weights; ``eps_gain`` as in :class:`Parameterisation`."""


@dataclass(frozen=True)
class Simple(Weighting):
    """w = 1 (Ho et al. 2020, Eq. 14)."""

    def __call__(self, schedule: Schedule, t: Tensor, eps_gain: Tensor) -> Tensor:
        return torch.ones_like(t)


@dataclass(frozen=True)
class Native(Weighting):
    """Plain mean square of the network's own output; with :class:`KarrasPreconditioned` this is
    EDM's weight 1 / c_out^2 (Karras et al. 2022, Eq. 8), with :class:`Velocity` or
    :class:`Flow` the usual loss of these models."""

    def __call__(self, schedule: Schedule, t: Tensor, eps_gain: Tensor) -> Tensor:
        return eps_gain**-2


@dataclass(frozen=True)
class DataError(Weighting):
    """Plain mean square of x0: w = sigma^2 / alpha^2."""

    def __call__(self, schedule: Schedule, t: Tensor, eps_gain: Tensor) -> Tensor:
        return torch.exp(-2.0 * schedule.log_snr(t))


@dataclass(frozen=True)
class EDMWeight(Weighting):
    """(sigma^2 + sigma_data^2) / (sigma sigma_data)^2 on the error of x0, for any
    parameterisation; sigma relative to alpha (Karras et al. 2022, Table 1)."""

    sigma_data: float = 0.5

    def __call__(self, schedule: Schedule, t: Tensor, eps_gain: Tensor) -> Tensor:
        return torch.exp(-2.0 * schedule.log_snr(t)) / self.sigma_data**2 + 1.0


@dataclass(frozen=True)
class Vlb(Weighting):
    """The variational bound: T/2 (SNR(t - 1/T) / SNR(t) - 1) for ``steps`` = T, and its limit
    -d lambda/dt in continuous time (Kingma et al. 2021, Eqs. 14 and 18)."""

    steps: int | None = None

    def __call__(self, schedule: Schedule, t: Tensor, eps_gain: Tensor) -> Tensor:
        if self.steps is None:
            return Likelihood()(schedule, t, eps_gain)
        span = schedule.t_max / self.steps
        gap = schedule.log_snr((t - span).clamp(min=schedule.t_min)) - schedule.log_snr(t)
        return 0.5 * self.steps * torch.expm1(2.0 * gap)


@dataclass(frozen=True)
class Likelihood(Weighting):
    """g^2 / (2 sigma^2): maximum likelihood (Song et al. 2021b, Eq. 7)."""

    def __call__(self, schedule: Schedule, t: Tensor, eps_gain: Tensor) -> Tensor:
        return 0.5 * schedule.diffusion_squared(t) * torch.exp(-2.0 * schedule.log_sigma(t))


@dataclass(frozen=True)
class MinSNR(Weighting):
    """min(SNR, gamma) / SNR (Hang et al. 2023)."""

    gamma: float = 5.0

    def __call__(self, schedule: Schedule, t: Tensor, eps_gain: Tensor) -> Tensor:
        return (self.gamma * torch.exp(-2.0 * schedule.log_snr(t))).clamp(max=1.0)


def range_bound(
    schedule: Schedule, t: Tensor, steps: int, fraction: Tensor, error: Tensor
) -> Tensor:
    """Terms of the variational bound, in bits per entry, with the reverse variance
    large^v small^(1-v), large = beta and small = the posterior's variance (Nichol & Dhariwal
    2021, Eq. 15). The term of the last step is the continuous Gaussian likelihood; its
    ``small`` is that of the step before, which is not zero.

    Args:
        t: times n t_max / ``steps``, [batch].
        fraction: v, [batch, ...]. error: x0 - x0_hat, [batch, ...], without gradient.
    """
    span = schedule.t_max / steps
    last = t < 1.5 * span
    small, large, gain = _posterior(schedule, t, span)
    small = torch.where(last, _posterior(schedule, t + span, span)[0], small)
    shape = (-1, *(1,) * (error.dim() - 1))
    low, high, gain = (v.to(error).reshape(shape) for v in (small.log(), large.log(), gain))
    log_variance = fraction * high + (1.0 - fraction) * low
    square = (gain * error) ** 2 * torch.exp(-log_variance)
    divergence = log_variance - low - 1.0 + torch.exp(low - log_variance) + square
    surprise = math.log(2 * math.pi) + log_variance + square
    return torch.where(last.reshape(shape), surprise, divergence) / (2 * math.log(2.0))


def _posterior(schedule: Schedule, t: Tensor, span: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of q(x_s | x_t, x_0), s = t - ``span``: variance, its upper bound beta, and the derivative
    of its mean by x_0; float64 [batch]."""
    s = (t - span).clamp(min=0.0)
    alpha, before, after = schedule.alpha(s), schedule.sigma(s) ** 2, schedule.sigma(t) ** 2
    beta = after - (schedule.alpha(t) / alpha) ** 2 * before
    return beta * before / after, beta, alpha * beta / after


class TimeSampler(ABC):
    """How training times are drawn; strata make the batch cover the range evenly."""

    @abstractmethod
    def from_uniform(self, schedule: Schedule, u: Tensor) -> Tensor:
        """Uniform numbers on [0, 1) -> times, float64 [batch]."""

    def __call__(
        self,
        schedule: Schedule,
        batch: int,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Stratified times: u_i = (i + v) / batch with one v, in random order (Kingma et al.
        2021, Appendix I.1)."""
        v = torch.rand((), generator=generator, dtype=torch.float64)
        order = torch.randperm(batch, generator=generator)
        return self.from_uniform(schedule, ((order + v) / batch).to(device))


@dataclass(frozen=True)
class UniformTime(TimeSampler):
    """t uniform on [t_min, t_max]; with ``steps``, on the grid n t_max / steps, n = 1..steps."""

    steps: int | None = None

    def from_uniform(self, schedule: Schedule, u: Tensor) -> Tensor:
        if self.steps is not None:
            return (torch.floor(u * self.steps) + 1.0) * (schedule.t_max / self.steps)
        return schedule.t_min + (schedule.t_max - schedule.t_min) * u


@dataclass(frozen=True)
class NormalLogSNR(TimeSampler):
    """lambda = log(alpha/sigma) ~ N(mean, std^2), cut to [low, high]. EDM's
    log sigma ~ N(-1.2, 1.2^2) is mean 1.2, std 1.2 on a Karras schedule."""

    mean: float = 1.2
    std: float = 1.2
    low: float = -math.inf
    high: float = math.inf

    def from_uniform(self, schedule: Schedule, u: Tensor) -> Tensor:
        z = math.sqrt(2.0) * torch.erfinv((2.0 * u - 1.0).clamp(-1 + 1e-12, 1 - 1e-12))
        log_snr = (self.mean + self.std * z).clamp(self.low, self.high)
        return schedule.t_from_log_snr(log_snr)
