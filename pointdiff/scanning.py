"""Virtual scans: what a camera outside sees of a complete cloud.

Two ways to decide which points are hidden: the hidden-point operator (Katz, Tal & Basri 2007) and
a depth image. A scan is a pure function of (seed, index).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from numbers import Integral, Real

import numpy as np
from scipy.spatial import ConvexHull, QhullError, cKDTree

from pointdiff.clouds import Cloud, Frame, resample
from shared.randomness import stream

VIEWS = 26
NEAR = 5e-4
"""Points in one cell of this share of the cloud's size are copies: its density without them."""


def cameras(views: int = VIEWS) -> np.ndarray:
    """Unit vectors [views, 3] towards the cameras: for 26 the faces, edges and corners of a cube,
    else points of a Fibonacci spiral."""
    if views == VIEWS:
        steps = [v for v in product((-1.0, 0.0, 1.0), repeat=3) if any(v)]
        return np.asarray(steps / np.linalg.norm(steps, axis=1, keepdims=True))
    i = np.arange(views) + 0.5
    height, angle = 1 - 2 * i / views, np.pi * (1 + 5**0.5) * i
    ring = np.sqrt(1 - height**2)
    return np.stack([ring * np.cos(angle), ring * np.sin(angle), height], axis=1)


def unhidden(points: Cloud, camera: np.ndarray, radius: float = 1.5) -> np.ndarray:
    """Indices of the points that ``camera`` [3] sees, by the hidden-point operator: points are
    flipped to the outside of a sphere of 10^``radius`` times the largest distance; those on the
    convex hull of the result and the camera are visible. Larger radius: more is seen.
    """
    if len(points) < 3:  # no body
        return np.arange(len(points))
    ray = np.asarray(points, np.float64) - camera
    length = np.linalg.norm(ray, axis=1, keepdims=True).clip(min=1e-12)
    flipped = ray + 2 * (length.max() * 10**radius - length) * ray / length
    body = np.concatenate([flipped, np.zeros((1, 3))])
    try:
        corners = ConvexHull(body).vertices
    except QhullError:  # flat, seen from its own plane: joggle the points
        corners = ConvexHull(body, qhull_options="QJ").vertices
    return np.sort(corners[corners < len(ray)])


def in_depth_image(points: Cloud, camera: np.ndarray, pixel: float | None = None) -> np.ndarray:
    """Indices of the points that ``camera`` [3], looking at the origin, sees in a depth image:
    those at most four pixels behind the nearest point of their pixel or of the eight
    around it.

    ``pixel``: width at the distance of the origin; None: twice the median distance
    of a point to its nearest neighbour, which leaves few holes.
    """
    points = np.asarray(points, np.float64)
    if pixel is None:
        pixel = _spacing(points)
    distance = float(np.linalg.norm(camera))
    right, up, ahead = _axes(-camera / distance)
    ray = points - camera
    depth = ray @ ahead
    front = depth > 1e-6 * distance
    if not front.any():
        return np.zeros(0, np.int64)
    scale = distance / (pixel * np.where(front, depth, 1.0))
    column, row = (np.floor((ray @ axis) * scale).astype(np.int64) for axis in (right, up))
    nearest = _depth_map(row[front], column[front], depth[front])
    ahead_of = np.full(len(points), -np.inf)
    place = (row[front] - row[front].min() + 1, column[front] - column[front].min() + 1)
    ahead_of[front] = nearest[place]
    return np.flatnonzero(front & (depth <= ahead_of + 4.0 * pixel))


def _spacing(points: np.ndarray) -> float:
    """Twice the median distance of a point to its nearest neighbour, copies left out."""
    cells = (points / (NEAR * float(np.ptp(points, axis=0).max()) or 1.0)).round()
    points = points[np.unique(cells, axis=0, return_index=True)[1]]
    if len(points) < 2:
        return 1.0
    return 2.0 * float(np.median(cKDTree(points).query(points, k=2)[0][:, 1]))


