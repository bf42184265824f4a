"""From arrays to graphs and molecules: rounding, RDKit, valence correction, fragments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
import numpy as np
import torch
from rdkit import Chem, rdBase
from rdkit.Chem import rdDepictor, rdDistGeom
from torch import Tensor

from molediff.molecules import Molecule
from shared.domains import Invalid

NORMAL_VALENCE = {7: 3, 8: 2, 16: 2}
"""Elements that become cations when their valence is exceeded by one (N, O, S)."""
_BOND = {1: Chem.BondType.SINGLE, 2: Chem.BondType.DOUBLE, 3: Chem.BondType.TRIPLE}


# -- generic graphs ---------------------------------------------------------------------------


def decode_graph(edges: Tensor, mask: Tensor | None = None) -> nx.Graph:
    """A graph from a real-valued adjacency [n, n]: an edge where it is at least 0.5; nodes
    without edges are dropped, as published, but one."""
    adjacency = (edges >= 0.5).cpu().numpy()
    if mask is not None:
        keep = mask.cpu().numpy()
        adjacency = adjacency & keep[:, None] & keep
    graph = nx.from_numpy_array(np.triu(adjacency, 1).astype(np.int8))
    graph.remove_nodes_from(list(nx.isolates(graph)))
    if len(graph) == 0:
        graph.add_node(0)
    plain = nx.empty_graph(len(graph))
    names = {node: i for i, node in enumerate(graph)}
    plain.add_edges_from((names[a], names[b]) for a, b in graph.edges())
    return plain


# -- molecules --------------------------------------------------------------------------------


def bond_orders(edges: Tensor) -> Tensor:
    """Real-valued bond orders -> 0..3, int64; halves go up."""
    return torch.floor(edges + 0.5).clamp(0, 3).to(torch.int64)


def atom_types(nodes: Tensor) -> Tensor:
    """Real-valued one-hot rows [..., F] -> index of the element, F for no atom; int64 [...].

    Entries above 0.5 count as 1, and 'no atom' has what is missing to a sum of 1; the largest
    wins, the first among equals.
    """
    hard = (nodes > 0.5).to(torch.int64)
    missing = 1 - hard.sum(-1, keepdim=True)
    return torch.cat([hard, missing], -1).argmax(-1)


@dataclass(frozen=True)
class Decoded:
    """A molecule, and whether its valences were right before any correction."""

    molecule: Molecule
    valid_without_correction: bool


def decode_molecule(
    nodes: Tensor, edges: Tensor, elements: Sequence[int], record: str = ""
) -> Decoded | Invalid:
    """A molecule from ``nodes`` [n, F] and ``edges`` [n, n], by the published procedure: N, O and
    S whose valence is exceeded by one become cations; then the highest bond of an offending atom
    is lowered until no valence is exceeded; the largest fragment stays.

    Args:
        elements: atomic numbers of the features.
    """
    types, orders = atom_types(nodes), bond_orders(edges)
    present = types < len(elements)
    numbers = [elements[k] for k in types[present].tolist()]
    if not numbers:
        return Invalid(record, "no atoms")
    with rdBase.BlockLogs():
        mol = construct(numbers, orders[present][:, present].tolist())
        valid = _offender(mol) is None
        if not correct(mol):
            return Invalid(record, "its valences cannot be corrected")
        final = largest_fragment(mol)
    if final is None:
        return Invalid(record, "RDKit cannot sanitise it")
    return Decoded(Molecule.from_rdkit(final), valid)


def construct(numbers: Sequence[int], orders: Sequence[Sequence[int]]) -> Chem.RWMol:
    """Atoms and bonds, one bond after the other; an atom of N, O or S whose valence a bond brings
    to one above normal becomes a cation."""
    mol = Chem.RWMol()
    for number in numbers:
        mol.AddAtom(Chem.Atom(number))
    for i, row in enumerate(orders):
        for j, order in enumerate(row[:i]):
            if order == 0:
                continue
            mol.AddBond(i, j, _BOND[order])
            atom = _offender(mol)
            if atom is not None:
                normal = NORMAL_VALENCE.get(atom.GetAtomicNum())
                if normal is not None and _valence(atom) == normal + 1:
                    atom.SetFormalCharge(1)
    return mol


def _offender(mol: Chem.Mol) -> Chem.Atom | None:
    """The first atom whose valence is exceeded."""
    found = Chem.DetectChemistryProblems(mol, Chem.SanitizeFlags.SANITIZE_PROPERTIES)
    for problem in found:
        if problem.GetType() == "AtomValenceException":
            return mol.GetAtomWithIdx(problem.GetAtomIdx())
    return None


def _valence(atom: Chem.Atom) -> int:
    return int(sum(bond.GetBondTypeAsDouble() for bond in atom.GetBonds()))


def correct(mol: Chem.RWMol) -> bool:
    """Lower the highest bond of an offending atom, in place, until there is none; False where an
    atom offends without any bond."""
    while (atom := _offender(mol)) is not None:
        bonds = sorted(atom.GetBonds(), key=lambda b: -b.GetBondTypeAsDouble())
        if not bonds:
            return False
        i, j = bonds[0].GetBeginAtomIdx(), bonds[0].GetEndAtomIdx()
        order = round(bonds[0].GetBondTypeAsDouble()) - 1
        mol.RemoveBond(i, j)
        if order:
            mol.AddBond(i, j, _BOND[order])
    return True


def largest_fragment(mol: Chem.Mol) -> Chem.Mol | None:
    """The fragment with the longest SMILES, sanitised; None where RDKit cannot read it back."""
    parts = Chem.MolToSmiles(mol).split(".")
    return Chem.MolFromSmiles(max(parts, key=len))


def with_coordinates(molecule: Molecule, dimensions: int = 2, seed: int = 0) -> Molecule:
    """The molecule with a drawing in the plane (z = 0), or with hydrogens and a conformer by
    ETKDG (Riniker & Landrum 2015), in Angstrom.

    Raises:
        ValueError: dimensions other than 2 and 3, or a molecule that cannot be embedded.
    """
    if dimensions not in (2, 3):
        raise ValueError(f"with_coordinates: dimensions={dimensions}; choose 2 or 3.")
    mol = molecule.to_rdkit()
    with rdBase.BlockLogs():
        if dimensions == 2:
            rdDepictor.Compute2DCoords(mol)
        else:
            mol = Chem.AddHs(mol)
            method: Any = rdDistGeom.ETKDGv3()
            method.randomSeed = seed
            if rdDistGeom.EmbedMolecule(mol, method) < 0:
                raise ValueError(f"ETKDG finds no conformer of {molecule.smiles()}.")
    found = Molecule.from_rdkit(mol)
    return found.replace(properties=molecule.properties, name=molecule.name)
