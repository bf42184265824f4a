"""Which atoms and molecules have chemically sensible valences, by two rules.

``edm`` is the protocol of the published QM9 and GEOM-Drugs tables (Hoogeboom et al. 2022, section
5): bonds from a distance table, no charges, no aromatic bonds. ``valence`` judges a molecule by
its own bonds (RDKit's perception where it has none) with formal charges and aromatic bonds counted
apart, against the table of the corrected GEOM-Drugs evaluation (Nikitin et al. 2025), and wants
one fragment. Aromatic bonds are never added up as 1 or 1.5: that inflates published figures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from rdkit import Chem, rdBase

from molediff.bonds import edm_bond_orders, perceive
from molediff.molecules import AROMATIC, SYMBOLS, Molecule, canonical_smiles, sanitized
from molediff.tables import EDM_VALENCE_OK, REFERENCE_VALENCES

PAIRS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Verdicts:
    """One row per molecule: its number of atoms, how many are stable, whether all is well, the
    number of connected parts, and the canonical SMILES that tells molecules apart (None: not
    valid)."""

    atoms: np.ndarray
    stable_atoms: np.ndarray
    stable: np.ndarray
    fragments: np.ndarray
    smiles: tuple[str | None, ...]


def edm_verdicts(molecules: Sequence[Molecule], single_bonds: bool = False) -> Verdicts:
    """EDM's protocol. An atom is stable when its bond orders add up to the valence of its element;
    a molecule when all its atoms are; it is valid when RDKit sanitises the graph of these bonds,
    and its SMILES is that of the largest fragment, hydrogens listed.

    Args:
        molecules: with positions; bonds and charges they carry are ignored.
        single_bonds: SMILES from bonds of order one only, as EDM does for GEOM-Drugs.

    Raises:
        ValueError: a molecule without positions.
    """
    atoms = np.array([len(m) for m in molecules], dtype=np.int64)
    stable_atoms = np.zeros(len(molecules), dtype=np.int64)
    fragments = np.zeros(len(molecules), dtype=np.int64)
    smiles: list[str | None] = [None] * len(molecules)
    for rows in _chunks(atoms):
        numbers, positions = _padded([molecules[i] for i in rows])
        orders = edm_bond_orders(numbers, positions)
        ok = EDM_VALENCE_OK[numbers, np.minimum(orders.sum(-1, dtype=np.int64), 255)]
        stable_atoms[rows] = ok.sum(1)
        for row, i in enumerate(rows):
            n = int(atoms[i])
            mol = edm_graph(numbers[row, :n], orders[row, :n, :n], single_bonds)
            fragments[i] = len(Chem.GetMolFrags(mol))
            smiles[i] = _largest_smiles(mol)
    return Verdicts(atoms, stable_atoms, stable_atoms == atoms, fragments, tuple(smiles))


def edm_graph(
    atomic_numbers: np.ndarray, orders: np.ndarray, single_bonds: bool = False
) -> Chem.Mol:
    """Atoms and bonds and nothing else, not sanitised. Open valences are filled by hydrogens that
    are not listed, as in EDM.

    Args:
        atomic_numbers: [n].
        orders: [n, n] bond orders 0..3.
        single_bonds: every bond counts as single.
    """
    kinds = (Chem.BondType.SINGLE, Chem.BondType.DOUBLE, Chem.BondType.TRIPLE)
    mol = Chem.RWMol()
    for z in atomic_numbers.tolist():
        mol.AddAtom(Chem.Atom(z))
    i, j = np.nonzero(np.triu(orders))
    for a, b, order in zip(i.tolist(), j.tolist(), orders[i, j].tolist(), strict=True):
        mol.AddBond(a, b, kinds[0 if single_bonds else order - 1])
    return mol


def _largest_smiles(mol: Chem.Mol) -> str | None:
    """SMILES of the largest fragment with hydrogens listed; None where RDKit refuses the graph."""
    try:
        with rdBase.BlockLogs():
            Chem.SanitizeMol(mol)
            fragments = Chem.GetMolFrags(mol, asMols=True)
            return Chem.MolToSmiles(max(fragments, key=lambda m: m.GetNumAtoms()))
    except ValueError:
        return None


def valence_verdicts(molecules: Sequence[Molecule], perception: str = "rdkit") -> Verdicts:
    """The corrected rule. Valid: RDKit sanitises the molecule and it is one fragment. Stable: one
    fragment, and every atom's (aromatic bonds, sum of the other orders, unlisted hydrogens
    included) is allowed for its element and formal charge. The kekulised and the aromatic form of
    a molecule get the same verdict. Bonds that cannot be perceived leave no stable atom.

    Args:
        molecules: with bonds, or with positions to perceive them from.
        perception: method of ``molediff.bonds.perceive``.
    """
    rows = [_judge(molecule, perception) for molecule in molecules]
    atoms = np.array([len(m) for m in molecules], dtype=np.int64)
    stable_atoms = np.array([row[0] for row in rows], dtype=np.int64)
    fragments = np.array([row[1] for row in rows], dtype=np.int64)
    stable = (stable_atoms == atoms) & (fragments == 1)
    return Verdicts(atoms, stable_atoms, stable, fragments, tuple(row[2] for row in rows))


def _judge(molecule: Molecule, perception: str) -> tuple[int, int, str | None]:
    """Stable atoms, number of fragments, SMILES."""
    if molecule.bonds is None:
        try:
            molecule = perceive(molecule, perception)
        except ValueError:
            return 0, 0, None
    mol = molecule.to_rdkit(sanitize=False)
    fragments = len(Chem.GetMolFrags(mol))
    smiles = None
    try:
        mol = sanitized(mol)
        molecule = Molecule.from_rdkit(mol)
        smiles = canonical_smiles(mol) if fragments == 1 else None
    except ValueError:
        pass  # judged by the bonds as they are written
    return int(stable_atoms(molecule).sum()), fragments, smiles


def stable_atoms(molecule: Molecule) -> np.ndarray:
    """[n] whether each atom's valence is allowed, with the bonds as they are written.

    Raises:
        ValueError: bonds are unknown.
    """
    if molecule.bonds is None or molecule.orders is None:
        raise ValueError("the bonds are unknown: perceive them with molediff.bonds.perceive")
    aromatic = np.zeros(len(molecule), dtype=np.int64)
    others = molecule.hydrogens.astype(np.int64)
    is_aromatic = molecule.orders == AROMATIC
    for end in molecule.bonds.T:
        np.add.at(aromatic, end, is_aromatic)
        np.add.at(others, end, np.where(is_aromatic, 0, molecule.orders))
    rows = zip(molecule.atomic_numbers.tolist(), molecule.charges.tolist(), strict=True)
    return np.array(
        [
            (int(aromatic[i]), int(others[i])) in REFERENCE_VALENCES.get(key, frozenset())
            for i, key in enumerate(rows)
        ]
    )


def elements_unknown_to_edm(molecules: Sequence[Molecule]) -> set[str]:
    """Elements that EDM's valence table lacks; their atoms are never stable under its rule."""
    used = {z for molecule in molecules for z in molecule.atomic_numbers.tolist()}
    return {SYMBOLS[z] for z in used if not EDM_VALENCE_OK[z].any()}


def _chunks(sizes: np.ndarray) -> Iterator[np.ndarray]:
    """Rows of similar size whose padded pair arrays stay small."""
    order = np.argsort(sizes, kind="stable")
    start = 0
    while start < len(order):
        # sizes ascend, so a guess by the first size may have to shrink once
        stop = min(len(order), start + max(1, PAIRS_AT_ONCE // int(sizes[order[start]]) ** 2))
        stop = min(stop, start + max(1, PAIRS_AT_ONCE // int(sizes[order[stop - 1]]) ** 2))
        yield order[start:stop]
        start = stop


def _padded(molecules: Sequence[Molecule]) -> tuple[np.ndarray, np.ndarray]:
    longest = max(len(m) for m in molecules)
    numbers = np.zeros((len(molecules), longest), dtype=np.int64)
    positions = np.zeros((len(molecules), longest, 3))
    for row, molecule in enumerate(molecules):
        if molecule.positions is None:
            raise ValueError(
                f"molecule {molecule.name!r} has no positions: the edm rule needs them"
            )
        numbers[row, : len(molecule)] = molecule.atomic_numbers
        positions[row, : len(molecule)] = molecule.positions
    return numbers, positions
