"""What a network's output means: parameterisations and the prediction they give.

A :class:`Prediction` offers the two forms that solvers use, ``x0`` (the estimate of the data) and
``eps`` (the estimate of the noise).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from shared.process import Scale, State

Correction = Callable[[Tensor], Tensor]
Condition = Mapping[str, Tensor]


class Prediction:
    """One field's prediction at ``x_t`` in two forms, made from the one given, when asked for.

    ``x0`` may be corrected afterwards (thresholding); ``eps`` stays the raw one, because published
    samplers mix a clamped x0 with an unclamped eps. ``var`` is the output of a variance head.
    """

    __slots__ = ("_correct", "_eps", "_x0", "alpha", "sigma", "var", "x")

    def __init__(
        self,
        x: Tensor,
        alpha: Scale,
        sigma: Scale,
        *,
        x0: Tensor | None = None,
        eps: Tensor | None = None,
        var: Tensor | None = None,
        correct: Correction | None = None,
    ) -> None:
        if x0 is None and eps is None:
            raise ValueError("Prediction: give x0, eps or both.")
        self.x, self.alpha, self.sigma, self.var = x, alpha, sigma, var
        self._x0, self._eps, self._correct = x0, eps, correct

    @property
    def raw_x0(self) -> Tensor:
        """x0_hat before any correction."""
        if self._x0 is None:
            assert self._eps is not None
            self._x0 = _combine(self.x, -self.sigma, self._eps).div_(self.alpha)
        return self._x0

    @property
    def x0(self) -> Tensor:
        """x0_hat = (x - sigma eps_hat) / alpha, corrected."""
        return self.raw_x0 if self._correct is None else self._correct(self.raw_x0)

    @property
    def eps(self) -> Tensor:
        """eps_hat = (x - alpha x0_hat) / sigma, raw."""
        if self._eps is None:
            assert self._x0 is not None
            self._eps = _combine(self.x, -self.alpha, self._x0).div_(self.sigma)
        return self._eps

    @property
    def score(self) -> Tensor:
        """grad log p_t(x) = -eps_hat / sigma."""
        return -self.eps / self.sigma

    def form(self, kind: str) -> Tensor:
        """'x0', 'eps' or 'var', as solvers ask for them."""
        if kind == "var":
            if self.var is None:
                raise ValueError(
                    "this solver needs a variance head, which the denoiser lacks; train one "
                    "(shared.variance) or choose another variance."
                )
            return self.var
        return self.x0 if kind == "x0" else self.eps

    def weighted(self, x0: float, eps: float) -> list[tuple[Scale, Tensor]]:
        """x0 * x0_hat + eps * eps_hat as a sum of (coefficient, array). A form that was not given
        is not made for it: without a correction it is a combination of x_t and the other."""
        plain = self._correct is None and not isinstance(self.alpha, Tensor)
        if plain and x0 and self._x0 is None and self.alpha:
            ratio = x0 / self.alpha
            return [(ratio, self.x), (eps - ratio * self.sigma, self.eps)]
        if plain and eps and self._eps is None and self.sigma:
            ratio = eps / self.sigma
            return [(ratio, self.x), (x0 - ratio * self.alpha, self.x0)]
        return [(c, self.form(kind)) for kind, c in (("x0", x0), ("eps", eps)) if c]

    def corrected(self, correct: Correction) -> Prediction:
        """The same prediction with a correction of x0 (after any earlier one)."""
        first = self._correct
        both = correct if first is None else lambda x0: correct(first(x0))
        return Prediction(
            self.x, self.alpha, self.sigma, x0=self._x0, eps=self._eps, var=self.var, correct=both
        )

    def map(self, fn: Callable[[Tensor], Tensor]) -> Prediction:
        """``fn`` applied to every array (rows of a batch, detaching); the correction stays."""

        def on(value: Any) -> Any:
            return fn(value) if isinstance(value, Tensor) else value

        x, alpha, sigma, var = on(self.x), on(self.alpha), on(self.sigma), on(self.var)
        x0, eps = on(self._x0), on(self._eps)
        return Prediction(x, alpha, sigma, x0=x0, eps=eps, var=var, correct=self._correct)

    @staticmethod
    def blend(predictions: Sequence[Prediction], weights: Sequence[Scale]) -> Prediction:
        """sum_k w_k times predictions at one point, with sum_k w_k = 1 (guidance, composition),
        in the forms that all of them have; variance and correction of the first stay."""

        def total(forms: Sequence[Tensor | None]) -> Tensor | None:
            terms = [w * f for w, f in zip(weights, forms, strict=True) if f is not None]
            return torch.stack(terms).sum(0) if len(terms) == len(forms) else None

        first = predictions[0]
        x0, eps = total([p._x0 for p in predictions]), total([p._eps for p in predictions])
        if x0 is None and eps is None:
            eps = total([p.eps for p in predictions])
        return Prediction(
            first.x,
            first.alpha,
            first.sigma,
            x0=x0,
            eps=eps,
            var=first.var,
            correct=first._correct,
        )

    def with_eps(self, eps: Tensor) -> Prediction:
        """The same point with another noise estimate (guidance); the correction stays."""
        return Prediction(
            self.x, self.alpha, self.sigma, eps=eps, var=self.var, correct=self._correct
        )


def _combine(x: Tensor, scale: Scale, y: Tensor) -> Tensor:
    """x + scale * y in one pass."""
    return (
        torch.addcmul(x, scale, y) if isinstance(scale, Tensor) else torch.add(x, y, alpha=scale)
    )


class Denoise(Protocol):
    """Anything that predicts: a :class:`Denoiser`, an analytic one, or a guided one.

    ``t`` is a float (sampling) or one time per sample, [batch] (training).
    """

    def __call__(
        self,
        x: State,
        t: float | Tensor,
        mask: Tensor | None = None,
        cond: Condition | None = None,
    ) -> dict[str, Prediction]: ...


class Parameterisation(ABC):
    """What a network's output stands for. The output is linear in (x0, eps):
    ``target``; ``predict`` inverts it; ``eps_gain`` = d eps_hat / d output at fixed x, which
    turns weights on the noise error into weights on the network's own error."""

    def scale_in(self, alpha: Scale, sigma: Scale) -> Scale:
        """c_in: the network sees c_in * x."""
        return 1.0

    @abstractmethod
    def target(self, x0: Tensor, eps: Tensor, alpha: Scale, sigma: Scale) -> Tensor: ...

    @abstractmethod
    def predict(self, out: Tensor, x: Tensor, alpha: Scale, sigma: Scale) -> Prediction: ...

    @abstractmethod
    def eps_gain(self, alpha: Scale, sigma: Scale) -> Scale: ...


