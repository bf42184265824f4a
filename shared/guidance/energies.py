"""Energies: differentiable scalars per sample, low where the samples should go.

An energy E turns a density p into the density p exp(-E), up to its norm. Sums of energies are
products of experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from shared.predictions import Condition
from shared.process import Process, State, alpha_sigma

Time = float | Tensor
Predict = Callable[[State, Time, Tensor | None, Condition | None], Tensor]
Target = str | float | Tensor


class Energy(ABC):
    """A scalar per sample. ``e + f`` is the product of experts exp(-e) exp(-f); ``2.0 * e`` and
    ``-e`` scale and negate; :class:`AnyOf` is the mixture."""

    name: str

    @abstractmethod
    def __call__(
        self, x: State, t: Time, mask: Tensor | None = None, cond: Condition | None = None
    ) -> Tensor:
        """The energies [batch] of ``x`` (x_t or an estimate of x_0, as the guidance says) at time
        ``t``."""

    def __add__(self, other: Energy) -> Energy:
        return Sum(((1.0, self), (1.0, other)))

    def __mul__(self, factor: float) -> Energy:
        return Sum(((factor, self),))

    __rmul__ = __mul__

    def __neg__(self) -> Energy:
        return self * -1.0

    def __sub__(self, other: Energy) -> Energy:
        return Sum(((1.0, self), (-1.0, other)))


@dataclass(frozen=True, eq=False)
class Sum(Energy):
    """sum_k w_k E_k."""

    terms: tuple[tuple[float, Energy], ...]

    @property
    def name(self) -> str:  # type: ignore[override]
        return " + ".join(energy.name for _, energy in self.terms)

    def __call__(
        self, x: State, t: Time, mask: Tensor | None = None, cond: Condition | None = None
    ) -> Tensor:
        values = [w * evaluate(energy, x, t, mask, cond) for w, energy in self.terms]
        return torch.stack(values).sum(0)


@dataclass(frozen=True, eq=False)
class AnyOf(Energy):
    """-log sum_k exp(-E_k): the mixture of experts, low where any of them is."""

    energies: tuple[Energy, ...]

    @property
    def name(self) -> str:  # type: ignore[override]
        return " or ".join(energy.name for energy in self.energies)

    def __call__(
        self, x: State, t: Time, mask: Tensor | None = None, cond: Condition | None = None
    ) -> Tensor:
        values = [-evaluate(energy, x, t, mask, cond) for energy in self.energies]
        return -torch.stack(values).logsumexp(0)


@dataclass(frozen=True, eq=False)
class Function(Energy):
    """Any function (x, t, mask, cond) -> [batch] as an energy."""

    fn: Predict
    name: str = "function"

    def __call__(
        self, x: State, t: Time, mask: Tensor | None = None, cond: Condition | None = None
    ) -> Tensor:
        return self.fn(x, t, mask, cond)


@dataclass(frozen=True, eq=False)
class SquaredError(Energy):
    """sum_k w_k (y_k - target_k)^2 of predicted properties y (EEGSDE, Sec. 4.1), in the units of
    the predictor; w = 1 / (2 s^2) makes it the likelihood of a measurement with deviation s.

    Args:
        predict: (x, t, mask, cond) -> properties, [batch] or [batch, k].
        target: the name of a condition of that shape, or one value (float, [k]) for all samples.
        weight: one weight, or [k].
    """

    predict: Predict
    target: Target
    weight: float | Tensor = 1.0
    name: str = "squared error"

    def __call__(
        self, x: State, t: Time, mask: Tensor | None = None, cond: Condition | None = None
    ) -> Tensor:
        y = self.predict(x, t, mask, cond)
        error = y - target_like(self.target, y, cond, self.name)
        return (self.weight * error.square()).reshape(len(y), -1).sum(1)


@dataclass(frozen=True, eq=False)
class Within(Energy):
    """Squared distance of predicted properties to the range [low, high]; one end left out gives
    an inequality. Ends as ``target`` of :class:`SquaredError`."""

    predict: Predict
    low: Target | None = None
    high: Target | None = None
    name: str = "range"

    def __post_init__(self) -> None:
        if self.low is None and self.high is None:
            raise ValueError(f"energy '{self.name}': give low, high or both.")

    def __call__(
        self, x: State, t: Time, mask: Tensor | None = None, cond: Condition | None = None
    ) -> Tensor:
        y = self.predict(x, t, mask, cond)
        outside = torch.zeros_like(y)
        if self.low is not None:
            outside = outside + F.relu(target_like(self.low, y, cond, self.name) - y)
        if self.high is not None:
            outside = outside + F.relu(y - target_like(self.high, y, cond, self.name))
        return outside.square().reshape(len(y), -1).sum(1)


@dataclass(frozen=True, eq=False)
class Classifier(Energy):
    """-log p(label | x_t) of a classifier that gives logits [batch, classes] (Dhariwal & Nichol
    2021). ``label``: a class, or the name of a condition of class numbers [batch]."""

    classify: Predict
    label: int | str
    name: str = "classifier"

    def __call__(
        self, x: State, t: Time, mask: Tensor | None = None, cond: Condition | None = None
    ) -> Tensor:
        logits = self.classify(x, t, mask, cond)
        if isinstance(self.label, str):
            label = condition(cond, self.label, self.name)
        else:
            label = torch.full(logits.shape[:1], self.label, device=logits.device)
        if label.shape != logits.shape[:1]:
            raise ValueError(
                f"energy '{self.name}': condition '{self.label}' has shape {tuple(label.shape)}; "
                f"give one class number per sample, [{len(logits)}]."
            )
        return F.cross_entropy(logits, label.long(), reduction="none")


# -- similarity to a source (EGSDE) -----------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Source:
    """The source of an edit as the energies of EGSDE see it: x_t ~ q(x_t | source), made with one
    fixed draw per sample.

    Args:
        source: condition with the clean source, shaped like ``field``.
        noise: condition with a standard normal of that shape; None leaves the source clean.
    """

    process: Process
    field: str
    source: str = "source"
    noise: str | None = None

    def at(self, t: Time, cond: Condition | None, name: str) -> Tensor:
        clean = condition(cond, self.source, name)
        if self.noise is None:
            return clean
        alpha, sigma = alpha_sigma(self.process.fields[self.field].schedule, t, clean)
        return alpha * clean + sigma * condition(cond, self.noise, name)


@dataclass(frozen=True, eq=False)
class Realistic(Energy):
    """Mean cosine similarity of domain-specific features [batch, channels, ...] to those of the
    source (Zhao et al. 2022, EGSDE, Eq. 11): low where the traces of its domain are gone."""

    features: Callable[[Tensor, Time], Tensor]
    source: Source
    name: str = "realistic"

    def __call__(
        self, x: State, t: Time, mask: Tensor | None = None, cond: Condition | None = None
    ) -> Tensor:
        ours = self.features(x[self.source.field], t)
        theirs = self.features(self.source.at(t, cond, self.name), t)
        return F.cosine_similarity(ours, theirs, dim=1).reshape(len(ours), -1).mean(1)


@dataclass(frozen=True, eq=False)
class Faithful(Energy):
    """Squared distance of domain-independent features to those of the source (EGSDE, Eq. 12);
    the published features are a low-pass filter, see :func:`low_pass`."""

    features: Callable[[Tensor, Time], Tensor]
    source: Source
    name: str = "faithful"

    def __call__(
        self, x: State, t: Time, mask: Tensor | None = None, cond: Condition | None = None
    ) -> Tensor:
        ours = self.features(x[self.source.field], t)
        theirs = self.features(self.source.at(t, cond, self.name), t)
        return (ours - theirs).square().flatten(1).sum(1)


def low_pass(factor: int) -> Callable[[Tensor, Time], Tensor]:
    """Images [batch, channels, height, width] averaged over blocks of ``factor`` pixels."""
    return lambda x, t: F.avg_pool2d(x, factor)


# -- checks -----------------------------------------------------------------------------------


def evaluate(
    energy: Energy, x: State, t: Time, mask: Tensor | None, cond: Condition | None
) -> Tensor:
    """The energies [batch], checked.

    Raises:
        ValueError: not one value per sample.
        FloatingPointError: NaN or infinity.
    """
    value = energy(x, t, mask, cond)
    batch = len(next(iter(x.values())))
    if value.shape != (batch,):
        raise ValueError(
            f"energy '{energy.name}' has shape {tuple(value.shape)}; return one value per sample, "
            f"[{batch}]."
        )
    check_finite(value, f"energy '{energy.name}'", t)
    return value


def check_condition(cond: Condition | None, batch: int) -> None:
    """Refuse conditions whose first axis is not the batch.

    Raises:
        ValueError: names the condition.
    """
    for name, value in (cond or {}).items():
        if value.dim() == 0 or len(value) != batch:
            raise ValueError(
                f"condition '{name}' has shape {tuple(value.shape)}; its first axis must be the "
                f"batch, {batch}."
            )


def condition(cond: Condition | None, key: str, user: str) -> Tensor:
    """The condition ``key``, or an error that says who wants it.

    Raises:
        ValueError: there is no such condition.
    """
    if cond is None or key not in cond:
        raise ValueError(f"'{user}' needs the condition '{key}'; given: {sorted(cond or {})}.")
    return cond[key]


def target_like(target: Target, y: Tensor, cond: Condition | None, user: str) -> Tensor:
    """A target for the predictions ``y``; broadcasting [batch] against [batch, 1] is an error.

    Raises:
        ValueError: the shapes differ, or the condition is missing.
    """
    per_sample = isinstance(target, str)
    value = condition(cond, target, user) if isinstance(target, str) else torch.as_tensor(target)
    wanted = y.shape if per_sample else y.shape[1:]
    if value.shape != wanted and (per_sample or value.dim() > 0):
        raise ValueError(
            f"energy '{user}': the target has shape {tuple(value.shape)}, the prediction needs "
            f"{tuple(wanted)}."
        )
    return value.to(y)


def check_finite(value: Tensor, what: str, t: Time) -> None:
    """Refuse NaN and infinity in ``value`` [batch, ...].

    Raises:
        FloatingPointError: says what, when and in which samples.
    """
    good = torch.isfinite(value.detach()).reshape(len(value), -1).all(1)
    if not bool(good.all()):
        bad = (~good).nonzero().flatten().tolist()
        when = f"t={t:.6g}" if isinstance(t, float) else "the given times"
        raise FloatingPointError(
            f"{what} is NaN or infinite at {when} for {len(bad)} of {len(good)} samples (first: "
            f"{bad[:5]}); check its model and lower its scale."
        )
