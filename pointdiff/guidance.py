"""Guided completion: the observed points as an energy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pointdiff.ops import knn, take
from shared.guidance import Energy, Guided, Term
from shared.predictions import Condition, Denoise
from shared.process import Process, State


@dataclass(frozen=True, eq=False)
class ScanConsistency(Energy):
    """One-sided Chamfer distance from the scan to the cloud, as the likelihood of the scan:
    sum_j |p_j - x_i(j)|^2 / (2 c_i (s^2 + sigma^2)), x_i(j) the nearest point to p_j and c_i the
    number of scan points that it serves, so that a full step moves each point to the mean of its
    scan points and never beyond. sigma is that of the process at the time: an estimate of x_0 is
    not more certain than that.

    Args:
        deviation: s, the noise of the scan in its radii.
    """

    process: Process
    deviation: float = 0.02
    name: str = "scan consistency"

    def __call__(
        self,
        x: State,
        t: float | Tensor,
        mask: Tensor | None = None,
        cond: Condition | None = None,
    ) -> Tensor:
        if cond is None or "partial" not in cond:
            raise ValueError("scan consistency needs the condition 'partial', [batch, m, 4].")
        cloud, partial = x["x"], cond["partial"].to(x["x"])
        scan, real = partial[..., :3], (partial[..., 3] > 0).to(cloud)
        index = knn(scan, cloud.detach())[1][..., 0]
        served = torch.zeros(cloud.shape[:2]).to(cloud).scatter_add_(1, index, real)
        weight = real / served.gather(1, index).clamp(min=1.0)
        gap = (take(cloud, index) - scan).square().sum(-1)
        time = torch.as_tensor(t, dtype=torch.float64)
        sigma = self.process.lead.sigma(time) / self.process.lead.alpha(time)
        variance = (sigma**2 + self.deviation**2).to(cloud)
        return (weight * gap).sum(1) / (2 * variance)


def consistent(
    denoise: Denoise,
    process: Process,
    domain: Any = None,
    null: Mapping[str, Tensor] | None = None,
    scale: float = 1.0,
    deviation: float = 0.02,
) -> Guided:
    """The denoiser drawn to the scan; ``scale`` 1 is the likelihood, more overshoots."""
    return Guided(
        denoise, process, [Term(ScanConsistency(process, deviation), scale, at="frozen")]
    )
