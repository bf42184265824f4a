"""How far the bond lengths and angles of molecules are from those of data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy.stats import wasserstein_distance

from molediff.bonds import perceive
from molediff.molecules import Molecule
from shared.metrics import Estimate

RESAMPLES = 30


@dataclass(frozen=True)
class Measurements:
    """One row per bond or angle: its ``kind``, its ``value`` and the number of its molecule."""

    kind: np.ndarray
    value: np.ndarray
    molecule: np.ndarray
    molecules: int


def shape_distances(
    molecules: Sequence[Molecule], reference: Sequence[Molecule], perception: str = "rdkit"
) -> dict[str, Estimate]:
    """``bond_length_distance`` (Angstrom) and ``bond_angle_distance`` (degrees): Wasserstein-1
    distance per kind of bond (two elements and the order) or angle (three elements), averaged with
    the frequencies of the kinds in the reference, over kinds that both sets have; NaN where there
    is none. n counts bonds or angles. The interval is 1.96 standard deviations of resamples of
    the generated molecules. Molecules without positions or sensible bonds are left out.
    """
    found, wanted = (
        [m for m in (_bonded(x, perception) for x in group) if m is not None]
        for group in (molecules, reference)
    )
    return {
        "bond_length_distance": distance(_lengths(found), _lengths(wanted)),
        "bond_angle_distance": distance(_angles(found), _angles(wanted)),
    }


def distance(found: Measurements, wanted: Measurements) -> Estimate:
    """Frequency-weighted mean of Wasserstein-1 distances over kinds, with its interval."""
    pairs = []
    for kind, count in zip(*np.unique(wanted.kind, return_counts=True), strict=True):
        rows = np.nonzero(found.kind == kind)[0]
        if rows.size:
            pairs.append((int(count), rows, wanted.value[wanted.kind == kind]))
    if not pairs:
        return Estimate(np.nan, 0, np.nan, np.nan)

    def weighted(copies: np.ndarray) -> float:
        total = weight = 0.0
        for count, rows, values in pairs:
            weights = copies[found.molecule[rows]]
            if weights.sum() > 0:
                total += count * wasserstein_distance(found.value[rows], values, weights)
                weight += count
        return total / weight if weight else np.nan  # a resample without any of the kinds

    value = weighted(np.ones(found.molecules))
    rng, m = np.random.default_rng(0), found.molecules
    draws = [weighted(rng.multinomial(m, np.full(m, 1 / m))) for _ in range(RESAMPLES)]
    half = 1.96 * float(np.nanstd(draws, ddof=1))
    return Estimate(value, len(found.value), max(0.0, value - half), value + half)


def _bonded(molecule: Molecule, perception: str) -> Molecule | None:
    if molecule.positions is None:
        return None
    try:
        known = molecule if molecule.bonds is not None else perceive(molecule, perception)
        return known.aromatised()
    except ValueError:
        return None


def _lengths(molecules: Sequence[Molecule]) -> Measurements:
    kinds, values, owners = [], [], []
    for number, molecule in enumerate(molecules):
        x, pairs, orders = _arrays(molecule)
        z = np.sort(molecule.atomic_numbers[pairs].astype(np.int64), axis=1)
        kinds.append((z[:, 0] * 128 + z[:, 1]) * 8 + orders)
        values.append(np.linalg.norm(x[pairs[:, 0]] - x[pairs[:, 1]], axis=1))
        owners.append(np.full(len(pairs), number))
    return _joined(kinds, values, owners, len(molecules))


def _angles(molecules: Sequence[Molecule]) -> Measurements:
    kinds, values, owners = [], [], []
    for number, molecule in enumerate(molecules):
        x, pairs, _ = _arrays(molecule)
        neighbours: dict[int, list[int]] = {}
        for i, j in pairs.tolist():
            neighbours.setdefault(i, []).append(j)
            neighbours.setdefault(j, []).append(i)
        triples = [
            (a, centre, b)
            for centre, around in neighbours.items()
            for a, b in combinations(around, 2)
        ]
        index = np.array(triples, dtype=np.int64).reshape(-1, 3)
        u, v = x[index[:, 0]] - x[index[:, 1]], x[index[:, 2]] - x[index[:, 1]]
        lengths = np.linalg.norm(u, axis=1) * np.linalg.norm(v, axis=1)
        cosine = np.divide((u * v).sum(1), lengths, out=np.ones(len(u)), where=lengths > 0)
        z = molecule.atomic_numbers[index].astype(np.int64)
        ends = np.sort(z[:, [0, 2]], axis=1)
        kinds.append((z[:, 1] * 128 + ends[:, 0]) * 128 + ends[:, 1])
        values.append(np.degrees(np.arccos(np.clip(cosine, -1, 1))))
        owners.append(np.full(len(index), number))
    return _joined(kinds, values, owners, len(molecules))


def _arrays(molecule: Molecule) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if molecule.positions is None or molecule.bonds is None or molecule.orders is None:
        raise ValueError("shapes need positions and bonds")
    return molecule.positions.astype(np.float64), molecule.bonds, molecule.orders


def _joined(
    kinds: list[np.ndarray], values: list[np.ndarray], owners: list[np.ndarray], molecules: int
) -> Measurements:
    empty = np.zeros(0)
    return Measurements(
        np.concatenate([empty.astype(np.int64), *kinds]),
        np.concatenate([empty, *values]),
        np.concatenate([empty.astype(np.int64), *owners]),
        molecules,
    )
