"""Solvers that choose their steps while they run: state-dependent, so no tables.

Each sample has its own step size and its own time, and its result does not depend on the rest of
the batch. Between two consecutive times of the grid a solver takes as many steps as it needs, so a
grid of one interval is the usual choice; hooks act at the grid's times.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor
from torchdiffeq import odeint

from shared.predictions import Prediction
from shared.process import Process, State
from shared.schedules import Schedule
from shared.solvers.base import Solver, check_times
from shared.solvers.exponential import FORMS, check_choice
from shared.solvers.plan import After, Denoise, Draw, Project

PerSample = Callable[[State, float | Tensor], Mapping[str, Prediction]]


class AdaptiveSolver(Solver):
    """Solves each interval of the grid with steps of its own choice."""

    @abstractmethod
    def _interval(self, run: Run, x: State, start: float, end: float) -> State:
        """From ``start`` to ``end``."""

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
        """See :meth:`Solver.solve`; ``denoise`` must accept one time per sample, [batch].

        Raises:
            ValueError: a time grid that does not fit, or ends with infinite log-SNR.
            FloatingPointError: the denoiser gave NaN or infinity.
        """
        for name, field in process.fields.items():
            check_times(field.schedule, times)
            if not torch.isfinite(
                field.schedule.log_snr(torch.tensor([times[0], times[-1]]))
            ).all():
                raise ValueError(
                    f"{type(self).__name__}: field '{name}' has an infinite log-SNR at an end of "
                    f"[{times[0]:.6g}, {times[-1]:.6g}]; choose t_start and t_end inside."
                )
        run = Run(process, denoise, draw, project or (lambda name, y: y), x)
        for start, end in pairwise(times):
            x = self._interval(run, x, start, end)
            if after is not None:
                x = after(x, end)
        return x

    def intervals(self, nfe: int) -> int:
        """One: the solver's tolerance and not a budget decides what it costs."""
        return 1


class Run:
    """What the steps of one call of ``solve`` share: the process, the callables, counted draws."""

    def __init__(
        self,
        process: Process,
        denoise: Denoise,
        draw: Draw,
        project: Project,
        x: State,
    ) -> None:
        self.process, self.project = process, project
        self.denoise = cast(PerSample, denoise)
        self._draw, self._draws = draw, 0
        # padding is exactly zero and noise never is: entries that count in a sample's mean
        self._real = {name: v != 0.0 for name, v in x.items()}
        self._size = sum(v.flatten(1).sum(1) for v in self._real.values()).clamp(min=1)  # type: ignore[union-attr]

    def times(self, t: float) -> Tensor:
        """One time per sample, [batch]; kept on the CPU, where schedules compute."""
        return torch.full((len(self._size),), t, dtype=torch.float64)

    def noise(self, x: State) -> State:
        """The next numbered draw for every field."""
        self._draws += 1
        return {name: self._draw(name, self._draws - 1) for name in x}

    def projected(self, x: State) -> State:
        return {name: self.project(name, v) for name, v in x.items()}

    def error(self, gap: State, first: State, second: State, atol: float, rtol: float) -> Tensor:
        """Root mean square over a sample of gap / max(atol, rtol max(|first|, |second|)),
        float64 [batch].

        Raises:
            FloatingPointError: not finite, for the samples named.
        """
        total = torch.zeros_like(self._size, dtype=torch.float64)
        for name, g in gap.items():
            scale = (rtol * torch.maximum(first[name].abs(), second[name].abs())).clamp(min=atol)
            total += ((g / scale) ** 2).flatten(1).sum(1)
        error = (total / self._size).sqrt().cpu()
        bad = (~torch.isfinite(error)).nonzero().flatten().tolist()
        if bad:
            raise FloatingPointError(
                f"sampling: NaN or infinity in {len(bad)} of {len(error)} samples (first: "
                f"{bad[:5]}). The denoiser's output is not finite there: check the checkpoint, "
                "the precision and the guidance scale."
            )
        return error


def _column(values: Tensor, like: Tensor) -> Tensor:
    """Per-sample numbers [batch] in the shape and type that broadcast against a field."""
    return values.to(like).reshape(-1, *(1,) * (like.dim() - 1))


def _choose(accept: Tensor, new: State, old: State) -> State:
    return {k: torch.where(_column(accept, new[k]).bool(), new[k], old[k]) for k in new}


def _too_many(solver: Solver, limit: int) -> RuntimeError:
    return RuntimeError(
        f"{type(solver).__name__}: not finished after {limit} steps; loosen rtol and atol or "
        "raise max_steps."
    )


