"""The optimal reverse variance: Analytic-DPM's table, and heads that predict it per element.

Given x_t, the best variance of an ancestral step needs Var[x0 | x_t]. Averaged over x_t it follows
from one number per time, Gamma(t) = E||eps_hat||^2 / dim (Bao et al. 2022a, Analytic-DPM); per
element it needs a second output on the frozen network, trained on eps^2 (SN) or on
(eps - eps_hat)^2 (NPR) (Bao et al. 2022b, Extended-Analytic-DPM).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from shared.checkpoints import write_atomically
from shared.denoisers import Denoiser
from shared.domains import Batch
from shared.predictions import Condition, Denoise, Prediction
from shared.process import Process, State


@dataclass(frozen=True)
class Gamma:
    """Gamma(t) = E||eps_hat(x_t, t)||^2 / dim of one field at increasing ``times``.

    Raises:
        ValueError: lengths that differ, times that do not increase, or a negative value.
    """

    times: tuple[float, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.times or len(self.times) != len(self.values):
            raise ValueError(
                f"Gamma: {len(self.times)} times and {len(self.values)} values; give one value "
                "per time."
            )
        if any(a >= b for a, b in zip(self.times, self.times[1:], strict=False)):
            raise ValueError("Gamma: times must increase strictly.")
        if not all(value >= 0.0 for value in self.values):
            raise ValueError("Gamma: values must be at least 0 and not NaN.")

    def __call__(self, t: float) -> float:
        """Linear between the table's times, constant beyond them."""
        return float(np.interp(t, self.times, self.values))

    def x0_variance(self, t: float, alpha: float, sigma: float, cap: float = math.inf) -> float:
        """Mean Var[x0 | x_t] per degree of freedom, sigma^2/alpha^2 (1 - Gamma(t)) cut to
        [0, cap] (Analytic-DPM, Eq. 8). Where alpha = 0 the state says nothing of x0: ``cap``."""
        if alpha == 0.0:
            return cap
        return min(max((sigma / alpha) ** 2 * (1.0 - self(t)), 0.0), cap)


@torch.no_grad()
def estimate_gamma(
    denoise: Denoise,
    process: Process,
    batches: Iterable[Batch],
    times: Sequence[float],
    seed: int = 0,
) -> dict[str, Gamma]:
    """Gamma of every field, once over ``batches`` at each of ``times``.

    One pass costs len(times) evaluations per batch; a few thousand samples do (Analytic-DPM,
    Appendix H). The times of the sampler's own grid need no interpolation later.

    Raises:
        ValueError: no data or no times.
    """
    times = sorted(times)
    square = {name: np.zeros(len(times)) for name in process.fields}
    count = dict.fromkeys(process.fields, 0.0)
    generator = torch.Generator().manual_seed(seed)
    for batch in batches:
        for name, x0 in batch.state.items():
            count[name] += float(process.fields[name].geometry.dim(x0, batch.mask).sum())
        for i, t in enumerate(times):
            white = {
                name: torch.randn(x0.shape, generator=generator).to(x0)
                for name, x0 in batch.state.items()
            }
            noise = process.noise(white, batch.mask)
            at = torch.full((len(batch),), t, dtype=torch.float64)
            x = process.perturb(batch.state, at, noise)
            for name, prediction in denoise(x, t, batch.mask, batch.cond or None).items():
                geometry = process.fields[name].geometry
                square[name][i] += float(geometry.norm_squared(prediction.eps).double().sum())
    if not times or not all(count.values()):
        raise ValueError("estimate_gamma: needs data and at least one time.")
    return {
        name: Gamma(tuple(times), tuple((square[name] / count[name]).tolist())) for name in square
    }


def save_gamma(path: Path | str, gammas: Mapping[str, Gamma]) -> None:
    """Write the tables of all fields as JSON."""
    tables = {name: {"times": g.times, "values": g.values} for name, g in gammas.items()}
    write_atomically(Path(path), json.dumps(tables).encode())


def load_gamma(path: Path | str | None) -> dict[str, Gamma]:
    """Read what :func:`save_gamma` wrote.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: no path, or the file holds something else.
    """
    if path is None:
        raise ValueError("path: a table of Gamma is needed; write one with save_gamma.")
    if not Path(path).is_file():
        raise FileNotFoundError(f"no table of Gamma at {path}; `variance run=...` estimates it.")
    try:
        tables = json.loads(Path(path).read_text())
        return {
            name: Gamma(tuple(table["times"]), tuple(table["values"]))
            for name, table in tables.items()
        }
    except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a table of Gamma; write it with save_gamma.") from error


