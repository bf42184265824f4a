"""Several denoisers as one: "and", "not" and "or" of densities (Liu et al. 2022).

Scores of products add, but diffusing a product is not the product of the diffused densities. The
composed score is exact at sigma -> 0, at every time for Gaussians of one covariance whose weights
sum to 1, and approximate elsewhere; Langevin corrector steps close the gap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.predictions import Condition, Denoise, Prediction
from shared.process import State

LogProb = Callable[[State, float | Tensor, Tensor | None, Condition | None], Tensor]


@dataclass(frozen=True, eq=False)
class Conditioned:
    """A denoiser with fixed values [1, ...] or [batch, ...] for some conditions: one model under
    several conditions gives several experts."""

    denoise: Denoise
    fixed: Condition

    def __call__(
        self,
        x: State,
        t: float | Tensor,
        mask: Tensor | None = None,
        cond: Condition | None = None,
    ) -> dict[str, Prediction]:
        n = len(next(iter(x.values())))
        fixed = {name: value.expand(n, *value.shape[1:]) for name, value in self.fixed.items()}
        return self.denoise(x, t, mask, {**(cond or {}), **fixed})


@dataclass(frozen=True, eq=False)
class Product:
    """prod_k p_k^{w_k}, "and"; a negative weight is "not".

    With ``base`` p the density is p prod_k (p_k / p)^{w_k}, the conjunction of Liu et al. (2022,
    Eq. 11) with p unconditional: eps = eps_0 + sum_k w_k (eps_k - eps_0).

    Raises:
        ValueError: not one weight per expert, or no expert.
    """

    experts: Sequence[Denoise]
    weights: Sequence[float]
    base: Denoise | None = None

    def __post_init__(self) -> None:
        _check(self.experts, self.weights, "Product")

    def __call__(
        self,
        x: State,
        t: float | Tensor,
        mask: Tensor | None = None,
        cond: Condition | None = None,
    ) -> dict[str, Prediction]:
        experts, weights = list(self.experts), list(self.weights)
        if self.base is not None:
            experts, weights = [self.base, *experts], [1.0 - sum(weights), *weights]
        outs = [expert(x, t, mask, cond) for expert in experts]
        return {name: _weigh([out[name] for out in outs], weights) for name in outs[0]}


def _weigh(predictions: Sequence[Prediction], weights: Sequence[float]) -> Prediction:
    if abs(sum(weights) - 1.0) < 1e-9:
        return Prediction.blend(predictions, weights)
    terms = [w * p.eps for w, p in zip(weights, predictions, strict=True)]
    return predictions[0].with_eps(torch.stack(terms).sum(0))


@dataclass(frozen=True, eq=False)
class Mixture:
    """sum_k w_k p_k, "or": the experts' predictions weighted with p(k | x_t), exact at every time.

    ``log_prob`` gives log p_k(x_t) [batch, k] up to a common constant, for instance the logits
    of a classifier that tells the experts apart on noisy data.

    Raises:
        ValueError: not one weight per expert, weights that are not positive, or (on call)
            ``log_prob`` of the wrong shape.
    """

    experts: Sequence[Denoise]
    weights: Sequence[float]
    log_prob: LogProb

    def __post_init__(self) -> None:
        _check(self.experts, self.weights, "Mixture")
        if min(self.weights) <= 0.0:
            raise ValueError("Mixture: weights must be positive; leave an expert out instead.")

    def __call__(
        self,
        x: State,
        t: float | Tensor,
        mask: Tensor | None = None,
        cond: Condition | None = None,
    ) -> dict[str, Prediction]:
        logits = self.log_prob(x, t, mask, cond)
        wanted = (len(next(iter(x.values()))), len(self.experts))
        if logits.shape != wanted:
            raise ValueError(
                f"Mixture: log_prob has shape {tuple(logits.shape)}; one value per sample and "
                f"expert is needed, {wanted}."
            )
        share = (logits + torch.as_tensor(self.weights).to(logits).log()).softmax(-1)
        outs = [expert(x, t, mask, cond) for expert in self.experts]
        return {
            name: Prediction.blend(
                [out[name] for out in outs],
                [s.to(p.x).reshape(-1, *(1,) * (p.x.dim() - 1)) for s in share.unbind(1)],
            )
            for name, p in outs[0].items()
        }


def _check(experts: Sequence[Denoise], weights: Sequence[float], user: str) -> None:
    if not experts or len(experts) != len(weights):
        raise ValueError(f"{user}: {len(experts)} experts and {len(weights)} weights.")
