"""FID of generated images against the number of denoiser calls, for many solvers on one model.

    python benchmarks/images.py [--run digits] [--n 1797] [--calls 5,6,8,...,1000]
        [--solver ddpm,ddim,...] [--published NAME] [--seed 0] [--small] [--out FOLDER]

Analytic-DPM's table and the SN and NPR heads are estimated on training images first. FID is on the
features of the model's domain (``domain.features``), against its training split; compare at equal
n only. ``--published`` puts published values beside, where the model is the published one. Run
again with the same ``--out``, it goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Rows, markdown, weights

from shared.batches import Batches
from shared.domains import Invalid
from shared.heads import new_head, train_head
from shared.images import files
from shared.images.domain import Images
from shared.images.quality import frechet_distance
from shared.metrics import Estimate
from shared.models import Model, load
from shared.resampling import jackknife
from shared.sampling import Summary
from shared.solvers import (
    DDIM,
    DDPM,
    DEIS,
    DPMSolverMultistep,
    DPMSolverSDE,
    Heun,
    KarrasTimes,
    LogSNRTimes,
    PowerTimes,
    TableTimes,
    UniPC,
)
from shared.variance import estimate_gamma

CALLS = (5, 6, 8, 10, 12, 15, 20, 25, 50, 100, 1000)
FEW = CALLS[:-2]  # where solvers of high order are measured by default
HIGH_ORDER = ("DPM-Solver++(2M)", "DPM-Solver++(3M)", "UniPC-3", "DEIS")
OPTIMAL = ("Analytic-DDPM", "SN-DDPM", "NPR-DDPM")

# FID on CIFAR-10, 50,000 samples. Analytic-DPM and Extended-Analytic-DPM (Bao et al. 2022a, b),
# linear schedule; DPM-Solver-v3 (Zheng et al. 2023), Table 1.
PUBLISHED: dict[str, dict[str, dict[int, float]]] = {
    "cifar10_ddpm": {
        "DDPM": {10: 44.45, 25: 21.83, 50: 15.21, 100: 10.94},
        "Analytic-DDPM": {10: 34.26, 25: 11.60, 50: 7.25, 100: 5.40},
        "NPR-DDPM": {10: 32.35, 25: 10.55, 50: 6.18, 100: 4.52},
        "SN-DDPM": {10: 24.06, 25: 6.91, 50: 4.63, 100: 3.67},
        "DDIM": {10: 21.31, 25: 10.70, 50: 7.74, 100: 6.08},
        "Analytic-DDIM": {10: 14.00, 25: 5.81, 50: 4.04, 100: 3.55},
        "NPR-DDIM": {10: 13.34, 25: 5.38, 50: 3.95, 100: 3.53},
        "SN-DDIM": {10: 12.19, 25: 4.28, 50: 3.39, 100: 3.23},
    },
    "cifar10_score_sde": {
        "DEIS": {5: 15.37, 10: 4.17, 15: 3.37, 20: 2.86},
        "DPM-Solver++(3M)": {
            5: 28.53, 6: 13.48, 8: 5.34, 10: 4.01, 12: 4.04, 15: 3.32, 20: 2.90, 25: 2.76,
        },
        "UniPC-3": {
            5: 23.71, 6: 10.41, 8: 5.16, 10: 3.93, 12: 3.88, 15: 3.05, 20: 2.73, 25: 2.65,
        },
    },
    "cifar10_edm": {
        "Heun": {
            5: 320.80, 6: 103.86, 8: 39.66, 10: 16.57, 12: 7.59, 15: 4.76, 20: 2.51, 25: 2.12,
        },
        "DPM-Solver++(3M)": {
            5: 24.54, 6: 11.85, 8: 4.36, 10: 2.91, 12: 2.45, 15: 2.17, 20: 2.05, 25: 2.02,
        },
        "UniPC-3": {
            5: 23.52, 6: 11.10, 8: 3.86, 10: 2.85, 12: 2.38, 15: 2.08, 20: 2.01, 25: 2.00,
        },
    },
}  # fmt: skip


class Bench:
    """One model, and everything its solvers need."""

    def __init__(self, model: Model[Any], args: argparse.Namespace) -> None:
        self.model, self.args = model, args
        domain = model.domain
        assert isinstance(domain, Images)
        self.domain, self.process = domain, model.denoiser.process
        features = domain._features
        if features is None:
            raise SystemExit(
                "this model's domain has no features; train with domain.features=FILE"
            )
        self.features = features
        self.truth = features(domain.pictures[~domain.held_out])[0]

    @cached_property
    def table(self) -> bool:
        return hasattr(self.process.lead, "betas")

    def grid(self) -> Any:
        """Of the ancestral samplers."""
        return TableTimes("linear") if self.table else PowerTimes()

    @cached_property
    def gamma(self) -> Any:
        counts = [c for c in self.args.counts if c <= 100]
        times = sorted({t for c in counts for t in self.grid()(self.process.lead, c) if t > 0})
        batches = Batches(self.domain, self.process, self.domain.datasets()[0], 128, 0)
        chunks = [batches[k].batch for k in range(self.args.images // 128)]
        return estimate_gamma(self.model.denoiser, self.process, chunks, times)

    def head(self, kind: str) -> Any:
        """Trained once, in front of the first solver that needs it."""
        if kind not in self.heads:
            head = new_head(self.model.denoiser, self.domain, kind)
            batches = Batches(self.domain, self.process, self.domain.datasets()[0], 128, 1)
            train_head(head, batches, self.args.updates)
            self.heads[kind] = head
        return self.heads[kind]

    @cached_property
    def heads(self) -> dict[str, Any]:
        return {}

    def fid(
        self, solver: Any, grid: Any, calls: int, denoise: Any = None
    ) -> tuple[Estimate, Summary]:
        """FID of new samples against the training images."""
        result = self.model.generate(
            self.args.n,
            solver=solver,
            grid=grid,
            steps=calls,
            seed=self.args.seed,
            batch=256,
            denoise=denoise,
        )
        found = [item for item in result.items if not isinstance(item, Invalid)]
        points = self.features(np.stack(found))[0]
        return jackknife(lambda p: frechet_distance(p, self.truth), points), result.summary

    def score(self, name: str, calls: int) -> dict[str, Any]:
        make, grid, kind = SOLVERS[name]
        denoise = None if kind is None else self.head(kind)
        fid, made = self.fid(make(self), grid or self.grid(), calls, denoise)
        return {
            "solver": name, "calls": calls, "used": made.nfe, "n": made.ok,
            "seed": self.args.seed, "seconds": made.seconds, "fid": fid.as_json(),
        }  # fmt: skip


Row = tuple[Callable[[Bench], Any], Any, "str | None"]


def _optimal(kind: type, pixel: float) -> Callable[[Bench], Any]:
    return lambda b: kind(variance=b.gamma, clip_sigma_idx=1, clip_pixel=pixel)


def _head(kind: type, pixel: float) -> Callable[[Bench], Any]:
    return lambda b: kind(variance="head", clip_sigma_idx=1, clip_pixel=pixel)


SOLVERS: dict[str, Row] = {
    "DDPM": (lambda b: DDPM(), None, None),
    "Analytic-DDPM": (_optimal(DDPM, 2.0), None, None),
    "SN-DDPM": (_head(DDPM, 2.0), None, "sn"),
    "NPR-DDPM": (_head(DDPM, 2.0), None, "npr"),
    "DDIM": (lambda b: DDIM(), None, None),
    "Analytic-DDIM": (_optimal(DDIM, 1.0), None, None),
    "SN-DDIM": (_head(DDIM, 1.0), None, "sn"),
    "NPR-DDIM": (_head(DDIM, 1.0), None, "npr"),
    "DPM-Solver++(2M)": (lambda b: DPMSolverMultistep(points=2), LogSNRTimes(), None),
    "DPM-Solver++(3M)": (
        lambda b: DPMSolverMultistep(points=3, published=True),
        LogSNRTimes(),
        None,
    ),
    "SDE-DPM-Solver++(2M)": (lambda b: DPMSolverSDE(), LogSNRTimes(), None),
    "UniPC-3": (lambda b: UniPC(), LogSNRTimes(), None),
    "DEIS": (lambda b: DEIS(), LogSNRTimes(), None),
    "Heun": (lambda b: Heun(), KarrasTimes(), None),
}


def table(rows: Sequence[dict[str, Any]], args: argparse.Namespace) -> str:
    """FID by solver and calls; published values in brackets."""
    calls = sorted({r["calls"] for r in rows})
    known = PUBLISHED.get(args.published, {})
    lines = []
    for name in dict.fromkeys(r["solver"] for r in rows):
        cells = {r["calls"]: r["fid"]["value"] for r in rows if r["solver"] == name}
        line: list[Any] = [name]
        for c in calls:
            value = "" if c not in cells else f"{cells[c]:.3g}"
            line.append(f"{value} ({known[name][c]})" if c in known.get(name, {}) else value)
        lines.append(line)
    head = (
        f"FID of {args.run} on the features '{args.features}', n = {rows[0]['n']}, "
        f"seed {args.seed}, against its training images"
        + (f"; published in brackets ({args.published})" if known else "")
        + ":\n\n"
    )
    return head + markdown(("calls", *calls), lines)


def checks(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What has to hold: solvers of high order with 10 calls near DDPM with 1,000, and optimal
    variances ahead of plain DDPM."""
    fid = {(r["solver"], r["calls"]): r["fid"]["value"] for r in rows}
    long = fid.get(("DDPM", 1000))
    ratios = {n: fid[n, 10] / long for n in HIGH_ORDER if long and (n, 10) in fid}
    better = {
        f"{n} at {c}": fid[n, c] < fid["DDPM", c]
        for n in OPTIMAL
        for c in (10, 25, 50)
        if (n, c) in fid and ("DDPM", c) in fid
    }
    return {"high_order_10_over_ddpm_1000": ratios, "better_than_ddpm": better}


