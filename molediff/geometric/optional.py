"""Scores that lean on packages of the ``chemistry`` extra: FCD, PoseBusters and GFN2-xTB."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from molediff.bonds import perceive
from molediff.molecules import Molecule
from molediff.xtb import ERRORS, STEPS, relaxed
from shared.extras import need
from shared.metrics import Estimate, mean, proportion

RESAMPLES = 20
KCAL_PER_EV = 23.060548


def fcd(smiles: Sequence[str], reference: Sequence[str]) -> Estimate:
    """Frechet ChemNet distance (Preuer et al. 2018) with the network and weights of fcd_torch. It
    falls with the sample size: compare equal n only. The interval is 1.96 standard deviations of
    resamples of the generated set. NaN below two molecules on either side.

    Raises:
        ModuleNotFoundError: fcd_torch is not installed.
    """
    package = need("fcd_torch", "extras: 'fcd'", "chemistry")
    if min(len(smiles), len(reference)) < 2:
        return Estimate(np.nan, len(smiles), np.nan, np.nan)
    network = package.FCD(device="cpu")
    x, y = (network.get_predictions(list(s)).astype(np.float64) for s in (smiles, reference))
    centre, root = y.mean(0), _root(np.cov(y.T))
    value = frechet(x, centre, root)
    rng = np.random.default_rng(0)
    draws = [frechet(x[rng.integers(0, len(x), len(x))], centre, root) for _ in range(RESAMPLES)]
    half = 1.96 * float(np.std(draws, ddof=1))
    return Estimate(value, len(x), max(0.0, value - half), value + half)


def frechet(x: np.ndarray, centre: np.ndarray, root: np.ndarray) -> float:
    """|m - m'|^2 + tr(S + S' - 2 (S'^1/2 S S'^1/2)^1/2) of samples x [n, d] and a reference with
    mean ``centre`` [d] and square root ``root`` [d, d] of its covariance."""
    covariance = np.cov(x.T)
    eigenvalues = np.linalg.eigvalsh(root @ covariance @ root)
    traces = np.trace(covariance) + np.square(root).sum()
    overlap = 2 * np.sqrt(np.clip(eigenvalues, 0, None)).sum()
    return float(np.square(x.mean(0) - centre).sum() + traces - overlap)


def _root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    return np.asarray((vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T)


def posebusters(molecules: Sequence[Molecule], perception: str = "rdkit") -> Estimate:
    """Molecules that pass every intramolecular check of PoseBusters (Buttenschoen et al. 2024,
    configuration ``mol``). Those without positions or sensible bonds fail. A second per molecule,
    and up to minutes for a strained cage, whose conformers RDKit finds hard to embed.

    Raises:
        ModuleNotFoundError: posebusters is not installed.
    """
    package = need("posebusters", "extras: 'posebusters'", "chemistry")
    ready = []
    for molecule in molecules:
        try:
            known = molecule if molecule.bonds is not None else perceive(molecule, perception)
            if known.positions is not None:
                ready.append(known.to_rdkit())
        except ValueError:
            continue
    if not ready:
        return proportion(0, len(molecules))
    report = package.PoseBusters(config="mol").bust(ready)
    return proportion(int(report.all(axis=1).sum()), len(molecules))


def strain(molecules: Sequence[Molecule], steps: int = STEPS) -> dict[str, Estimate]:
    """``strain``: energy in kcal/mol that a geometry gives off when it relaxes under GFN2-xTB
    (Bannwarth et al. 2019; tblite and ase), mean over those that converge within ``steps``;
    ``strain_relaxed``: how many do, among all.

    Raises:
        ModuleNotFoundError: tblite or ase is not installed.
    """
    for module in ("tblite.ase", "ase.optimize"):
        need(module, "extras: 'strain'", "chemistry")
    energies = []
    for molecule in molecules:
        with suppress(*ERRORS):
            energies.append(KCAL_PER_EV * relaxed(molecule, steps)[1])
    return {
        "strain": mean(energies),
        "strain_relaxed": proportion(len(energies), len(molecules)),
    }
