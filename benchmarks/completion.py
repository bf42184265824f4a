"""Completion of test scans: a model against what needs none, and against an encoder-decoder.

    python benchmarks/completion.py --data shapes.npz [--run shapes] [--n 32 | --all]
        [--steps 5 10 20 50] [--long 1000 --few 4]
        [--pcn-seconds 600 --views views.npz [--pcn-file pcn.safetensors]]

The scan itself, the scan with its mirror image, and the nearest training shape are the baselines;
--pcn-seconds trains an encoder-decoder (benchmarks/pcn.py) for so much processor time on the same
pairs, and keeps it in --pcn-file, from which a later call takes it, or trains it on. Every cloud
has as many points as the scan. "Kept" says that points on the scan were replaced by points of it,
as `pointdiff complete` does by default; the same is done for every baseline.

Frame "given": the scan lies as in the published benchmarks, centre 0 and largest radius 1 being
those of the whole, which tells how far the hidden part reaches. Frame "own": nothing but the scan
is known. The nearest shape is then that whose scan, centred and scaled as this one, is nearest.

Chamfer-L2 (mean squared distance to the nearest point, both ways, added) is times 1e4, EMD (mean
distance, exact) times 1e2, F1 at a squared distance of 1e-4; of shapes with largest radius 1, so
that Chamfer is four times, and EMD twice, what it is in a unit cube. Means over the first n test
shapes, one fixed scan of each; standard errors are in the JSON. A few scans may make most of the
mean of Chamfer, hence its median. Rows that the folder has already are kept, those of the model
as long as its weights are the same.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pcn
import torch
from common import Rows, markdown, weights

import pointdiff  # noqa: F401 (registers the pretrained models)
from pointdiff.clouds import Cloud, Frame, resample
from pointdiff.completion import Completer, load
from pointdiff.data import Augmentation
from pointdiff.domain import Completion
from pointdiff.merging import kept
from pointdiff.metrics import chamfer, evaluate
from pointdiff.ops import knn
from pointdiff.scanning import Scanner
from shared.randomness import stream

UNITS = {"chamfer_l2": 1e4, "emd": 1e2, "f1": 1.0}
NAMES = (
    "the scan",
    "scan and mirror image",
    "nearest training shape",
    "encoder-decoder",
    "diffusion",
)
COLUMNS = ("completion", "frame", "kept", "calls", "n", "Chamfer-L2 x1e4", "its median",
           "EMD x1e2", "F1", "seconds each")  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """A test scan and its complete cloud, both in the frame of the data."""

    scan: Cloud
    truth: Cloud


def mirrored(scan: Cloud, index: int) -> Cloud:
    """The scan and its image in the plane x = 0, thinned out."""
    both = np.concatenate([scan, scan * np.array([-1, 1, 1], np.float32)])
    return resample(both, len(scan), stream(0, index, "mirrored", 0))


def nearest(domain: Completion, scan: Cloud, sketch: int = 128) -> Cloud:
    """The training shape that is nearest to a part of the scan, one-sided, where it lies."""
    rows = domain.shapes.rows("train", domain.validation)
    query = torch.from_numpy(scan[:sketch])[None]
    gaps = [
        float(knn(query, torch.from_numpy(domain.shapes[int(r)][::8].copy())[None])[0].mean())
        for r in rows
    ]
    best = domain.shapes[int(rows[int(np.argmin(gaps))])]
    return resample(best, len(scan), stream(0, 0, "nearest", 0))


class Scans:
    """``views`` scans of every training shape in their own frames, ``sketch`` points of each."""

    def __init__(self, domain: Completion, views: int = 8, sketch: int = 96) -> None:
        self.domain, self.sketch = domain, sketch
        pairs = domain.fixed("train", "scan")
        found = [pairs.numbered(i) for i in range(views * len(pairs))]
        self.frames = [pair.frame for pair in found]
        self.rows = [int(pairs.rows[i % len(pairs)]) for i in range(len(found))]
        self.clouds = torch.from_numpy(np.stack([p.partial[:sketch, :3] for p in found]))

    def nearest(self, scan: Cloud) -> Cloud:
        """The training shape with the scan that is nearest, both ways, to the given one in its
        frame."""
        place = Frame.of(scan)
        query = torch.from_numpy(place.enter(scan)[: self.sketch])
        gaps = []
        for clouds in self.clouds.split(256):
            squared = torch.cdist(query.expand(len(clouds), -1, -1), clouds).square()
            gaps.append(squared.amin(2).mean(1) + squared.amin(1).mean(1))
        best = int(torch.cat(gaps).argmin())
        shape = self.frames[best].enter(self.domain.shapes[self.rows[best]])
        return resample(place.leave(shape), len(scan), stream(0, 0, "nearest", 0))


class Table:
    """Judges ways to complete scans, row by row; rows that the folder has already are kept.
    ``whole``: only as `pointdiff complete` gives them, with the scan kept."""

    def __init__(
        self, pairs: Sequence[Pair], folder: Path, points: int, weights: str, whole: bool
    ) -> None:
        self.pairs, self.whole = pairs, whole
        self.rows = Rows(
            *(folder, "completion", {"points": points, "seed": 0}, _order, _markdown),
            current=lambda row: not weights or row.get("weights") in (None, weights),
        )

    def add(
        self,
        name: str,
        make: Callable[[Cloud, int], Cloud],
        calls: int | None = None,
        frame: str | None = None,
        keeps: Sequence[bool] = (False, True),
        n: int | None = None,
        ready: Callable[[], object] = lambda: None,
        **facts: Any,
    ) -> None:
        """The clouds that ``make`` (scan, index) gives; ``keeps``: as they are (False), and with
        the scan kept (True). ``ready`` is called before, untimed."""
        if self.whole:
            keeps = keeps[-1:]
        pairs = self.pairs[:n]
        settings = {
            "completion": name, "frame": frame, "calls": calls, "n": len(pairs), **facts,
        }  # fmt: skip
        if all(self.rows.has(**settings, kept=keep) for keep in keeps):
            return
        ready()
        start = time.perf_counter()
        clouds = [make(pair.scan, i) for i, pair in enumerate(pairs)]
        seconds = (time.perf_counter() - start) / len(pairs)
        for keep in keeps:
            if self.rows.has(**settings, kept=keep):
                continue
            made = (
                [kept(c, p.scan) for c, p in zip(clouds, pairs, strict=True)] if keep else clouds
            )
            truths = [pair.truth for pair in pairs]
            found = evaluate(made, truths)
            scores = {key: found[key].as_json() for key in UNITS}
            scores["chamfer_l2_median"] = float(np.median(list(map(_squared, made, truths))))
            self.rows.add({**settings, "kept": keep, **scores, "seconds": seconds})


def _squared(cloud: Cloud, truth: Cloud) -> float:
    return float(chamfer(torch.from_numpy(cloud)[None], torch.from_numpy(truth)[None]))


def _order(row: Mapping[str, Any]) -> tuple[Any, ...]:
    cost = row["calls"] or row.get("trained_seconds") or 0
    return (-row["n"], row["frame"] or "", NAMES.index(row["completion"]), cost, row["kept"])


def _markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of most shapes, then the others, folded away."""
    most = max((row["n"] for row in rows), default=0)
    every, some = ([r for r in rows if (r["n"] == most) is all_] for all_ in (True, False))
    if not some:
        return _table(every)
    summary = "<summary>By denoiser calls, with and without the scan kept, fewer shapes</summary>"
    return f"{_table(every)}\n<details>\n{summary}\n\n{_table(some)}\n</details>\n"


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    cells = []
    for row in rows:
        median = row.get("chamfer_l2_median")
        scores = [f"{unit * row[key]['value']:.3f}" for key, unit in UNITS.items()]
        scores.insert(1, "" if median is None else f"{UNITS['chamfer_l2'] * median:.3f}")
        seconds = None if row["seconds"] is None else f"{row['seconds']:.2f}"
        kept = "yes" if row["kept"] else ""
        cells.append([_name(row), row["frame"], kept, row["calls"], row["n"], *scores, seconds])
    return markdown(COLUMNS, cells)


