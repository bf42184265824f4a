"""Steering by rewards without gradients: Feynman-Kac particles and best-of-N.

K particles per sample run side by side and are resampled in proportion to potentials made of
rewards of the x_0 estimates (Singhal et al. 2025). Their law tends to p(x_0) exp(scale r(x_0)) as
K grows, for every potential, because the last weights make up for what the earlier ones left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from shared.predictions import Prediction
from shared.process import Process, State
from shared.solvers.base import PlanSolver, Solver
from shared.solvers.plan import After, Denoise, Draw, Project, run

Reward = Callable[[State], Tensor]

# Numbers of draws: particle k uses k * PARTICLE + j (START: its own start), resampling those
# from RESAMPLE on, three each
PARTICLE, START, RESAMPLE = 1 << 24, 1 << 23, 1 << 41


@dataclass(frozen=True, eq=False)
class Steered(Solver):
    """Feynman-Kac steering around any solver that is a plan, and best-of-N around any solver;
    gives one particle per sample. The particles of a sample depend on its own draws alone. The
    denoiser is called K times per evaluation, each time on the batch.

    Args:
        solver: must be a stochastic plan if particles are resampled.
        reward: estimate of x_0 -> rewards [batch]; any code, without gradient. It sees the
            samples of the batch in their order, once per particle.
        particles: K; 1 changes nothing.
        scale: lambda of exp(lambda r).
        potential: 'difference' exp(lambda (r_t - r_{t+1})), 'max' exp(lambda max_s r_s), 'sum'
            exp(lambda sum_s r_s).
        every: weigh at every so many evaluations; 0: only at the end.
        ess: resample a sample's particles only while their effective number, 1 / sum w^2, is
            below this share of K; 1 resamples at every weighing.
        pick: the particle that is given back, 'sample' by its weight or 'best' by its reward.
        choice: another reward, of the finished samples, by which 'best' picks.
        scatter: start the other particles at draws of the prior; False: all at the given state
            (an edit, where the start is not the prior).

    Raises:
        ValueError: settings that do not fit together; (on solve) rewards of the wrong shape.
        FloatingPointError: (on solve) NaN or infinite rewards.
    """

    solver: Solver
    reward: Reward
    particles: int = 4
    scale: float = 1.0
    potential: Literal["difference", "max", "sum"] = "difference"
    every: int = 1
    ess: float = 1.0
    pick: Literal["sample", "best"] = "sample"
    choice: Reward | None = None
    scatter: bool = True

    stochastic = True

    def __post_init__(self) -> None:
        if self.particles < 1 or self.every < 0 or not 0.0 <= self.ess <= 1.0:
            raise ValueError(
                f"Steered: particles={self.particles} must be at least 1, every={self.every} at "
                f"least 0, ess={self.ess} in [0, 1]."
            )
        if self.potential not in ("difference", "max", "sum"):
            raise ValueError(
                f"Steered: potential '{self.potential}' is not one of difference, max, sum."
            )
        if self.pick not in ("sample", "best"):
            raise ValueError(f"Steered: pick '{self.pick}' is not one of sample, best.")
        if self.choice is not None and self.pick != "best":
            raise ValueError("Steered: a choice needs pick='best'.")
        if self.every and self.particles > 1:
            name = type(self.solver).__name__
            if not isinstance(self.solver, PlanSolver):
                raise ValueError(f"Steered: {name} is no plan to resample in; give every=0.")
            if not self.solver.stochastic:
                raise ValueError(
                    f"Steered: {name} draws no noise, so copies of a particle would stay equal; "
                    "take a stochastic solver, or every=0."
                )

    @classmethod
    def best_of(cls, solver: Solver, reward: Reward, n: int) -> Steered:
        """``n`` independent tries per sample, of which the one with the best reward stays."""
        return cls(solver, reward, n, every=0, pick="best")

    @property
    def order(self) -> int:  # type: ignore[override]
        return self.solver.order

    def intervals(self, nfe: int) -> int:
        return self.solver.intervals(nfe // self.particles)

    def calls(self, process: Process, times: Sequence[float]) -> int | None:
        each = self.solver.calls(process, times)
        return None if each is None else self.particles * each

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
        particles = _Particles(self, len(next(iter(x.values()))), draw, next(iter(x)))
        if not self.every or not isinstance(self.solver, PlanSolver):
            starts = particles.split(particles.start(process, x))
            ends = [
                self.solver.solve(
                    process, denoise, start, times, particles.draw_of(k), project, after
                )
                for k, start in enumerate(starts)
            ]
            return particles.choose(_join(ends))
        end = run(
            self.solver.plans(process, times),
            particles.denoise(denoise),
            particles.start(process, x),
            particles.draws,
            None if project is None else particles.each_field(project),
            None if after is None else particles.each_state(after),
            particles.resample,
        )
        return particles.choose(end)


@dataclass(eq=False)
class _Particles:
    """The particles of one batch: row k * batch + i of the state is particle k of sample i."""

    how: Steered
    batch: int
    draw: Draw
    lead: str
    evaluations: int = 0
    resamplings: int = 0
    log_weight: Tensor = field(init=False)  # since the last resampling, [k, batch]
    spent: Tensor = field(init=False)  # log of all potentials of the particle's ancestry
    history: Tensor | None = None  # last, largest or summed reward of the ancestry

    def __post_init__(self) -> None:
        shape = (self.how.particles, self.batch)
        self.log_weight = torch.zeros(shape, dtype=torch.float64)
        self.spent = torch.zeros(shape, dtype=torch.float64)

    # -- K copies of the batch, one after the other

    def split(self, x: State) -> list[State]:
        k = self.how.particles
        parts = {name: v.chunk(k) for name, v in x.items()}
        return [{name: v[i] for name, v in parts.items()} for i in range(k)]

    def start(self, process: Process, x: State) -> State:
        starts = [x]
        for k in range(1, self.how.particles):
            noise = {name: self.draw(name, k * PARTICLE + START) for name in x}
            starts.append(process.prior(noise) if self.how.scatter else x)
        return _join(starts)

    def draw_of(self, k: int) -> Draw:
        """The draws of particle ``k``."""
        return lambda name, j: self.draw(name, k * PARTICLE + j)

    def draws(self, name: str, j: int) -> Tensor:
        return torch.cat([self.draw_of(k)(name, j) for k in range(self.how.particles)])

    def denoise(self, denoise: Denoise) -> Denoise:
        def joined(x: State, t: float) -> dict[str, Prediction]:
            outs = [denoise(part, t) for part in self.split(x)]
            return {name: _join_predictions([out[name] for out in outs]) for name in outs[0]}

        return joined

    def each_field(self, project: Project) -> Project:
        k = self.how.particles
        return lambda name, x: torch.cat([project(name, part) for part in x.chunk(k)])

    def each_state(self, after: After) -> After:
        return lambda x, time: _join([after(part, time) for part in self.split(x)])

    # -- weights

    def rewards(self, x0: State, reward: Reward) -> Tensor:
        """[k, batch]."""
        rewards = torch.stack([torch.as_tensor(reward(part)) for part in self.split(x0)])
        if rewards.shape != self.log_weight.shape:
            raise ValueError(
                f"Steered: the reward has shape {tuple(rewards.shape[1:])}; return one value per "
                f"sample, [{self.batch}]."
            )
        if not bool(torch.isfinite(rewards).all()):
            raise FloatingPointError(
                "Steered: a reward is NaN or infinite; give samples that cannot be judged a low "
                "number."
            )
        return rewards.detach().to("cpu", torch.float64)

    def weigh(self, reward: Tensor) -> None:
        """Multiply the weights by the potential of these rewards."""
        before = self.history
        if self.how.potential == "difference":
            self.history = reward
            log_potential = self.how.scale * (reward - (0.0 if before is None else before))
        else:
            merge = torch.maximum if self.how.potential == "max" else torch.add
            self.history = reward if before is None else merge(before, reward)
            log_potential = self.how.scale * self.history
        self.log_weight = self.log_weight + log_potential
        self.spent = self.spent + log_potential

    def resample(self, predictions: Mapping[str, Prediction], t: float) -> Tensor | None:
        """The rows that go on, or None; a hook of the plan loop."""
        self.evaluations += 1
        if self.evaluations % self.how.every:
            return None
        estimates = {name: p.x0 for name, p in predictions.items()}
        self.weigh(self.rewards(estimates, self.how.reward))
        weights = self.log_weight.softmax(0)
        # a particle short of exactly K effective ones: equal weights need no resampling
        thin = 1.0 / weights.square().sum(0) < self.how.ess * self.how.particles * (1 - 1e-9)
        identity = torch.arange(self.how.particles)[:, None].expand_as(weights)
        parents = torch.where(thin, systematic(weights, self.uniform()), identity)
        self.log_weight = torch.where(thin, 0.0, self.log_weight)
        self.spent = self.spent.gather(0, parents)
        if self.history is not None:
            self.history = self.history.gather(0, parents)
        return self.rows(parents).to(next(iter(predictions.values())).x.device)

    def rows(self, parents: Tensor) -> Tensor:
        return (parents * self.batch + torch.arange(self.batch)).flatten()

    def choose(self, x: State) -> State:
        """One particle per sample."""
        if self.how.particles == 1:
            return x
        reward = self.rewards(x, self.how.choice or self.how.reward)
        if self.how.pick == "best":
            chosen = reward.argmax(0)
        else:
            weights = (self.log_weight + self.how.scale * reward - self.spent).softmax(0)
            chosen = _inverse_cdf(weights, self.uniform()[None])[0]
        return {name: v[self.rows(chosen).to(v.device)] for name, v in x.items()}

    def uniform(self) -> Tensor:
        """A uniform number per sample [batch], made of three normals a, b, c on the geometry:
        <a, c> and <b, c> are normals of one variance, so their angle is uniform."""
        first = RESAMPLE + 3 * self.resamplings
        self.resamplings += 1
        a, b, c = (
            self.draw(self.lead, first + i).flatten(1).to("cpu", torch.float64) for i in range(3)
        )
        angle = torch.atan2((a * c).sum(1), (b * c).sum(1)) / (2.0 * math.pi)
        return (angle + 0.5).clamp(0.0, 1.0 - 1e-12)


def systematic(weights: Tensor, u: Tensor) -> Tensor:
    """Systematic resampling (Kitagawa 1996): parents [k, batch] for weights [k, batch] that sum
    to 1 and one uniform number per sample, [batch]; particle i has floor or ceil of k w_i
    children."""
    k = len(weights)
    return _inverse_cdf(weights, (torch.arange(k).to(u)[:, None] + u) / k)


def _inverse_cdf(weights: Tensor, u: Tensor) -> Tensor:
    """[m, batch] indices where the cumulated weights [k, batch] pass ``u`` [m, batch]."""
    cumulated = weights.cumsum(0).T.contiguous()
    found = torch.searchsorted(cumulated, u.T.contiguous(), right=True).T
    return found.clamp(max=len(weights) - 1)


def _join(states: Sequence[State]) -> State:
    return {name: torch.cat([state[name] for state in states]) for name in states[0]}


def _join_predictions(parts: Sequence[Prediction]) -> Prediction:
    first = parts[0]
    return Prediction(
        torch.cat([p.x for p in parts]),
        first.alpha,
        first.sigma,
        x0=torch.cat([p.x0 for p in parts]),
        eps=torch.cat([p.eps for p in parts]),
        var=None if first.var is None else torch.cat([p.form("var") for p in parts]),
    )
