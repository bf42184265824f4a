"""Completion of test scans: a model against what needs no model, at several numbers of steps.

    python benchmarks/completion.py --data shapes.npz [--run runs/mine] [--n 32] [--steps 5 10 20]

The scan itself, the scan with its mirror image, and the nearest training shape (by Chamfer
distance from the scan to it) are the baselines. Every cloud has as many points as the scan.
Chamfer-L2 is times 1e4, EMD (exact) times 1e2, F1 at a squared distance of 1e-4 (of shapes with
largest radius 1). Without --run the baselines only.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from common import markdown, publish

from pointdiff.clouds import Cloud, resample
from pointdiff.completion import load
from pointdiff.domain import Completion
from pointdiff.metrics import evaluate
from pointdiff.ops import knn
from pointdiff.scanning import Scanner
from shared.randomness import stream

UNITS = {"chamfer_l2": 1e4, "emd": 1e2, "f1": 1.0}


def mirrored(scan: Cloud, points: int, index: int) -> Cloud:
    """The scan and its image in the plane x = 0, thinned out."""
    both = np.concatenate([scan, scan * np.array([-1, 1, 1], np.float32)])
    return resample(both, points, stream(0, index, "mirrored", 0))


def nearest(domain: Completion, scan: Cloud, sketch: int = 128) -> Cloud:
    """The training shape that is nearest to a part of the scan, one-sided."""
    rows = domain.shapes.rows("train", domain.validation)
    query = torch.from_numpy(scan[:sketch])[None]
    gaps = [
        float(knn(query, torch.from_numpy(domain.shapes[int(r)][::8].copy())[None])[0].mean())
        for r in rows
    ]
    best = domain.shapes[int(rows[int(np.argmin(gaps))])]
    return resample(best, domain.points, stream(0, 0, "nearest", 0))


def judge(name: str, clouds: Sequence[Cloud], truth: Sequence[Cloud], seconds: float) -> list:
    """One row of the table."""
    found = evaluate(clouds, truth)
    cells = [f"{unit * float(found[key]):.3f}" for key, unit in UNITS.items()]
    return [name, *cells, f"{seconds / len(clouds):.2f}"]


def rows(domain: Completion, run: Path | None, n: int, steps: Sequence[int]) -> list[list]:
    """Everything that is compared, on the first ``n`` test scans."""
    scans = [domain.test[i].partial[:, :3] for i in range(n)]
    truth = [domain.test[i].complete for i in range(n)]
    table = [judge("the scan", scans, truth, 0.0)]
    reflected = [mirrored(scan, domain.points, i) for i, scan in enumerate(scans)]
    table.append(judge("scan and mirror image", reflected, truth, 0.0))
    start = time.perf_counter()
    found = [nearest(domain, scan) for scan in scans]
    table.append(judge("nearest training shape", found, truth, time.perf_counter() - start))
    if run is None:
        return table
    model = load(run)
    for nfe in steps:
        start = time.perf_counter()
        clouds = [
            model.complete(scan, points=domain.points, frame="given", steps=nfe, seed=0)[0]
            for scan in scans
        ]
        table.append(judge(f"model, {nfe} steps", clouds, truth, time.perf_counter() - start))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--n", type=int, default=32)
    parser.add_argument("--points", type=int, default=2048)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20, 50])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    domain = Completion(given.data, given.points, Scanner(points=given.points))
    columns = ["completion", "Chamfer-L2 x1e4", "EMD x1e2", "F1", "seconds each"]
    n = min(given.n, len(domain.test))
    table = rows(domain, given.run, n, given.steps)
    result = {"n": n, "points": given.points, "columns": columns, "rows": table}
    publish(given.out, "completion", result, markdown(columns, table))


if __name__ == "__main__":
    main()
