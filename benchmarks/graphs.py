"""Published tables of graph generation, from published GDSS checkpoints.

    python benchmarks/graphs.py CHECKPOINT --data DATA [--test-indices JSON] [--n N] [--seeds K]
        [--solver published,s4,pc,ddim,dpmpp_2m,unipc,heun,...] [--calls 100,200,2000]
        [--prior published|matched] [--small] [--out FOLDER]

DATA is what the model was trained on (any format of molediff.graphs.data, or SMILES): it gives
the numbers of nodes, the training set for novelty and the test set to compare with. Plain graphs
are compared in sets as large as the test set, as published; molecules all at once. Rows that the
folder has already are kept: the same command goes on where it stopped. --small takes few samples
and calls: it shows that the command works, and its figures mean nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Rows, markdown

from molediff.graphs import convert
from molediff.graphs.convert import Published
from molediff.graphs.models import graph_process, prior_std
from molediff.graphs.pairs import PairDomain
from shared import solvers
from shared.configuration import build
from shared.denoisers import Denoiser
from shared.process import Process
from shared.sampling import Memory
from shared.sampling import sample as run_sampling
from shared.solvers.base import Solver
from shared.solvers.grids import Grid

METRICS = {
    "graphs": ("degree", "clustering", "orbit", "average"),
    "molecular_graphs": ("valid_without_correction", "unique", "novel", "nspdk", "fcd"),
}
PUBLISHED: dict[str, dict[int, dict[str, float]]] = {
    "community_small": {100: {"average": 0.110}, 200: {"average": 0.104}, 400: {"average": 0.072},
                        1000: {"average": 0.061}, 2000: {"average": 0.046}},
    "ego_small": {50: {"average": 0.040}, 100: {"average": 0.031}, 200: {"average": 0.023},
                  500: {"average": 0.021}, 1000: {"average": 0.017}},
    "ENZYMES": {1000: {"average": 0.032}},
    "grid": {2000: {"average": 0.062}},
    "QM9": {2000: {"valid_without_correction": 0.9572, "unique": 0.9846, "fcd": 2.900}},
    "ZINC250k": {2000: {"valid_without_correction": 0.9701, "unique": 0.9964, "fcd": 14.656}},
}  # fmt: skip
"""Set -> denoiser calls of the published sampler -> what its authors report."""


def recipe(name: str, published: Published) -> tuple[Solver, Grid]:
    """A solver and the grid that goes with it."""
    if name == "published":
        settings = published.sampler
        return build(convert.solver_config(settings)), solvers.ScoreSDETimes(eps=settings["eps"])
    exact = solvers.DPMSolverMultistep
    langevin = solvers.Langevin(0.15, noise_scale=0.7)
    found: dict[str, Solver] = {
        "s4": solvers.SymmetricSplitting(langevin),
        "pc": solvers.PredictorCorrector(exact(points=1, eta=1.0), langevin),
        "sde": exact(points=1, eta=1.0, denoise_to_zero=True),
        "sde_2m": exact(points=2, eta=1.0, denoise_to_zero=True),
        "ddim": exact(points=1, denoise_to_zero=True),
        "dpmpp_2m": exact(points=2, denoise_to_zero=True),
        "unipc": solvers.UniPC(),
        "heun": solvers.Heun(),
    }
    if name not in found:
        raise SystemExit(f"--solver {name}: choose published, {', '.join(found)}.")
    return found[name], solvers.PowerTimes(t_end=1e-2)


def matched(process: Process, moments: Mapping[str, float]) -> Process:
    """The same process, started with the second moments of the data at t_max."""
    schedules = {name: part.schedule for name, part in process.fields.items()}
    prior = {name: prior_std(schedules[name], moments[name]) for name in schedules}
    return graph_process(schedules["nodes"], schedules["edges"], prior)


def scores(domain: PairDomain[Any], items: Sequence[Any]) -> list[dict[str, float]]:
    """Metrics of every set of items."""
    size = len(items)
    if domain.name == "graphs":
        size = min(size, len(domain.test_items or domain.training_items))
    sets = [items[k : k + size] for k in range(0, len(items) - size + 1, size)]
    keys = METRICS[domain.name]
    found = [domain.metrics(part) for part in sets]
    return [{key: float(values[key]) for key in keys if key in values} for values in found]


def row(
    published: Published,
    denoiser: Denoiser,
    domain: PairDomain[Any],
    settings: Mapping[str, Any],
    batch: int,
) -> dict[str, Any]:
    """One solver, budget and seed."""
    solver, grid = recipe(settings["solver"], published)
    process = denoiser.process
    if settings["prior"] == "matched":
        process = matched(process, domain.second_moments)
    sink = Memory()
    summary = run_sampling(
        *(denoiser, process, domain, settings["n"], solver, settings["calls"], grid),
        *(settings["seed"],),
        batch=batch,
        sink=sink,
    )
    items = [sink.items[i] for i in range(settings["n"])]
    made = {"nfe": summary.nfe, "seconds": summary.seconds, "sets": scores(domain, items)}
    return {**settings, "batch": batch, **made}


def table(name: str, rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> str:
    """Mean and standard deviation of a set, over all sets of all seeds."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for r in rows:
        groups.setdefault((r["solver"], r["prior"], r["nfe"], r["n"]), []).append(r)
    keys = [key for key in keys if any(key in s for r in rows for s in r["sets"])]
    lines = []
    for (solver, prior, calls, n), members in groups.items():
        sets = [s for r in members for s in r["sets"]]
        cells = [_cell([s[key] for s in sets if key in s]) for key in keys]
        lines.append((solver, prior, calls, f"{n} x {len(members)}", len(sets), *cells))
    for calls, values in PUBLISHED.get(name, {}).items():
        lines.append(
            ("as reported", "published", calls, "", "", *(values.get(key) for key in keys))
        )
    names = (key.replace("_", " ") for key in keys)
    return markdown(("solver", "start", "calls", "n x seeds", "sets", *names), lines)