@dataclass(frozen=True)
class DPMSolverAdaptive(AdaptiveSolver):
    """DPM-Solver-12 and -23 with adaptive step size (Lu et al. 2022a, Appendix C, Algorithm 3).
    The error is a mean over a sample's entries; with very few, a step may pass by luck.

    Args:
        order: 2 (the pair of orders 1 and 2) or 3 (2 and 3). form: 'noise' or 'data'.
        rtol, atol: tolerances. h_init: first step in log-SNR. theta: safety factor.
        t_err: a sample is done when it is this near to the end in time.
        shared_steps: as published, the batch moves together with the step of its worst sample, so
            that a sample depends on its batch; for comparison only.
        max_steps: give up after so many.

    Raises:
        ValueError: an option out of range.
    """

    order: int = 3
    form: str = "noise"
    rtol: float = 0.05
    atol: float = 0.0078
    h_init: float = 0.05
    theta: float = 0.9
    t_err: float = 1e-5
    shared_steps: bool = False
    max_steps: int = 10_000
    stochastic = False

    def __post_init__(self) -> None:
        check_choice(self, order=(self.order, (2, 3)), form=(self.form, FORMS))

    def _interval(self, run: Run, x: State, start: float, end: float) -> State:
        lead = run.process.lead
        s = run.times(start)
        h, goal = torch.full_like(s, self.h_init), lead.log_snr(end)
        previous = x
        for _ in range(self.max_steps):
            active = s - end > self.t_err
            if not active.any():
                return x
            h = torch.where(active, torch.minimum(h, goal - lead.log_snr(s)), 0.0)
            t = torch.where(active, lead.t_from_log_snr(lead.log_snr(s) + h), s)
            low, high = self._pair(run, x, s, t, h)
            gap = {name: high[name] - low[name] for name in x}
            error = run.error(gap, low, previous, self.atol, self.rtol)
            if self.shared_steps:
                error = error.max().expand_as(error)
            accept = active & (error <= 1.0)
            x, previous = _choose(accept, high, x), _choose(accept, low, previous)
            s = torch.where(accept, t, s)
            h = self.theta * h * error.clamp(min=1e-12) ** (-1.0 / self.order)
        raise _too_many(self, self.max_steps)

    def _pair(self, run: Run, x: State, s: Tensor, t: Tensor, h: Tensor) -> tuple[State, State]:
        """The results of the lower and of the higher order."""
        lead, parts = run.process.lead, (1.0 / self.order, 2.0 / self.order)
        nodes, values = [s], [run.denoise(x, s)]
        lower, stage = x, x
        for part in parts[: self.order - 1]:
            node = lead.t_from_log_snr(lead.log_snr(s) + part * h)
            stage = self._advance(run, x, nodes, values, node, exact=True)
            nodes.append(node)
            values.append(run.denoise(stage, node))
        lower = self._advance(run, x, nodes[:-1], values[:-1], t, exact=False)
        if self.order == 3:
            nodes, values = [nodes[0], nodes[2]], [values[0], values[2]]
        return lower, self._advance(run, x, nodes, values, t, exact=self.order == 3)

    def _advance(
        self,
        run: Run,
        x: State,
        nodes: Sequence[Tensor],
        values: Sequence[Mapping[str, Prediction]],
        t: Tensor,
        exact: bool,
    ) -> State:
        """The exponential step of one or two predictions, per sample; 'taylor' if ``exact``."""
        kind, out = "x0" if self.form == "data" else "eps", {}
        for name, y in x.items():
            schedule = run.process.fields[name].schedule
            decay, weights = self._weights(schedule, nodes, t, exact)
            out[name] = _column(decay, y) * y
            for weight, value in zip(weights, values, strict=True):
                out[name] = out[name] + _column(weight, y) * value[name].form(kind)
        return run.projected(out)

    def _weights(
        self, schedule: Schedule, nodes: Sequence[Tensor], t: Tensor, exact: bool
    ) -> tuple[Tensor, list[Tensor]]:
        s, log_snr = nodes[0], schedule.log_snr
        h = log_snr(t) - log_snr(s)
        if self.form == "data":
            z, scale, decay = -h, schedule.alpha(t), schedule.sigma(t) / schedule.sigma(s)
        else:
            z, scale, decay = h, schedule.sigma(t), schedule.alpha(t) / schedule.alpha(s)
        total = torch.expm1(z)
        if len(nodes) == 1:
            return decay, [-scale * total]
        still = h == 0.0  # a sample that is done
        z = torch.where(still, 1.0, z)
        first = torch.expm1(z) / z - 1.0 if exact else 0.5 * torch.expm1(z)
        u = (log_snr(nodes[1]) - log_snr(s)) / torch.where(still, 1.0, h)
        slope = torch.where(still, 0.0, first / u)
        return decay, [-scale * (total - slope), -scale * slope]


