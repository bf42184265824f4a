"""Noise schedules: time -> (alpha, sigma, log-SNR) and back, exact in float64.

The forward law of every schedule is ``x_t = alpha(t) x_0 + sigma(t) eps`` with standard normal
``eps``. Everything else follows: the drift ``f = d log alpha / dt`` and the squared diffusion
``g^2 = -2 sigma^2 d log_snr / dt`` of the forward SDE ``dx = f x dt + g dw`` (Kingma et al. 2021,
Variational Diffusion Models; Lu et al. 2022, DPM-Solver, Eq. 2.3).

``log_snr`` is the *half* log-SNR, ``lambda = log(alpha / sigma)``, the variable of the DPM-Solver
papers. Times are tensors of any shape; results are float64 of the same shape.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Time = float | Tensor


def as_time(t: Time) -> Tensor:
    """A time (or any other schedule coordinate) as a float64 tensor."""
    return torch.as_tensor(t, dtype=torch.float64)


def _log_sqrt_sigmoid(x: Tensor) -> Tensor:
    return 0.5 * F.logsigmoid(x)


def _slope(fn: Callable[[Tensor], Tensor], t: Time) -> Tensor:
    """Derivative of an element-wise function at every entry of ``t``."""
    with torch.enable_grad():
        t = as_time(t).detach().requires_grad_(True)
        (slope,) = torch.autograd.grad(fn(t).sum(), t)
    return slope


class Schedule(ABC):
    """A noise schedule on the times ``[t_min, t_max]``; noise grows with ``t``.

    ``t_min`` and ``t_max`` are where samplers stop and start by default. The functions are
    defined on the whole of ``[0, t_max]``.
    """

    t_min: float
    t_max: float

    @abstractmethod
    def log_alpha(self, t: Time) -> Tensor:
        """log alpha(t)."""

    @abstractmethod
    def log_sigma(self, t: Time) -> Tensor:
        """log sigma(t)."""

    @abstractmethod
    def t_from_log_snr(self, log_snr: Time) -> Tensor:
        """The time with half log-SNR ``log_snr``; values out of range give the nearest end,
        except where a schedule says that it extrapolates."""

    def alpha(self, t: Time) -> Tensor:
        return self.log_alpha(t).exp()

    def sigma(self, t: Time) -> Tensor:
        return self.log_sigma(t).exp()

    def log_snr(self, t: Time) -> Tensor:
        """lambda(t) = log(alpha / sigma); decreases with ``t``."""
        return self.log_alpha(t) - self.log_sigma(t)

    def log_alpha_rate(self, t: Time) -> Tensor:
        """The drift coefficient f(t) = d log alpha / dt."""
        return _slope(self.log_alpha, t)

    def diffusion_squared(self, t: Time) -> Tensor:
        """g(t)^2 = -2 sigma^2 d lambda / dt."""
        return -2.0 * (2.0 * self.log_sigma(t)).exp() * _slope(self.log_snr, t)

    def prior_std(self) -> float:
        """Standard deviation of the sampler's start, sigma(t_max)."""
        return float(self.sigma(self.t_max))


class VariancePreserving(Schedule):
    """Schedules with alpha^2 + sigma^2 = 1; a subclass gives ``log_alpha`` and its inverse."""

    @abstractmethod
    def t_from_log_alpha(self, log_alpha: Tensor) -> Tensor:
        """The time with the given log alpha."""

    def log_sigma(self, t: Time) -> Tensor:
        return 0.5 * torch.log(-torch.expm1(2.0 * self.log_alpha(t)))

    def t_from_log_snr(self, log_snr: Time) -> Tensor:
        return self.t_from_log_alpha(_log_sqrt_sigmoid(2.0 * as_time(log_snr)))


