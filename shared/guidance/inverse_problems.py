"""Sampling with parts of the answer, or measurements of it, given.

Two ways: replacement with resampling (:class:`RePaint`, a solver around any solver), and by
gradient (:class:`Measurement` and :class:`Inpainting`, energies on the estimate of x_0).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from shared.geometry import CentredPoints, Euclidean
from shared.guidance.energies import Energy, Time, condition
from shared.predictions import Condition
from shared.process import Process, Scale, State, alpha_sigma
from shared.solvers.base import Solver
from shared.solvers.plan import After, Denoise, Draw, Project

# Numbers of draws: the inner solver of visit v uses v * VISIT + j, the wrapper those above OWN.
VISIT, OWN = 1 << 44, 1 << 43


@dataclass(frozen=True, eq=False)
class Known:
    """The part of the data that is given.

    Args:
        value: field -> the data, [batch or 1, ...]; fields left out are free.
        keep: field -> True where it is given: [batch or 1, nodes] for a field of nodes or
            edges (the edges between given nodes), else shaped like the field.

    Centred points are given up to a common shift, because the centre of mass of the whole is part
    of what is sampled: their positions relative to each other are kept.

    Raises:
        ValueError: fields differ, or (on use) a keep-mask does not fit its field.
    """

    value: State
    keep: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        if self.value.keys() != self.keep.keys() or not self.value:
            raise ValueError(
                f"Known: values for {sorted(self.value)}, keep-masks for {sorted(self.keep)}."
            )

    def missing(self, process: Process, x: State, target: State) -> State:
        """What has to be added to ``x`` so that its given part equals that of ``target``."""
        return {name: self._restrict(process, name, target[name] - x[name]) for name in self.value}

    def replaced(self, process: Process, x: State, target: State) -> State:
        """``x`` with its given part taken from ``target``."""
        missing = self.missing(process, x, target)
        return {n: v + missing[n] if n in missing else v for n, v in x.items()}

    def spread(self, like: State) -> State:
        """The given values as a state like ``like``, zero in free fields."""
        return {
            name: self.value[name].to(v).expand_as(v)
            if name in self.value
            else torch.zeros_like(v)
            for name, v in like.items()
        }

    def _restrict(self, process: Process, name: str, x: Tensor) -> Tensor:
        geometry, keep = process.fields[name].geometry, self.keep[name].to(x.device)
        if keep.dim() == 2 and not isinstance(geometry, Euclidean):
            return geometry.project(x, keep.expand(x.shape[:2]))
        if isinstance(geometry, CentredPoints) or keep.dim() != x.dim():
            wanted = "node" if isinstance(geometry, CentredPoints) else "entry"
            raise ValueError(
                f"Known: the keep-mask of '{name}' has shape {tuple(keep.shape)}; give one value "
                f"per {wanted} of {tuple(x.shape)}."
            )
        return geometry.project(x * keep.to(x.dtype))


@dataclass(frozen=True, eq=False)
class RePaint(Solver):
    """Inpainting by replacement with resampling (Lugmayr et al. 2022, Algorithm 1).

    After every step the given part is replaced by a fresh draw of q(x_t | known). The grid is cut
    into stretches of ``jump`` intervals, counted from its end; each is passed ``resamples`` times,
    with the state sent back to the stretch's start by the forward process in between, so that the
    free part can follow the given one. The inner solver restarts at every pass. With
    ``resamples`` = 1 this is plain replacement. At the end the given part is exact.
    """

    solver: Solver
    known: Known
    jump: int = 10
    resamples: int = 10

    stochastic = True

    def __post_init__(self) -> None:
        if self.jump < 1 or self.resamples < 1:
            raise ValueError(
                f"RePaint: jump={self.jump} and resamples={self.resamples} must be at least 1."
            )

    @property
    def order(self) -> int:  # type: ignore[override]
        return min(1, self.solver.order)

    def intervals(self, nfe: int) -> int:
        return self.solver.intervals(nfe // self.resamples)

    def calls(self, process: Process, times: Sequence[float]) -> int | None:
        each = [self.solver.calls(process, stretch) for stretch in self._stretches(times)]
        known = [calls for calls in each if calls is not None]
        return self.resamples * sum(known) if len(known) == len(each) else None

    def solve(
        self,
        process: Process,
        denoise: Denoise,
        x: State,
        times: Sequence[float],
        draw: Draw,
        project: Project | None = None,
        after: After | None = None,
    ) -> State:
        own = count(OWN)

        def noise() -> State:
            number = next(own)
            return {name: draw(name, number) for name in x}

        def replace(state: State, time: float | None) -> State:
            if time is not None:
                target = process.perturb(self.known.spread(state), time, noise())
                state = self.known.replaced(process, state, target)
            return state if after is None else after(state, time)

        visit = 0
        for stretch in self._stretches(times):
            for again in range(self.resamples):
                if again > 0:
                    x = _forward(process, x, stretch[-1], stretch[0], noise())
                numbered = _shifted(draw, visit * VISIT)
                x = self.solver.solve(process, denoise, x, stretch, numbered, project, replace)
                visit += 1
        return self.known.replaced(process, x, self.known.spread(x))

    def _stretches(self, times: Sequence[float]) -> list[Sequence[float]]:
        if self.resamples == 1:
            return [times]
        ends = list(range(len(times) - 1, 0, -self.jump))[::-1]
        starts = [0, *ends[:-1]]
        return [times[a : b + 1] for a, b in zip(starts, ends, strict=True)]


def _shifted(draw: Draw, first: int) -> Draw:
    return lambda name, j: draw(name, first + j)


def _forward(process: Process, x: State, s: float, t: float, noise: State) -> State:
    """A draw of q(x_t | x_s), t >= s."""
    out = {}
    for name, value in x.items():
        schedule = process.fields[name].schedule
        keep = float(schedule.alpha(t) / schedule.alpha(s))
        variance = float(schedule.sigma(t) ** 2 - (keep * schedule.sigma(s)) ** 2)
        out[name] = keep * value + max(0.0, variance) ** 0.5 * noise[name]
    return out


# -- by gradient ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class GaussianNoise:
    """-log N(observed; predicted, std^2 + spread) without its constant, [batch].

    ``spread`` (alpha, sigma) is the variance of the operator's output given x_t: 0 (None) as in
    DPS, or that of :func:`prior_spread` as in Pi-GDM (Song et al. 2023), which is exact for
    Gaussian data and a linear operator.
    """

    std: float
    spread: Callable[[Scale, Scale], Scale] | None = None

    def __post_init__(self) -> None:
        if self.std <= 0.0:
            raise ValueError(f"GaussianNoise: std={self.std} must be positive.")

    def __call__(self, observed: Tensor, predicted: Tensor, alpha: Scale, sigma: Scale) -> Tensor:
        variance = self.std**2 + (0.0 if self.spread is None else self.spread(alpha, sigma))
        return 0.5 * (observed - predicted).square().flatten(1).sum(1) / variance


@dataclass(frozen=True, eq=False)
class Norm:
    """||observed - predicted||, [batch], as published DPS steps along it: by 2 zeta' where the
    ancestral step of guidance goes by scale * sigma^2_{t|s} / alpha_{t|s} (Chung et al. 2023,
    Algorithm 1 with zeta_i = zeta' / ||observed - predicted||)."""

    def __call__(self, observed: Tensor, predicted: Tensor, alpha: Scale, sigma: Scale) -> Tensor:
        square = (observed - predicted).square().flatten(1).sum(1)
        return (square + torch.finfo(square.dtype).tiny).sqrt()


@dataclass(frozen=True, eq=False)
class PoissonNoise:
    """Counts of mean ``gain`` * predicted, as a Gaussian of that variance (DPS, Eq. 19); counts
    below ``floor`` are taken as ``floor``."""

    gain: float = 1.0
    floor: float = 1.0

    def __call__(self, observed: Tensor, predicted: Tensor, alpha: Scale, sigma: Scale) -> Tensor:
        error = (observed - self.gain * predicted).square()
        return 0.5 * (error / observed.clamp(min=self.floor)).flatten(1).sum(1)


NoiseModel = Callable[[Tensor, Tensor, Scale, Scale], Tensor]


def prior_spread(std: float) -> Callable[[Scale, Scale], Scale]:
    """Var[x_0 | x_t] of data of standard deviation ``std``:
    sigma^2 std^2 / (alpha^2 std^2 + sigma^2)."""

    def spread(alpha: Scale, sigma: Scale) -> Scale:
        return sigma**2 * std**2 / (alpha**2 * std**2 + sigma**2)

    return spread


@dataclass(frozen=True, eq=False)
class Measurement(Energy):
    """-log p(observed | x_0) at the estimate of x_0: diffusion posterior sampling (Chung et al.
    2023) as ``Term(Measurement(...), at="estimate")``.

    Args:
        process: gives alpha and sigma of the leading field to the noise model.
        operator: estimate of x_0 -> measurements [batch, ...].
        observed: condition of that shape, or one value [...] for all samples.
        noise: ``(observed, predicted, alpha, sigma)`` -> [batch].
    """

    process: Process
    operator: Callable[[State], Tensor]
    observed: str | Tensor
    noise: NoiseModel
    name: str = "measurement"

    def __call__(
        self, x: State, t: Time, mask: Tensor | None = None, cond: Condition | None = None
    ) -> Tensor:
        predicted = self.operator(x)
        if isinstance(self.observed, str):
            observed = condition(cond, self.observed, self.name).to(predicted)
        else:
            observed = self.observed.to(predicted).expand(len(predicted), *self.observed.shape)
        if observed.shape != predicted.shape:
            raise ValueError(
                f"energy '{self.name}': observed {tuple(observed.shape)}, the operator gives "
                f"{tuple(predicted.shape)}."
            )
        alpha, sigma = alpha_sigma(self.process.lead, t, predicted.new_empty(len(predicted)))
        return self.noise(observed, predicted, alpha, sigma)


@dataclass(frozen=True, eq=False)
class Inpainting(Energy):
    """-log p(given part | x_0) at the estimate of x_0, up to its constant, every degree of freedom
    counted once; the gradient's answer to :class:`RePaint`. ``std`` is the deviation allowed to
    the given part, ``spread`` as in :class:`GaussianNoise`."""

    process: Process
    known: Known
    std: float = 0.05
    spread: Callable[[Scale, Scale], Scale] | None = None
    name: str = "inpainting"

    def __post_init__(self) -> None:
        if self.std <= 0.0:
            raise ValueError(f"Inpainting: std={self.std} must be positive.")

    def __call__(
        self, x: State, t: Time, mask: Tensor | None = None, cond: Condition | None = None
    ) -> Tensor:
        missing = self.known.missing(self.process, x, self.known.spread(x))
        parts = [self.process.fields[name].geometry.norm_squared(v) for name, v in missing.items()]
        square = torch.stack(parts).sum(0)
        alpha, sigma = alpha_sigma(self.process.lead, t, square)
        variance = self.std**2 + (0.0 if self.spread is None else self.spread(alpha, sigma))
        return 0.5 * square / variance
