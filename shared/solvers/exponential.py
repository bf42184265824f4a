"""The step that all exponential integrators share.

With the half log-SNR lambda as time, the probability-flow ODE between two times s and t has the
exact solution (Lu et al. 2022, DPM-Solver Eq. 3.4; DPM-Solver++ Eq. 8), for u = (lambda -
lambda_s) / h, h = lambda_t - lambda_s,

    noise form:  x_t = alpha_t/alpha_s x_s - sigma_t z int_0^1 e^{z (1-u)} eps_hat(u) du,  z = h
    data form:   x_t = sigma_t/sigma_s x_s - alpha_t z int_0^1 e^{z (1-u)} x0_hat(u) du,   z = -h

A solver replaces the prediction by the polynomial through the values it has; what is left are the
*moments* c_k = z int_0^1 e^{z (1-u)} u^k du = z k! phi_{k+1}(z). Members of the families differ in
where they evaluate, and in which moments they approximate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shared.schedules import Schedule
from shared.solvers.plan import Form, Tape

FORMS = ("data", "noise")


@dataclass(frozen=True)
class Node:
    """A time and its scales; ``log_snr`` is infinite where alpha or sigma is zero."""

    time: float
    alpha: float
    sigma: float
    log_snr: float


@dataclass(frozen=True)
class Evaluation:
    """The two forms of a prediction made at ``node``."""

    node: Node
    x0: Form
    eps: Form


def nodes_at(schedule: Schedule, times: Sequence[float]) -> list[Node]:
    """The nodes of a time grid, in float64."""
    t = torch.tensor(list(times), dtype=torch.float64)
    columns = torch.stack([t, schedule.alpha(t), schedule.sigma(t), schedule.log_snr(t)], 1)
    return [Node(*row) for row in columns.tolist()]


def evaluate(tape: Tape, x: Form, node: Node) -> Evaluation:
    """Evaluate the denoiser at the current state."""
    return Evaluation(node, *tape.predict(x, node.time))


def phi(k: int, z: float) -> float:
    """phi_k(z) = int_0^1 e^{z (1-u)} u^{k-1} / (k-1)! du to round-off; phi_0 = exp."""
    if abs(z) < 1.0:
        return math.fsum(z**n / math.factorial(n + k) for n in range(18))
    value = math.exp(z)
    for i in range(k):
        value = (value - 1.0 / math.factorial(i)) / z
    return value


def moments(z: float, n: int) -> list[float]:
    """The exact moments c_0..c_{n-1}; ``z`` may be infinite when n = 1."""
    return [math.expm1(z), *(z * math.factorial(k) * phi(k + 1, z) for k in range(1, n))]


def lagrange_weights(moments: Sequence[float], points: Sequence[float]) -> list[float]:
    """Weights w_j with sum_j w_j p(u_j) = sum_k c_k p_k for all polynomials p of the degree
    that the points determine."""
    weights = []
    for j, u in enumerate(points):
        basis = [1.0]  # coefficients of prod (x - v) / (u - v), lowest first
        for v in (*points[:j], *points[j + 1 :]):
            shifted = [0.0, *basis]
            basis = [(a - v * b) / (u - v) for a, b in zip(shifted, [*basis, 0.0], strict=True)]
        weights.append(math.fsum(c * b for c, b in zip(moments, basis, strict=True)))
    return weights


@dataclass(frozen=True)
class Interval:
    """From node ``s`` to node ``t`` in one form. ``eta`` > 0 is the SDE of the data form (Lu et
    al. 2022, DPM-Solver++ Eq. 17 for eta = 1): z = -(1 + eta) h.

    An interval with infinite h (into sigma = 0 or out of alpha = 0) is always in data form, where
    its first-order step is finite, and allows no other.
    """

    s: Node
    t: Node
    form: str
    eta: float = 0.0

    @property
    def h(self) -> float:
        return self.t.log_snr - self.s.log_snr

    @property
    def finite(self) -> bool:
        return math.isfinite(self.h)

    @property
    def data(self) -> bool:
        return self.form == "data" or not self.finite

    @property
    def z(self) -> float:
        return -(1.0 + self.eta) * self.h if self.data else self.h

    @property
    def decay(self) -> float:
        """The factor of x_s in x_t."""
        if not self.data:
            return self.t.alpha / self.s.alpha
        return self.t.sigma / self.s.sigma * (math.exp(-self.eta * self.h) if self.eta else 1.0)

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise that the SDE adds."""
        return self.t.sigma * math.sqrt(-math.expm1(-2.0 * self.eta * self.h)) if self.eta else 0.0

    def usable(self, seen: Sequence[Evaluation]) -> Sequence[Evaluation]:
        """Evaluations that may enter a difference; the first is the one at ``s``."""
        return [e for e in seen if math.isfinite(e.node.log_snr)] if self.finite else seen[:1]

    def points(self, seen: Sequence[Evaluation]) -> list[float]:
        """Places u of evaluations, 0 at ``s`` and 1 at ``t``."""
        if not self.finite:
            return [0.0]
        return [(e.node.log_snr - self.s.log_snr) / self.h for e in seen]

    def advance(self, x: Form, seen: Sequence[Evaluation], weights: Sequence[float]) -> Form:
        """x_t = decay x_s - scale sum_j w_j prediction_j (without the SDE's noise)."""
        scale = self.t.alpha if self.data else self.t.sigma
        out = x * self.decay
        for value, weight in zip(seen, weights, strict=True):
            out = out + (value.x0 if self.data else value.eps) * (-scale * weight)
        return out

    def euler(self, x: Form, first: Evaluation) -> Form:
        """The first-order step (DDIM)."""
        return self.advance(x, [first], moments(self.z, 1))


def denoise_to_zero(tape: Tape, x: Form, node: Node) -> None:
    """One evaluation more: the state becomes x0_hat."""
    tape.step(tape.predict(x, node.time)[0])


def check_choice(owner: object, **choices: tuple[object, Sequence[object]]) -> None:
    """Refuse an option that does not exist.

    Raises:
        ValueError: names the option, its value and what is allowed.
    """
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            options = ", ".join(map(str, allowed))
            raise ValueError(
                f"{type(owner).__name__}: {name} is {value!r}; choose one of {options}."
            )
