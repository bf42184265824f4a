"""Fragments to keep, as a user names them: in a file of molecules, or as SMILES."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from rdkit import Chem, rdBase
from rdkit.Chem import rdDistGeom, rdForceFieldHelpers

from molediff.files import FORMATS, read
from molediff.molecules import Molecule
from shared.configuration import ConfigurationError
from shared.domains import Invalid

MOST_RECORDS = 16
"""A scaffold file with more records than this is taken for a library, not for fragments."""


@dataclass(frozen=True, eq=False)
class Fragment:
    """Atoms to keep, with positions in Angstrom. ``source`` names it in messages."""

    molecule: Molecule
    source: str = "scaffold"

    def __len__(self) -> int:
        return len(self.molecule)

    @staticmethod
    def read(text: str) -> Fragment:
        """A fragment from a file of molecules or from SMILES.

        ``frag.sdf``: the heavy atoms, so that the model places hydrogens anew everywhere.
        ``frag.sdf:0,1,4-6``: exactly these atoms, counted from 0 (hydrogens too where listed).
        ``frag.sdf@3,7``: all atoms but the hydrogens at atoms 3 and 7, where it is to grow.
        ``C1CCCCC1``: the heavy atoms of an embedded SMILES; with ``*`` at the places where it is
        to grow, all other hydrogens stay.

        All records of a file belong together, in their given pose: two components, in one
        record or two, are linked. The format is that of :func:`molediff.read`.

        Raises:
            ConfigurationError: no such file, nothing readable in it, an index out of range, or a
                SMILES that cannot be embedded; one line.
        """
        path, sign, atoms = _split(text)
        if not _is_file(path):
            return Fragment(_embedded(text), text)
        whole = _joined(path)
        chosen = _indices(text, atoms, len(whole)) if sign else []
        if sign == ":":
            return Fragment(_cut(whole, chosen), text)
        hydrogen = whole.atomic_numbers == 1
        if sign == "@":
            hydrogen &= np.isin(_owners(whole), chosen)
        kept = np.nonzero(~hydrogen)[0].tolist()
        if not kept:
            raise ConfigurationError(
                f"scaffold '{text}' has no heavy atoms: list the atoms to keep, {path}:0,1."
            )
        return Fragment(_cut(whole, kept), text)


def _split(text: str) -> tuple[str, str, str]:
    """Path, ':' or '@' or '', and the list of atoms."""
    match = re.fullmatch(r"(.+?)\s*([:@])\s*([-\d,\s]*)", text.strip())
    if match and _is_file(match[1]):
        return match[1], match[2], match[3]
    return text.strip(), "", ""


def _is_file(path: str) -> bool:
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    return Path(path).is_file() or bool(suffixes and {*suffixes[-2:]} & FORMATS.keys())


def _joined(path: str) -> Molecule:
    """All records of a file in one frame."""
    try:
        records = list(islice(read(path), MOST_RECORDS + 1))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"scaffold '{path}' cannot be read: {error}.") from None
    for record in records:
        if isinstance(record, Invalid):
            raise ConfigurationError(f"scaffold '{path}' cannot be read: {record.reason}.")
    if len(records) > MOST_RECORDS:
        raise ConfigurationError(
            f"scaffold '{path}' holds more than {MOST_RECORDS} records: keep one fragment, or "
            "the fragments to link, in a file of its own."
        )
    found = [record for record in records if isinstance(record, Molecule)]
    if len(found) == 1 and found[0].positions is None:
        return _embedded(found[0].smiles(), hydrogens=True)
    places = [m.positions for m in found if m.positions is not None]
    if len(places) < len(found):
        raise ConfigurationError(f"scaffold '{path}' holds no positions: give an SDF or XYZ file.")
    numbers = np.concatenate([m.atomic_numbers for m in found])
    charges = np.concatenate([m.charges for m in found])
    return Molecule(numbers, np.concatenate(places), charges)


def _embedded(smiles: str, hydrogens: bool = False) -> Molecule:
    """A SMILES in 3D: heavy atoms, or with ``*`` all atoms but those at the stars."""
    with rdBase.BlockLogs():
        mol = Chem.MolFromSmiles(smiles)
    if mol is None or mol.GetNumAtoms() == 0:
        raise ConfigurationError(
            f"scaffold '{smiles}' is neither a file of molecules nor a SMILES that can be read."
        )
    if len(Chem.GetMolFrags(mol)) > 1:
        raise ConfigurationError(
            f"scaffold '{smiles}' has several parts, whose pose a SMILES does not tell: give a "
            "file with both in place."
        )
    stars = [atom.GetIdx() for atom in mol.GetAtoms() if atom.GetAtomicNum() == 0]
    filled = Chem.RWMol(mol)
    for star in stars:
        filled.GetAtomWithIdx(star).SetAtomicNum(1)
    whole = _in_space(filled, smiles)
    every = hydrogens or bool(stars)
    kept = [i for i, z in enumerate(whole.atomic_numbers) if i not in stars and (every or z > 1)]
    if not (whole.atomic_numbers[kept] > 1).any():
        raise ConfigurationError(f"scaffold '{smiles}' has no heavy atoms: name some.")
    return _cut(whole, kept)


def _in_space(mol: Chem.Mol, smiles: str) -> Molecule:
    try:
        with rdBase.BlockLogs():
            Chem.SanitizeMol(mol)
            mol = Chem.AddHs(mol)
            placed = rdDistGeom.EmbedMolecule(mol, randomSeed=0) == 0
            if placed and rdForceFieldHelpers.MMFFHasAllMoleculeParams(mol):
                rdForceFieldHelpers.MMFFOptimizeMolecule(mol)
    except ValueError:  # such as a star with two bonds
        placed = False
    if not placed:
        raise ConfigurationError(
            f"scaffold '{smiles}' cannot be embedded in 3D: give a file with positions."
        )
    return Molecule.from_rdkit(mol)


def _indices(text: str, atoms: str, n: int) -> list[int]:
    found: list[int] = []
    for part in atoms.replace(" ", "").split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None:
            raise ConfigurationError(
                f"scaffold '{text}': '{part}' is not an atom: write numbers from 0, as in 0,1,4-6."
            )
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    beyond = [i for i in found if i >= n]
    if beyond:
        raise ConfigurationError(
            f"scaffold '{text}': no atom {beyond[0]}; its {n} atoms are counted from 0 to {n - 1}."
        )
    return list(dict.fromkeys(found))


def _owners(molecule: Molecule) -> np.ndarray:
    """[n] the nearest heavy atom of every atom, which for a hydrogen is the one it is bonded to;
    files of the XYZ kind tell no bonds."""
    assert molecule.positions is not None
    distance = np.linalg.norm(molecule.positions[:, None] - molecule.positions[None], axis=-1)
    distance[:, molecule.atomic_numbers == 1] = np.inf
    np.fill_diagonal(distance, np.inf)
    return np.asarray(distance.argmin(1))


def _cut(molecule: Molecule, atoms: Sequence[int]) -> Molecule:
    rows = np.asarray(atoms)
    assert molecule.positions is not None
    return Molecule(
        molecule.atomic_numbers[rows], molecule.positions[rows], molecule.charges[rows]
    )
