"""Point clouds: plain arrays [n, 3], what makes one usable, and the frame a model sees it in."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np

Cloud = np.ndarray
"""Floating-point coordinates [n, 3]."""

LEAST, MOST = 16, 500_000
"""Numbers of points that are taken, unless a caller says otherwise."""
FARTHEST = 1e9
"""Largest coordinate: squares of it are still sums of float32 numbers."""
COARSEST = 1e-3
"""Largest rounding error of a coordinate in float32, as a share of the cloud's size."""


def check(
    points: Any,
    what: str = "cloud",
    *,
    least: int = LEAST,
    most: int = MOST,
    duplicates: str = "keep",
) -> Cloud:
    """``points`` as a float32 array [n, 3], after making sure that it is a usable cloud.

    Args:
        what: how errors call it.
        least, most: numbers of points that are accepted; ``least`` counts distinct ones.
        duplicates: 'keep' them, 'drop' all but the first, or 'refuse' the cloud.

    Raises:
        ValueError: another shape or type, no points, too few or too many, coordinates that are
            not finite or absurdly large (also against the size of the cloud: float32 would lose
            them), all points equal, or duplicates that are refused.
    """
    array = np.asarray(points)
    if array.ndim != 2 or array.shape[1] != 3 or array.dtype.kind not in "fiu":
        raise ValueError(
            f"{what}: needs numbers of shape [points, 3], not {array.dtype} of {array.shape}."
        )
    n = len(array)
    if n == 0:
        raise ValueError(f"{what}: no points.")
    if n > most:
        raise ValueError(f"{what}: {n:,} points, at most {most:,} are taken; thin it out first.")
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).any(1).sum())
        raise ValueError(f"{what}: {bad} of {n} points have coordinates that are not finite.")
    if np.abs(array).max() > FARTHEST:
        raise ValueError(f"{what}: coordinates beyond {FARTHEST:g}; rescale the cloud.")
    cloud = array.astype(np.float32)
    if n > 1 and (array == array[0]).all():
        raise ValueError(f"{what}: all {n} points are equal.")
    lost, size = np.abs(cloud - array).max(), np.ptp(array, axis=0).max()
    if n > 1 and lost > COARSEST * size:
        raise ValueError(
            f"{what}: coordinates up to {np.abs(array).max():g} in a cloud of size {size:g} are "
            "lost to rounding; move it to the origin first."
        )
    if duplicates not in ("keep", "drop", "refuse"):
        raise ValueError(f"duplicates={duplicates!r}: choose keep, drop or refuse.")
    first = np.sort(np.unique(cloud, axis=0, return_index=True)[1])
    if len(first) < least:
        distinct = "" if len(first) == n else f" ({len(first)} distinct)"
        raise ValueError(f"{what}: {n} points{distinct}, at least {least} are needed.")
    if duplicates == "refuse" and len(first) < n:
        raise ValueError(f"{what}: {n - len(first)} of {n} points are duplicates.")
    return cloud[first] if duplicates == "drop" else cloud


@dataclass(frozen=True)
class Frame:
    """A centre [3] and a positive scale: model coordinates are (x - centre) / scale."""

    centre: tuple[float, float, float] = (0.0, 0.0, 0.0)
    scale: float = 1.0

    @classmethod
    def of(cls, points: Cloud) -> Frame:
        """Centre of the bounding box, and the largest distance from it."""
        points = np.asarray(points, np.float64)
        centre = (points.min(0) + points.max(0)) / 2
        scale = float(np.linalg.norm(points - centre, axis=1).max()) or 1.0
        return cls((float(centre[0]), float(centre[1]), float(centre[2])), scale)

    def enter(self, points: Cloud) -> Cloud:
        """World -> model, float32."""
        moved = (np.asarray(points, np.float64) - np.array(self.centre)) / self.scale
        return np.asarray(moved, np.float32)

    def leave(self, points: Cloud) -> Cloud:
        """Model -> world, float32."""
        moved = np.asarray(points, np.float64) * self.scale + np.array(self.centre)
        return np.asarray(moved, np.float32)


def natural(name: str, value: Any) -> int:
    """``value`` as a number of things.

    Raises:
        ValueError: it is none; names the key.
    """
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not (whole and 1 <= int(value) <= MOST):
        raise ValueError(f"{name}={value!r}: give a whole number from 1 to {MOST:,}.")
    return int(value)


def placed(scan: Cloud) -> bool:
    """Whether a scan seems to be in the frame of its complete cloud already, centre 0 and largest
    radius 1: its farthest point lies there, and it was not itself centred, by its mean or its
    bounding box. A scan that does not show the farthest point of the whole is not recognised."""
    if not 0.97 <= np.linalg.norm(scan, axis=1).max() <= 1.005:
        return False
    own = scan.mean(0), Frame.of(scan).centre
    return all(float(np.linalg.norm(centre)) > 1e-3 for centre in own)


def resample(points: Cloud, n: int, generator: np.random.Generator) -> Cloud:
    """Exactly ``n`` points in random order: a choice without repetition, or all of them and a
    choice of repetitions where there are fewer."""
    if len(points) >= n:
        return points[generator.choice(len(points), n, replace=False)]
    more = generator.choice(len(points), n - len(points), replace=True)
    return np.concatenate([points, points[more]])[generator.permutation(n)]