def _name(row: Mapping[str, Any]) -> str:
    trained = row.get("trained_seconds")
    return row["completion"] + (f", {trained:,.0f} s" if trained else "")


def compare(given: argparse.Namespace) -> None:
    """Everything that is compared."""
    domain = Completion(given.data, given.points, Scanner(points=given.points), frame="data")
    n = len(domain.test) if given.all else min(given.n, len(domain.test))
    records = [domain.test[i] for i in range(n)]
    pairs = [Pair(r.partial[:, :3], r.complete) for r in records]
    model = None if given.run is None else load(given.run)
    digest = "" if model is None else weights(model.model.denoiser)
    table = Table(pairs, given.out, given.points, digest, given.all)
    table.add("the scan", lambda scan, i: scan, keeps=(False,))
    table.add("scan and mirror image", mirrored)
    table.add("nearest training shape", lambda scan, i: nearest(domain, scan), frame="given")
    own = cache(lambda: Scans(training(given)))
    table.add(
        "nearest training shape", lambda scan, i: own().nearest(scan), frame="own", ready=own
    )
    if model is not None:
        add_model(table, model, given, digest)
    if given.pcn_seconds:
        add_pcn(table, given)


def training(given: argparse.Namespace) -> Completion:
    """The training pairs of the shipped model."""
    augment = Augmentation(rotation=15.0, mirror=0.5, stretch=1.15, turned=0.25)
    return Completion(
        given.data, 1024, Scanner(points=1024), augment=augment, views=given.views, frame="both"
    )


