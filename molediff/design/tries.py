"""Which of several tries at one molecule stays: a valid one, then that of the least energy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from molediff.design.judging import verdict
from molediff.geometric.domain import Molecules
from molediff.molecules import Molecule
from molediff.scorers import mask_of
from shared.guidance import Term
from shared.guidance.steering import Reward
from shared.predictions import Condition
from shared.process import State

INVALID = -1e9
"""The fitness of what is no valid molecule, below that of every energy and score."""


def fittest(
    domain: Molecules, terms: Sequence[Term], time: float, cond: Condition | None = None
) -> Reward:
    """Minus the weighted energies of finished states, far less for what is no valid molecule
    (:func:`molediff.design.judging.verdict`) or has no energy: the reward of ``Steered.best_of``.

    Args:
        terms: energies and their weights; an energy of all samples is read at ``time``, the end
            of the noise. cond: what the energies are told of each sample of the batch.
    """

    def reward(state: State) -> Tensor:
        mask = mask_of(state)
        items = domain.decode({k: v.detach().cpu() for k, v in state.items()}, mask)
        valid = [isinstance(item, Molecule) and verdict(item)[0] for item in items]
        fit = torch.where(torch.tensor(valid), 0.0, INVALID).to(torch.float64)
        device = next(iter(state.values())).device
        inside = None if mask is None else mask.to(device)
        for term in terms:
            fit -= term.scale * term.energy(state, time, inside, cond).cpu().to(torch.float64)
        return torch.where(fit.isfinite(), fit, 2 * INVALID)

    return reward
