"""Guidance by energies: the denoiser of the tilted density p_t exp(-scale E).

Its noise estimate is

    eps_hat + scale * sigma * grad E.

EEGSDE (Bao et al. 2023) writes its guided step as mu - l sigma^2_{t|s} / alpha_{t|s} grad E. In
the ancestral step eps_hat has the coefficient -sigma^2_{t|s} / (alpha_{t|s} sigma_t), so both are
the same there with l = scale; in any other solver they agree to first order in the step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from shared.guidance.energies import Energy, Time, check_condition, check_finite, evaluate
from shared.predictions import Condition, Denoise, Prediction
from shared.process import Process, Scale, State, alpha_sigma


@dataclass(frozen=True)
class Interval:
    """A weight that is ``value`` where low <= log(alpha / sigma) <= high, else 0."""

    low: float = -float("inf")
    high: float = float("inf")
    value: float = 1.0

    def __call__(self, alpha: Scale, sigma: Scale) -> Scale:
        log_snr = torch.log(torch.as_tensor(alpha)) - torch.log(torch.as_tensor(sigma))
        inside = (log_snr >= self.low) & (log_snr <= self.high)
        return self.value * inside if isinstance(alpha, Tensor) else self.value * float(inside)


@dataclass(frozen=True, eq=False)
class Term:
    """One energy as guidance.

    Args:
        scale: its weight; ``schedule`` (alpha, sigma of the leading field) -> a factor in time.
        at: where the energy is evaluated and how its gradient reaches x_t. 'input': at x_t, for
            energies that know about noise. 'estimate': at x0_hat, back through the denoiser
            (DPS). 'frozen': at x0_hat with eps_hat held constant, without a pass back through
            the denoiser.
        normalise: scale the gradient to unit root mean square over the degrees of freedom.
        clip: its largest root mean square.
    """

    energy: Energy
    scale: float = 1.0
    schedule: Callable[[Scale, Scale], Scale] | None = None
    at: Literal["input", "estimate", "frozen"] = "input"
    normalise: bool = False
    clip: float | None = None

    def __post_init__(self) -> None:
        if self.at not in ("input", "estimate", "frozen"):
            raise ValueError(f"Term: at='{self.at}' is not one of input, estimate, frozen.")
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"Term: clip={self.clip} must be positive.")

    def weight(self, alpha: Scale, sigma: Scale) -> Scale:
        return self.scale * (1.0 if self.schedule is None else self.schedule(alpha, sigma))


@dataclass(frozen=True, eq=False)
class Guided:
    """A denoiser that follows energies: eps_hat + sum_k weight_k sigma grad E_k, for every field
    (each with its own sigma), gradients projected onto the geometry and masked.

    Works under ``torch.no_grad`` (not in inference mode), leaves no gradient in parameters, and
    runs the denoiser without a graph unless a gradient goes through it. When the caller
    differentiates through ``x``, the result is differentiable. Where alpha = 0 or sigma = 0 the
    prediction stays as it is.

    Raises (on call):
        ValueError: a condition or an energy of the wrong shape, or one that ignores the state.
        FloatingPointError: an energy or its gradient is NaN or infinite; names it.
    """

    denoise: Denoise
    process: Process
    terms: Sequence[Term]

    def __call__(
        self,
        x: State,
        t: float | Tensor,
        mask: Tensor | None = None,
        cond: Condition | None = None,
    ) -> dict[str, Prediction]:
        batch = next(iter(x.values()))
        check_condition(cond, len(batch))
        scales = alpha_sigma(self.process.lead, t, batch.new_empty(len(batch)))
        weighted = [(term, term.weight(*scales)) for term in self.terms]
        weighted = [(term, w) for term, w in weighted if isinstance(w, Tensor) or w != 0.0]
        if not weighted or _at_an_end(*scales):
            return self.denoise(x, t, mask, cond)
        if torch.is_inference_mode_enabled():
            raise RuntimeError("Guided: needs gradients; sample under no_grad, not inference_mode")
        outer = torch.is_grad_enabled() and any(v.requires_grad for v in x.values())
        through = outer or any(term.at == "estimate" for term, _ in weighted)
        with torch.enable_grad():
            inputs = {n: v if outer and v.requires_grad else _leaf(v) for n, v in x.items()}
            with torch.set_grad_enabled(through):
                predictions = self.denoise(inputs, t, mask, cond)
            guide = _Guide(self.process, inputs, predictions, t, mask, cond, outer)
            push = guide.total(weighted)
        if not outer:
            predictions = {name: p.map(Tensor.detach) for name, p in predictions.items()}
        return {
            name: p if _at_an_end(p.alpha, p.sigma) else p.with_eps(p.eps + p.sigma * push[name])
            for name, p in predictions.items()
        }


@dataclass(frozen=True, eq=False)
class _Guide:
    """One evaluation point of :class:`Guided`; ``create`` keeps the graph of the gradients."""

    process: Process
    inputs: State
    predictions: Mapping[str, Prediction]
    t: Time
    mask: Tensor | None
    cond: Condition | None
    create: bool

    def total(self, weighted: Sequence[tuple[Term, Scale]]) -> State:
        push = {name: torch.zeros_like(v) for name, v in self.inputs.items()}
        for term, weight in weighted:
            gradient = self.gradient(term)
            factor = self.limit(term, gradient) * weight
            for name, g in gradient.items():
                push[name] = push[name] + factor.to(g).reshape(-1, *(1,) * (g.dim() - 1)) * g
        return push

    def gradient(self, term: Term) -> State:
        """grad E with respect to every field, on its geometry."""
        energy = term.energy
        value = evaluate(energy, self.seen(term), self.t, self.mask, self.cond)
        slopes: Sequence[Tensor | None] = [None] * len(self.inputs)
        if value.requires_grad:
            slopes = torch.autograd.grad(
                value.sum(),
                list(self.inputs.values()),
                retain_graph=True,
                create_graph=self.create,
                allow_unused=True,
            )
        if all(slope is None for slope in slopes):
            raise ValueError(
                f"energy '{energy.name}' does not depend on the state: compute it without "
                "no_grad, detach or NumPy."
            )
        out = {}
        for (name, x), slope in zip(self.inputs.items(), slopes, strict=True):
            slope = torch.zeros_like(x) if slope is None else slope
            check_finite(slope, f"the gradient of energy '{energy.name}' by '{name}'", self.t)
            out[name] = self.process.fields[name].geometry.gradient(slope, self.mask)
        return out

    def seen(self, term: Term) -> State:
        """What the energy is evaluated at."""
        if term.at == "input":
            return self.inputs
        if term.at == "estimate":
            return {name: p.x0 for name, p in self.predictions.items()}
        return {
            name: (self.inputs[name] - p.sigma * p.eps.detach()) / p.alpha
            for name, p in self.predictions.items()
        }

    def limit(self, term: Term, gradient: State) -> Tensor:
        """The factor [batch] that normalises and clips a gradient."""
        squares = [self.process.fields[n].geometry.norm_squared(g) for n, g in gradient.items()]
        square = torch.stack(squares).sum(0)
        if not term.normalise and term.clip is None:
            return torch.ones_like(square)
        dim = self.process.dim(self.inputs, self.mask).to(square).clamp(min=1.0)
        tiny = torch.finfo(square.dtype).tiny
        inverse = (square / dim).clamp(min=tiny).rsqrt()
        if term.normalise:
            return inverse * (1.0 if term.clip is None else min(1.0, term.clip))
        assert term.clip is not None
        return (term.clip * inverse).clamp(max=1.0)


def _at_an_end(alpha: Scale, sigma: Scale) -> bool:
    return any(not isinstance(scale, Tensor) and scale == 0.0 for scale in (alpha, sigma))


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()