@dataclass(frozen=True)
class VPLinear(VariancePreserving):
    """beta(t) = beta_min + t (beta_max - beta_min) (Song et al. 2021, Eq. 32)."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-3
    t_max: float = 1.0

    def log_alpha(self, t: Time) -> Tensor:
        t = as_time(t)
        return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def t_from_log_alpha(self, log_alpha: Tensor) -> Tensor:
        c = -4.0 * log_alpha  # (b1 - b0) t^2 + 2 b0 t = c
        rise = self.beta_max - self.beta_min
        return c / (self.beta_min + torch.sqrt(self.beta_min**2 + rise * c))


@dataclass(frozen=True)
class VPCosine(VariancePreserving):
    """alpha = cos(pi/2 (t+s)/(1+s)) / cos(pi/2 s/(1+s)) (Nichol & Dhariwal 2021), in continuous
    time; ``t_max = 0.9946`` keeps alpha away from zero as in DPM-Solver."""

    s: float = 0.008
    t_min: float = 1e-3
    t_max: float = 0.9946

    def log_alpha(self, t: Time) -> Tensor:
        half = as_time(t) / (1 + self.s) * (math.pi / 4)  # exactly 0 at t = 0, no cancellation
        ratio = torch.sin(half) * torch.sin(half + self._start) / math.cos(self._start)
        return torch.log1p(-2.0 * ratio)

    def t_from_log_alpha(self, log_alpha: Tensor) -> Tensor:
        angle = torch.arccos(log_alpha.exp().clamp(max=1.0) * math.cos(self._start))
        return ((angle - self._start) * 2 / math.pi * (1 + self.s)).clamp(min=0.0)

    @property
    def _start(self) -> float:
        return self.s / (1 + self.s) * math.pi / 2


@dataclass(frozen=True)
class VPDiscrete(VariancePreserving):
    """A table of N betas in continuous time: log alpha is piecewise linear through
    ``(n/N, log alpha_n)``, n = 1..N (DPM-Solver, Appendix D.3), and through (0, 0).

    ``from_zero``: the N betas belong to the times n/(N-1), n = 0..N-1, so that t = 0 is noisy
    already (the cosine table of the molecular EDM). ``min_log_snr`` ends the time axis where the
    table falls below it (zero terminal SNR); the published value is -5.1.

    Raises:
        ValueError: fewer than two betas, or one outside (0, 1].
    """

    betas: tuple[float, ...]
    min_log_snr: float = -5.1
    from_zero: bool = False
    t_min: float = field(init=False)
    t_max: float = field(init=False)
    _knots: tuple[Tensor, Tensor] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        betas = torch.tensor(self.betas, dtype=torch.float64)
        if betas.numel() < 2 or not bool(((betas > 0) & (betas <= 1)).all()):
            raise ValueError("VPDiscrete: betas must be a table of two or more values in (0, 1].")
        n = torch.arange(betas.numel(), dtype=torch.float64)
        t = n / (len(n) - 1) if self.from_zero else (n + 1) / len(n)
        log_alpha = 0.5 * torch.log1p(-betas).cumsum(0)
        t_min = float(t[0])
        if not self.from_zero:
            zero = torch.zeros(1, dtype=torch.float64)
            t, log_alpha = torch.cat([zero, t]), torch.cat([zero, log_alpha])
        keep = max(2, int((log_alpha >= _log_sqrt_sigmoid(as_time(2.0 * self.min_log_snr))).sum()))
        object.__setattr__(self, "_knots", (t[:keep], log_alpha[:keep]))
        object.__setattr__(self, "t_min", t_min)
        object.__setattr__(self, "t_max", float(t[keep - 1]))

    def __hash__(self) -> int:  # cheap, because caches ask for it at every evaluation
        return hash((len(self.betas), self.betas[0], self.betas[-1], self.min_log_snr))

    @classmethod
    def linear(cls, steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> VPDiscrete:
        """The linear table of DDPM (Ho et al. 2020)."""
        return cls(tuple(torch.linspace(first, last, steps, dtype=torch.float64).tolist()))

    @classmethod
    def cosine(cls, steps: int = 1000, s: float = 0.008, cap: float = 0.999) -> VPDiscrete:
        """The cosine table of iDDPM, betas capped at ``cap`` (Nichol & Dhariwal 2021)."""
        return cls(_cosine_betas(steps, s, cap))

    @classmethod
    def edm_cosine(cls, steps: int = 1000) -> VPDiscrete:
        """The cosine table of the molecular EDM: ``steps`` + 1 entries, t = 0 included."""
        betas = _cosine_betas(steps + 1, 0.008, 0.999)
        return cls(betas, min_log_snr=-math.inf, from_zero=True)

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Sequence[float]) -> VPDiscrete:
        """The table whose alpha_n^2 are given (a diffusers or score_sde table)."""
        bar = torch.tensor([1.0, *alphas_cumprod], dtype=torch.float64)
        return cls(tuple((1.0 - bar[1:] / bar[:-1]).tolist()))

    @property
    def steps(self) -> int:
        return len(self.betas)

    def log_alpha(self, t: Time) -> Tensor:
        return _interpolate(as_time(t), *self._knots)

    def t_from_log_alpha(self, log_alpha: Tensor) -> Tensor:
        t, log_alphas = self._knots
        return _interpolate(log_alpha, log_alphas.flip(0), t.flip(0)).clamp(0.0, self.t_max)


def _cosine_betas(steps: int, s: float, cap: float) -> tuple[float, ...]:
    u = torch.arange(steps + 1, dtype=torch.float64) / steps
    bar = torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2
    return tuple((1 - bar[1:] / bar[:-1]).clamp(max=cap).tolist())


def _interpolate(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """Piecewise linear through increasing knots; the outer segments go on."""
    xs, ys = xs.to(x.device), ys.to(x.device)
    right = torch.searchsorted(xs, x.detach().contiguous()).clamp(1, len(xs) - 1)
    x0, x1, y0, y1 = xs[right - 1], xs[right], ys[right - 1], ys[right]
    return y0 + (x - x0) * (y1 - y0) / (x1 - x0)


@dataclass(frozen=True)
class Polynomial(VariancePreserving):
    """The schedule of the molecular EDM (Hoogeboom et al. 2022, Appendix B):
    alpha^2 = (1 - 2s)(1 - t^p)^2 + s, s = ``precision``.

    Equal to the published table at its knots i/``steps``. The published clipping of
    alpha_i^2 / alpha_{i-1}^2 at 0.001 acts on the last interval alone, where this schedule
    continues geometrically; the published lookup by round(t T) is undefined between knots.
    """

    power: float = 2.0
    precision: float = 1e-5
    steps: int = 1000
    clip: float = 1e-3
    t_min: float = 0.0
    t_max: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 2 or not 0 < self.precision < 0.5:
            raise ValueError("Polynomial: needs steps >= 2 and 0 < precision < 0.5.")

    @property
    def _last_knot(self) -> tuple[float, float]:
        """Time of the last but one knot and the unsmoothed alpha^2 there."""
        t = 1.0 - 1.0 / self.steps
        return t, (1.0 - t**self.power) ** 2

    def _signal_loss(self, t: Tensor) -> Tensor:
        """1 - (unsmoothed alpha^2), without cancellation at small ``t``."""
        knot, signal = self._last_knot
        u = t.clamp(0.0, knot) ** self.power
        tail = 1.0 - signal * self.clip ** ((t.clamp(knot, 1.0) - knot) * self.steps)
        return torch.where(t <= knot, u * (2.0 - u), tail)

    def log_alpha(self, t: Time) -> Tensor:
        s = self.precision
        return 0.5 * torch.log1p(-(s + (1 - 2 * s) * self._signal_loss(as_time(t))))

    def log_sigma(self, t: Time) -> Tensor:
        s = self.precision
        return 0.5 * torch.log(s + (1 - 2 * s) * self._signal_loss(as_time(t)))

    def t_from_log_alpha(self, log_alpha: Tensor) -> Tensor:
        return self._t_from_sigma_squared(-torch.expm1(2.0 * log_alpha))

    def t_from_log_snr(self, log_snr: Time) -> Tensor:
        return self._t_from_sigma_squared(torch.sigmoid(-2.0 * as_time(log_snr)))

    def _t_from_sigma_squared(self, sigma_squared: Tensor) -> Tensor:
        s = self.precision
        loss = ((sigma_squared - s) / (1 - 2 * s)).clamp(0.0, 1.0)
        knot, signal = self._last_knot
        head = (loss / (1.0 + torch.sqrt(1.0 - loss))) ** (1.0 / self.power)
        left = ((1.0 - loss) / signal).clamp(self.clip, 1.0)
        tail = knot + torch.log(left) / math.log(self.clip) / self.steps
        return torch.where(1.0 - loss >= signal, head.clamp(max=knot), tail)


@dataclass(frozen=True)
class VarianceExploding(Schedule):
    """alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t (Song et al. 2021, Eq. 30).
    The inverse extrapolates beyond [0, 1]."""

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    t_min: float = 0.0
    t_max: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError("VarianceExploding: needs 0 < sigma_min < sigma_max.")

    def log_alpha(self, t: Time) -> Tensor:
        return 0.0 * as_time(t)

    def log_sigma(self, t: Time) -> Tensor:
        return math.log(self.sigma_min) + as_time(t) * math.log(self.sigma_max / self.sigma_min)

    def t_from_log_snr(self, log_snr: Time) -> Tensor:
        log_sigma = -as_time(log_snr)
        return (log_sigma - math.log(self.sigma_min)) / math.log(self.sigma_max / self.sigma_min)


@dataclass(frozen=True)
class SubVP(Schedule):
    """alpha as in :class:`VPLinear`, sigma = 1 - alpha^2 (Song et al. 2021, Eq. 33)."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-3
    t_max: float = 1.0

    @property
    def _vp(self) -> VPLinear:
        return VPLinear(self.beta_min, self.beta_max)

    def log_alpha(self, t: Time) -> Tensor:
        return self._vp.log_alpha(t)

    def log_sigma(self, t: Time) -> Tensor:
        return torch.log(-torch.expm1(2.0 * self.log_alpha(t)))

    def t_from_log_snr(self, log_snr: Time) -> Tensor:
        # exp(lambda) (1 - a^2) = a has the root a = sqrt(1 + q^2) - q with q = exp(-lambda) / 2
        q = 0.5 * torch.exp(-as_time(log_snr))
        return self._vp.t_from_log_alpha(-torch.asinh(q))


