"""Ancestral sampling for any schedule: DDPM, DDIM, their optimal variances, DDIM inversion.

With q(x_t | x_s) = N(alpha_ts x_s, sigma_ts^2), alpha_ts = alpha_t / alpha_s and
sigma_ts^2 = sigma_t^2 - alpha_ts^2 sigma_s^2, the posterior q(x_s | x_t, x_0) has the variance
beta_tilde = sigma_ts^2 sigma_s^2 / sigma_t^2. A step puts x0_hat into the mean and adds noise; no
noise enters the step into sigma = 0, and a grid that ends before keeps the last step's noise.

FastDPM (Kong & Ping 2021) is :class:`DDIM` with eta = kappa on the grids of
:mod:`shared.solvers.search`; the Euler step of a rectified flow is DDIM with eta = 0.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from shared.schedules import Schedule
from shared.solvers.base import PlanSolver
from shared.solvers.plan import Form, LinearVariance, LogVariance, Tape
from shared.variance import Gamma

PIXEL = 2.0 / 255.0 * math.sqrt(math.pi / 2.0)


@dataclass(frozen=True)
class Transition:
    """From time ``t`` to ``s``; ``share`` = sigma_ts^2 / sigma_t^2 without cancellation."""

    t: float
    s: float
    alpha_t: float
    sigma_t: float
    alpha_s: float
    sigma_s: float
    share: float

    @property
    def forward(self) -> float:
        """sigma_ts^2, DDPM's beta on a discrete table."""
        return self.share * self.sigma_t**2

    @property
    def posterior(self) -> float:
        """beta_tilde."""
        return self.share * self.sigma_s**2


def transitions(schedule: Schedule, times: Sequence[float]) -> Iterator[Transition]:
    """The steps of a time grid, in order."""
    t = torch.tensor(list(times), dtype=torch.float64)
    share = -torch.expm1(2.0 * (schedule.log_snr(t)[:-1] - schedule.log_snr(t)[1:]))
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    columns = (t[:-1], t[1:], alpha[:-1], sigma[:-1], alpha[1:], sigma[1:], share)
    for row in zip(*(column.tolist() for column in columns), strict=True):
        yield Transition(*row)


@dataclass(frozen=True)
class _Ancestral(PlanSolver):
    """Common options.

    ``variance``: a :class:`Gamma` or one per field adds the optimal variance on average (Bao et
    al. 2022a), 'head' adds it per element (SN and NPR, Bao et al. 2022b), through
    (d mean / d x0_hat)^2 Var[x0 | x_t]; each class has further choices.
    ``cov_max`` bounds Var[x0 | x_t] of the tables; 1 is right for data in [-1, 1].
    ``clip_sigma_idx``, ``clip_pixel``: the noise of so many last noisy steps has at most the
    standard deviation that moves an image in [-1, 1] by ``clip_pixel`` grey levels on average
    (Bao et al. 2022a, Appendix F).
    """

    variance: str | Gamma | Mapping[str, Gamma] | None = None
    cov_max: float = 1.0
    clip_sigma_idx: int = 0
    clip_pixel: float = 2.0

    order = 1

    @abstractmethod
    def _step(self, x: Form, x0: Form, eps: Form, step: Transition) -> tuple[Form, float, float]:
        """The mean; d mean / d x0_hat at fixed x_t; the variance of the noise before an optimal
        one is added."""

    def for_field(self, name: str) -> PlanSolver:
        if not isinstance(self.variance, Mapping):
            return self
        if name not in self.variance:
            raise ValueError(
                f"variance: no table of Gamma for field '{name}', only for "
                f"{sorted(self.variance)}; estimate it with shared.variance.estimate_gamma."
            )
        return replace(self, variance=self.variance[name])

    def write(
        self, tape: Tape, schedule: Schedule, times: Sequence[float], lead: Schedule
    ) -> None:
        x = tape.start()
        steps = list(transitions(schedule, times))
        noisy = sum(step.sigma_s > 0.0 for step in steps)
        for i, step in enumerate(steps):
            row = tape.row
            mean, carried, small = self._step(x, *tape.predict(x, step.t), step)
            if step.sigma_s > 0.0 and self.stochastic:
                clipped = i >= noisy - self.clip_sigma_idx
                cap = (self.clip_pixel * PIXEL) ** 2 if clipped else math.inf
                if self.variance == "head":
                    mean += tape.learned_noise(LinearVariance(row, small, carried**2, cap))
                elif self.variance == "range":
                    log_small, log_large = math.log(step.posterior), math.log(step.forward)
                    mean += tape.learned_noise(LogVariance(row, log_small, log_large))
                else:
                    variance = small + carried**2 * self._covariance(step)
                    mean += math.sqrt(min(variance, cap)) * tape.draw()
            x = tape.step(mean, step.s)

    def _covariance(self, step: Transition) -> float:
        """Var[x0 | x_t] of the table, 0 without one."""
        if isinstance(self.variance, Mapping):
            raise ValueError("variance: tables per field need for_field before plan.")
        if isinstance(self.variance, Gamma):
            return self.variance.x0_variance(step.t, step.alpha_t, step.sigma_t, self.cov_max)
        return 0.0


