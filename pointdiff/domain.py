"""Completion of partial point clouds as a domain of the core.

A state has one field, 'x' [b, n, 3]; the condition is 'partial' [b, m, 4], the scan's points with
a flag: 1, or -1 for mirrored ones. Both are in the frame of the data: the centre of the complete
shape's bounding box is 0, its largest radius 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pointdiff import files
from pointdiff.clouds import Cloud, check, resample
from pointdiff.data import AXES, Augmentation, Pair, Pairs, Shapes, load_shapes, with_flags
from pointdiff.metrics import evaluate
from pointdiff.scanning import Scanner
from pointdiff.views import gallery
from shared.configuration import reject_unknown
from shared.domains import Batch, Domain, Invalid
from shared.metrics import Estimate, proportion
from shared.process import State
from shared.randomness import stream


class Completion(Domain[Cloud]):
    """Complete clouds given a scan.

    Args:
        data: .npz of shapes, or a file or folder of clouds and meshes (see
            :func:`pointdiff.data.load_shapes`); None for a model that only completes.
        points: of a complete cloud.
        scan: how partial clouds are made; its ``points`` are those of the condition.
        mirror: None, or the axis ('x', 'y', 'z') across which the scan is mirrored.
        augment: changes of the training pairs. validation: share of the training shapes.
    """

    name: ClassVar[str] = "completion"

    def __init__(
        self,
        data: str | None = None,
        points: int = 2048,
        scan: Scanner | None = None,
        mirror: str | None = None,
        augment: Augmentation | None = None,
        validation: float = 0.05,
    ) -> None:
        if mirror is not None and mirror not in AXES:
            raise ValueError(f"domain.mirror={mirror!r}: choose x, y, z or null.")
        if points < 1 or not 0 < validation < 1:
            raise ValueError("domain: needs points >= 1 and 0 < validation < 1.")
        self.data, self.points, self.mirror = data, points, mirror
        self.scan, self.augment, self.validation = scan or Scanner(), augment, validation
        self._restored: Mapping[str, Any] | None = None

    # -- constants ----------------------------------------------------------------------------

    @cached_property
    def shapes(self) -> Shapes:
        """The complete shapes.

        Raises:
            ValueError: the domain has no data.
        """
        if self.data is None:
            raise ValueError("domain.data is not set: give an .npz of shapes or a folder.")
        return load_shapes(self.data)

    def statistics(self) -> dict[str, Any]:
        if self._restored is not None:
            return dict(self._restored)
        training = self.shapes.rows("train", self.validation)[:500]
        std = float(np.mean([self.shapes[int(i)].std() for i in training]))
        sizes = {"points": self.points, "partial": self.scan.points}
        return {"domain": self.name, **sizes, "mirror": self.mirror, "std": std}

    def restore(self, statistics: Mapping[str, Any]) -> None:
        if statistics.get("domain") != self.name:
            found = statistics.get("domain")
            raise ValueError(f"the checkpoint is of domain {found}, not {self.name}.")
        self._restored = dict(statistics)
        self.points, self.mirror = int(statistics["points"]), statistics["mirror"]

    @property
    def partial_points(self) -> int:
        """Points of a scan before mirroring."""
        return int((self._restored or {"partial": self.scan.points})["partial"])

    # -- training -----------------------------------------------------------------------------

    def datasets(self) -> tuple[Dataset[Pair], Dataset[Pair]]:
        training, held = (self.shapes.rows(part, self.validation) for part in ("train", "valid"))
        return self._pairs(training, fresh=True), self._pairs(held, fresh=False)

    def _pairs(self, rows: np.ndarray, fresh: bool) -> Pairs:
        augment = self.augment if fresh else None
        return Pairs(self.shapes, rows, self.points, self.scan, self.mirror, augment, fresh)

    def collate(self, records: Sequence[Pair]) -> Batch:
        complete, partial = (
            torch.from_numpy(np.stack(column)) for column in zip(*records, strict=True)
        )
        return Batch({"x": complete}, cond={"partial": partial})

    # -- completing ---------------------------------------------------------------------------

    @cached_property
    def test(self) -> Pairs:
        """The pairs that are measured: one fixed scan of every shape of the test split, or of the
        validation shapes where there is no test split."""
        rows = self.shapes.rows("test", self.validation)
        rows = rows if len(rows) else self.shapes.rows("valid", self.validation)
        return self._pairs(rows, fresh=False)

    def template(self, seed: int, indices: Sequence[int], **request: Any) -> Batch:
        """``request``: ``scan``, a partial cloud [n, 3], or a file or folder of them, in the frame
        of the data, of which sample i completes number i modulo their count (by default the test
        scans); ``points``, of a completion."""
        reject_unknown("completion, request", request, ("scan", "points"))
        points = request.get("points", self.points)
        if not isinstance(points, int) or points < 1:
            raise ValueError(f"request.points={points}: give a whole number of at least 1.")
        if request.get("scan") is None:
            partial = [self.test[i % len(self.test)].partial for i in indices]
        else:
            scans = self._scans(request["scan"])
            partial = [self.enter(scans[i % len(scans)], seed, i) for i in indices]
        state = {"x": torch.zeros(len(indices), points, 3)}
        return Batch(state, cond={"partial": torch.from_numpy(np.stack(partial))})

    def enter(self, scan: Cloud, seed: int, index: int) -> np.ndarray:
        """A scan [any, 3] as a condition, resampled to the number of points in training."""
        generator = stream(seed, index, "template", 0)
        return with_flags(resample(scan, self.partial_points, generator), self.mirror, generator)

    def _scans(self, path: str | Cloud) -> list[Cloud]:
        if isinstance(path, np.ndarray):
            return [check(path, "request.scan")]
        scans = []
        for number, cloud in enumerate(files.read(path)):
            if isinstance(cloud, Invalid):
                raise ValueError(f"request.scan: {cloud.reason}")
            scans.append(check(cloud, f"request.scan: {path}, cloud {number}"))
        return scans

    def decode(self, state: State, mask: Tensor | None) -> list[Cloud | Invalid]:
        clouds = state["x"].float().numpy()
        return [
            cloud if np.isfinite(cloud).all() else Invalid(str(row), "points that are not finite")
            for row, cloud in enumerate(clouds)
        ]

    # -- files and reports --------------------------------------------------------------------

    @property
    def suffix(self) -> str:
        return ".npy"

    def read(self, path: Path) -> Iterator[Cloud | Invalid]:
        return files.read(path)

    def write(self, path: Path, items: Iterable[Cloud]) -> None:
        files.write(path, items)

    def metrics(
        self, items: Sequence[Cloud | Invalid], reference: Sequence[Cloud] | None = None
    ) -> dict[str, Estimate]:
        """See :func:`pointdiff.metrics.evaluate`. Without ``reference`` cloud i is compared with
        the truth of test scan i; only 'valid' is known if some failed (their place is lost)."""
        if reference is None:
            failed = sum(isinstance(item, Invalid) for item in items)
            if failed:
                return {"valid": proportion(len(items) - failed, len(items))}
            reference = [self.test[i % len(self.test)].complete for i in range(len(items))]
        return evaluate(items, reference)

    def view(self, items: Sequence[Cloud]) -> str:
        """The first clouds, to be turned with the mouse."""
        return gallery({f"cloud {i}": cloud for i, cloud in enumerate(items[:12])})
