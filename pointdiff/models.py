"""Denoisers of point clouds, built for a domain: what the configurations of group ``model``
name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from pointdiff.pdr.network import PARTIAL, Branch, DualPath, Transfer
from pointdiff.transformer import LatentTransformer
from shared.denoisers import Denoiser, Head, TimeCode
from shared.losses import Native, NormalLogSNR, TimeSampler
from shared.predictions import Condition, KarrasPreconditioned
from shared.process import Process, State, version
from shared.schedules import Schedule

if TYPE_CHECKING:
    from pointdiff.domain import Completion


class Network(Protocol):
    """What :class:`CompletionBackbone` makes a backbone of."""

    def condition(self, partial: Tensor) -> Any:
        """Features of partial clouds [batch, m, 4], which do not depend on time."""

    def __call__(self, x: Tensor, features: Any, code: Tensor, label: Tensor | None) -> Tensor:
        """Noisy points [batch, n, 3] -> [batch, n, 3]."""


class CompletionBackbone(nn.Module):
    """A network as a backbone for the condition 'partial' [batch, m, 4] (and 'label').

    Without gradients the features of a partial cloud are computed once and kept for as long as
    the same tensor comes again, that is for all steps of a sampler.
    """

    def __init__(self, network: DualPath | LatentTransformer) -> None:
        super().__init__()
        self.network: Network = network
        self._kept: tuple[Tensor, tuple[int, ...], Any] | None = None

    def forward(
        self,
        inputs: State,
        code: Tensor,
        mask: Tensor | None,
        cond: Condition | None,
    ) -> State:
        if cond is None or "partial" not in cond:
            raise ValueError("the completion model needs the condition 'partial', [batch, m, 4].")
        features = self._features(cond["partial"].to(inputs["x"].dtype), cond["partial"])
        return {"x": self.network(inputs["x"], features, code, cond.get("label"))}

    def _features(self, partial: Tensor, key: Tensor) -> Any:
        if torch.is_grad_enabled():
            self._kept = None
            return self.network.condition(partial)
        # weights that were loaded, averaged or moved since then have another version or place
        places = (p.data_ptr() for p in self.parameters())
        state = (*places, *map(version, (key, *self.parameters())))
        if self._kept is None or self._kept[0] is not key or self._kept[1] != state:
            self._kept = key, state, self.network.condition(partial)
        return self._kept[2]


def pdr(
    domain: Completion,
    schedule: Schedule,
    noisy: Mapping[str, Any] | None = None,
    partial: Mapping[str, Any] | None = None,
    transfer: Mapping[str, Any] | None = None,
    whole: tuple[tuple[int, ...], tuple[int, ...]] = ((4, 128, 256), (512, 1024)),
    time: int = 128,
    head: Head | None = None,
    times: TimeSampler | None = None,
) -> Denoiser:
    """The conditional network of PDR; ``noisy``, ``partial`` (:class:`Branch`) and ``transfer``
    (:class:`Transfer`) change what is published. The time code is that of 1000 steps.

    Raises:
        ValueError: more points in the first level than in the clouds.
    """
    above = Branch(**(noisy or {}))
    below = Branch(**partial) if partial else PARTIAL
    for name, branch, most in (
        ("noisy", above, domain.points),
        ("partial", below, domain.partial_points),
    ):
        if branch.points[0] > most:
            raise ValueError(
                f"model.{name}.points: {branch.points[0]} points of a cloud with {most}."
            )
    classes = len(domain.class_names) + 1 if domain.class_names else 0
    network = DualPath(above, below, Transfer(**(transfer or {})), whole, time, classes)
    code = TimeCode("time", scale=1000.0, shift=-1.0)
    return Denoiser(CompletionBackbone(network), Process.single(schedule), head, code, times)


def latents(
    domain: Completion,
    schedule: Schedule,
    sigma_data: float = 0.5,
    mean: float = 0.4,
    std: float = 1.3,
    **network: Any,
) -> Denoiser:
    """:class:`pointdiff.transformer.LatentTransformer` with EDM's preconditioning.

    Args:
        mean, std: of the log-SNR, log(alpha/sigma), in training, where it stays within the
            schedule's.
        network: arguments of the transformer.
    """
    head = Head(KarrasPreconditioned(sigma_data), Native())
    classes = len(domain.class_names) + 1 if domain.class_names else 0
    made = LatentTransformer(sigma_data=sigma_data, classes=classes, **network)
    backbone = CompletionBackbone(made)
    low, high = (float(schedule.log_snr(t)) for t in (schedule.t_max, schedule.t_min))
    times = NormalLogSNR(mean, std, low, high)
    return Denoiser(backbone, Process.single(schedule), head, TimeCode("log_snr"), times)