@dataclass(frozen=True)
class RK45(AdaptiveSolver):
    """The probability-flow ODE dx/dt = f x + g^2 eps_hat / (2 sigma) (Song et al. 2021, Eq. 13) by
    Dormand & Prince's pair of torchdiffeq. Its step size serves the whole batch at once, so that
    a sample depends on its batch within the tolerance.

    Args:
        rtol, atol: tolerances. method: any adaptive method of torchdiffeq.
    """

    rtol: float = 1e-5
    atol: float = 1e-5
    method: str = "dopri5"
    order = 5
    stochastic = False

    def _interval(self, run: Run, x: State, start: float, end: float) -> State:
        names = list(x)

        def slope(t: Tensor, y: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            state, time = dict(zip(names, y, strict=True)), float(t)
            predictions = run.denoise(state, time)
            out = []
            for name in names:
                schedule = run.process.fields[name].schedule
                rate = float(schedule.log_alpha_rate(time))
                pull = float(schedule.diffusion_squared(time) / (2.0 * schedule.sigma(time)))
                change = rate * state[name] + pull * predictions[name].eps
                out.append(run.project(name, change))
            return tuple(out)

        device = x[names[0]].device
        span = torch.tensor([start, end], dtype=torch.float64, device=device)
        ends = odeint(
            slope,
            tuple(x.values()),
            span,
            rtol=self.rtol,
            atol=self.atol,
            method=self.method,
            # without step_t the last step would go past the end and be interpolated
            options={"dtype": torch.float64, "step_t": span[1:]},
        )
        return {name: path[-1] for name, path in zip(names, ends, strict=True)}


@dataclass(frozen=True)
class AdaptiveSDE(AdaptiveSolver):
    """The reverse SDE with adaptive steps: Euler-Maruyama against the stochastic improved Euler
    method, continuing from their mean (Jolicoeur-Martineau et al. 2021, Algorithm 1).

    The error is a mean over a sample's entries, and a step that was refused draws new noise. With
    a hundred entries that is harmless; with two, steps pass by luck, and the samples spread too
    far, so use another solver there.

    Args:
        rtol, atol: tolerances; the paper's atol is (range of the data) / 256.
        h_init: first step in time, as a fraction of the schedule's ``t_max``.
        theta: safety factor. exponent: r of the step size rule.
        max_steps: give up after so many.
    """

    rtol: float = 0.02
    atol: float = 0.0078
    h_init: float = 0.01
    theta: float = 0.9
    exponent: float = 0.9
    max_steps: int = 10_000
    order = 1
    stochastic = True

    def _interval(self, run: Run, x: State, start: float, end: float) -> State:
        t = run.times(start)
        h = torch.full_like(t, self.h_init * run.process.lead.t_max).clamp(max=start - end)
        previous = x
        for _ in range(self.max_steps):
            active = t > end
            if not active.any():
                return x
            h = torch.where(active, torch.minimum(h, t - end), 0.0)
            noise = run.noise(x)
            euler = self._euler(run, x, x, t, h, noise)
            # a step that reaches the end lands on it exactly
            after = torch.where(t - h <= end * (1.0 + 1e-12), end, t - h)
            other = self._euler(run, euler, x, after, h, noise)
            mean = {name: 0.5 * (euler[name] + other[name]) for name in x}
            gap = {name: euler[name] - mean[name] for name in x}
            error = run.error(gap, euler, previous, self.atol, self.rtol)
            accept = active & (error <= 1.0)
            x, previous = _choose(accept, mean, x), _choose(accept, euler, previous)
            t = torch.where(accept, after, t)
            h = self.theta * h * error.clamp(min=1e-12) ** (-self.exponent)
        raise _too_many(self, self.max_steps)

    def _euler(self, run: Run, at: State, x: State, t: Tensor, h: Tensor, noise: State) -> State:
        """x - h (f x - g^2 score) + sqrt(h) g z with the slopes at state ``at`` and time ``t``."""
        predictions, out = run.denoise(at, t), {}
        for name, y in x.items():
            schedule = run.process.fields[name].schedule
            square = schedule.diffusion_squared(t)
            rate = _column(h * schedule.log_alpha_rate(t), y)
            pull = _column(h * square / schedule.sigma(t), y)
            std = _column((h * square).sqrt(), y)
            drift = rate * at[name] + pull * predictions[name].eps
            out[name] = y - drift + std * noise[name]
        return run.projected(out)
