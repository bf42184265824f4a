"""Similarity to given structures by the protocol of EEGSDE: molecules with as many atoms as
held-out ones, drawn to their fingerprints by an energy (Bao et al. 2023, Sec. 5.3).

    python benchmarks/similarity.py --data FOLDER [--run qm9] [--fingerprints qm9_fingerprint]
        [--strengths 0,0.5,2] [--n 1000] [--steps 50] [--particles 1] [--seed 0] [--small]
        [--out FOLDER]

With particles, which share the calls, so many tries compete for every molecule, by validity and
then by the energy.
``--data``, a prepared QM9, holds the targets. The similarity of what is no molecule is 0. Rows of
the same weights that the folder has already are kept.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Rows, markdown, weights
from tries import generate

import molediff
from molediff import Molecule, evaluate
from molediff.bonds import perceive
from molediff.fingerprints import fingerprint, tanimoto
from molediff.geometric.data import MoleculeData
from molediff.geometric.domain import Molecules
from molediff.geometric.energies import fingerprint_energy
from molediff.geometric.fingerprints import FingerprintMolecules
from molediff.geometric.predicting import Predictor
from shared.domains import Batch
from shared.guidance import Guided, Term
from shared.metrics import mean
from shared.models import Model
from shared.randomness import stream


class Resembling(Molecules):
    """Molecules with as many atoms as held-out ones, whose fingerprints are the targets."""

    def __init__(self, domain: Molecules, data: MoleculeData, kind: str) -> None:
        self.__dict__.update(vars(domain))
        held_out = data.subset("valid")
        texts = held_out.smiles()
        self.rows = [i for i, text in enumerate(texts) if text]
        self.texts, self.sizes_of, self.kind = texts, held_out.sizes, kind

    def chosen(self, seed: int, indices: Sequence[int]) -> list[int]:
        """Rows of the held-out molecules."""
        count = len(self.rows)
        return [self.rows[stream(seed, i, "similar", 0).integers(count)] for i in indices]

    def bits(self, seed: int, indices: Sequence[int]) -> np.ndarray:
        """[b, 1024] fingerprints to be reached."""
        rows = self.chosen(seed, indices)
        return np.stack([fingerprint(self.texts[row], self.kind) for row in rows])

    def template(self, seed: int, indices: Sequence[int], **request: Any) -> Batch:
        batch = self._blank([int(self.sizes_of[row]) for row in self.chosen(seed, indices)])
        bits = torch.from_numpy(self.bits(seed, indices).astype(np.float32))
        free = {k: v.expand(len(bits), -1) for k, v in (self.null_condition() or {}).items()}
        return Batch(batch.state, batch.mask, {**free, "bits": bits})


def row(
    model: Model[Any], predictor: Predictor, settings: dict[str, Any], args: argparse.Namespace
) -> dict[str, Any]:
    """Mean Tanimoto similarity to the targets at one strength; 0 for what is no molecule."""
    kind = predictor.domain.kind
    domain = Resembling(model.domain, MoleculeData(args.data), kind)
    found: Any = model.denoiser
    energy, strength = fingerprint_energy(predictor.network.predict, "bits"), settings["strength"]
    if strength:
        found = Guided(found, model.denoiser.process, [Term(energy, strength)])
    made, calls, seconds = generate(
        model, domain, found, [Term(energy)],
        n=args.n, steps=args.steps, tries=args.particles, seed=args.seed, batch=args.batch,
    )  # fmt: skip
    goals, alike = domain.bits(args.seed, range(args.n)), np.zeros(args.n)
    for i, molecule in enumerate(made):
        if not isinstance(molecule, Molecule):
            continue
        try:
            alike[i] = tanimoto(fingerprint(perceive(molecule, "rdkit"), kind), goals[i])
        except ValueError:  # no bonds that make sense
            continue
    scores = evaluate(made)
    return {
        **settings, "kind": kind, "nfe": calls, "seconds": seconds,
        "tanimoto": mean(alike).as_json(),
        "molecule_stability": scores["molecule_stability"].as_json(),
    }  # fmt: skip


def order(r: Mapping[str, Any]) -> tuple[Any, ...]:
    return (r["particles"], r["strength"], r["n"], r["calls"])


def table(rows: Sequence[dict[str, Any]]) -> str:
    columns = ("fingerprint", "energy", "tries", "calls", "n", "Tanimoto", "95 % interval",
               "molecules stable %")  # fmt: skip
    return markdown(
        columns,
        [
            (
                *(r[key] for key in ("kind", "strength", "particles", "nfe", "n")),
                r["tanimoto"]["value"],
                f"{r['tanimoto']['low']:.3f}-{r['tanimoto']['high']:.3f}",
                round(100 * r["molecule_stability"]["value"], 1),
            )
            for r in rows
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--run", default="qm9")
    parser.add_argument("--fingerprints", default="qm9_fingerprint")
    parser.add_argument("--data", required=True)
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--strengths", default="0,0.5,2")
    parser.add_argument("--particles", type=int, default=1, help="tries per molecule")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--small", action="store_true", help="seconds instead of an hour")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.small:
        args.n, args.steps, args.strengths = 4, 4, "0,0.5"
    model, predictor = molediff.load(args.run), Predictor.load(args.fingerprints)
    if not isinstance(predictor.domain, FingerprintMolecules):
        raise SystemExit(f"--fingerprints {args.fingerprints} predicts no fingerprints.")
    subject = {
        "run": args.run, "weights": weights(model.denoiser),
        "fingerprints": args.fingerprints, "energy": weights(predictor.network),
    }  # fmt: skip
    rows = Rows(args.out, "similarity", subject, order, table)
    for strength in map(float, args.strengths.split(",")):
        settings = {
            "strength": strength, "particles": args.particles, "n": args.n, "calls": args.steps,
            "seed": args.seed,
        }  # fmt: skip
        if not rows.has(**settings):
            rows.add(row(model, predictor, settings, args))


if __name__ == "__main__":
    main()