def _order(r: Mapping[str, Any]) -> tuple[Any, ...]:
    return (r["solver"] != "published", r["solver"], r["prior"], r["nfe"], r["seed"])


def _cell(values: Sequence[float]) -> str:
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}" if values else ""


def load(arguments: argparse.Namespace) -> tuple[Published, Denoiser, PairDomain[Any]]:
    """The converted model, and its domain with the data."""
    published = convert.read(arguments.checkpoint)
    config = convert.full_config(published)["domain"]
    config.update(data=arguments.data)
    if published.name in convert.ELEMENTS:
        config.update(test_indices=arguments.test_indices)
    else:
        config.update(connected=False, features=int(published.config["data"]["max_feat_num"]))
    return published, convert.build_denoiser(published), build(config)


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    out.add_argument("checkpoint", type=Path)
    out.add_argument("--data", required=True)
    out.add_argument("--test-indices")
    out.add_argument("--n", type=int, help="samples per seed; default: as published")
    out.add_argument("--seeds", type=int, default=3)
    out.add_argument("--batch", type=int, default=1024)
    out.add_argument("--calls", help="denoiser calls, comma-separated; default: as published")
    out.add_argument("--solver", default="published", help="comma-separated")
    out.add_argument("--prior", default="published", choices=("published", "matched"))
    out.add_argument("--small", action="store_true", help="seconds instead of hours")
    out.add_argument("--threads", type=int, default=torch.get_num_threads())
    out.add_argument("--out", type=Path, default=Path("outputs/benchmarks"))
    return out


def main() -> None:
    args = parser().parse_args()
    torch.set_num_threads(args.threads)
    published, denoiser, domain = load(args)
    if args.n is None:
        args.n = 10_000 if domain.name != "graphs" else 6 * max(len(domain.test_items), 20)
    calls = [int(c) for c in (args.calls or "").split(",") if c]
    calls = calls or [convert.denoiser_calls(published.sampler)]
    if args.small:
        args.n, args.seeds, calls = max(len(domain.test_items[:20]), 8), 1, [6]
    rows = Rows(
        args.out,
        f"graphs_{published.name.lower()}",
        {"set": published.name},
        _order,
        lambda rows: table(published.name, rows, METRICS[domain.name]),
    )
    for solver, count, seed in product(args.solver.split(","), calls, range(args.seeds)):
        settings = {
            "solver": solver, "prior": args.prior, "calls": count, "n": args.n, "seed": seed,
        }  # fmt: skip
        if not rows.has(**settings):
            rows.add(row(published, denoiser, domain, settings, args.batch))


if __name__ == "__main__":
    main()
