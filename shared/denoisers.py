"""Denoisers: backbone, preconditioning and loss.

A backbone sees scaled inputs, a time code and the condition, never a schedule; the head of a field
says what its output means (:mod:`shared.predictions`) and how it is trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from shared.geometry import Euclidean, Points
from shared.losses import Simple, TimeSampler, UniformTime, Weighting, range_bound
from shared.precision import Precision
from shared.predictions import Condition, Noise, Parameterisation, Prediction
from shared.process import Process, Scale, State, alpha_sigma
from shared.schedules import Schedule


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
        """The backbone's outputs on its scaled inputs, on the geometries."""
        out = self.run(x, t, mask, cond)
        direct = {n: out[n] for n in self.heads if self.heads[n].categories is None}
        return {**out, **self.process.project(direct, mask)}

    def run(
        self,
        x: State,
        t: float | Tensor,
        mask: Tensor | None = None,
        cond: Condition | None = None,
    ) -> State:
        """Whatever the backbone gives for scaled inputs and time code, in the dtype of ``x``."""
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
        return {name: value.to(first.dtype) for name, value in out.items()}

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
