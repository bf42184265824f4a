"""Stability of generated molecules against the number of denoiser calls, for several solvers and
time grids on one model.

    python benchmarks/molecules.py [--run qm9] [--n 1000] [--calls 10,15,20,25,50,100,250,1000]
        [--solver ddpm,ddim,...] [--grid time_uniform,log_snr] [--data FOLDER] [--seed 0] [--small]
        [--no-closed-shell] [--out FOLDER]

Rows of the same weights that the folder has already are kept. ``--data``, the training molecules,
is for Analytic-DPM, whose variance is estimated on them. ``--no-closed-shell`` lets the model make
radicals, with results of their own (molecules_radicals).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from common import Rows, markdown, weights
from rdkit import Chem
from rdkit.Chem import Draw

import molediff
from molediff import Molecule, evaluate
from molediff.geometric.closed_shell import ClosedShell
from molediff.geometric.domain import Molecules
from molediff.geometric.stability import valence_verdicts
from shared.models import Model
from shared.randomness import stream
from shared.solvers.ancestral import DDPM
from shared.variance import Gamma, estimate_gamma

SOLVERS = ("dpmpp_2m_sde", "dpmpp_2m", "ddim", "heun", "ddpm", "analytic_ddpm")
SCORES = ("atom_stability", "molecule_stability", "validity", "molecule_stability_valence")


def gamma(model: Model[Any], data: str, molecules: int = 512) -> dict[str, Gamma]:
    """E||eps_hat||^2 per field over training molecules, for the analytic variance."""
    training, _ = Molecules(data, properties=model.domain.properties).datasets()
    chosen = stream(0, 0, "benchmark", 0).permutation(training.lengths.size)[:molecules]
    records = sorted((training[int(i)] for i in chosen), key=lambda r: len(r.elements))
    batches = [model.domain.collate(records[k : k + 64]) for k in range(0, len(records), 64)]
    process = model.denoiser.process
    times = torch.linspace(0.0, 1.0, 41, dtype=torch.float64)[1:].tolist()
    return dict(estimate_gamma(model.denoiser, process, batches, times, 0))


def row(model: Model[Any], settings: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """One solver, grid and budget."""
    name = settings["solver"]
    solver: Any = DDPM(variance=args.gamma, cov_max=math.inf) if name == "analytic_ddpm" else name
    result = model.generate(
        settings["n"], solver=solver, grid=settings["grid"], steps=settings["calls"],
        seed=settings["seed"], batch=args.batch,
    )  # fmt: skip
    scores = evaluate(result.items)
    return {
        **settings, "nfe": result.summary.nfe, "seconds": result.summary.seconds,
        "scores": {key: scores[key].as_json() for key in SCORES if key in scores},
    }  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Molecules stable by solver and calls; then everything about the default solver and grid."""
    calls = sorted({r["calls"] for r in rows})
    lines: dict[tuple[Any, ...], dict[int, str]] = {}
    for r in rows:
        line = lines.setdefault((r["solver"], r["grid"], r["n"]), {})
        line[r["calls"]] = _percent(r["scores"]["molecule_stability"])
    matrix = markdown(
        ("solver", "grid", "n", *(f"{c} calls" for c in calls)),
        [(*line, *(cells.get(c) for c in calls)) for line, cells in lines.items()],
    )
    default = {"solver": Molecules.solver, "grid": Molecules.grid}
    own = [r for r in rows if default.items() <= r.items()] or rows[:1]
    names = (f"{s.replace('_', ' ')} %" for s in SCORES)
    full = markdown(
        ("calls", "n", *names),
        [(r["calls"], r["n"], *(_percent(r["scores"].get(s)) for s in SCORES)) for r in own],
    )
    return (
        f"Molecules stable (EDM's rule), %, seed {rows[0]['seed']}:\n\n{matrix}\n"
        f"{own[0]['solver']}, {own[0]['grid']}:\n\n{full}"
    )


def _percent(score: dict[str, Any] | None) -> str | None:
    """Per cent, and half the width of the 95 % interval."""
    if not score or score["value"] is None:
        return None
    return f"{100 * score['value']:.1f} ± {50 * (score['high'] - score['low']):.1f}"


def order(r: Mapping[str, Any]) -> tuple[Any, ...]:
    return (SOLVERS.index(r["solver"]), r["grid"], -r["n"], r["calls"])


def picture(model: Model[Any], path: Path, args: argparse.Namespace, most: int = 10) -> None:
    """The first ``most`` molecules of the seed that are valid by the corrected rule."""
    items = model.sample(min(args.n, 64), seed=args.seed, batch=args.batch)
    smiles = [
        s for s in valence_verdicts([m for m in items if isinstance(m, Molecule)]).smiles if s
    ]
    drawn = [Chem.MolFromSmiles(s) for s in smiles[:most]]
    if drawn:
        image = Draw.MolsToGridImage(drawn, molsPerRow=5, subImgSize=(220, 160))
        image.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--run", default="qm9", help="run folder or pretrained name")
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--calls", default="10,15,20,25,50,100,250,1000")
    parser.add_argument("--solver", default=",".join(SOLVERS))
    parser.add_argument("--grid", default=Molecules.grid)
    parser.add_argument("--data", help="prepared data set, for analytic_ddpm")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--closed-shell", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--small", action="store_true", help="seconds instead of hours")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.small:
        args.n, args.calls, args.solver = 8, "10", "ddim,dpmpp_2m"
    model = molediff.load(args.run)
    if isinstance(model.denoiser, ClosedShell) and not args.closed_shell:
        model.denoiser.odd.zero_()
    names = [s for s in args.solver.split(",") if args.data or s != "analytic_ddpm"]
    args.gamma = gamma(model, args.data) if "analytic_ddpm" in names else None
    subject = {
        "run": args.run, "weights": weights(model.denoiser), "closed_shell": args.closed_shell,
    }  # fmt: skip
    title = "molecules" if args.closed_shell else "molecules_radicals"
    rows = Rows(args.out, title, subject, order, table)
    for name, grid, calls in product(names, args.grid.split(","), args.calls.split(",")):
        settings = {
            "solver": name, "grid": grid, "calls": int(calls), "n": args.n, "seed": args.seed,
        }  # fmt: skip
        if not rows.has(**settings):
            rows.add(row(model, settings, args))
    picture(model, args.out / f"{title}.png", args)


if __name__ == "__main__":
    main()
