"""Property guidance by the protocol of EDM and EEGSDE: every molecule gets a target and a size
drawn jointly from labelled data, and an oracle trained on other labels says how far it missed.

    python benchmarks/design.py [--run qm9] [--data FOLDER] [--n 1000] [--steps 50]
        [--properties mu,alpha,homo,lumo,gap,cv] [--pairs gap+mu,mu+cv] [--settings 0:1,1:1,0:2]
        [--particles 1] [--seed 0] [--small] [--out FOLDER]

A setting is the strength of the energies and the scale of classifier-free guidance: 0:1 is the
plain conditional model, 1:1 EEGSDE with l = 1. With particles, which share the calls, so many
tries compete for every molecule, by validity and then by the energies, also where these do not
guide; the oracle never chooses. ``--steps 100 --particles 4 --settings 0:2`` is the default of
``molediff design``.

U: the oracle against shuffled targets. L: the oracle against the labels of held-out molecules.
Closure: (U - MAE) / (U - L), which compares across oracles. All decoded molecules count, valid or
not, as published. ``--data``, a prepared QM9, gives U and the #atoms baseline. Rows of the same
weights that the folder has already are kept, and several processes may fill one table.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Rows, markdown, weights
from tries import generate

import molediff
from molediff import evaluate
from molediff.design.judging import Known
from molediff.design.plan import companion
from molediff.design.run import oracles
from molediff.geometric.data import MoleculeData
from molediff.geometric.domain import Molecules
from molediff.geometric.energies import property_energy
from molediff.geometric.predicting import Predictor
from shared.domains import Batch
from shared.guidance import ClassifierFree, Guided, Term
from shared.metrics import mean
from shared.models import Model
from shared.randomness import stream

PROPERTIES = ("mu", "alpha", "homo", "lumo", "gap", "cv")
PUBLISHED = {  # mean absolute errors: U, EEGSDE, L (Bao et al. 2023; meV as eV)
    "mu": (1.613, 0.777, 0.043),
    "alpha": (8.98, 2.50, 0.09),
    "cv": (6.879, 0.941, 0.040),
    "homo": (0.645, 0.302, 0.039),
    "lumo": (1.457, 0.447, 0.036),
    "gap": (1.464, 0.487, 0.065),
}
DEFAULT = {"strength": 0.0, "condition": 2.0, "particles": 4, "calls": 100}
SHORT = (
    "property", "n", "MAE", "95 % interval", "closure %", "EEGSDE closure %", "xTB MAE",
    "valid %", "molecules stable %", "novel %",
)  # fmt: skip


class Drawn(Molecules):
    """Sizes and targets drawn together from labelled training molecules."""

    def __init__(self, domain: Molecules, names: Sequence[str]) -> None:
        self.__dict__.update(vars(domain))
        self.wanted = [self.properties.index(name) for name in names]

    def drawn(self, seed: int, indices: Sequence[int]) -> np.ndarray:
        """[b, 1 + k] sizes and properties."""
        known = np.array(self.statistics()["known"])
        return known[[stream(seed, i, "design", 0).integers(len(known)) for i in indices]]

    def template(self, seed: int, indices: Sequence[int], **request: Any) -> Batch:
        rows = self.drawn(seed, indices)
        values = self.standardise(rows[:, 1:])
        context = np.full_like(values, np.nan)
        context[:, self.wanted] = values[:, self.wanted]
        batch = self._blank([int(n) for n in rows[:, 0]])
        goals = {
            f"goal_{self.properties[k]}": torch.from_numpy(values[:, k].copy())
            for k in self.wanted
        }
        return Batch(batch.state, batch.mask, {"context": torch.from_numpy(context), **goals})


@dataclass(frozen=True)
class Bounds:
    """U, the #atoms baseline and L of one property."""

    shuffled: float
    atoms: float
    oracle: float

    def closure(self, error: float) -> float:
        return (self.shuffled - error) / (self.shuffled - self.oracle)


def bounds(data: MoleculeData, oracle: Any, name: str) -> Bounds:
    """On the labelled validation molecules; the baseline's means come from training molecules."""
    train, valid = data.subset("train"), data.subset("valid")
    x, y = train.sizes, train.column(name)
    known = ~np.isnan(y)
    averages = {n: y[known & (x == n)].mean() for n in np.unique(x[known])}
    targets = valid.column(name)
    rows = np.flatnonzero(~np.isnan(targets))
    targets, sizes = targets[rows], valid.sizes[rows]
    shuffled = stream(0, 0, "shuffle", 0).permutation(targets)
    guess = np.array([averages.get(n, y[known].mean()) for n in sizes])
    return Bounds(
        float(np.abs(targets - shuffled).mean()),
        float(np.abs(targets - guess).mean()),
        oracle.accuracy[name].mae.value,
    )


def energy(energies: Predictor, name: str, strength: float) -> Term:
    """The energy of one property, told its target molecule by molecule."""
    column = energies.names.index(name)
    predict = energies.network.predict
    return Term(property_energy(predict, energies.statistics, column, f"goal_{name}"), strength)


