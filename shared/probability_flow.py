"""Log-likelihood through the probability-flow ODE."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torchdiffeq import odeint

from shared.geometry import Geometry
from shared.predictions import Condition, Denoise
from shared.process import Field, Process, State
from shared.randomness import Draws
from shared.schedules import Schedule

LogDensity = Callable[[State, Tensor | None], Tensor]


def log_normal(geometry: Geometry, x: Tensor, std: float | Tensor, mask: Tensor | None) -> Tensor:
    """log N(x; 0, std^2) on a subspace, [batch]; ``x`` lies on it, ``std`` is one or [batch]."""
    std = torch.as_tensor(std, dtype=torch.float64, device=x.device)
    square = geometry.norm_squared(x).double() / std**2
    return -0.5 * square - geometry.dim(x, mask) * (torch.log(std) + 0.5 * math.log(2 * math.pi))


def prior_log_prob(process: Process, x: State, mask: Tensor | None = None) -> Tensor:
    """log density of the sampler's start at ``x``, [batch]."""
    terms = [log_normal(f.geometry, x[n], prior_std(f), mask) for n, f in process.fields.items()]
    return torch.stack(terms).sum(0)


def prior_std(field: Field) -> float:
    """Standard deviation of the sampler's start."""
    return field.schedule.prior_std() if field.prior_std is None else field.prior_std


