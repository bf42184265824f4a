"""Molecules that keep a given fragment: growing from a scaffold, linking two fragments.

The fragment's atoms come first in every sample, the new ones after them. Elements (and charges)
of the fragment are given outright. Its positions live in the space of zero centre of mass of the
whole molecule, where the place of the fragment is part of what is sampled; what is given is its
shape: the positions of its atoms minus their own mean, a linear subspace of 3 (k - 1) dimensions.

After every step that subspace, and nothing else, is replaced by a draw of q(x_t | fragment): the
fragment is noised with its own numbered draw and shifted so that the mean of its atoms stays where
the sampler has put it (:class:`shared.guidance.Known` on centred points). The noise is isotropic,
so this is the exact law of a projection of x_t, with no alignment to choose. Every sample shows
the fragment's coordinates up to one translation. There is no rotation to find either: the density
of an equivariant model is the same in every orientation. Rotating fragment and draws rotates the
result.

The new atoms follow the given ones in two ways, which add up: by resampling (RePaint), and by the
gradient of log p(fragment | x_t) at the estimate of x_0 (:class:`Agreement`). Resampling alone
needs many hundred denoiser calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from molediff.geometric.domain import Molecules
from molediff.geometric.fragments import Fragment
from molediff.geometric.records import Record
from molediff.molecules import SYMBOLS
from shared.configuration import ConfigurationError
from shared.domains import Batch
from shared.guidance import Energy, Inpainting, Known, RePaint, Term
from shared.guidance.energies import Time
from shared.predictions import Condition
from shared.process import Process, Scale, State
from shared.solvers.base import Solver
from shared.solvers.plan import After, Denoise, Draw, Project


class Scaffolded(Molecules):
    """A domain of molecules whose samples all contain a fragment: the same constants and data,
    templates with room for the fragment and ``new`` atoms more.

    Args:
        domain: of the model that samples.
        new: how many atoms to add: a number, or ``(least, most)`` or '2..5' and None (any number)
            for sizes as the training data have them. The request ``atoms`` overrides it: the size
            of the whole molecule.

    Raises:
        ConfigurationError: the fragment has an element the model does not know, or is as large
            as the largest molecule of its data.
    """

    def __init__(
        self, domain: Molecules, fragment: Fragment, new: int | str | Sequence[int] | None = None
    ) -> None:
        self.__dict__.update(vars(domain))
        self.fragment = fragment
        largest = max(map(int, self.statistics()["sizes"]), default=0)
        least, most = (1, largest - len(fragment)) if new is None else _range(new)
        if most < 1:
            raise ConfigurationError(
                f"scaffold '{fragment.source}' has {len(fragment)} atoms, the model's largest "
                f"molecules {largest}: keep fewer atoms, or say how many to add."
            )
        low, high = len(fragment) + least, len(fragment) + most
        self.atoms = low if low == high else f"{low}..{high}"
        self.known_state()

    def known_state(self) -> State:
        """The fragment in model units, field -> [1, k, ...]."""
        numbers = self.fragment.molecule.atomic_numbers.tolist()
        unknown = [SYMBOLS[z] for z in numbers if z not in self.elements]
        if unknown:
            known = ", ".join(SYMBOLS[z] for z in self.elements)
            raise ConfigurationError(
                f"scaffold '{self.fragment.source}': the model does not know {unknown[0]}; it "
                f"makes molecules of {known}."
            )
        columns = np.array([self.elements.index(z) for z in numbers])
        molecule = self.fragment.molecule
        assert molecule.positions is not None
        return self.collate([Record(columns, molecule.positions, molecule.charges)]).state

    def template(self, seed: int, indices: Sequence[int], **request: Any) -> Batch:
        """As :meth:`Molecules.template`, with the sizes of this domain."""
        if request.get("atoms") is None:
            request["atoms"] = self.atoms
        batch = super().template(seed, indices, **request)
        sizes = [batch.state["positions"].shape[1]]
        smallest = min(sizes if batch.mask is None else batch.mask.sum(1).tolist())
        if smallest <= len(self.fragment):
            raise ConfigurationError(
                f"request.atoms={request['atoms']} leaves nothing to add to the "
                f"{len(self.fragment)} atoms of scaffold '{self.fragment.source}': give more."
            )
        return batch

    def keeping(self, solver: Solver, *, jump: int = 1, resamples: int = 4) -> Solver:
        """``solver`` with the fragment kept; see :class:`Keep`."""
        return Keep(solver, self.known_state(), jump, resamples)

    def terms(self, process: Process, scale: float = 1.0) -> list[Term]:
        """What :class:`shared.guidance.Guided` needs for the new atoms to follow the fragment:
        a gradient through the denoiser, which makes a call longer."""
        spreads = {
            "positions": Spread(self.position_std, settled=0.3, least=0.3),
            "types": Spread(self.scale * len(self.elements) ** -0.5, settled=0.5, least=0.1),
            "charges": Spread(self.charge_scale),
        }
        energy = Agreement(process, self.known_state(), spreads)
        return [Term(energy, scale, at="estimate")]


@dataclass(frozen=True, eq=False)
class Keep(Solver):
    """:class:`shared.guidance.RePaint` for a fragment whose atoms come first in every molecule.

    Args:
        solver: passes stretches of the grid, so one without a last step of its own.
        value: the fragment in model units, field -> [1, k, ...].
        jump, resamples: of RePaint; every time is passed ``resamples`` times, so a budget of
            denoiser calls buys so many times fewer steps.
    """

    solver: Solver
    value: State
    jump: int = 1
    resamples: int = 4

    stochastic = True

    @property
    def order(self) -> int:  # type: ignore[override]
        return min(1, self.solver.order)

    def intervals(self, nfe: int) -> int:
        return self.solver.intervals(nfe // self.resamples)

    def calls(self, process: Process, times: Sequence[float]) -> int | None:
        return self._around(self.value).calls(process, times)

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
        """See :meth:`shared.solvers.base.Solver.solve`."""
        return self._around(x).solve(process, denoise, x, times, draw, project, after)

    def _around(self, x: State) -> RePaint:
        return RePaint(self.solver, known_first(self.value, x), self.jump, self.resamples)


@dataclass(frozen=True)
class Spread:
    """Var[x_0 | x_t] of one entry: that of Gaussian data of standard deviation ``std``, times
    s^2 / (s^2 + settled^2), at least ``least``, with s = sigma / alpha. Below the noise
    ``settled`` an atom's surroundings tell where and what it is, so a Gaussian would leave too
    much open and pull too little."""

    std: float
    settled: float = 0.0
    least: float = 1.0

    def __call__(self, alpha: Scale, sigma: Scale) -> Scale:
        noise = torch.as_tensor(sigma / alpha).square()
        share = (noise / (noise + self.settled**2)).clamp(min=self.least)
        return share * noise * self.std**2 / (noise + self.std**2)


@dataclass(frozen=True, eq=False)
class Agreement(Energy):
    """-log p(fragment | x_t), taken as Gaussian around the estimate of x_0 (Pi-GDM; Song et al.
    2023). ``value``: the fragment as in :class:`Keep`; ``spreads``: field -> :class:`Spread`;
    ``std``: deviation allowed to the fragment, model units."""

    process: Process
    value: State
    spreads: Mapping[str, Spread]
    std: float = 0.02

    name = "fragment"

    def __call__(
        self, x: State, t: Time, mask: Tensor | None = None, cond: Condition | None = None
    ) -> Tensor:
        """``x``: estimates of x_0."""
        parts = []
        for field, v in self.value.items():
            known = known_first({field: v}, x)
            energy = Inpainting(self.process, known, self.std, self.spreads[field])
            parts.append(energy(x, t, mask))
        return torch.stack(parts).sum(0)


def known_first(value: State, x: State) -> Known:
    """``value`` (field -> [1, k, ...]) as the first k nodes of states like ``x``."""
    given, keep = {}, {}
    for name, v in value.items():
        nodes = x[name].shape[1]
        given[name] = x[name].new_zeros(1, nodes, *v.shape[2:])
        given[name][:, : v.shape[1]] = v
        keep[name] = (torch.arange(nodes) < v.shape[1])[None]
    return Known(given, keep)


def _range(new: int | str | Sequence[int]) -> tuple[int, int]:
    words = str(new).split("..") if isinstance(new, int | str) else [str(n) for n in new]
    if not all(word.strip().isdigit() for word in words) or not 1 <= len(words) <= 2:
        raise ConfigurationError(f"new atoms '{new}': write a number or a range, as in 3..8.")
    least, most = int(words[0]), int(words[-1])
    if not 1 <= least <= most:
        raise ConfigurationError(f"new atoms '{new}': at least 1, and the smaller number first.")
    return least, most
