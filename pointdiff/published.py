"""Published completion data sets, read as they are laid out on disk.

| layout | files |
|---|---|
| MVP | ``MVP_Train_CP.h5``, ``MVP_Test_CP.h5`` with incomplete_pcds and complete_pcds; or |
| | ``mvp_train_input.h5`` and ``mvp_train_gt_2048pts.h5`` (and test), also with novel_ arrays; |
| | scans i belong to complete cloud i // 26 |
| Completion3D | ``train/partial/CLASS/NAME.h5`` and ``train/gt/CLASS/NAME.h5`` (val, test) |
| PCN | ``train/partial/CLASS/NAME/00.pcd`` ... and ``train/complete/CLASS/NAME.pcd`` (val, test) |
| ShapeNet-55 | ``shapenet_pc/NAME.npy`` with ``ShapeNet-55/train.txt`` and ``test.txt`` |

The first three bring their scans; of ShapeNet-55 scans are made (its published ones are drawn
anew for every evaluation). Their clouds lie in a cube from -0.5 to 0.5 and are doubled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pointdiff import files
from pointdiff.clouds import Cloud
from shared.extras import need
from shared.randomness import stream

SCALE = 2.0
MVP_VIEWS = 26
PARTS = {"train": ("train",), "valid": ("val", "valid"), "test": ("test",)}


class Recorded(Protocol):
    """Scans with their complete clouds; ``groups`` [n]: those of one cloud share a number."""

    @property
    def groups(self) -> np.ndarray: ...

    def __len__(self) -> int: ...

    def pair(self, index: int, points: int) -> tuple[Cloud, Cloud]:
        """The complete cloud [n, 3] and the scan [m, 3] of record ``index``. Where there are
        several resolutions it is the smallest with at least ``points``, or the largest."""


@dataclass(frozen=True)
class FilePairs:
    """One file for each cloud: (complete, scan)."""

    paths: Sequence[tuple[Path, Path]]

    @property
    def groups(self) -> np.ndarray:
        return np.unique([str(path) for path, _ in self.paths], return_inverse=True)[1]

    def __len__(self) -> int:
        return len(self.paths)

    def pair(self, index: int, points: int) -> tuple[Cloud, Cloud]:
        complete, scan = (SCALE * files.read_one(path) for path in self.paths[index])
        return complete, scan


class Mvp:
    """The arrays of MVP: ``scans`` (file, key), ``complete`` resolution -> (file, key) of each."""

    def __init__(
        self, scans: Sequence[tuple[Path, str]], complete: Mapping[int, Sequence[tuple[Path, str]]]
    ) -> None:
        self.scans, self.complete = scans, complete
        lengths = [len(_rows(*place)) for place in scans]
        for points, places in complete.items():
            for place, n in zip(places, lengths, strict=True):
                if MVP_VIEWS * len(_rows(*place)) != n:
                    raise ValueError(
                        f"{place[0]}: {len(_rows(*place))} clouds of {points} points for {n} "
                        f"scans; MVP has {MVP_VIEWS} of each."
                    )
        self.starts = np.cumsum([0, *lengths])

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def groups(self) -> np.ndarray:
        return np.arange(len(self)) // MVP_VIEWS

    def pair(self, index: int, points: int) -> tuple[Cloud, Cloud]:
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        row = index - int(self.starts[part])
        enough = [n for n in sorted(self.complete) if n >= points] or [max(self.complete)]
        truth = _rows(*self.complete[enough[0]][part])[row // MVP_VIEWS]
        scan = _rows(*self.scans[part])[row]
        return SCALE * np.asarray(truth, np.float32), SCALE * np.asarray(scan, np.float32)


_OPEN: dict[Path, Any] = {}


def _rows(path: Path, key: str) -> Any:
    """An array of an HDF5 file, which stays open.

    Raises:
        ValueError: no such array.
    """
    if path not in _OPEN:
        h5py = need("h5py", f"{path.name}: HDF5", "points")
        try:
            _OPEN[path] = h5py.File(path, "r")
        except OSError as error:
            raise ValueError(f"{path}: no readable HDF5 file ({error}).") from error
    if key not in _OPEN[path]:
        raise ValueError(f"{path}: no array '{key}'; it has {', '.join(_OPEN[path]) or 'none'}.")
    return _OPEN[path][key]


def find(folder: str | Path, part: str) -> Recorded | None:
    """The scans of ``part`` ('train', 'valid', 'test') of a published data set with scans of its
    own; None for folders of another layout, and for parts that it does not have.

    Raises:
        ValueError: files of such a data set that do not fit together.
    """
    root = Path(folder)
    if not root.is_dir():
        return None
    if part == "train" or part == "test":
        found = _mvp(root, part)
        if found is not None:
            return found
    for name in PARTS[part]:
        for made in (_completion3d(root / name), _pcn(root / name)):
            if made:
                return FilePairs(made)
    return None


@dataclass(frozen=True)
class Some:
    """Records of a data set."""

    whole: Recorded
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def groups(self) -> np.ndarray:
        groups: np.ndarray = self.whole.groups[self.rows]
        return groups

    def pair(self, index: int, points: int) -> tuple[Cloud, Cloud]:
        return self.whole.pair(int(self.rows[index]), points)


def parts(folder: str | Path, validation: float) -> dict[str, Recorded | None]:
    """What :func:`find` finds, by part. Without a test part its validation part is measured;
    without a validation part the share ``validation`` of the training clouds, with all their
    scans, is held out."""
    found = {name: find(folder, name) for name in PARTS}
    training = found["train"]
    clouds = 0 if training is None else int(training.groups.max()) + 1
    if training is not None and found["valid"] is None and clouds > 1:
        order = stream(0, 0, "published/split", 0).permutation(clouds)
        held = (order < max(1, validation * clouds))[training.groups]
        found["train"], found["valid"] = (
            Some(training, np.flatnonzero(rows)) for rows in (~held, held)
        )
    if found["test"] is None:
        found["test"] = found["valid"]
    return found


def part(found: Mapping[str, Recorded | None], name: str, folder: str) -> Recorded | None:
    """One of :func:`parts`; None where the data set is no published one.

    Raises:
        ValueError: it is, but lacks the part.
    """
    made = found.get(name)
    if made is None and any(one is not None for one in found.values()):
        raise ValueError(f"{folder}: no scans of the part {name} with their complete clouds.")
    return made


def _mvp(root: Path, part: str) -> Mvp | None:
    whole = root / f"MVP_{part.capitalize()}_CP.h5"
    if whole.exists():
        return Mvp([(whole, "incomplete_pcds")], {2048: [(whole, "complete_pcds")]})
    scans = root / f"mvp_{part}_input.h5"
    if not scans.exists():
        return None
    sizes = [n for n in (2048, 4096, 8192, 16384) if (root / _gt(part, n)).exists()]
    if not sizes:
        raise ValueError(f"{root}: {scans.name} without {_gt(part, 2048)}.")
    _rows(scans, "incomplete_pcds")
    prefixes = ["", "novel_"] if "novel_incomplete_pcds" in _OPEN[scans] else [""]
    return Mvp(
        [(scans, f"{prefix}incomplete_pcds") for prefix in prefixes],
        {n: [(root / _gt(part, n), f"{p}complete_pcds") for p in prefixes] for n in sizes},
    )


def _gt(part: str, points: int) -> str:
    return f"mvp_{part}_gt_{points}pts.h5"


def _completion3d(root: Path) -> list[tuple[Path, Path]]:
    if not (root / "gt").is_dir():  # the truth of the test scans is not published
        return []
    scans = sorted((root / "partial").glob("*/*.h5"))
    return [(_there(root / "gt" / p.parent.name / p.name, p), p) for p in scans]


def _pcn(root: Path) -> list[tuple[Path, Path]]:
    scans = sorted((root / "partial").glob("*/*/*.pcd"))
    return [(_there(_truth_of(root, scan), scan), scan) for scan in scans]


def _truth_of(root: Path, scan: Path) -> Path:
    return root / "complete" / scan.parent.parent.name / f"{scan.parent.name}.pcd"


def _there(complete: Path, scan: Path) -> Path:
    if not complete.exists():
        raise ValueError(f"{scan}: its complete cloud {complete} is missing.")
    return complete


def shapenet55(folder: str | Path) -> tuple[list[Path], np.ndarray] | None:
    """Cloud files of ShapeNet-55 (or -34) and their split (0 train, 1 test), or None.

    Raises:
        ValueError: a listed file is missing.
    """
    root = Path(folder)
    clouds = root / "shapenet_pc"
    lists = next((d for d in (root / "ShapeNet-55", root / "ShapeNet-34") if d.is_dir()), None)
    if not clouds.is_dir() or lists is None:
        return None
    paths: list[Path] = []
    split: list[int] = []
    for number, name in enumerate(("train.txt", "test.txt")):
        text = (lists / name).read_text(encoding="utf-8") if (lists / name).exists() else ""
        for line in text.split():
            if not (clouds / line).exists():
                raise ValueError(f"{lists / name}: {clouds / line} is missing.")
            paths.append(clouds / line)
            split.append(number)
    return paths, np.array(split, np.int8)