def row(
    model: Model[Any],
    settings: dict[str, Any],
    energies: Predictor,
    judges: dict[str, Any],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """One setting: errors by every oracle, stability, novelty."""
    names, strength = settings["properties"], settings["strength"]
    domain = Drawn(model.domain, names)
    denoise: Any = model.denoiser
    if settings["condition"] != 1.0:
        null = domain.null_condition()
        denoise = ClassifierFree(denoise, denoise.process, null, settings["condition"])
    terms = [energy(energies, name, strength or 1.0) for name in names]
    if strength:
        denoise = Guided(denoise, model.denoiser.process, terms)
    made, calls, seconds = generate(
        model, domain, denoise, terms,
        n=args.n, steps=args.steps, tries=args.particles, seed=args.seed, batch=args.batch,
    )  # fmt: skip
    wanted = domain.drawn(args.seed, range(args.n))[:, 1:]
    errors: dict[str, Any] = {}
    for short, judge in judges.items():
        found = judge(made)
        for name in names:
            if name in judge.accuracy:
                error = np.abs(found[name] - wanted[:, domain.properties.index(name)])
                errors[f"{name}_{short}"] = mean(error[np.isfinite(error)]).as_json()
    scores = evaluate(made, args.known)
    keys = ("atom_stability", "molecule_stability", "validity_valence", "novelty_valence")
    return {
        **settings, "nfe": calls, "seconds": seconds, "errors": errors,
        "scores": {key: scores[key].as_json() for key in keys if key in scores},
    }  # fmt: skip


def order(r: Mapping[str, Any]) -> tuple[Any, ...]:
    names = r["properties"]
    setting = (r["particles"], r["strength"], r["condition"], r["n"], r["calls"])
    return (len(names), PROPERTIES.index(names[0]), names, *setting)


def line(r: Mapping[str, Any], name: str, limits: Mapping[str, Bounds]) -> dict[str, Any]:
    """What the table says of one property of a row, by column."""
    error, xtb = r["errors"][f"{name}_network"], r["errors"].get(f"{name}_xtb", {})
    limit, told = limits.get(name), "+".join(r["properties"])
    u, ours, low = PUBLISHED[name]

    def percent(key: str) -> float | None:
        value = r["scores"].get(key, {}).get("value")
        return None if value is None else round(100 * value, 1)

    return {
        "property": name if told == name else f"{name} ({told})",
        "energy": r["strength"], "condition": r["condition"], "tries": r["particles"],
        "calls": r["nfe"], "n": r["n"], "MAE": error["value"],
        "95 % interval": f"{error['low']:.3g}-{error['high']:.3g}",
        "U": limit and limit.shuffled, "#atoms": limit and limit.atoms,
        "L": limit and limit.oracle,
        "closure %": limit and round(100 * limit.closure(error["value"]), 1),
        "EEGSDE closure %": round(100 * (u - ours) / (u - low), 1) if told == name else None,
        "xTB MAE": xtb.get("value"), "valid %": percent("validity_valence"),
        "molecules stable %": percent("molecule_stability"), "novel %": percent("novelty_valence"),
    }  # fmt: skip


def table(rows: Sequence[Mapping[str, Any]], limits: Mapping[str, Bounds]) -> str:
    """The default of ``molediff design`` in short, then every setting, folded away."""
    usual = [r for r in rows if DEFAULT.items() <= r.items() and len(r["properties"]) == 1]
    lines = [line(r, name, limits) for r in rows for name in r["properties"]]
    every = _markdown(lines, lines[0] if lines else ())
    if not usual:
        return every
    short = _markdown([line(r, r["properties"][0], limits) for r in usual], SHORT)
    summary = f"<summary>All {len(rows)} settings</summary>"
    return f"{short}\n<details>\n{summary}\n\n{every}\n</details>\n"


def _markdown(lines: Sequence[Mapping[str, Any]], columns: Iterable[str]) -> str:
    names = tuple(columns)
    return markdown(names, [[found[name] for name in names] for found in lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--run", default="qm9")
    parser.add_argument("--energies", default="auto")
    parser.add_argument("--oracle", default="auto")
    parser.add_argument("--data", help="prepared QM9, for U and the #atoms baseline")
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--properties", default=",".join(PROPERTIES))
    parser.add_argument("--pairs", default="")
    parser.add_argument("--settings", default="0:1,1:1,0:2", help="strength:condition, ...")
    parser.add_argument("--particles", type=int, default=1, help="tries per molecule")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--xtb", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--small", action="store_true", help="seconds instead of hours")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.small:
        args.n, args.steps, args.properties, args.settings = 4, 4, "gap", "1:2"
    model = molediff.load(args.run)
    energies = Predictor.load(companion(args.energies, model, "energy") or "")
    judges = oracles(model, args.oracle, "auto" if args.xtb else False)
    known = Known.of(model)
    args.known = None if known is None else known.smiles
    wanted = [name.split("+") for name in [*args.properties.split(","), *args.pairs.split(",")]]
    wanted = [names for names in wanted if names != [""]]
    limits = {}
    if args.data:
        data = MoleculeData(args.data)
        limits = {name: bounds(data, judges["network"], name) for name in model.domain.properties}
    subject = {"run": args.run, "weights": weights(model.denoiser)}
    rows = Rows(args.out, "design", subject, order, lambda rows: table(rows, limits))
    for names, setting in product(wanted, args.settings.split(",")):
        strength, condition = map(float, setting.split(":"))
        settings = {
            "properties": names, "strength": strength, "condition": condition,
            "n": args.n, "calls": args.steps, "particles": args.particles, "seed": args.seed,
        }  # fmt: skip
        if not rows.has(**settings):
            found = row(model, settings, energies, judges, args)
            rows.add(found, bounds={name: vars(b) for name, b in limits.items()})


if __name__ == "__main__":
    main()