@dataclass(frozen=True)
class _White(Geometry):
    """Draws white noise of the extent of a geometry, not yet on it."""

    geometry: Geometry

    def project(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x

    def dim(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.geometry.dim(x, mask)

    def extent(self, shape: tuple[int, ...], nodes: int | None) -> tuple[int, ...]:
        return self.geometry.extent(shape, nodes)


@dataclass(frozen=True, eq=False)
class ProbabilityFlow:
    """Log-likelihood through the probability-flow ODE dx/dt = alpha' x0_hat + sigma' eps_hat (Song
    et al. 2021, Eq. 39), with its divergence on the geometry.

    ``x`` is taken as the state at ``t_end``, so the density is that of slightly noised data.

    Args:
        trace: 'rademacher' or 'gaussian' probes (Hutchinson's estimate, unbiased), or 'exact'
            (one pass back per entry of the state: tiny dimensions).
        probes: probes per sample.
        t_end: default t_min of the schedule, or a thousandth of t_max where sigma(t_min) = 0.
        prior: log density of the state at t_max; default the sampler's start.
        method, rtol, atol, steps: of torchdiffeq. Adaptive steps keep the error of every sample
            of the batch within the tolerances; a fixed-step ``method`` ('rk4') takes ``steps``
            steps, uniform in time, and makes a sample independent of its batch.
    """

    process: Process
    denoise: Denoise
    trace: Literal["rademacher", "gaussian", "exact"] = "rademacher"
    probes: int = 1
    t_end: float | None = None
    prior: LogDensity | None = None
    method: str = "dopri5"
    rtol: float = 1e-5
    atol: float = 1e-5
    steps: int = 100

    def __post_init__(self) -> None:
        if self.trace not in ("rademacher", "gaussian", "exact") or self.probes < 1:
            raise ValueError(
                f"ProbabilityFlow: trace '{self.trace}' is not one of rademacher, gaussian, "
                f"exact, or probes={self.probes} is below 1."
            )

    @property
    def ends(self) -> tuple[float, float]:
        """The times of the data and of the prior."""
        lead = self.process.lead
        if self.t_end is not None:
            return self.t_end, lead.t_max
        return (lead.t_min if float(lead.sigma(lead.t_min)) > 0 else 1e-3 * lead.t_max), lead.t_max

    def log_prob(
        self,
        x: State,
        draws: Draws | None = None,
        mask: Tensor | None = None,
        cond: Condition | None = None,
    ) -> tuple[Tensor, State]:
        """log p(x), float64 [batch], and the latent state at t_max.

        Args:
            draws: the samples' random numbers; the probes use those named ``probe``. Not needed
                for the exact trace.

        Raises:
            ValueError: random probes without draws.
            FloatingPointError: the denoiser is not finite somewhere on the way.
        """
        probes = list(self._probes(x, draws, mask))
        names, (first, last) = list(x), self.ends

        def rates(t: Tensor, values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            state = {n: v.to(x[n].dtype) for n, v in zip(names, values[:-1], strict=True)}
            velocity, divergence = self._rates(state, min(float(t), last), probes, mask, cond)
            if not bool(torch.isfinite(divergence).all()):
                raise FloatingPointError(
                    f"ProbabilityFlow: the denoiser is NaN or infinite at t={float(t):.6g}; check "
                    "the checkpoint, t_end and the precision."
                )
            return (*(velocity[name] for name in names), divergence)

        start = torch.zeros(len(x[names[0]]), dtype=torch.float64, device=x[names[0]].device)
        with torch.no_grad():
            end = odeint(
                rates,
                (*(x[name] for name in names), start),
                torch.tensor([first, last], dtype=torch.float64, device=x[names[0]].device),
                rtol=self.rtol,
                atol=self.atol,
                method=self.method,
                options=self._options(),
            )
        latent = {n: v[-1].to(x[n].dtype) for n, v in zip(names, end[:-1], strict=True)}
        if self.prior is None:
            return prior_log_prob(self.process, latent, mask) + end[-1][-1], latent
        return self.prior(latent, mask).double() + end[-1][-1], latent

    def _options(self) -> dict[str, object]:
        first, last = self.ends
        if self.method in ("euler", "midpoint", "rk4", "heun2", "heun3"):
            return {"step_size": (last - first) / self.steps}
        # the last step ends on the last time: schedules are not defined beyond
        return {"norm": _worst_sample, "step_t": torch.tensor([last], dtype=torch.float64)}

    def _rates(
        self,
        x: State,
        t: float,
        probes: Sequence[State],
        mask: Tensor | None,
        cond: Condition | None,
    ) -> tuple[State, Tensor]:
        """dx/dt and its divergence, [batch]."""
        with torch.enable_grad():
            x = {name: v.detach().requires_grad_() for name, v in x.items()}
            seen = self.denoise(x, t, mask, cond)
            velocity = {}
            for name, field in self.process.fields.items():
                alpha_rate, sigma_rate = _rate(field.schedule, t)
                v = alpha_rate * seen[name].raw_x0 + sigma_rate * seen[name].eps
                velocity[name] = field.geometry.project(v, mask)
            along = torch.stack([self._along(x, velocity, z) for z in probes])
        divergence = along.sum(0) if self.trace == "exact" else along.mean(0)
        return {name: v.detach() for name, v in velocity.items()}, divergence

    def _along(self, x: State, velocity: State, z: State) -> Tensor:
        """<z, dv/dx z> of each sample, [batch]: the pass back gives J^T z entry by entry."""
        fields = self.process.fields
        products = [fields[name].geometry.inner(v, z[name]).sum() for name, v in velocity.items()]
        slopes = torch.autograd.grad(
            torch.stack(products).sum(), list(x.values()), retain_graph=True
        )
        return torch.stack(
            [(g * z[name]).flatten(1).sum(1).double() for name, g in zip(x, slopes, strict=True)]
        ).sum(0)

    def _probes(self, x: State, draws: Draws | None, mask: Tensor | None) -> Iterator[State]:
        if self.trace == "exact":
            yield from self._basis(x, mask)
            return
        if draws is None:
            raise ValueError(
                "ProbabilityFlow: random probes need draws (shared.randomness.Draws)."
            )
        for k in range(self.probes):
            probe = {}
            for name, field in self.process.fields.items():
                white = draws.normal(f"probe.{name}", k, x[name], _White(field.geometry), mask)
                white = white.sign() if self.trace == "rademacher" else white
                probe[name] = field.geometry.noise(white, mask)
            yield probe

    def _basis(self, x: State, mask: Tensor | None) -> Iterator[State]:
        """Unit white noise, entry by entry; together they span every geometry evenly."""
        for name, value in x.items():
            for entry in range(value[0].numel()):
                probe = {other: torch.zeros_like(v) for other, v in x.items()}
                probe[name].flatten(1)[:, entry] = 1.0
                probe[name] = self.process.fields[name].geometry.noise(probe[name], mask)
                if bool(probe[name].any()):
                    yield probe


def _rate(schedule: Schedule, t: float) -> tuple[float, float]:
    """alpha'(t) and sigma'(t), finite also where alpha = 0."""
    with torch.enable_grad():
        time = torch.tensor(t, dtype=torch.float64, requires_grad=True)
        rates = [
            torch.autograd.grad(value, time, allow_unused=True)[0]
            for value in (schedule.alpha(time), schedule.sigma(time))
        ]
    alpha, sigma = (0.0 if rate is None else float(rate) for rate in rates)
    return alpha, sigma


def _worst_sample(values: tuple[Tensor, ...]) -> Tensor:
    """Largest root mean square over the samples of a state (fields, log density)."""
    rows = [v.double().reshape(len(v), -1) for v in values]
    return torch.cat(rows, 1).square().mean(1).sqrt().max()
