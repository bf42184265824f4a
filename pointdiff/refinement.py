"""Training the refinement network of PDR, and using it (Lyu et al. 2022, Section 3.3).

Completions of the training scans are drawn once with a trained model,
``pointdiff sample run=RUN data=FILE request.split=train request.keep=false n=4000 out=coarse``;
then ``pointdiff train experiment=completion_refine domain.data=FILE domain.coarse=coarse`` learns
to move their points and to put more points around them, and ``pointdiff complete scan.ply
refine=RUN`` uses it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pointdiff.clouds import Cloud
from pointdiff.data import Pair, Pairs
from pointdiff.domain import Completion
from pointdiff.metrics import chamfer
from pointdiff.pdr.network import PARTIAL, Branch, DualPath, Transfer
from pointdiff.pdr.refine import Refiner
from shared import models
from shared.denoisers import Denoiser
from shared.domains import Batch
from shared.predictions import Condition
from shared.process import Process, State
from shared.sample_folders import read_manifest
from shared.schedules import Schedule


class Refinements(Dataset[tuple[Pair, Cloud]]):
    """Pairs with coarse completions of their scans, all in the frame of the pair."""

    def __init__(self, domain: Refining, rows: np.ndarray) -> None:
        self.domain, self.rows = domain, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Pair, Cloud]:
        row = int(self.rows[index])
        pair = self.domain.training_pair(int(self.domain.numbers[row]))
        return pair, pair.frame.enter(self.domain.clouds[row])


class Refining(Completion):
    """Coarse completions to be refined.

    Args:
        coarse: sample folder made with ``request.split=train request.keep=false`` from the same
            data.
        factor: refined points per coarse one; they are compared with at most 4096 of the truth.
        others: of :class:`pointdiff.domain.Completion`; ``points`` are those of a coarse cloud.
    """

    name: ClassVar[str] = "refinement"

    def __init__(self, coarse: str | None = None, factor: int = 1, **others: Any) -> None:
        super().__init__(**others)
        self.coarse, self.factor = coarse, factor

    @cached_property
    def _samples(self) -> tuple[np.ndarray, np.ndarray]:
        if self.coarse is None:
            raise ValueError("domain.coarse is not set: give a sample folder.")
        folder = Path(self.coarse)
        file = folder / "settings.json"
        asked = json.loads(file.read_text(encoding="utf-8"))["request"] if file.exists() else {}
        if asked.get("split") != "train":
            raise ValueError(f"domain.coarse={folder}: no samples with request.split=train.")
        if asked.get("keep", True):
            raise ValueError(
                f"domain.coarse={folder}: points of the scans are in them already; draw samples "
                "with request.keep=false."
            )
        numbers = [r.index for r in read_manifest(folder) if r.status == "ok"]
        clouds = list(self.read(folder / f"samples{self.suffix}"))
        return np.array(numbers), np.stack([np.asarray(cloud) for cloud in clouds])

    @property
    def numbers(self) -> np.ndarray:
        """The number of the training pair that each coarse completion belongs to."""
        return self._samples[0]

    @property
    def clouds(self) -> np.ndarray:
        """Coarse completions [samples, n, 3]."""
        return self._samples[1]

    def datasets(self) -> tuple[Dataset[Any], Dataset[Any]]:
        """The last part of the coarse completions, the ``validation`` share, is held back."""
        cut = max(1, round(len(self.numbers) * (1 - self.validation)))
        every = np.arange(len(self.numbers))
        return Refinements(self, every[:cut]), Refinements(self, every[min(cut, len(every) - 1) :])

    def _pairs(self, part: str, fresh: bool, frame: str | None = None) -> Pairs:
        pairs = super()._pairs(part, fresh, frame)
        pairs.points = min(self.points * self.factor, 4096)
        return pairs

    def collate(self, records: Sequence[Any]) -> Batch:
        batch = super().collate([pair for pair, _ in records])
        coarse = torch.from_numpy(np.stack([coarse for _, coarse in records]))
        return Batch(batch.state, cond={**batch.cond, "coarse": coarse})


class Refinement(Denoiser):
    """A :class:`Refiner` as something to train: its loss is the Chamfer distance CD_P between the
    refined cloud and the truth; noise and times play no part."""

    def __init__(self, refiner: Refiner, schedule: Schedule) -> None:
        super().__init__(refiner, Process.single(schedule))

    def losses(
        self,
        x0: State,
        noise: State,
        t: Tensor,
        mask: Tensor | None = None,
        cond: Condition | None = None,
    ) -> dict[str, Tensor]:
        assert cond is not None
        refined = self.backbone(cond["coarse"], cond["partial"])
        return {"x": chamfer(refined, x0["x"], "l1_half")}


def refiner(
    domain: Refining,
    schedule: Schedule,
    noisy: Mapping[str, Any] | None = None,
    partial: Mapping[str, Any] | None = None,
    transfer: Mapping[str, Any] | None = None,
    whole: tuple[tuple[int, ...], tuple[int, ...]] = ((4, 128, 256), (512, 1024)),
    scale: float = 1e-3,
) -> Refinement:
    """The refinement network for ``domain.factor``; arguments as of :func:`pointdiff.models.pdr`,
    ``scale``: of the moves."""
    below = Branch(**partial) if partial else PARTIAL
    out = 3 if domain.factor == 1 else 3 * (domain.factor + 1)
    network = DualPath(
        Branch(**(noisy or {})), below, Transfer(**(transfer or {})), whole, time=0, out=out
    )
    return Refinement(Refiner(network, domain.factor, scale), schedule)


def load(run: str | Path, checkpoint: str | None = None) -> models.Model[Cloud]:
    """A trained refinement network by its run folder or name.

    Raises:
        FileNotFoundError: no such run. ValueError: a model of something else.
    """
    model = models.load(run, checkpoint)
    if not isinstance(model.domain, Refining):
        raise ValueError(f"{run} is a model of {model.domain.name}, not of refinement.")
    return model


def factor(model: models.Model[Cloud]) -> int:
    """How many points it makes of one."""
    assert isinstance(model.domain, Refining)
    return model.domain.factor


@torch.no_grad()
def refine(model: models.Model[Cloud], cloud: Cloud, scan: Cloud, seed: int = 0) -> Cloud:
    """A completion [n, 3] of ``scan`` [m, 3], refined to [factor n, 3]."""
    domain, device = model.domain, next(model.denoiser.parameters()).device
    assert isinstance(domain, Refining)
    pair = domain.enter(scan, seed, 0)
    coarse, partial = (
        torch.from_numpy(x)[None].to(device) for x in (pair.frame.enter(cloud), pair.partial)
    )
    return pair.frame.leave(model.denoiser.backbone(coarse, partial)[0].cpu().numpy())
