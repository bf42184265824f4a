"""How likely data are under a model: variational bounds and the probability-flow likelihood.

All values are in nats per sample, float64 [batch], and densities over the degrees of freedom of
the geometries: (n - 1) * 3 for centred points, every edge once. Change of scale between model
units and data units (Jacobians) and the size of the sample are the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.predictions import Condition, Denoise, Prediction
from shared.probability_flow import ProbabilityFlow, log_normal, prior_log_prob, prior_std
from shared.process import Process, State
from shared.randomness import Draws
from shared.schedules import Schedule

__all__ = [
    "Bound",
    "ProbabilityFlow",
    "bits_per_dim",
    "gaussian_decoder",
    "log_normal",
    "prior_kl",
    "prior_log_prob",
    "rate_kl",
    "step_kl",
    "variational_bound",
]

Decoder = Callable[[State, Mapping[str, Prediction], Tensor | None], Tensor]


def prior_kl(process: Process, x0: State, mask: Tensor | None = None) -> Tensor:
    """KL(q(x_T | x_0) || prior) of each sample, [batch]."""
    total = torch.zeros(len(next(iter(x0.values()))), dtype=torch.float64)
    for name, field in process.fields.items():
        geometry, t = field.geometry, field.schedule.t_max
        alpha, sigma = float(field.schedule.alpha(t)), float(field.schedule.sigma(t))
        prior = prior_std(field)
        ratio = (sigma / prior) ** 2
        shift = geometry.norm_squared(x0[name]).double() * (alpha / prior) ** 2
        spread = geometry.dim(x0[name], mask) * (ratio - 1.0 - math.log(ratio))
        total = total.to(shift) + 0.5 * (shift + spread)
    return total


def step_kl(
    process: Process,
    denoise: Denoise,
    x0: State,
    t: Tensor,
    s: Tensor,
    noise: State,
    mask: Tensor | None = None,
    cond: Condition | None = None,
) -> Tensor:
    """KL(q(x_s | x_t, x_0) || p(x_s | x_t)) at x_t = alpha x_0 + sigma noise, [batch]:
    expm1(2 (lambda_s - lambda_t)) / 2 * ||eps - eps_hat||^2 (Kingma et al. 2021, Eq. 14), summed
    over the fields. ``t``, ``s`` < t: float64 [batch]."""

    def weight(schedule: Schedule) -> Tensor:
        return 0.5 * torch.expm1(2.0 * (schedule.log_snr(s) - schedule.log_snr(t)))

    return _noise_error(process, denoise, x0, t, noise, weight, mask, cond)


def rate_kl(
    process: Process,
    denoise: Denoise,
    x0: State,
    t: Tensor,
    noise: State,
    mask: Tensor | None = None,
    cond: Condition | None = None,
) -> Tensor:
    """The continuous-time integrand -d lambda/dt ||eps - eps_hat||^2, the limit of
    :func:`step_kl` / (t - s) (Kingma et al. 2021, Eq. 18), [batch]."""

    def weight(schedule: Schedule) -> Tensor:
        return _log_snr_rate(schedule, t)

    return _noise_error(process, denoise, x0, t, noise, weight, mask, cond)


def _log_snr_rate(schedule: Schedule, t: Tensor) -> Tensor:
    """-d lambda / dt."""
    return 0.5 * schedule.diffusion_squared(t) * torch.exp(-2.0 * schedule.log_sigma(t))


def _noise_error(
    process: Process,
    denoise: Denoise,
    x0: State,
    t: Tensor,
    noise: State,
    weight: Callable[[Schedule], Tensor],
    mask: Tensor | None,
    cond: Condition | None,
) -> Tensor:
    predictions = denoise(process.perturb(x0, t, noise), t, mask, cond)
    terms = []
    for name, field in process.fields.items():
        error = field.geometry.norm_squared(noise[name] - predictions[name].eps)
        terms.append(weight(field.schedule) * error.double())
    return torch.stack(terms).sum(0)


def gaussian_decoder(process: Process, t: float) -> Decoder:
    """log N(x_0; x0_hat, (sigma/alpha)^2) at time ``t`` (Hoogeboom et al. 2022, Eq. 10), for
    continuous fields."""

    def log_prob(x0: State, seen: Mapping[str, Prediction], mask: Tensor | None) -> Tensor:
        terms = []
        for name, field in process.fields.items():
            std = math.exp(-float(field.schedule.log_snr(t)))
            error = x0[name] - seen[name].raw_x0
            terms.append(log_normal(field.geometry, error, std, mask))
        return torch.stack(terms).sum(0)

    return log_prob


@dataclass(frozen=True)
class Bound:
    """An evidence lower bound and its parts, each [batch], in nats."""

    prior_kl: Tensor
    diffusion_kl: Tensor
    reconstruction: Tensor

    @property
    def elbo(self) -> Tensor:
        """Lower bound of log p(x_0)."""
        return self.reconstruction - self.diffusion_kl - self.prior_kl


@torch.no_grad()
def variational_bound(
    process: Process,
    denoise: Denoise,
    x0: State,
    draws: Draws,
    times: Sequence[float] | None = None,
    *,
    evaluations: int | None = None,
    decoder: Decoder | None = None,
    mask: Tensor | None = None,
    cond: Condition | None = None,
) -> Bound:
    """One unbiased estimate of the bound of log p(x_0) per sample.

    Args:
        draws: the samples' random numbers: ``variational_bound`` uses those named so.
        times: decreasing grid of the discrete model from t_max to its last time; None: continuous
            time between t_max and t_min.
        evaluations: steps drawn per sample, stratified; None: every step of the grid (64 draws in
            continuous time).
        decoder: ``(x0, predictions at the last time, mask)`` -> log p(x_0 | x_last) [batch];
            default :func:`gaussian_decoder`.

    Raises:
        ValueError: a grid of fewer than two times, or one that does not start at t_max.
    """
    if times is not None and (len(times) < 2 or abs(times[0] - process.lead.t_max) > 1e-9):
        raise ValueError(
            f"variational_bound: the times must be a grid from t_max = {process.lead.t_max:.6g} "
            "down to the last time, or None for continuous time."
        )
    last = process.lead.t_min if times is None else float(times[-1])
    if float(process.lead.sigma(last)) == 0.0:
        raise ValueError(
            f"variational_bound: sigma is 0 at the last time {last:.6g}, where densities are "
            "infinite; give times that end before."
        )
    diffusion = torch.zeros(len(draws.indices), dtype=torch.float64)
    for number, (t, s, factor) in enumerate(_strata(process, times, evaluations, draws)):
        noise = _normals(process, x0, draws, number + 1, mask)
        if s is None:
            term = rate_kl(process, denoise, x0, t.to(_device(x0)), noise, mask, cond)
        else:
            t, s = t.to(_device(x0)), s.to(_device(x0))
            term = step_kl(process, denoise, x0, t, s, noise, mask, cond)
        diffusion = diffusion.to(term) + factor.to(term) * term
    seen = process.perturb(x0, last, _normals(process, x0, draws, 0, mask))
    decoder = gaussian_decoder(process, last) if decoder is None else decoder
    reconstruction = decoder(x0, denoise(seen, last, mask, cond), mask)
    return Bound(prior_kl(process, x0, mask), diffusion, reconstruction)


def _strata(
    process: Process, times: Sequence[float] | None, evaluations: int | None, draws: Draws
) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """(t, s or None, factor), each [batch], whose terms sum to the diffusion loss."""
    grid = None if times is None else torch.tensor(times, dtype=torch.float64)
    steps = 64 if grid is None else len(grid) - 1
    n = steps if evaluations is None else evaluations
    first, last = (
        float(process.lead.log_snr(t)) for t in (process.lead.t_max, process.lead.t_min)
    )
    for k in range(n):
        if grid is not None and evaluations is None:
            pick = torch.full((len(draws.indices),), k)
            yield grid[pick], grid[pick + 1], torch.ones(len(pick), dtype=torch.float64)
            continue
        u = (k + draws.uniform("variational_bound", k)) / n
        if grid is not None:
            pick = (u * steps).long().clamp(max=steps - 1)
            yield grid[pick], grid[pick + 1], torch.full_like(u, steps / n)
        else:  # uniform in the log-SNR of the leading field
            t = process.lead.t_from_log_snr(first + (last - first) * u)
            yield t, None, (last - first) / n / _log_snr_rate(process.lead, t)


def _device(x: State) -> torch.device:
    return next(iter(x.values())).device


def _normals(
    process: Process, like: State, draws: Draws, number: int, mask: Tensor | None
) -> State:
    return {
        name: draws.normal(f"variational_bound.{name}", number, like[name], f.geometry, mask)
        for name, f in process.fields.items()
    }


def bits_per_dim(log_prob: Tensor, dim: Tensor | float, bin_width: float = 2.0 / 256.0) -> Tensor:
    """-log2 of the probability per dimension of data quantised in bins of ``bin_width`` model
    units, with uniform dequantisation; 2/256 = 8-bit images scaled to [-1, 1]."""
    return -log_prob / (dim * math.log(2.0)) - math.log2(bin_width)
