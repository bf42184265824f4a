"""Completing scans with a trained model, from Python and from the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pointdiff.clouds import Cloud, Frame, check
from pointdiff.domain import Completion
from shared import models
from shared.domains import Invalid
from shared.models import Model

FRAMES = ("own", "given")


@dataclass(frozen=True)
class Completer:
    """A trained completion model."""

    model: Model[Cloud]

    def complete(
        self,
        scan: Any,
        samples: int = 1,
        *,
        points: int | None = None,
        frame: str = "own",
        steps: int = 20,
        seed: int | None = None,
        **settings: Any,
    ) -> list[Cloud]:
        """Complete clouds, float32 [points, 3], in the coordinates of ``scan`` [n, 3].

        Args:
            samples: how many different completions.
            points: of each; by default those of training, where the model is best.
            frame: 'own': the scan is brought to centre 0 and radius 1 first; 'given': its
                coordinates are already those of the data, centre 0 and radius 1 of the whole.
            steps: denoiser calls. seed: None draws one. settings: of ``Model.generate``.

        Raises:
            ValueError: a scan that cannot be used (see :func:`pointdiff.clouds.check`), or an
                unknown setting.
            FloatingPointError: a completion diverged.
        """
        if frame not in FRAMES:
            raise ValueError(f"frame={frame!r}: choose {' or '.join(FRAMES)}.")
        cloud = check(scan, "scan")
        place = Frame.of(cloud) if frame == "own" else Frame()
        size = {} if points is None else {"points": points}
        items = self.model.sample(
            samples, steps=steps, seed=seed, scan=place.enter(cloud), **size, **settings
        )
        for item in items:
            if isinstance(item, Invalid):
                raise FloatingPointError(f"a completion failed: {item.reason}; try more steps.")
        return [place.leave(np.asarray(item)) for item in items]


def load(run: str | Path, checkpoint: str | None = None) -> Completer:
    """A completion model by its run folder or pretrained name; see :func:`shared.models.load`.

    Raises:
        FileNotFoundError: no such run. ValueError: a model of something else.
    """
    model = models.load(run, checkpoint)
    if not isinstance(model.domain, Completion):
        raise ValueError(f"{run} is a model of {model.domain.name}, not of completion.")
    return Completer(model)