@dataclass(frozen=True)
class Noise(Parameterisation):
    """The network predicts eps (Ho et al. 2020)."""

    def target(self, x0: Tensor, eps: Tensor, alpha: Scale, sigma: Scale) -> Tensor:
        return eps

    def predict(self, out: Tensor, x: Tensor, alpha: Scale, sigma: Scale) -> Prediction:
        return Prediction(x, alpha, sigma, eps=out)

    def eps_gain(self, alpha: Scale, sigma: Scale) -> Scale:
        return 1.0


@dataclass(frozen=True)
class Data(Parameterisation):
    """The network predicts x0."""

    def target(self, x0: Tensor, eps: Tensor, alpha: Scale, sigma: Scale) -> Tensor:
        return x0

    def predict(self, out: Tensor, x: Tensor, alpha: Scale, sigma: Scale) -> Prediction:
        return Prediction(x, alpha, sigma, x0=out)

    def eps_gain(self, alpha: Scale, sigma: Scale) -> Scale:
        return -alpha / sigma


@dataclass(frozen=True)
class Velocity(Parameterisation):
    """v = alpha eps - sigma x0 (Salimans & Ho 2022), for any alpha and sigma."""

    def target(self, x0: Tensor, eps: Tensor, alpha: Scale, sigma: Scale) -> Tensor:
        return alpha * eps - sigma * x0

    def predict(self, out: Tensor, x: Tensor, alpha: Scale, sigma: Scale) -> Prediction:
        norm = alpha * alpha + sigma * sigma
        return Prediction(
            x,
            alpha,
            sigma,
            x0=(alpha * x - sigma * out) / norm,
            eps=(sigma * x + alpha * out) / norm,
        )

    def eps_gain(self, alpha: Scale, sigma: Scale) -> Scale:
        return alpha / (alpha * alpha + sigma * sigma)


@dataclass(frozen=True)
class Flow(Parameterisation):
    """u = eps - x0, the velocity of rectified flow (Liu et al. 2023)."""

    def target(self, x0: Tensor, eps: Tensor, alpha: Scale, sigma: Scale) -> Tensor:
        return eps - x0

    def predict(self, out: Tensor, x: Tensor, alpha: Scale, sigma: Scale) -> Prediction:
        total = alpha + sigma
        return Prediction(
            x, alpha, sigma, x0=(x - sigma * out) / total, eps=(x + alpha * out) / total
        )

    def eps_gain(self, alpha: Scale, sigma: Scale) -> Scale:
        return alpha / (alpha + sigma)


@dataclass(frozen=True)
class Score(Parameterisation):
    """The network predicts grad log p_t = -eps / sigma (Song et al. 2021)."""

    def target(self, x0: Tensor, eps: Tensor, alpha: Scale, sigma: Scale) -> Tensor:
        return -eps / sigma

    def predict(self, out: Tensor, x: Tensor, alpha: Scale, sigma: Scale) -> Prediction:
        return Prediction(x, alpha, sigma, eps=-sigma * out)

    def eps_gain(self, alpha: Scale, sigma: Scale) -> Scale:
        return -sigma


@dataclass(frozen=True)
class KarrasPreconditioned(Parameterisation):
    """x0 = c_skip x + c_out F(c_in x) with unit-variance input and target (Karras et al. 2022,
    Table 1), written for any alpha; ``sigma_data`` is the standard deviation of the data."""

    sigma_data: float = 0.5

    def _norm(self, alpha: Scale, sigma: Scale) -> Scale:
        return ((alpha * self.sigma_data) ** 2 + sigma**2) ** 0.5

    def scale_in(self, alpha: Scale, sigma: Scale) -> Scale:
        return 1.0 / self._norm(alpha, sigma)

    def target(self, x0: Tensor, eps: Tensor, alpha: Scale, sigma: Scale) -> Tensor:
        # (x0 - c_skip x) / c_out with x = alpha x0 + sigma eps, without dividing by sigma
        norm = self._norm(alpha, sigma)
        return (sigma / self.sigma_data * x0 - alpha * self.sigma_data * eps) / norm

    def predict(self, out: Tensor, x: Tensor, alpha: Scale, sigma: Scale) -> Prediction:
        norm = self._norm(alpha, sigma)
        c_skip = alpha * self.sigma_data**2 / norm**2
        x0 = c_skip * x + sigma * self.sigma_data / norm * out
        eps = sigma / norm**2 * x - alpha * self.sigma_data / norm * out
        return Prediction(x, alpha, sigma, x0=x0, eps=eps)

    def eps_gain(self, alpha: Scale, sigma: Scale) -> Scale:
        return -alpha * self.sigma_data / self._norm(alpha, sigma)
