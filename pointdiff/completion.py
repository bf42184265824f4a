"""Completing scans with a trained model, from Python and from the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pointdiff import refinement
from pointdiff.clouds import Cloud, Frame, check, natural, placed, resample
from pointdiff.domain import Completion
from pointdiff.merging import kept
from shared import models
from shared.domains import Invalid
from shared.models import Model
from shared.randomness import stream

FRAMES = ("auto", "own", "given")
REACH = 1.1
"""How far a scan may reach in the given frame, where the whole reaches 1: noise."""


@dataclass(frozen=True)
class Completer:
    """A trained completion model, and a trained refinement network for its completions."""

    model: Model[Cloud]
    refiner: Model[Cloud] | None = None

    def complete(
        self,
        scan: Any,
        samples: int = 1,
        *,
        points: int | None = None,
        frame: str = "auto",
        keep: bool = True,
        steps: int = 20,
        seed: int | None = None,
        **settings: Any,
    ) -> list[Cloud]:
        """Complete clouds, float32 [points, 3], in the coordinates of ``scan`` [n, 3].

        Args:
            samples: how many different completions; the first is a typical one, the others are
                drawn freely (see ``even`` of :meth:`pointdiff.domain.Completion.template`).
            points: of each. With a refiner the model makes a part of them, from which the refiner
                makes them all; without one the model makes all of them itself.
            frame: 'own': where the scan lies says nothing about what it does not show; 'given':
                its coordinates are those of a complete cloud with centre 0 and largest radius 1,
                as in the published benchmarks (the clouds of MVP, PCN and Completion3D, times 2),
                which tells how far the rest reaches; 'auto': as
                :func:`pointdiff.clouds.placed` finds. Models of the scan's own frame do not
                depend on it.
            keep: points of the scan in place of those that were generated on what it shows.
            steps: denoiser calls. seed: None draws one. settings: of ``Model.generate``.

        Raises:
            ValueError: a scan that cannot be used (see :func:`pointdiff.clouds.check`), or an
                unknown setting.
            FloatingPointError: a completion diverged.
        """
        samples = natural("samples", samples)
        cloud = check(scan, "scan")
        given, knows = self.frame(cloud, frame) == "given", self._domain.frame
        place = Frame.of(cloud) if knows == "data" and not given else Frame()
        if knows == "both":
            settings["frame"] = "data" if given else "scan"
        factor = 1 if self.refiner is None else refinement.factor(self.refiner)
        size = {} if points is None else {"points": -(-natural("points", points) // factor)}
        settings["keep"] = keep and self.refiner is None  # else after refining
        items = self.model.sample(
            samples, steps=steps, seed=seed, scan=place.enter(cloud), **size, **settings
        )
        for item in items:
            if isinstance(item, Invalid):
                raise FloatingPointError(f"a completion failed: {item.reason}; try more steps.")
        clouds = [place.leave(np.asarray(item)) for item in items]
        if self.refiner is None:
            return clouds
        refined = [refinement.refine(self.refiner, c, cloud)[:points] for c in clouds]
        return self._kept(refined, cloud) if keep else refined

    def _kept(self, clouds: list[Cloud], scan: Cloud) -> list[Cloud]:
        """With points of the scan, of which no more are looked at than without a refiner."""
        most = max(len(clouds[0]), self._domain.partial_points)
        if len(scan) > most:
            scan = resample(scan, most, stream(0, 0, "completion", 0))
        return [kept(cloud, scan) for cloud in clouds]

    def frame(self, scan: Cloud, frame: str = "auto") -> str:
        """'own' or 'given': the ``frame`` in which ``scan`` is completed.

        Raises:
            ValueError: an unknown one, or 'given' for a scan that is too large for it.
        """
        if frame not in FRAMES:
            raise ValueError(f"frame={frame!r}: choose {', '.join(FRAMES)}.")
        if self._domain.frame == "scan":
            return "own"
        reach = float(np.linalg.norm(scan, axis=1).max())
        if frame == "given" and reach > REACH:
            raise ValueError(
                f"frame=given: the scan reaches {reach:.4g} from the origin, where a complete "
                "cloud reaches 1; scale it, or give frame=own."
            )
        found = "given" if placed(scan) else "own"
        return found if frame == "auto" else frame

    @property
    def _domain(self) -> Completion:
        assert isinstance(self.model.domain, Completion)
        return self.model.domain


def load(
    run: str | Path = "shapes",
    checkpoint: str | None = None,
    refine: str | Path | None = None,
) -> Completer:
    """A completion model by its run folder or pretrained name (see :func:`shared.models.load`),
    and the refinement network ``refine`` likewise.

    Raises:
        FileNotFoundError: no such run. ValueError: a model of something else.
    """
    model = models.load(run, checkpoint)
    if model.domain.name != Completion.name:
        raise ValueError(f"{run} is a model of {model.domain.name}, not of completion.")
    return Completer(model, None if refine is None else refinement.load(refine))
