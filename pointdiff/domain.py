"""Completion of partial point clouds as a domain of the core.

A state has one field, 'x' [b, n, 3]; the condition is 'partial' [b, m, 4], the scan's points with
a flag: 1, or -1 for mirrored ones, and 'frame' [b, 4], the centre and scale that lead back to the
coordinates of the scan. By default both are in the frame of the scan, centre 0 and radius 1 of
what is seen: units and position of a scan do not matter, and nothing of what is hidden is given
away. In the frame of the data, that of the published benchmarks (whose clouds are doubled, see
:mod:`pointdiff.published`), the complete shape has centre 0
and radius 1, which tells how far it reaches where the scan shows nothing.
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

from pointdiff import files, published
from pointdiff.clouds import Cloud, Frame, check, natural, resample
from pointdiff.data import (
    AXES,
    Augmentation,
    Pair,
    Pairs,
    RecordedPairs,
    Shapes,
    load_shapes,
    with_flags,
)
from pointdiff.merging import merge
from pointdiff.metrics import evaluate
from pointdiff.scanning import Scanner
from pointdiff.views import gallery
from shared.configuration import reject_unknown
from shared.domains import Batch, Domain, Invalid
from shared.metrics import Estimate, proportion
from shared.process import State
from shared.randomness import Draws, even_normal, stream

FRAMES = ("scan", "data", "both")
REQUESTS = ("scan", "split", "points", "keep", "label", "frame", "even")


class Completion(Domain[Cloud]):
    """Complete clouds given a scan.

    Args:
        data: .npz of shapes, or a file or folder of clouds and meshes (see
            :func:`pointdiff.data.load_shapes`), or a folder of a published data set
            (:mod:`pointdiff.published`); None for a model that only completes.
        points: of a complete cloud. training_points: in training, where fewer are cheaper; None:
            as many.
        scan: how partial clouds are made; its ``points`` are those of the condition.
        mirror: None, or the axis ('x', 'y', 'z') across which the scan is mirrored.
        augment: changes of the training pairs. validation: share of the training shapes.
        frame: 'scan', or 'data': coordinates as they are, in which the centre of the complete
            shape's bounding box is 0 and its largest radius 1 (PDR); or 'both': a model that
            knows either, trained on as many pairs of each.
        classes: tell the model the class, 'label' [b], where it is known.
        drop: share of the training pairs without a scan, for models that also generate without
            one, and for classifier-free guidance.
        views: file of :func:`pointdiff.data.save_views`, which makes training scans quick.
    """

    name: ClassVar[str] = "completion"
    solver: ClassVar[str] = "dpmpp_2m_clean"

    def __init__(
        self,
        data: str | None = None,
        points: int = 2048,
        scan: Scanner | None = None,
        mirror: str | None = None,
        augment: Augmentation | None = None,
        validation: float = 0.05,
        frame: str = "scan",
        views: str | None = None,
        training_points: int | None = None,
        drop: float = 0.0,
        classes: bool = False,
    ) -> None:
        if not 0 <= drop <= 1:
            raise ValueError(f"domain.drop={drop}: give a share from 0 to 1.")
        if frame not in FRAMES:
            raise ValueError(f"domain.frame={frame!r}: choose {', '.join(FRAMES)}.")
        self.frame, self.views = frame, views
        self.training_points, self.drop, self.classes = training_points, drop, classes
        if mirror is not None and mirror not in AXES:
            raise ValueError(f"domain.mirror={mirror!r}: choose x, y, z or null.")
        if points < 1 or not 0 < validation < 1:
            raise ValueError("domain: needs points >= 1 and 0 < validation < 1.")
        self.data, self.points, self.mirror = data, points, mirror
        self.scan, self.augment, self.validation = scan or Scanner(), augment, validation
        self._restored: Mapping[str, Any] | None = None
        self._made: dict[tuple[str, str], Pairs] = {}

    # -- constants ----------------------------------------------------------------------------

    @cached_property
    def shapes(self) -> Shapes:
        """The complete shapes.

        Raises:
            ValueError: the domain has no data.
        """
        if self.data is None:
            raise ValueError(
                "domain.data is not set: give an .npz of shapes or a folder ('sample': data= for "
                "test scans, or request.scan=)."
            )
        shapes = load_shapes(self.data)
        if self.views is not None:
            shapes.take_views(self.views, self.scan)
        return shapes

    def statistics(self) -> dict[str, Any]:
        if self._restored is not None:
            return dict(self._restored)
        some = self.fixed("train", self._settled(None))
        std = float(np.mean([some[i].complete.std() for i in range(min(64, len(some)))]))
        sizes = {"points": self.points, "partial": self.scan.points}
        own = {"mirror": self.mirror, "frame": self.frame, "drop": self.drop}
        return {"domain": self.name, **sizes, **own, "std": std, "names": self.class_names}

    def restore(self, statistics: Mapping[str, Any]) -> None:
        if statistics.get("domain") != self.name:
            found = statistics.get("domain")
            raise ValueError(f"the checkpoint is of domain {found}, not {self.name}.")
        self._restored = dict(statistics)
        self.points, self.mirror = int(statistics["points"]), statistics["mirror"]
        self.frame = statistics.get("frame", "data")
        self.drop = float(statistics.get("drop", 0.0))

    @property
    def class_names(self) -> list[str]:
        """Names of the classes; empty for models without."""
        if self._restored is not None:
            return list(self._restored.get("names", ()))
        if not self.classes:
            return []
        names = () if any(self._published.values()) else self.shapes.names
        if not names:
            raise ValueError(
                f"domain.classes=true: {self.data} tells no classes; give an .npz with 'label' "
                "and 'label_names', or domain.classes=false."
            )
        return list(names)

    @property
    def partial_points(self) -> int:
        """Points of a scan before mirroring."""
        return int((self._restored or {"partial": self.scan.points})["partial"])

    # -- training -----------------------------------------------------------------------------

    def datasets(self) -> tuple[Dataset[Pair], Dataset[Pair]]:
        made = self._pairs("train", fresh=True), self._pairs("valid", fresh=False)
        for pairs in made:
            pairs.points, pairs.drop = self.training_points or self.points, self.drop
        return made

    def _pairs(self, part: str, fresh: bool, frame: str | None = None) -> Pairs:
        """The pairs of 'train', 'valid' or 'test', in the domain's frame or another."""
        others: dict[str, Any] = {
            "mirror": self.mirror,
            "augment": self.augment if fresh else None,
            "fresh": fresh,
            "frame": frame or self.frame,
        }
        recorded = published.part(self._published, part, str(self.data))
        if recorded is not None:
            return RecordedPairs(recorded, self.points, self.scan, **others)
        rows = self.shapes.rows(part, self.validation)
        return Pairs(self.shapes, rows, self.points, self.scan, **others)

    @cached_property
    def _published(self) -> Mapping[str, published.Recorded | None]:
        """The scans of a published data set by their part."""
        return {} if self.data is None else published.parts(self.data, self.validation)

    def collate(self, records: Sequence[Pair]) -> Batch:
        complete = torch.from_numpy(np.stack([record.complete for record in records]))
        return Batch({"x": complete}, cond=self._condition(records))

    def _condition(self, pairs: Sequence[Pair]) -> dict[str, Tensor]:
        frames = [[*pair.frame.centre, pair.frame.scale] for pair in pairs]
        partial = np.stack([pair.partial for pair in pairs])
        cond = {
            "partial": torch.from_numpy(partial),
            "frame": torch.tensor(frames, dtype=torch.float64),
        }
        if self.class_names:  # a class more, the last, is 'not known'
            most = len(self.class_names)
            cond["label"] = torch.tensor([p.label if p.label >= 0 else most for p in pairs])
        return cond

    # -- completing ---------------------------------------------------------------------------

    @property
    def test(self) -> Pairs:
        """The pairs that are measured: one fixed scan of every shape of the test split, or of the
        validation shapes where there is no test split."""
        return self.fixed("test", self._settled(None))

    def fixed(self, part: str, frame: str) -> Pairs:
        """Pairs without changes, always the same."""
        if (part, frame) not in self._made:
            pairs = self._pairs(part, fresh=False, frame=frame)
            if part == "test" and not len(pairs):
                pairs = self._pairs("valid", fresh=False, frame=frame)
            self._made[part, frame] = pairs
        return self._made[part, frame]

    def _settled(self, frame: Any) -> str:
        """The frame that is asked for; None: the only one, or that of the scan."""
        known = {"both": FRAMES[:2]}.get(self.frame, (self.frame,))
        if frame is not None and frame not in known:
            raise ValueError(f"request.frame={frame}: the model knows {' and '.join(known)}.")
        return frame or known[0]

    def truth(self, index: int) -> Cloud:
        """The complete cloud of test scan ``index`` (modulo their count), in its own frame."""
        pair = self.test[index % len(self.test)]
        return pair.frame.leave(pair.complete)

    def training_pair(self, number: int) -> Pair:
        """Pair ``number`` of the training shapes without changes, always the same."""
        return self.fixed("train", self._settled(None)).numbered(number)

    def template(self, seed: int, indices: Sequence[int], **request: Any) -> Batch:
        """``request``:

        - ``scan``: a partial cloud [n, 3], or a file or folder of them, of which sample i
          completes number i modulo their count; 'none' (see ``drop``); by default the test scans;
        - ``split``: 'train': the scans of :meth:`training_pair`;
        - ``label``: name or number of the class, for models with classes;
        - ``frame``: of models that know both: 'data': coordinates are those of the data, centre 0
          and radius 1 of the whole; by default that of the scan;
        - ``points``: of a completion;
        - ``keep``: false: do not put points of the scan in place of generated ones;
        - ``even``: false: independent noise for every point. By default the first completion of a
          scan starts from noise that is spread evenly (:func:`shared.randomness.even_normal`),
          which makes it a typical one; further ones are independent draws. Of training scans all
          are even, without a scan none.
        """
        reject_unknown("completion, request", request, REQUESTS)
        points = natural("request.points", request.get("points", self.points))
        keep, even = request.get("keep", True), request.get("even", True)
        for key, value in (("keep", keep), ("even", even)):
            if not isinstance(value, bool):
                raise ValueError(f"request.{key}={value}: give true or false.")
        state = {"x": torch.zeros(len(indices), points, 3)}
        label = self._label(request.get("label"))
        frame = self._settled(request.get("frame"))
        scan, split = request.get("scan"), request.get("split", "test")
        if isinstance(scan, str) and scan == "none":
            return Batch(state, cond=self._nothing(len(indices), label))
        if scan is None:
            known = self._known(indices, split, frame)
            count = len(self.test) if split == "test" else None
        else:
            scans = self._scans(scan)
            known, count = self._given(scans, seed, indices, frame, label), len(scans)
        cond = self._condition([pair for pair, _ in known])
        if keep:  # what takes the place of generated points
            most = max(points, self.partial_points)
            kept = [
                resample(seen, most, stream(seed, i, "template", 1))
                for i, (_, seen) in zip(indices, known, strict=True)
            ]
            cond["kept"] = torch.from_numpy(np.stack(kept))
        noise = self._noise(state["x"], seed, indices, count) if even else None
        return Batch(state, cond=cond, noise=noise)

    @staticmethod
    def _noise(like: Tensor, seed: int, indices: Sequence[int], count: int | None) -> State:
        """Even noise for the samples before ``count`` (None: all), independent for the others."""
        noise = Draws(seed, indices).normal("x", 0, like)
        for row, i in enumerate(indices):
            if count is None or i < count:
                noise[row] = even_normal(len(like[row]), 3, stream(seed, i, "template", 2))
        return {"x": noise}

    def _known(self, indices: Sequence[int], split: str, frame: str) -> list[tuple[Pair, Cloud]]:
        """Pairs of the data, and what is seen in each."""
        if split not in ("test", "train"):
            raise ValueError(f"request.split={split}: choose test or train.")
        if split == "train":
            pairs = [self.fixed(split, frame).numbered(i) for i in indices]
        else:
            test = self.fixed(split, frame)
            pairs = [test[i % len(test)] for i in indices]
        return [(pair, pair.partial[pair.partial[:, 3] > 0, :3]) for pair in pairs]

    def _given(
        self, scans: Sequence[Cloud], seed: int, indices: Sequence[int], frame: str, label: int
    ) -> list[tuple[Pair, Cloud]]:
        """Scans of the user, and all points of each."""
        known = []
        for i in indices:
            scan = scans[i % len(scans)]
            pair = self.enter(scan, seed, i, frame)._replace(label=label)
            known.append((pair, pair.frame.enter(scan)))
        return known

    def enter(self, scan: Cloud, seed: int, index: int, frame: str | None = None) -> Pair:
        """A scan [any, 3] as a condition, resampled to the number of points in training, with
        nothing known of the complete cloud."""
        place = Frame.of(scan) if self._settled(frame) == "scan" else Frame()
        generator = stream(seed, index, "template", 0)
        thinned = resample(place.enter(scan), self.partial_points, generator)
        return Pair(np.zeros((0, 3)), with_flags(thinned, self.mirror, generator), place)

    def null_condition(self) -> dict[str, Tensor]:
        if not self.drop:
            return {}
        half = 0 if self.mirror is None else self.partial_points // 2
        return {"partial": torch.zeros(1, self.partial_points + half, 4)}

    def _nothing(self, n: int, label: int) -> dict[str, Tensor]:
        """The condition of ``n`` clouds without a scan."""
        null = self.null_condition()
        if not null:
            raise ValueError("request.scan=none: the model was trained without domain.drop.")
        nothing = Pair(np.zeros((0, 3)), null["partial"][0].numpy(), label=label)
        return self._condition([nothing] * n)

    def _label(self, given: Any) -> int:
        """The number of a class given by name or number; -1 for none."""
        names = self.class_names
        if given is None:
            return -1
        if given in names:
            return names.index(given)
        if isinstance(given, int) and 0 <= given < len(names):
            return given
        known = ", ".join(names) or "none: it was trained without domain.classes"
        raise ValueError(f"request.label={given}: the model knows the classes {known}.")

    def finish(self, state: State, batch: Batch) -> State:
        """Points of the scan in place of those generated on what it shows
        (:func:`pointdiff.merging.merge`), and back into its coordinates."""
        rows = []
        for row, x in enumerate(state["x"]):
            if "kept" in batch.cond and x.isfinite().all():
                x = merge(x, batch.cond["kept"][row])
            place = batch.cond["frame"][row].to(torch.float64)
            rows.append((x.to(torch.float64) * place[3] + place[:3]).to(x.dtype))
        return {"x": torch.stack(rows)}

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
        the truth of test scan i; only 'valid' is known if some failed (their place is lost) or
        the domain has no data."""
        if reference is None:
            failed = sum(isinstance(item, Invalid) for item in items)
            if failed or self.data is None:
                return {"valid": proportion(len(items) - failed, len(items))}
            reference = [self.truth(i) for i in range(len(items))]
        return evaluate(items, reference)

    def view(self, items: Sequence[Cloud]) -> str:
        """The first clouds, to be turned with the mouse."""
        return gallery({f"cloud {i}": cloud for i, cloud in enumerate(items[:12])})

    def compare(
        self, items: Sequence[Cloud | Invalid], reference: Sequence[Cloud] | None = None
    ) -> str:
        """The first clouds, each beside the scan (where it is known) and the truth, if any."""
        if reference is None and self.data is None:
            return self.view([item for item in items if not isinstance(item, Invalid)])
        shown: dict[str, Cloud] = {}
        for i, item in enumerate(items[:6]):
            if isinstance(item, Invalid):
                continue
            if reference is None:
                pair = self.test[i % len(self.test)]
                seen = pair.partial[pair.partial[:, 3] > 0, :3]
                shown |= {f"scan {i}": pair.frame.leave(seen), f"completion {i}": item}
                shown[f"truth {i}"] = pair.frame.leave(pair.complete)
            else:
                shown |= {f"completion {i}": item, f"truth {i}": reference[i % len(reference)]}
        return gallery(shown, 3 if reference is None else 2)
