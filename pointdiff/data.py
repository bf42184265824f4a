"""Complete shapes to train on, and the pairs that virtual scans make of them."""

from __future__ import annotations

import io
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.spatial.transform import Rotation
from torch.utils.data import Dataset

from pointdiff import files, published
from pointdiff.clouds import Cloud, Frame, resample
from pointdiff.published import Recorded
from pointdiff.scanning import Scanner
from shared.checkpoints import write_atomically
from shared.domains import Invalid
from shared.randomness import stream

AXES = {"x": 0, "y": 1, "z": 2}


class Pair(NamedTuple):
    """A complete cloud [n, 3], a scan of it [m, 4] (position; 1, or -1 for a mirrored point),
    the frame that both are in, and the class (-1: not known)."""

    complete: np.ndarray
    partial: np.ndarray
    frame: Frame = Frame()
    label: int = -1


@dataclass(frozen=True)
class Augmentation:
    """Random changes that a complete cloud and its scan share (Lyu et al. 2022, Appendix).

    Args:
        scale: largest factor, and one over the smallest. stretch: the same, for each axis.
        rotation: largest angle about ``up``, degrees. turned: probability of a rotation to any
            orientation instead.
        mirror: probability of x -> -x. translation: standard deviation.
    """

    scale: float = 1.0
    rotation: float = 0.0
    up: str = "y"
    mirror: float = 0.0
    translation: float = 0.0
    stretch: float = 1.0
    turned: float = 0.0

    def __post_init__(self) -> None:
        if min(self.scale, self.stretch) < 1 or self.up not in AXES:
            raise ValueError("augment: needs scale >= 1, stretch >= 1, and up x, y or z.")
        if not (0 <= self.mirror <= 1 and 0 <= self.turned <= 1):
            raise ValueError("augment: mirror and turned are probabilities.")

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
        if self.turned and generator.random() < self.turned:
            matrix = matrix @ Rotation.random(random_state=generator).as_matrix()
        if self.stretch > 1:
            matrix = matrix * self.stretch ** generator.uniform(-1, 1, 3)
        return matrix, self.translation * generator.standard_normal(3)