def add_model(table: Table, model: Completer, given: argparse.Namespace, digest: str) -> None:
    """Rows of the model, by the number of denoiser calls."""

    def add(steps: int, frame: str, n: int | None = None) -> None:
        def completed(scan: Cloud, i: int) -> Cloud:
            how = {"points": given.points, "frame": frame, "steps": steps, "seed": i}
            return model.complete(scan, keep=False, **how)[0]

        table.add("diffusion", completed, steps, frame, n=n, weights=digest)

    for steps in [20] if given.all else given.steps:
        add(steps, "given")
    add(20, "own")
    if given.long and not given.all:
        add(given.long, "given", given.few)


def add_pcn(table: Table, given: argparse.Namespace) -> None:
    """Rows of the encoder-decoder, trained once where one of them is missing."""
    domain = training(given)
    network = cache(lambda: pcn.trained(domain, given.pcn_seconds, given.pcn_file))

    def add(frame: str, name: str) -> None:
        def completed(scan: Cloud, i: int) -> Cloud:
            return pcn.complete(network(), domain, scan, name)

        facts = {"trained_seconds": given.pcn_seconds}
        table.add("encoder-decoder", completed, frame=frame, ready=network, **facts)

    add("given", "data")
    add("own", "scan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--run")
    parser.add_argument("--n", type=int, default=32)
    parser.add_argument("--all", action="store_true", help="every test shape, 20 calls, kept")
    parser.add_argument("--points", type=int, default=2048)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20, 50])
    parser.add_argument("--long", type=int, help="another number of steps, for few shapes")
    parser.add_argument("--few", type=int, default=4)
    parser.add_argument("--pcn-seconds", type=float, default=0.0)
    parser.add_argument("--pcn-file", type=Path, help="keeps the trained encoder-decoder")
    parser.add_argument("--views", help="file of `pointdiff views`, for --pcn-seconds")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    compare(given)


if __name__ == "__main__":
    main()
