"""Networks that predict properties of molecules: from noisy ones to steer sampling (the energies
of EEGSDE, Bao et al. 2023) and from clean ones to judge what came out (EDM's protocol).

Both are a :class:`PropertyModel` and train like a denoiser: ``experiment=qm9_energy`` draws noise
levels as generators do, ``experiment=qm9_oracle`` none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from molediff.geometric.egnn import InvariantEGNN
from molediff.geometric.transformer import Trunk, length
from shared.denoisers import Denoiser, Head
from shared.geometry import expand_mask
from shared.losses import TimeSampler
from shared.predictions import Condition
from shared.process import Process, State
from shared.schedules import Schedule

PROPERTIES = "properties"

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "absolute": partial(F.l1_loss, reduction="none"),
    "squared": partial(F.mse_loss, reduction="none"),
    "bits": partial(F.binary_cross_entropy_with_logits, reduction="none"),
}


class InvariantTransformer(Trunk):
    """Numbers per molecule from the trunk of the flagship denoiser: sums over atoms for extensive
    properties, attention over atoms for orbital energies, and lengths of sums of charges times
    positions and of vectors for dipoles. Arguments as for :class:`Trunk`, and ``outputs``."""

    DIPOLES = 8

    def __init__(self, features: Mapping[str, int], *, outputs: int = 1, **options: Any) -> None:
        super().__init__(features, **options)
        width, heads = self.width, 8
        self.atoms = nn.Linear(width, width)
        self.attention = nn.Linear(width, heads)
        self.charges = nn.Linear(width, self.DIPOLES)
        self.moments = nn.Linear(self.vectors, self.DIPOLES, bias=False)
        self.molecule = nn.Sequential(
            nn.Linear(2 * width + self.DIPOLES, width), nn.SiLU(), nn.Linear(width, outputs)
        )

    def forward(
        self,
        inputs: State,
        code: Tensor,
        mask: Tensor | None = None,
        cond: Mapping[str, Tensor] | None = None,
    ) -> State:
        """Scaled inputs and time code [batch] -> {'properties': [batch, outputs]}."""
        h, v = self.run(inputs, code, mask, cond)
        atoms, logits, charges = F.silu(self.atoms(h)), self.attention(h), self.charges(h)
        moments = self.moments(v)
        if mask is not None:
            atoms, charges, moments = (
                y * expand_mask(mask, y).to(y.dtype) for y in (atoms, charges, moments)
            )
            logits = logits.masked_fill(~mask[..., None], torch.finfo(logits.dtype).min)
        b, n, heads = logits.shape
        mean = torch.einsum("bnh,bnhc->bhc", logits.softmax(1), atoms.view(b, n, heads, -1))
        x = inputs["positions"] * self.angstrom
        dipole = torch.einsum("bnd,bnk->bkd", charges, x) + moments.sum(1)
        pooled = torch.cat([atoms.sum(1) / 18.0, mean.flatten(1), length(dipole.mT)], -1)
        return {PROPERTIES: self.molecule(pooled)}


class Pooled(nn.Module):
    """:class:`InvariantEGNN` with the interface of a backbone."""

    def __init__(self, network: InvariantEGNN) -> None:
        super().__init__()
        self.network = network

    def forward(
        self,
        inputs: State,
        code: Tensor,
        mask: Tensor | None = None,
        cond: Mapping[str, Tensor] | None = None,
    ) -> State:
        return {PROPERTIES: self.network(inputs, code if self.network.timed else None, mask)}


class PropertyModel(Denoiser):
    """Predicts standardised properties [batch, k] of x_t; ``cond["context"]`` [batch, k] of the
    training data is the target, NaN where a property is unknown.

    Args:
        backbone: gives ``{'properties': [batch, k]}``.
        names: the properties, for the names of the losses.
        loss: 'absolute' (as published), 'squared', or 'bits' for logits of fingerprints.
        Others as for :class:`Denoiser`, whose heads only scale the inputs here.
    """

    def __init__(
        self,
        backbone: nn.Module,
        process: Process,
        heads: Mapping[str, Head],
        names: tuple[str, ...],
        times: TimeSampler,
        loss: str = "absolute",
    ) -> None:
        super().__init__(backbone, process, heads, times=times)
        if loss not in LOSSES:
            raise ValueError(f"model.loss={loss!r}: choose one of {', '.join(LOSSES)}.")
        self.names, self.loss_name = names, loss

    def predict(
        self,
        x: State,
        t: float | Tensor,
        mask: Tensor | None = None,
        cond: Condition | None = None,
    ) -> Tensor:
        """Standardised properties [batch, k] of states at time ``t``; ``cond`` is not used: what
        is wanted must not leak into what is predicted."""
        return self.run(x, t, mask)[PROPERTIES]

    def losses(
        self,
        x0: State,
        noise: State,
        t: Tensor,
        mask: Tensor | None = None,
        cond: Condition | None = None,
    ) -> dict[str, Tensor]:
        """Loss of every property [batch], zero where it is unknown; of all together for bits."""
        if cond is None or "context" not in cond:
            raise ValueError(
                "a property model learns from cond['context']: give domain.properties."
            )
        found, target = (
            self.predict(self.process.perturb(x0, t, noise), t, mask),
            cond["context"],
        )
        known = ~target.isnan()
        terms = LOSSES[self.loss_name](found, torch.where(known, target, 0.0).to(found)) * known
        if self.loss_name == "bits":
            return {PROPERTIES: terms.mean(1)}
        return dict(zip(self.names, terms.unbind(1), strict=True))


@dataclass(frozen=True)
class NoNoise(TimeSampler):
    """Always the first time of the schedule: training on clean data."""

    def from_uniform(self, schedule: Schedule, u: Tensor) -> Tensor:
        return torch.full_like(u, schedule.t_min)