class Shapes:
    """Complete clouds in memory, each centred with largest radius 1.

    ``points`` [shapes] arrays [n, 3] times ``scale``; ``split`` [shapes]: 0 train, 1 test;
    ``groups`` [shapes]: copies of a shape share one; ``visible``: None, or for each shape what
    cameras see of it (:meth:`pointdiff.scanning.Scanner.visible`). ``labels`` [shapes] are
    numbers of classes with ``names``.
    """

    def __init__(
        self,
        points: Sequence[np.ndarray] | np.ndarray,
        scale: float = 1.0,
        split: np.ndarray | None = None,
        groups: np.ndarray | None = None,
        visible: Sequence[np.ndarray] | None = None,
        labels: np.ndarray | None = None,
        names: Sequence[str] = (),
    ) -> None:
        n = len(points)
        self.visible, self.names = visible, [str(name) for name in names]
        self.labels = np.full(n, -1) if labels is None else labels
        self.points, self.scale = points, scale
        self.split = np.zeros(n, np.int8) if split is None else split
        self.groups = np.arange(n) if groups is None else groups
        if not len(self.split) == len(self.groups) == n:
            raise ValueError(f"shapes: {n} clouds, but other numbers of splits or groups.")

    def take_views(self, path: str | Path, scanner: Scanner) -> None:
        """Take what cameras see from the file that :func:`save_views` made of the same shapes.

        Raises:
            ValueError: views of other shapes, or of another scanner.
        """
        with files.load_arrays(path) as arrays:
            if not {"visible", "start", "scanner"} <= set(arrays):
                raise ValueError(f"domain.views={path}: made by something else than views.")
            rows, start = arrays["visible"], arrays["start"]
            made, wanted = str(arrays["scanner"]), _viewpoint(scanner)
            own = self.fingerprint()
            same = np.array_equal(arrays.get("shapes", own), own)
        widths = [-(-len(cloud) // 8) for cloud in self.points]
        fits = rows.dtype == np.uint8 and rows.shape == (scanner.views, sum(widths))
        if made != wanted or not (same and fits and np.array_equal(np.diff(start), widths)):
            raise ValueError(
                f"domain.views={path}: made of other shapes or by another scanner ({made}, not "
                f"{wanted})."
            )
        self.visible = [rows[:, a:b] for a, b in zip(start, start[1:], strict=False)]

    def fingerprint(self) -> np.ndarray:
        """A checksum of the first points of every shape, uint32 [shapes]."""
        heads = (np.ascontiguousarray(cloud[:64], "<f4").tobytes() for cloud in self.points)
        return np.array([zlib.crc32(head) for head in heads], np.uint32)

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
    ``split``, ``duplicate_group``, ``label`` and ``label_names``, which are taken as they are; or
    of any file or folder that :func:`pointdiff.files.read` reads, or ShapeNet-55, brought to
    centre 0 and radius 1.

    Raises:
        FileNotFoundError, ValueError: nothing there, or no shape that can be used.
    """
    path = Path(path)
    if path.suffix == ".npz" and path.is_file():
        with files.load_arrays(path) as arrays:
            points = arrays.get("points")
            if points is not None and points.ndim == 3 and points.shape[2] == 3:
                broken = np.flatnonzero([not np.isfinite(cloud).all() for cloud in points])
                if len(broken) or not points.size:
                    reason = f"shape {broken[0]} is not finite" if len(broken) else "no shapes"
                    raise ValueError(f"{path}: {reason}.")
                scale = float(arrays.get("scale", np.float32(1)))
                split, groups = arrays.get("split"), arrays.get("duplicate_group")
                labels, names = arrays.get("label"), arrays.get("label_names", ())
                return Shapes(points, scale, split, groups, labels=labels, names=names)
    listed = published.shapenet55(path)
    if listed is not None:
        clouds = [files.read_one(file) for file in listed[0]]
        return Shapes([Frame.of(cloud).enter(cloud) for cloud in clouds], split=listed[1])
    clouds, reasons = [], []
    for cloud in files.read(path):
        if isinstance(cloud, Invalid):
            reasons.append(cloud.reason)
        else:
            clouds.append(Frame.of(cloud).enter(cloud))
    if not clouds:
        raise ValueError(f"{path}: no usable shape; the first: {reasons[0]}")
    if reasons:
        count = f"{len(reasons)} of {len(reasons) + len(clouds)}"
        warnings.warn(f"{path}: {count} left out; the first: {reasons[0]}", stacklevel=2)
    return Shapes(clouds)


def save_views(
    path: str | Path,
    shapes: Shapes,
    scanner: Scanner,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Find once what the cameras of ``scanner`` see of every shape, for ``domain.views``."""
    rows = []
    for i in range(len(shapes)):
        rows.append(scanner.visible(shapes[i]))
        if progress is not None:
            progress(i + 1, len(shapes))
    start = np.cumsum([0, *(row.shape[1] for row in rows)])
    content = io.BytesIO()
    np.savez_compressed(
        content,
        visible=np.concatenate(rows, 1),
        start=start,
        scanner=_viewpoint(scanner),
        shapes=shapes.fingerprint(),
    )
    write_atomically(Path(path), content.getvalue())


def _viewpoint(scanner: Scanner) -> str:
    return f"{scanner.method}, {scanner.views} views, distance {scanner.distance:g}"


class Pairs(Dataset[Pair]):
    """Training pairs: every reading of a shape makes a new scan, drawn from torch's generator;
    without ``fresh`` the scan of a record is always the same. ``frame``: 'scan': both clouds are
    in the frame of the scan; 'data': in that of the shape, from which ``augment`` leads away;
    'both': in either, that of the shape found again after ``augment``. ``drop``: share of the
    pairs whose scan is all zeros, flags included, which stands for none."""

    def __init__(
        self,
        shapes: Shapes,
        rows: np.ndarray,
        points: int,
        scanner: Scanner,
        mirror: str | None = None,
        augment: Augmentation | None = None,
        fresh: bool = True,
        frame: str = "data",
        drop: float = 0.0,
    ) -> None:
        self.shapes, self.rows, self.points = shapes, rows, points
        self.frame, self.drop = frame, drop
        self.scanner, self.mirror, self.augment, self.fresh = scanner, mirror, augment, fresh

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Pair:
        if not self.fresh:
            return self.numbered(index)
        return self._pair(index, int(torch.randint(2**62, ())), 0)

    def numbered(self, number: int) -> Pair:
        """Always the same pair: beyond the last shape they begin again, with other scans."""
        return self._pair(number % len(self.rows), 0, number)

    def clouds(
        self, index: int, seed: int, number: int, generator: np.random.Generator
    ) -> tuple[Cloud, Cloud]:
        """A shape and a scan of it."""
        row = int(self.rows[index])
        cloud = self.shapes[row]
        visible = None if self.shapes.visible is None else self.shapes.visible[row]
        return cloud, self.scanner(cloud, seed, number, visible=visible)

    def _pair(self, index: int, seed: int, number: int) -> Pair:
        generator = stream(seed, number, "pair", 0)
        cloud, partial = self.clouds(index, seed, number, generator)
        thinned = resample(cloud, self.points, generator)
        if self.augment is not None:
            matrix, shift = (a.astype(np.float32) for a in self.augment.draw(generator))
            cloud, thinned, partial = (c @ matrix + shift for c in (cloud, thinned, partial))
        label = self.label(index)
        if self.drop and generator.random() < self.drop:
            nothing = np.zeros_like(with_flags(partial, self.mirror, generator))
            return Pair(thinned, nothing, label=label)
        frame = self._frame(cloud, partial, generator)
        scan = with_flags(frame.enter(partial), self.mirror, generator)
        return Pair(frame.enter(thinned), scan, frame, label)

    def _frame(self, complete: Cloud, partial: Cloud, generator: np.random.Generator) -> Frame:
        if self.frame == "data":
            return Frame()
        seen = self.frame == "scan" or generator.random() < 0.5
        return Frame.of(partial if seen else complete)

    def label(self, index: int) -> int:
        """The class of a shape, -1 where it is not known."""
        return int(self.shapes.labels[int(self.rows[index])])


class RecordedPairs(Pairs):
    """Pairs whose scans were recorded (:mod:`pointdiff.published`); ``scanner`` only says how many
    points of them are taken."""

    def __init__(self, recorded: Recorded, points: int, scanner: Scanner, **others: Any) -> None:
        super().__init__(Shapes([]), np.arange(len(recorded)), points, scanner, **others)
        self.recorded = recorded

    def clouds(
        self, index: int, seed: int, number: int, generator: np.random.Generator
    ) -> tuple[Cloud, Cloud]:
        cloud, scan = self.recorded.pair(int(self.rows[index]), self.points)
        return cloud, resample(scan, self.scanner.points, generator)

    def label(self, index: int) -> int:
        return -1


def with_flags(partial: Cloud, mirror: str | None, generator: np.random.Generator) -> np.ndarray:
    """A scan [m, 3] as input of the network, float32 [m, 4] with ones; or, given the axis across
    which to ``mirror``, [m + m // 2, 4]: a random half of the mirror images follows, with -1."""
    real = np.concatenate([partial, np.ones((len(partial), 1))], 1).astype(np.float32)
    if mirror is None:
        return real
    image = resample(real, len(real) // 2, generator).copy()
    image[:, [AXES[mirror], 3]] *= -1
    return np.concatenate([real, image])
