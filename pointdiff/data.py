"""Complete shapes to train on, and the pairs that virtual scans make of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from pointdiff import files
from pointdiff.clouds import Cloud, Frame, resample
from pointdiff.scanning import Scanner
from shared.domains import Invalid
from shared.randomness import stream

AXES = {"x": 0, "y": 1, "z": 2}


class Pair(NamedTuple):
    """A complete cloud [n, 3] and a scan of it [m, 4]: position; 1, or -1 for a mirrored point."""

    complete: np.ndarray
    partial: np.ndarray


@dataclass(frozen=True)
class Augmentation:
    """Random changes that a complete cloud and its scan share (Lyu et al. 2022, Appendix).

    Args:
        scale: largest factor, and one over the smallest. rotation: largest angle about ``up``,
            degrees. mirror: probability of x -> -x. translation: standard deviation.
    """

    scale: float = 1.0
    rotation: float = 0.0
    up: str = "y"
    mirror: float = 0.0
    translation: float = 0.0

    def __post_init__(self) -> None:
        if self.scale < 1 or self.up not in AXES or not 0 <= self.mirror <= 1:
            raise ValueError("augment: needs scale >= 1, up x, y or z, and 0 <= mirror <= 1.")

    def draw(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """A matrix [3, 3] and a shift [3]: x -> x @ matrix + shift."""
        angle = np.radians(generator.uniform(-self.rotation, self.rotation))
        i, j = (k for k in range(3) if k != AXES[self.up])
        matrix = np.eye(3)
        matrix[[i, i, j, j], [i, j, i, j]] = [
            np.cos(angle), np.sin(angle), -np.sin(angle), np.cos(angle),
        ]  # fmt: skip
        matrix *= self.scale ** generator.uniform(-1, 1)
        if generator.random() < self.mirror:
            matrix[0] *= -1
        return matrix, self.translation * generator.standard_normal(3)


class Shapes:
    """Complete clouds in memory, each centred with largest radius 1.

    ``points`` [shapes] arrays [n, 3] times ``scale``; ``split`` [shapes]: 0 train, 1 test;
    ``groups`` [shapes]: copies of a shape share one.
    """

    def __init__(
        self,
        points: Sequence[np.ndarray] | np.ndarray,
        scale: float = 1.0,
        split: np.ndarray | None = None,
        groups: np.ndarray | None = None,
    ) -> None:
        n = len(points)
        self.points, self.scale = points, scale
        self.split = np.zeros(n, np.int8) if split is None else split
        self.groups = np.arange(n) if groups is None else groups
        if not len(self.split) == len(self.groups) == n:
            raise ValueError(f"shapes: {n} clouds, but other numbers of splits or groups.")

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> Cloud:
        return np.asarray(self.points[index] * np.float32(self.scale), np.float32)

    def rows(self, part: str, validation: float) -> np.ndarray:
        """Indices of the part 'train', 'valid' (``validation`` of the groups of the training
        split, drawn once for all) or 'test'."""
        if part == "test":
            return np.flatnonzero(self.split == 1)
        training = np.flatnonzero(self.split == 0)
        names = np.unique(self.groups[training])
        order = stream(0, 0, "shapes/split", 0).permutation(len(names))
        held = names[order < validation * len(names)]
        inside = np.isin(self.groups[training], held)
        return training[inside if part == "valid" else ~inside]


def load_shapes(path: str | Path) -> Shapes:
    """Shapes of an .npz file with ``points`` [shapes, n, 3] (times ``scale``), and optionally
    ``split`` and ``duplicate_group``, which are taken as they are; or of any file or folder that
    :func:`pointdiff.files.read` reads, brought to centre 0 and radius 1.

    Raises:
        FileNotFoundError, ValueError: nothing there, or no shape that can be used.
    """
    path = Path(path)
    if path.suffix == ".npz" and path.is_file():
        with np.load(path, allow_pickle=False) as arrays:
            points = arrays.get("points")
            if points is not None and points.ndim == 3 and points.shape[2] == 3:
                scale = float(arrays.get("scale", np.float32(1)))
                split, groups = arrays.get("split"), arrays.get("duplicate_group")
                return Shapes(points, scale, split, groups)
    clouds, reasons = [], []
    for cloud in files.read(path):
        if isinstance(cloud, Invalid):
            reasons.append(cloud.reason)
        else:
            clouds.append(Frame.of(cloud).enter(cloud))
    if not clouds:
        raise ValueError(f"{path}: no usable shape; the first: {reasons[0]}")
    return Shapes(clouds)


class Pairs(Dataset[Pair]):
    """Training pairs: every reading of a shape makes a new scan, drawn from torch's generator;
    without ``fresh`` the scan of a record is always the same."""

    def __init__(
        self,
        shapes: Shapes,
        rows: np.ndarray,
        points: int,
        scanner: Scanner,
        mirror: str | None = None,
        augment: Augmentation | None = None,
        fresh: bool = True,
    ) -> None:
        self.shapes, self.rows, self.points = shapes, rows, points
        self.scanner, self.mirror, self.augment, self.fresh = scanner, mirror, augment, fresh

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Pair:
        seed = int(torch.randint(2**62, ())) if self.fresh else 0
        number = 0 if self.fresh else index
        cloud = self.shapes[int(self.rows[index])]
        generator = stream(seed, number, "pair", 0)
        partial = self.scanner(cloud, seed, number)
        complete = resample(cloud, self.points, generator)
        if self.augment is not None:
            matrix, shift = (a.astype(np.float32) for a in self.augment.draw(generator))
            complete, partial = complete @ matrix + shift, partial @ matrix + shift
        return Pair(complete, with_flags(partial, self.mirror, generator))


def with_flags(partial: Cloud, mirror: str | None, generator: np.random.Generator) -> np.ndarray:
    """A scan [m, 3] as input of the network, float32 [m, 4] with ones; or, given the axis across
    which to ``mirror``, [m + m // 2, 4]: a random half of the mirror images follows, with -1."""
    real = np.concatenate([partial, np.ones((len(partial), 1))], 1).astype(np.float32)
    if mirror is None:
        return real
    image = resample(real, len(real) // 2, generator).copy()
    image[:, [AXES[mirror], 3]] *= -1
    return np.concatenate([real, image])
