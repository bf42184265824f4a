"""Errors of GFN2-xTB against the labels of QM9 on validation molecules that no line was fitted
to: as the programs give it, by the shipped lines, and, for scale, of guessing the training mean.

    python benchmarks/oracles.py --data FOLDER [--n 1000] [--relaxed 0] [--network RUN] [--seed 1]
        [--small] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import markdown, publish
from scipy.stats import spearmanr

from molediff import xtb
from molediff.geometric.data import MoleculeData
from molediff.geometric.predicting import NetworkOracle
from molediff.oracles import labelled, program_versions, shipped, table
from shared.metrics import Estimate, mean


def rows(
    data: MoleculeData, n: int, seed: int, relax: bool, network: str | None = None
) -> list[dict[str, Any]]:
    """One row per property."""
    lines = shipped(relax).lines
    names = [name for name in lines if name in data.property_names]
    molecules = list(labelled(data.subset("valid"), names, n, seed))
    started = time.perf_counter()
    found = table(xtb.stream(molecules, relax=relax))
    seconds = (time.perf_counter() - started) / len(molecules)
    predicted = NetworkOracle.load(network)(molecules) if network else {}
    out = []
    for name in names:
        raw, guess = found[name], float(data.statistics[name]["mean"])
        good = np.isfinite(raw)
        labels = np.array([m.properties[name] for m in molecules])
        estimates = {"mean_guess": guess, "raw": raw, "calibrated": lines[name](raw)}
        estimates |= {"network": predicted[name]} if name in predicted else {}
        errors = {key: np.abs(value - labels)[good] for key, value in estimates.items()}
        out.append({
            "property": name, "unit": lines[name].unit, "relaxed": relax,
            "n": len(molecules), "failed": int((~good).sum()), "seed": seed,
            "mae": {key: mean(error).as_json() for key, error in errors.items()},
            "spearman": float(spearmanr(raw[good], labels[good]).statistic),
            "seconds_per_molecule": seconds,
        })  # fmt: skip
    return out


def markdown_table(found: Sequence[dict[str, Any]]) -> str:
    def cell(estimate: dict[str, Any] | None) -> str:
        if estimate is None:
            return ""
        value = Estimate(**estimate)
        return f"{value.value:.3g} ({value.low:.3g}-{value.high:.3g})"

    columns = (
        "property", "unit", "geometry", "n", "training mean", "xTB", "xTB calibrated",
        "network", "rank correlation of xTB",
    )  # fmt: skip
    return markdown(
        columns,
        [
            (
                row["property"],
                row["unit"],
                "relaxed" if row["relaxed"] else "B3LYP",
                row["n"] - row["failed"],
                *(cell(row["mae"].get(k)) for k in ("mean_guess", "raw", "calibrated", "network")),
                row["spearman"],
            )
            for row in found
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--data", required=True, help="prepared data set with labels")
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--relaxed", type=int, default=0, help="molecules to relax first as well")
    parser.add_argument("--network", help="run or pretrained name of a property network")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--small", action="store_true", help="a few molecules")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.small:
        args.n, args.relaxed = 4, 2
    data = MoleculeData(args.data)
    found = rows(data, args.n, args.seed, relax=False, network=args.network)
    if args.relaxed:
        found += rows(data, args.relaxed, args.seed, relax=True)
    result = {"data": data.info["fingerprint"], "programs": program_versions(), "rows": found}
    publish(args.out, "oracles", result, markdown_table(found))


if __name__ == "__main__":
    main()
