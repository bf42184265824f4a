"""Time grids: where a solver's steps begin and end, in float64."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.schedules import Schedule
from shared.solvers.base import check_times


class Grid(ABC):
    """``grid(schedule, intervals)`` -> ``intervals + 1`` decreasing times."""

    @abstractmethod
    def __call__(
        self,
        schedule: Schedule,
        intervals: int,
        t_start: float | None = None,
        t_end: float | None = None,
    ) -> list[float]:
        """The times from ``t_start`` to ``t_end``, both included.

        Raises:
            ValueError: a number of intervals or an end that is impossible.
        """


@dataclass(frozen=True, kw_only=True)
class SpacedGrid(Grid):
    """Times spaced by a rule between two ends, which are met exactly.

    Args:
        t_start: where to begin; None: the schedule's ``t_max``.
        t_end: where to end; None: the schedule's ``t_min``.
        final_zero: one interval more, from ``t_end`` to time 0, counted among the intervals; for
            schedules whose sigma vanishes there.
    """

    t_start: float | None = None
    t_end: float | None = None
    final_zero: bool = False

    @abstractmethod
    def place(self, schedule: Schedule, start: float, end: float, u: Tensor) -> Tensor:
        """Times at the fractions ``u`` of the way from ``start`` to ``end``."""

    def __call__(
        self,
        schedule: Schedule,
        intervals: int,
        t_start: float | None = None,
        t_end: float | None = None,
    ) -> list[float]:
        start = _first_given(t_start, self.t_start, schedule.t_max)
        end = _first_given(t_end, self.t_end, schedule.t_min)
        self._check(schedule, intervals, start, end)
        count = intervals + 1 - self.final_zero
        u = torch.linspace(0.0, 1.0, count, dtype=torch.float64)[1:-1]
        between = self.place(schedule, start, end, u).detach().tolist()
        times = [start, *between, end, *([0.0] if self.final_zero else [])]
        if not all(map(math.isfinite, times)):
            raise ValueError(
                f"time grid: {type(self).__name__} cannot reach from {start:.6g} to {end:.6g}, "
                "because the log-SNR is infinite at an end; move t_start or t_end inside."
            )
        check_times(schedule, times)
        return times

    def _check(self, schedule: Schedule, intervals: int, start: float, end: float) -> None:
        least = 2 if self.final_zero else 1
        if intervals < least:
            raise ValueError(
                f"time grid: intervals = {intervals}, but {type(self).__name__} needs at least "
                f"{least}; allow more steps."
            )
        if start <= end or (self.final_zero and end <= 0.0):
            raise ValueError(
                f"time grid: t_start = {start:.6g}, t_end = {end:.6g}; sampling goes from noise "
                f"to data, so choose t_start > t_end{' > 0' if self.final_zero else ''}."
            )
        check_times(schedule, [start, end])


def _first_given(*values: float | None) -> float:
    return float(next(v for v in values if v is not None))


@dataclass(frozen=True)
class PowerTimes(SpacedGrid):
    """Uniform in t^(1/power): power 1 is uniform in time, power 2 is 'quadratic'."""

    power: float = 1.0

    def place(self, schedule: Schedule, start: float, end: float, u: Tensor) -> Tensor:
        first, last = start ** (1.0 / self.power), end ** (1.0 / self.power)
        return (first + u * (last - first)) ** self.power


@dataclass(frozen=True)
class LogSNRTimes(SpacedGrid):
    """Uniform in log-SNR, that is geometric ('exponential') in sigma / alpha. ``power`` > 1
    crowds the low noise levels ('polyexponential' of the k-diffusion library)."""

    power: float = 1.0

    def place(self, schedule: Schedule, start: float, end: float, u: Tensor) -> Tensor:
        first, last = schedule.log_snr(start), schedule.log_snr(end)
        return schedule.t_from_log_snr(last + (1.0 - u) ** self.power * (first - last))


@dataclass(frozen=True)
class KarrasTimes(SpacedGrid):
    """Uniform in (sigma / alpha)^(1/rho) (Karras et al. 2022, Eq. 5)."""

    rho: float = 7.0

    def place(self, schedule: Schedule, start: float, end: float, u: Tensor) -> Tensor:
        first = torch.exp(-schedule.log_snr(start) / self.rho)
        last = torch.exp(-schedule.log_snr(end) / self.rho)
        return schedule.t_from_log_snr(-self.rho * torch.log(first + u * (last - first)))


@dataclass(frozen=True)
class GivenTimes(Grid):
    """A list of decreasing times, found by a search or read from a file."""

    points: Sequence[float]

    def __call__(
        self,
        schedule: Schedule,
        intervals: int | None = None,
        t_start: float | None = None,
        t_end: float | None = None,
    ) -> list[float]:
        times = [float(t) for t in self.points]
        check_times(schedule, times)
        own = {"intervals": len(times) - 1, "t_start": times[0], "t_end": times[-1]}
        asked = {"intervals": intervals, "t_start": t_start, "t_end": t_end}
        for name, value in asked.items():
            if value is not None and value != own[name]:
                raise ValueError(
                    f"time grid: {name} = {value}, but the given times have {own[name]}; change "
                    "one of the two."
                )
        return times