class VarianceHead(nn.Module):
    """A second output on a frozen denoiser; follows the ``Denoise`` protocol and sets
    ``Prediction.var`` to the clipped Var[x0 | x_t] of every element:
    sigma^2/alpha^2 (h - eps_hat^2) for 'sn', sigma^2/alpha^2 h for 'npr'.

    'npr' forgives an imperfect eps_hat more (Extended-Analytic-DPM, Section 4).

    Args:
        denoiser: trained already; its weights are frozen here.
        head: ``(inputs, outputs, code, mask, cond) -> {field: h}``, h of the field's shape;
            ``inputs``, ``code`` are what the backbone saw and ``outputs`` what it gave.
        kind: 'sn' or 'npr'.
        cap: largest variance of an element of the data; 1 for data in [-1, 1].

    Raises:
        ValueError: an unknown kind.
    """

    def __init__(
        self, denoiser: Denoiser, head: nn.Module, kind: str = "npr", cap: float = 1.0
    ) -> None:
        super().__init__()
        if kind not in ("sn", "npr"):
            raise ValueError(f"VarianceHead: kind '{kind}' is not one of sn, npr.")
        self.denoiser = denoiser.requires_grad_(False).eval()
        self.head = head
        self.kind, self.cap = kind, cap
        self.process, self.times = denoiser.process, denoiser.times

    def train(self, mode: bool = True) -> VarianceHead:
        """The head alone trains."""
        super().train(mode)
        self.denoiser.eval()
        return self

    def forward(
        self,
        x: State,
        t: float | Tensor,
        mask: Tensor | None = None,
        cond: Condition | None = None,
    ) -> dict[str, Prediction]:
        """Predictions of all fields with their variances."""
        predictions, raw = self._evaluate(x, t, mask, cond)
        for name, prediction in predictions.items():
            h = raw[name] - prediction.eps.square() if self.kind == "sn" else raw[name]
            ratio = prediction.sigma / prediction.alpha
            prediction.var = (ratio * ratio * h).clamp(0.0, self.cap)
        return predictions

    def loss(
        self,
        x0: State,
        noise: State,
        t: Tensor,
        mask: Tensor | None = None,
        cond: Condition | None = None,
    ) -> Tensor:
        """The sum of :meth:`losses`, [batch]."""
        return torch.stack(list(self.losses(x0, noise, t, mask, cond).values())).sum(0)

    def losses(
        self,
        x0: State,
        noise: State,
        t: Tensor,
        mask: Tensor | None = None,
        cond: Condition | None = None,
    ) -> dict[str, Tensor]:
        """Mean square error of the head per degree of freedom, field -> [batch]; arguments as in
        :meth:`shared.denoisers.Denoiser.loss`."""
        x = self.process.perturb(x0, t, noise)
        predictions, raw = self._evaluate(x, t, mask, cond)
        terms = {}
        for name, h in raw.items():
            eps = noise[name]
            error = eps if self.kind == "sn" else eps - predictions[name].eps
            # noise that is exactly zero is padding or a diagonal, where nothing is predicted
            miss = torch.where(eps == 0, torch.zeros_like(h), h - error.square())
            geometry = self.process.fields[name].geometry
            dim = geometry.dim(eps, mask).clamp(min=1.0)
            terms[name] = geometry.norm_squared(miss) / dim.to(miss)
        return terms

    def _evaluate(
        self, x: State, t: float | Tensor, mask: Tensor | None, cond: Condition | None
    ) -> tuple[dict[str, Prediction], State]:
        """The frozen predictions and the head's raw output, with one pass of the backbone."""
        seen: dict[str, tuple[State, Tensor]] = {}
        hook = self.denoiser.backbone.register_forward_pre_hook(
            lambda _, args: seen.update(backbone=args[:2])
        )
        with torch.no_grad():
            try:
                outputs = self.denoiser.outputs(x, t, mask, cond)
            finally:
                hook.remove()
            predictions = self.denoiser.predictions(outputs, x, t)
        inputs, code = seen["backbone"]
        inputs = {name: value.to(x[name]) for name, value in inputs.items()}
        raw: State = self.head(inputs, outputs, code, mask, cond)
        return predictions, raw