@dataclass(frozen=True)
class Karras(Schedule):
    """sigma(t) = t, alpha = 1, times in units of the data (Karras et al. 2022).
    Defined for every t > 0, so the inverse extrapolates."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError("Karras: needs 0 < sigma_min < sigma_max.")

    @property
    def t_min(self) -> float:  # type: ignore[override]
        return self.sigma_min

    @property
    def t_max(self) -> float:  # type: ignore[override]
        return self.sigma_max

    def log_alpha(self, t: Time) -> Tensor:
        return 0.0 * as_time(t)

    def log_sigma(self, t: Time) -> Tensor:
        return torch.log(as_time(t))

    def sigma(self, t: Time) -> Tensor:
        return as_time(t).clone()

    def t_from_log_snr(self, log_snr: Time) -> Tensor:
        return torch.exp(-as_time(log_snr))


@dataclass(frozen=True)
class RectifiedFlow(Schedule):
    """alpha = 1 - t, sigma = t (Liu et al. 2023; Lipman et al. 2023, with time reversed)."""

    t_min: float = 0.0
    t_max: float = 1.0

    def log_alpha(self, t: Time) -> Tensor:
        return torch.log1p(-as_time(t))

    def log_sigma(self, t: Time) -> Tensor:
        return torch.log(as_time(t))

    def alpha(self, t: Time) -> Tensor:
        return 1.0 - as_time(t)

    def sigma(self, t: Time) -> Tensor:
        return as_time(t).clone()

    def t_from_log_snr(self, log_snr: Time) -> Tensor:
        return torch.sigmoid(-as_time(log_snr))


class LearnedGamma(nn.Module, VariancePreserving):
    """A monotone network gamma(t) = -2 log_snr(t), trained with the variational bound
    (Kingma et al. 2021, Appendix H): y = l1(t) + l3(sigmoid(l2(l1(t)))) with positive weights,
    rescaled to gamma(0) = ``gamma_0`` and gamma(1) = ``gamma_1``, which are trained too.

    The inverse is found by bisection to float64 precision.
    """

    t_min = 0.0
    t_max = 1.0

    def __init__(self, gamma_0: float = -5.0, gamma_1: float = 10.0, width: int = 1024) -> None:
        super().__init__()
        if gamma_0 >= gamma_1:
            raise ValueError("LearnedGamma: needs gamma_0 < gamma_1 (noise grows with time).")
        gen = torch.Generator().manual_seed(0)
        self.slope = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        self.inner = nn.Parameter(torch.randn(width, generator=gen, dtype=torch.float64) - 2.0)
        self.shift = nn.Parameter(torch.randn(width, generator=gen, dtype=torch.float64))
        self.outer = nn.Parameter(torch.randn(width, generator=gen, dtype=torch.float64) - 2.0)
        self.gamma_0 = nn.Parameter(torch.tensor(gamma_0, dtype=torch.float64))
        self.gamma_1 = nn.Parameter(torch.tensor(gamma_1, dtype=torch.float64))

    def _monotone(self, t: Tensor) -> Tensor:
        line = F.softplus(self.slope) * t
        hidden = torch.sigmoid(F.softplus(self.inner) * line[..., None] + self.shift)
        return line + (F.softplus(self.outer) * hidden).mean(-1)

    def gamma(self, t: Time) -> Tensor:
        ends = self._monotone(
            torch.tensor([0.0, 1.0], dtype=torch.float64, device=self.slope.device)
        )
        given = as_time(t)
        unit = (self._monotone(given.to(ends.device)) - ends[0]) / (ends[1] - ends[0])
        gamma: Tensor = self.gamma_0 + (self.gamma_1 - self.gamma_0) * unit
        return gamma.to(given.device)  # solvers keep their times on the CPU

    def log_alpha(self, t: Time) -> Tensor:
        return _log_sqrt_sigmoid(-self.gamma(t))

    def log_sigma(self, t: Time) -> Tensor:
        return _log_sqrt_sigmoid(self.gamma(t))

    def log_snr(self, t: Time) -> Tensor:
        return -0.5 * self.gamma(t)

    def t_from_log_alpha(self, log_alpha: Tensor) -> Tensor:
        return self.t_from_log_snr(log_alpha - 0.5 * torch.log(-torch.expm1(2.0 * log_alpha)))

    @torch.no_grad()
    def t_from_log_snr(self, log_snr: Time) -> Tensor:
        target = as_time(log_snr)
        low, high = torch.zeros_like(target), torch.ones_like(target)
        for _ in range(60):
            middle = 0.5 * (low + high)
            noisier = self.log_snr(middle) < target
            low, high = torch.where(noisier, low, middle), torch.where(noisier, middle, high)
        return 0.5 * (low + high)