@dataclass(frozen=True)
class DDPM(_Ancestral):
    """mean = alpha_ts sigma_s^2/sigma_t^2 x_t + alpha_s sigma_ts^2/sigma_t^2 x0_hat
    (Ho et al. 2020, Eq. 7), plus noise of variance 'beta_tilde', 'beta' (sigma_ts^2), 'range'
    (learned between the two, Nichol & Dhariwal 2021), or the optimal one on top of beta_tilde.

    Raises:
        ValueError: an unknown variance, or clipping asked of 'range'.
    """

    variance: str | Gamma | Mapping[str, Gamma] | None = "beta_tilde"

    stochastic = True

    def __post_init__(self) -> None:
        known = ("beta_tilde", "beta", "range", "head")
        if not isinstance(self.variance, Gamma | Mapping) and self.variance not in known:
            raise ValueError(
                f"DDPM: variance '{self.variance}' is not one of {', '.join(known)}, nor a table "
                "of Gamma."
            )
        if self.variance == "range" and self.clip_sigma_idx:
            raise ValueError("DDPM: a learned range is not clipped; set clip_sigma_idx to 0.")

    def _step(self, x: Form, x0: Form, eps: Form, step: Transition) -> tuple[Form, float, float]:
        carried = step.alpha_s * step.share
        keep = step.alpha_t / step.alpha_s * (step.sigma_s / step.sigma_t) ** 2
        small = step.forward if self.variance == "beta" else step.posterior
        return keep * x + carried * x0, carried, small


@dataclass(frozen=True)
class DDIM(_Ancestral):
    """mean = alpha_s x0_hat + sqrt(sigma_s^2 - eta^2 beta_tilde) eps_hat (Song et al. 2021a,
    Eq. 12), with the raw eps_hat as published, so that a clamped x0_hat leaves it alone, plus
    noise of variance eta^2 beta_tilde.

    ``eta``: 0 deterministic, 1 the noise of DDPM; FastDPM's kappa. ``variance``: None, 'head' or
    tables of Gamma.

    Raises:
        ValueError: eta outside [0, 1] or an unknown variance.
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.eta <= 1.0:
            raise ValueError(f"DDIM: eta = {self.eta} is outside [0, 1].")
        if isinstance(self.variance, str) and self.variance != "head":
            raise ValueError(
                f"DDIM: variance '{self.variance}' is neither 'head' nor a table of Gamma."
            )

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        return self.eta > 0.0 or self.variance is not None

    def _step(self, x: Form, x0: Form, eps: Form, step: Transition) -> tuple[Form, float, float]:
        direction = step.sigma_s * math.sqrt(max(0.0, 1.0 - self.eta**2 * step.share))
        carried = step.alpha_s - direction * step.alpha_t / step.sigma_t
        return step.alpha_s * x0 + direction * eps, carried, self.eta**2 * step.posterior


@dataclass(frozen=True)
class DDIMInversion(PlanSolver):
    """DDIM with eta = 0 run from data to noise over increasing times (Song et al. 2021a,
    Section 4.3), each step with the prediction at its cleaner end. Start at ``t_min`` rather than
    at sigma = 0, where most denoisers are not defined."""

    order = 1
    stochastic = False
    increasing = True

    def write(
        self, tape: Tape, schedule: Schedule, times: Sequence[float], lead: Schedule
    ) -> None:
        x = tape.start()
        for t, s in zip(times, times[1:], strict=False):
            x0, eps = tape.predict(x, t)
            x = tape.step(float(schedule.alpha(s)) * x0 + float(schedule.sigma(s)) * eps, s)