def _depth_map(row: np.ndarray, column: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Smallest depth in every pixel and its eight neighbours, with an edge of one pixel."""
    row, column = row - row.min() + 1, column - column.min() + 1
    image = np.full((row.max() + 2, column.max() + 2), np.inf)
    np.minimum.at(image, (row, column), depth)
    for axis in (0, 1):
        image = np.minimum(image, np.minimum(np.roll(image, 1, axis), np.roll(image, -1, axis)))
    return np.asarray(image)


def _axes(ahead: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An orthonormal frame whose last vector is ``ahead``."""
    helper = np.eye(3)[np.abs(ahead).argmin()]
    right = np.cross(helper, ahead)
    right /= np.linalg.norm(right)
    return right, np.cross(ahead, right), ahead


HIDING: dict[str, Callable[[Cloud, np.ndarray], np.ndarray]] = {
    "hull": unhidden,
    "depth": in_depth_image,
}


@dataclass(frozen=True)
class Scanner:
    """Makes partial clouds. Lengths are in units of the cloud's radius.

    Args:
        points: of a scan; fewer visible ones are repeated.
        method: 'hull' (the hidden-point operator) or 'depth' (blurs sparse clouds: thin parts show
            both sides).
        views: cameras on the sphere; each scan draws one of them.
        distance: of the cameras from the centre.
        noise: standard deviation of the noise along the line of sight.
        occlusion: share of the visible points hidden by an obstacle in front (the nearest to a
            random ray of the camera).
        crop: share of the visible points cut away by a random plane.

    Raises:
        ValueError: a value out of range.
    """

    points: int = 2048
    method: str = "hull"
    views: int = VIEWS
    distance: float = 3.0
    noise: float = 0.0
    occlusion: float = 0.0
    crop: float = 0.0

    def __post_init__(self) -> None:
        if self.method not in HIDING:
            raise ValueError(f"method={self.method!r}: choose {' or '.join(HIDING)}.")
        if not all(isinstance(n, Integral) and n >= 1 for n in (self.points, self.views)):
            raise ValueError("points and views: give whole numbers of at least 1.")
        if not (_finite(self.distance, self.noise) and self.distance > 1 and self.noise >= 0):
            raise ValueError("scan: needs finite distance > 1 and noise >= 0.")
        shares = self.occlusion, self.crop
        if not (_finite(*shares) and all(0 <= share < 1 for share in shares)):
            raise ValueError("occlusion and crop: give shares from 0 to below 1.")

    def visible(self, cloud: Cloud) -> np.ndarray:
        """What each camera sees of ``cloud`` [n, 3]: packed bits, uint8 [views, ceil(n / 8)].
        Scans are drawn from it at once, where finding the hidden points takes longer."""
        points = Frame.of(cloud).enter(cloud).astype(np.float64)
        rows = np.zeros((self.views, len(cloud)), bool)
        for row, camera in zip(rows, self.distance * cameras(self.views), strict=True):
            row[HIDING[self.method](points, camera)] = True
        return np.packbits(rows, axis=1)

    def __call__(
        self,
        cloud: Cloud,
        seed: int,
        index: int,
        view: int | None = None,
        visible: np.ndarray | None = None,
    ) -> Cloud:
        """Scan ``index`` of ``seed`` of a complete ``cloud`` [n, 3], in its coordinates:
        float32 [points, 3]; ``view`` chooses the camera, ``visible`` is the result of
        :meth:`visible` where it is known (views without a point are found anew).

        Raises:
            ValueError: no such view.
        """
        if view is not None and not 0 <= view < self.views:
            raise ValueError(f"view={view}: there are views 0 to {self.views - 1}.")
        generator = stream(seed, index, "scan", 0)
        drawn = int(generator.integers(self.views))
        view = drawn if view is None else view
        camera = self.distance * cameras(self.views)[view]
        frame = Frame.of(cloud)
        points = frame.enter(cloud).astype(np.float64)
        if visible is not None and visible[view].any():
            rows = np.flatnonzero(np.unpackbits(visible[view], count=len(points)))
        else:  # every camera sees something: a view without a point was not found before
            rows = HIDING[self.method](points, camera)
        seen = self._obstructed(points[rows], camera, generator)
        seen = resample(seen, self.points, generator)
        sight = seen - camera
        sight /= np.linalg.norm(sight, axis=1, keepdims=True)
        seen = seen + self.noise * generator.standard_normal((len(seen), 1)) * sight
        return frame.leave(seen)

    def _obstructed(
        self, seen: np.ndarray, camera: np.ndarray, generator: np.random.Generator
    ) -> np.ndarray:
        sight = (seen - camera) / np.linalg.norm(seen - camera, axis=1, keepdims=True)
        aim, normal = generator.integers(len(seen)), generator.standard_normal(3)
        seen = _without(seen, sight @ sight[aim], self.occlusion)
        return _without(seen, seen @ normal, self.crop)


def _finite(*values: object) -> bool:
    return all(isinstance(value, Real) and np.isfinite(float(value)) for value in values)


def _without(points: np.ndarray, score: np.ndarray, share: float) -> np.ndarray:
    """All but the ``share`` of the points with the highest score, in their order."""
    keep = max(1, len(points) - int(share * len(points)))
    return np.asarray(points[np.sort(np.argsort(score, kind="stable")[:keep])])