def order(r: Mapping[str, Any]) -> tuple[int, int]:
    return (list(SOLVERS).index(r["solver"]), r["calls"])


def wanted(name: str, args: argparse.Namespace) -> list[int]:
    ancestral = name in ("DDPM", "DDIM", *OPTIMAL, "Analytic-DDIM")
    longest = 1000 if name == "DDPM" else 100 if ancestral or args.all else max(FEW)
    return [c for c in args.counts if c <= longest]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--run", default="digits", help="run folder or pretrained name")
    parser.add_argument("--n", type=int, default=1797)
    parser.add_argument("--calls", default=",".join(map(str, CALLS)))
    parser.add_argument("--solver", default=",".join(SOLVERS))
    parser.add_argument("--all", action="store_true", help="every solver up to 100 calls")
    parser.add_argument("--images", type=int, default=512, help="for the table of Gamma")
    parser.add_argument("--updates", type=int, default=1500, help="of a variance head")
    parser.add_argument("--published", choices=sorted(PUBLISHED))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--small", action="store_true", help="seconds instead of an hour")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.small:
        args.n, args.calls, args.images, args.updates = 40, "5,10", 128, 2
        args.solver = "DDPM,Analytic-DDPM,SN-DDPM,DPM-Solver++(2M)"
    args.counts = [int(c) for c in args.calls.split(",")]
    bench = Bench(load(args.run), args)
    args.features = bench.features.name
    subject = {
        "run": args.run, "weights": weights(bench.model.denoiser), "updates": args.updates,
        "features": args.features, "n": args.n, "seed": args.seed,
    }  # fmt: skip
    rows = Rows(args.out, "images", subject, order, lambda rows: table(rows, args))
    for name in args.solver.split(","):
        for calls in wanted(name, args):
            if not rows.has(solver=name, calls=calls):
                found = bench.score(name, calls)
                rows.add(found, checks=checks([*rows.read(), found]))
    picture = bench.model.sample(100, seed=args.seed, steps=25)
    tiles = np.stack([item for item in picture if not isinstance(item, Invalid)])
    zoom = max(1, 40 // tiles.shape[1])
    (args.out / "images.png").write_bytes(files.png(tiles, columns=10, zoom=zoom))


if __name__ == "__main__":
    main()
