"""EDM as published (Hoogeboom et al. 2022): its training loss, likelihood of atoms
and sampler. The process itself is :func:`molediff.geometric.process.molecule_process`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shared.denoisers import Denoiser, Head
from shared.geometry import expand_mask
from shared.likelihood import prior_kl
from shared.predictions import Condition, Noise, Prediction
from shared.process import Process, State
from shared.solvers.ancestral import DDPM
from shared.solvers.base import Solver
from shared.solvers.plan import After, Denoise, Draw, Project


def edm_heads(types: int, *, charges: bool = False) -> dict[str, Head]:
    """Noise prediction. Weights make the sum over fields EDM's loss, half the squared error over
    all dimensions of an atom; :func:`l2_loss` has its denominator to the letter."""
    sizes = {"positions": 3, "types": types} | ({"charges": 1} if charges else {})
    return {name: Head(Noise(), weight=0.5 * n / sum(sizes.values())) for name, n in sizes.items()}


@dataclass(frozen=True)
class AtomDecoder:
    """log p(x_0 | z_0) of positions and atoms (Hoogeboom et al. 2022, Section 3.3): positions
    are Gaussian around the network's estimate; types and charges are read from z_0 itself, through
    a normal of width sigma_0 integrated over half a unit around every class or integer.

    A decoder for :func:`shared.likelihood.variational_bound`.

    Args:
        scales: field -> model units per unit of the data, such as 0.25 for types.
        constants: add the constants of the normal over positions.
    """

    scales: Mapping[str, float] = field(default_factory=lambda: {"types": 0.25, "charges": 0.1})
    constants: bool = True

    def __call__(
        self, x0: State, seen: Mapping[str, Prediction], mask: Tensor | None = None
    ) -> Tensor:
        """Data, predictions at z_0 and mask -> [batch], nats."""
        total = self.positions(x0["positions"], seen["positions"], mask)
        for name in x0.keys() - {"positions"}:
            total = total + self.atoms(name, x0[name], seen[name], mask)
        return total

    def positions(self, x0: Tensor, seen: Prediction, mask: Tensor | None) -> Tensor:
        error = _sum((x0 - seen.raw_x0) * (seen.alpha / seen.sigma), mask)
        if not self.constants:
            return -0.5 * error
        atoms = _ones(x0, mask).sum(1)
        std = torch.as_tensor(seen.sigma / seen.alpha, dtype=x0.dtype).reshape(-1)
        return -0.5 * error - 3.0 * (atoms - 1.0) * (std.log() + 0.5 * math.log(2.0 * math.pi))

    def atoms(self, name: str, x0: Tensor, seen: Prediction, mask: Tensor | None) -> Tensor:
        """Types (several columns: one class of all) or integers (one column)."""
        scale = self.scales[name]
        wanted, found = x0 / scale, seen.x / scale
        classes = name == "types"
        offset = found - (1.0 if classes else wanted)
        log_p = _log_window(offset, seen.sigma / scale)
        if classes:
            log_p = (log_p.log_softmax(-1) * wanted).sum(-1, keepdim=True)
        return (log_p.sum(-1) * _ones(x0, mask)).sum(1)


def _log_window(offset: Tensor, std: float | Tensor) -> Tensor:
    """log of the probability that a normal of width ``std`` moves ``offset`` by at most a half."""
    upper = torch.special.ndtr((offset + 0.5) / std)
    lower = torch.special.ndtr((offset - 0.5) / std)
    return torch.log(upper - lower + 1e-10)


def l2_loss(
    denoiser: Denoiser,
    x0: State,
    noise: State,
    step: Tensor,
    mask: Tensor | None = None,
    cond: Condition | None = None,
    *,
    steps: int = 1000,
    scales: Mapping[str, float] | None = None,
) -> Tensor:
    """EDM's training loss [batch], 'l2': half the squared noise error over (3 + F) times the
    number of atoms *with padding*; at step 0 the likelihood of atoms in place of their error.
    The prior's KL is added, as published.

    Args:
        step: integer noise levels 0..``steps`` [batch], drawn uniformly when training.
        scales: see :class:`AtomDecoder`.
    """
    decoder = AtomDecoder(scales) if scales else AtomDecoder()
    t = step.to(torch.float64) * (denoiser.process.lead.t_max / steps)
    seen = denoiser(denoiser.process.perturb(x0, t, noise), t, mask, cond)
    width = sum(x.shape[-1] for x in x0.values()) * x0["positions"].shape[1]
    error = {n: _sum(noise[n] - seen[n].eps, mask) * (0.5 / width) for n in x0}
    atoms = [n for n in x0 if n != "positions"]
    smooth = torch.stack([error[n] for n in atoms]).sum(0)
    exact = -torch.stack([decoder.atoms(n, x0[n], seen[n], mask) for n in atoms]).sum(0)
    kl = prior_kl(denoiser.process, x0, mask).to(smooth)
    return error["positions"] + torch.where(step == 0, exact, smooth) + kl


def log_volume(x: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """log |d model / d data| of positions [batch], to be added to log p in model units to give
    that per Angstrom; ``scale``: model units per Angstrom."""
    return 3.0 * (_ones(x, mask).sum(1) - 1.0) * math.log(scale)


@dataclass(frozen=True)
class EDMSampler(Solver):
    """Ancestral sampling with EDM's last step: positions are drawn from
    N(x0_hat(z_0), (sigma_0 / alpha_0)^2) with one more evaluation, types and charges are z_0.

    ``atoms_from_network`` reads those from the network too (x0_hat), which is better for a
    network that classifies types and is not the published rule.
    """

    atoms_from_network: bool = False

    order = 1
    stochastic = True

    def intervals(self, nfe: int) -> int:
        return nfe - 1

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
        """See :meth:`shared.solvers.base.Solver.solve`; the last draw has number
        ``len(times) - 1``."""
        z = DDPM().solve(process, denoise, x, times, draw, project, after)
        last = float(times[-1])
        seen = denoise(z, last)
        std = math.exp(-float(process.fields["positions"].schedule.log_snr(last)))
        positions = seen["positions"].x0 + std * draw("positions", len(times) - 1)
        found = {n: p.x0 for n, p in seen.items()} if self.atoms_from_network else dict(z)
        found["positions"] = positions if project is None else project("positions", positions)
        return found if after is None else after(found, None)


def _ones(x: Tensor, mask: Tensor | None) -> Tensor:
    """1 for real atoms, [batch, n]."""
    return torch.ones_like(x[..., 0]) if mask is None else mask.to(x.dtype)


def _sum(x: Tensor, mask: Tensor | None) -> Tensor:
    """Sum of squares over real atoms, [batch]."""
    x = x if mask is None else x * expand_mask(mask, x).to(x.dtype)
    return x.square().flatten(1).sum(1)
