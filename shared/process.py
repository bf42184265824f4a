"""A process: the named fields of a state, each with a schedule and a geometry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor, nn

from shared.geometry import Euclidean, Geometry
from shared.schedules import Schedule

State = dict[str, Tensor]
Scale = float | Tensor


def version(tensor: Tensor) -> int:
    """How often it was changed in place; tensors of inference mode do not count that."""
    return -1 if tensor.is_inference() else int(tensor._version)


@dataclass(frozen=True)
class Field:
    """One named array of the state.

    ``prior_std`` is the standard deviation of the sampler's start; None means sigma(t_max).
    """

    schedule: Schedule
    geometry: Geometry = field(default_factory=Euclidean)
    prior_std: float | None = None


@dataclass(frozen=True)
class Process:
    """Field name -> :class:`Field`. All fields share the time; the first field *leads*:
    solvers choose interior times in its log-SNR.

    Raises:
        ValueError: no fields, or fields whose schedules live on different time intervals.
    """

    fields: Mapping[str, Field]

    def __post_init__(self) -> None:
        if not self.fields:
            raise ValueError("Process: needs at least one field.")
        ends = {(f.schedule.t_min, f.schedule.t_max) for f in self.fields.values()}
        if len(ends) > 1:
            raise ValueError(
                f"Process: the schedules of {', '.join(self.fields)} cover different times "
                f"{sorted(ends)}; give them the same t_min and t_max."
            )

    @classmethod
    def single(
        cls, schedule: Schedule, geometry: Geometry | None = None, name: str = "x"
    ) -> Process:
        """A process of one field."""
        return cls({name: Field(schedule, geometry or Euclidean())})

    @property
    def lead(self) -> Schedule:
        return next(iter(self.fields.values())).schedule

    def perturb(self, x0: State, t: float | Tensor, noise: State) -> State:
        """x_t = alpha(t) x_0 + sigma(t) eps, with one time, or one per sample ([batch])."""
        out = {}
        for name, x in x0.items():
            alpha, sigma = alpha_sigma(self.fields[name].schedule, t, x)
            out[name] = alpha * x + sigma * noise[name]
        return out

    def prior(self, noise: State) -> State:
        """The start of the sampler, given standard normals on the geometries."""
        stds = {
            n: f.prior_std if f.prior_std is not None else f.schedule.prior_std()
            for n, f in self.fields.items()
        }
        return {name: stds[name] * eps for name, eps in noise.items()}

    def noise(self, white: State, mask: Tensor | None = None) -> State:
        """White noise of the full shapes -> standard normals on the geometries."""
        return {name: self.fields[name].geometry.noise(z, mask) for name, z in white.items()}

    def project(self, x: State, mask: Tensor | None = None) -> State:
        return {name: self.fields[name].geometry.project(v, mask) for name, v in x.items()}

    def dim(self, x: State, mask: Tensor | None = None) -> Tensor:
        """Degrees of freedom of each sample over all fields, float64 [batch]."""
        dims = [self.fields[name].geometry.dim(v, mask) for name, v in x.items()]
        return torch.stack(dims).sum(0)


@lru_cache(maxsize=8192)
def _scales(schedule: Schedule, t: float) -> tuple[float, float]:
    with torch.no_grad():
        return float(schedule.alpha(t)), float(schedule.sigma(t))


def alpha_sigma(schedule: Schedule, t: float | Tensor, like: Tensor) -> tuple[Scale, Scale]:
    """alpha(t) and sigma(t), computed in float64: Python floats for a float time (cached), else
    tensors of ``like``'s dtype that broadcast against it (``t`` [batch])."""
    if not isinstance(t, Tensor):
        if isinstance(schedule, nn.Module):  # its parameters may change: not cached
            return _scales.__wrapped__(schedule, t)
        return _scales(schedule, float(t))
    shape = (-1, *(1,) * (like.dim() - 1))
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    return alpha.to(like).reshape(shape), sigma.to(like).reshape(shape)
