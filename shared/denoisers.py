"""Denoisers: what a network's output means, how its input is scaled, and how it is trained.

A backbone sees scaled inputs, a time code and the condition, never a schedule. A
:class:`Parameterisation` turns its output into a :class:`Prediction`, which offers the two forms
that solvers use, ``x0`` (the estimate of the data) and ``eps`` (the estimate of the noise).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from shared.geometry import Euclidean, Points
from shared.losses import Simple, TimeSampler, UniformTime, Weighting, range_bound
from shared.precision import Precision
from shared.process import Process, Scale, State, alpha_sigma
from shared.schedules import Schedule

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


# -- parameterisations ------------------------------------------------------------------------


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


# -- the denoiser -----------------------------------------------------------------------------


@dataclass(frozen=True)
class TimeCode:
    """What the network is told about the time: 'time' (t), 'log_snr' (log alpha/sigma) or
    'karras' (log(sigma/alpha) / 4), times ``scale`` plus ``shift`` (e.g. scale 1000, shift -1 for
    the integer steps 0..999 of a discrete table)."""

    kind: str = "log_snr"
    scale: float = 1.0
    shift: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("time", "log_snr", "karras"):
            raise ValueError(f"TimeCode: kind '{self.kind}' is not one of time, log_snr, karras.")

    def __call__(self, schedule: Schedule, t: Tensor) -> Tensor:
        if self.kind == "time":
            code = t.to(torch.float64)
        else:
            # at sigma = 0 or alpha = 0 the log-SNR is infinite; a network wants a number
            code = schedule.log_snr(t).clamp(-30.0, 30.0) * (
                1.0 if self.kind == "log_snr" else -0.25
            )
        return code * self.scale + self.shift


@dataclass(frozen=True)
class Head:
    """How one field is predicted and trained.

    ``categories``: the network's output is a set of logits over one-hot rows times
    ``categories`` (the feature scale); x0_hat is the expected row and the loss the cross-entropy.
    The logits get the exact likelihood term categories * x * alpha / sigma^2, so an untrained
    network starts from Bayes' rule with a flat prior.

    ``learned_range``: the backbone also gives '<field>_variance', the place of the reverse
    variance between its bounds, from -1 to 1. It is trained by ``bound_weight`` times the
    variational bound, which the mean does not feel (Nichol & Dhariwal 2021, Eqs. 15 and 16).
    """

    parameterisation: Parameterisation = field(default_factory=Noise)
    weighting: Weighting = field(default_factory=Simple)
    weight: float = 1.0
    categories: float | None = None
    learned_range: bool = False
    bound_weight: float = 1e-3


class Denoiser(nn.Module):
    """Backbone + parameterisation + preconditioning + loss.

    Args:
        backbone: ``(inputs, code, mask, cond) -> outputs``, dicts of [batch, ...] per field;
            ``inputs`` are scaled, ``code`` is the time code [batch].
        process: fields, schedules and geometries.
        heads: field -> :class:`Head`; one head serves all fields.
        time_code: what the backbone is told about the time.
        times: how training times are drawn.
        precision: which part of the backbone runs in half precision.

    Raises:
        ValueError: heads that do not fit the fields, or a learned range without a grid of times.
    """

    def __init__(
        self,
        backbone: nn.Module,
        process: Process,
        heads: Head | Mapping[str, Head] | None = None,
        time_code: TimeCode | None = None,
        times: TimeSampler | None = None,
        precision: Precision | None = None,
    ) -> None:
        super().__init__()
        if heads is None or isinstance(heads, Head):
            heads = dict.fromkeys(process.fields, heads or Head())
        if heads.keys() != process.fields.keys():
            raise ValueError(
                f"Denoiser: heads for {sorted(heads)}, the process has {sorted(process.fields)}."
            )
        self.backbone = backbone
        self.process = process
        self.heads = dict(heads)
        self.time_code = time_code or TimeCode()
        self.times = times or UniformTime()
        self.precision = precision or Precision()
        for name, head in self.heads.items():
            if head.learned_range:
                self._check_learned_range(name)
        self.schedules = nn.ModuleDict(
            {  # a learned schedule trains and is saved with the rest
                name: f.schedule
                for name, f in process.fields.items()
                if isinstance(f.schedule, nn.Module)
            }
        )

    def forward(
        self,
        x: State,
        t: float | Tensor,
        mask: Tensor | None = None,
        cond: Condition | None = None,
    ) -> dict[str, Prediction]:
        """Predictions of all fields at ``x`` (field -> [batch, ...]) and time ``t``."""
        out = self.outputs(x, t, mask, cond)
        return self.predictions(out, x, t)

    def predictions(self, out: State, x: State, t: float | Tensor) -> dict[str, Prediction]:
        """What the backbone's ``out`` at ``x`` and ``t`` stands for."""
        found = {name: self._predict(name, out[name], x[name], t) for name in self.heads}
        for name, head in self.heads.items():
            if head.learned_range:
                found[name].var = 0.5 * (out[f"{name}_variance"] + 1.0)
        return found

    def outputs(
        self,
        x: State,
        t: float | Tensor,
        mask: Tensor | None = None,
        cond: Condition | None = None,
    ) -> State:
        """The backbone's raw outputs on its scaled inputs."""
        first = next(iter(x.values()))
        inputs = {}
        for name, head in self.heads.items():
            scale = head.parameterisation.scale_in(*self._scales(name, t, x[name]))
            inputs[name] = (
                x[name] * scale if isinstance(scale, Tensor) or scale != 1.0 else x[name]
            )
        times = torch.as_tensor(t, dtype=torch.float64, device=first.device).expand(len(first))
        code = self.time_code(self.process.lead, times).to(first.dtype)
        with self.precision.autocast(first.device):
            out: State = self.backbone(self.precision.enter(inputs), code, mask, cond)
        out = {name: value.to(first.dtype) for name, value in out.items()}
        return {
            **out,
            **self.process.project(
                {n: out[n] for n in self.heads if self.heads[n].categories is None}, mask
            ),
        }

    def _scales(self, name: str, t: float | Tensor, like: Tensor) -> tuple[Scale, Scale]:
        return alpha_sigma(self.process.fields[name].schedule, t, like)

    def _predict(self, name: str, out: Tensor, x: Tensor, t: float | Tensor) -> Prediction:
        head, (alpha, sigma) = self.heads[name], self._scales(name, t, x)
        if head.categories is None:
            return head.parameterisation.predict(out, x, alpha, sigma)
        logits = _bayes_logits(out, x, alpha, sigma, head.categories)
        return Prediction(x, alpha, sigma, x0=head.categories * logits.softmax(-1))

    def loss(
        self,
        x0: State,
        noise: State,
        t: Tensor,
        mask: Tensor | None = None,
        cond: Condition | None = None,
    ) -> Tensor:
        """Loss of each sample [batch], the weighted mean square error per degree of freedom.

        Args:
            x0: data, field -> [batch, ...]. noise: standard normals on the geometries.
            t: one time per sample, [batch].
        """
        return torch.stack(list(self.losses(x0, noise, t, mask, cond).values())).sum(0)

    def losses(
        self,
        x0: State,
        noise: State,
        t: Tensor,
        mask: Tensor | None = None,
        cond: Condition | None = None,
    ) -> dict[str, Tensor]:
        """The terms of :meth:`loss`: one per field, and '<field>_variance' for a learned range;
        each [batch]."""
        x = self.process.perturb(x0, t, noise)
        out = self.outputs(x, t, mask, cond)
        terms = {
            name: head.weight
            * self.field_loss(name, out[name], x[name], x0[name], noise[name], t, mask)
            for name, head in self.heads.items()
        }
        ranged = [name for name, head in self.heads.items() if head.learned_range]
        if ranged:
            found = self.predictions(out, x, t)
            for name in ranged:
                terms[f"{name}_variance"] = self._range_loss(name, found[name], x0[name], t, mask)
        return terms

    def _range_loss(
        self, name: str, found: Prediction, x0: Tensor, t: Tensor, mask: Tensor | None
    ) -> Tensor:
        field, steps = self.process.fields[name], self._steps()
        assert found.var is not None
        bits = range_bound(field.schedule, t, steps, found.var, x0 - found.raw_x0.detach())
        bits = field.geometry.project(bits, mask).flatten(1).sum(1)
        dim = field.geometry.dim(x0, mask).clamp(min=1.0).to(bits)
        return self.heads[name].weight * self.heads[name].bound_weight * steps * bits / dim

    def _steps(self) -> int:
        return getattr(self.times, "steps", None) or 0

    def _check_learned_range(self, name: str) -> None:
        if not self._steps():
            raise ValueError(
                f"Denoiser: the learned range of '{name}' needs a chain of steps; "
                "give times=UniformTime(steps=...)."
            )
        if not isinstance(self.process.fields[name].geometry, (Euclidean, Points)):
            raise ValueError(
                f"Denoiser: '{name}' cannot have a learned range: its entries are not independent."
            )
        if self.heads[name].categories is not None:
            raise ValueError(f"Denoiser: '{name}' cannot have both categories and a range.")

    def field_loss(
        self,
        name: str,
        out: Tensor,
        x: Tensor,
        x0: Tensor,
        noise: Tensor,
        t: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The unscaled loss of one field, [batch]."""
        head, (alpha, sigma) = self.heads[name], self._scales(name, t, x)
        if head.categories is not None:
            logits = _bayes_logits(out, x, alpha, sigma, head.categories)
            surprise = -(x0 / head.categories * logits.log_softmax(-1)).sum(-1)
            nodes = torch.ones_like(surprise) if mask is None else mask.to(surprise)
            return (surprise * nodes).sum(1) / nodes.sum(1)
        field = self.process.fields[name]
        gain = head.parameterisation.eps_gain(field.schedule.alpha(t), field.schedule.sigma(t))
        gain = torch.as_tensor(gain, dtype=torch.float64, device=t.device).expand(t.shape)
        weight = head.weighting(field.schedule, t, gain) * gain**2
        error = out - head.parameterisation.target(x0, noise, alpha, sigma)
        dim = field.geometry.dim(x, mask).clamp(min=1.0)
        return (weight / dim).to(x.dtype) * field.geometry.norm_squared(error)


def _bayes_logits(out: Tensor, x: Tensor, alpha: Scale, sigma: Scale, scale: float) -> Tensor:
    return out + x * (scale * alpha / sigma**2)
