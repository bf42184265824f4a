"""Elements that a closed shell allows.

The electrons of a neutral molecule without radicals pair up, so its atomic numbers add up to an
even number. A classifier of elements decides atom by atom and cannot count: often it makes one
electron too many or too few, and then some atom misses a bond whatever the geometry. Given the
probabilities of independent atoms, those under the condition of an even sum have a closed form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shared.denoisers import Denoiser
from shared.predictions import Condition, Prediction
from shared.process import State

IMPOSSIBLE = 1e-5
"""Below this probability of an even sum, in twos, the probabilities stay as they are."""


def given_even(p: Tensor, odd: Tensor, mask: Tensor | None = None) -> Tensor:
    """Class probabilities [b, n, k] of independent rows, given that the number of rows in odd
    classes is even.

    With m_i = P(row i even) - P(row i odd) that number is even with probability
    (1 + prod_i m_i) / 2, and Bayes' rule gives p_i(c) (1 +- prod_{j != i} m_j) / (1 + prod_j m_j),
    minus for odd classes. Differentiable.

    Args:
        odd: [k], true for odd classes. mask: [b, n], false for padding.
    """
    sign = 1.0 - 2.0 * odd.to(p)
    margin = (p * sign).sum(-1)
    if mask is not None:
        margin = torch.where(mask.bool(), margin, 1.0)
    one = torch.ones_like(margin[:, :1])
    before = torch.cat([one, margin[:, :-1]], 1).cumprod(1)
    after = torch.cat([one, margin.flip(1)[:, :-1]], 1).cumprod(1).flip(1)
    twice = (1.0 + margin.prod(1))[:, None, None]
    found = p * (1.0 + (before * after)[..., None] * sign) / twice.clamp(min=IMPOSSIBLE)
    return torch.where(twice > IMPOSSIBLE, found, p)


class ClosedShell(Denoiser):
    """A denoiser whose elements 'types', which it classifies, have an even sum of atomic numbers.

    Only predictions change; training does not.

    Args:
        atomic_numbers: of the classes. others: as of :class:`shared.denoisers.Denoiser`.

    Raises:
        ValueError: a head that does not classify.
    """

    odd: Tensor

    def __init__(self, *others: Any, atomic_numbers: Sequence[int], **named: Any) -> None:
        super().__init__(*others, **named)
        scale = self.heads["types"].categories
        if scale is None:
            raise ValueError("ClosedShell: the head of 'types' gives no probabilities.")
        self.scale = scale
        odd = torch.tensor([z % 2 == 1 for z in atomic_numbers])
        self.register_buffer("odd", odd, persistent=False)

    def forward(
        self,
        x: State,
        t: float | Tensor,
        mask: Tensor | None = None,
        cond: Condition | None = None,
    ) -> dict[str, Prediction]:
        """See :class:`shared.denoisers.Denoiser`."""
        found = super().forward(x, t, mask, cond)
        p = found["types"]
        x0 = self.scale * given_even(p.x0 / self.scale, self.odd, mask)
        return {**found, "types": Prediction(p.x, p.alpha, p.sigma, x0=x0, var=p.var)}
