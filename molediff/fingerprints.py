"""Fingerprints: the structure of a molecule as 1024 bits, and how alike two of them are.

EEGSDE uses Open Babel's FP2 (paths of up to seven atoms); without Open Babel, RDKit's own path
fingerprint is the nearest thing. Kinds are not comparable, so a network keeps the name of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from rdkit import Chem, rdBase
from rdkit.Chem import rdFingerprintGenerator

from molediff.files import read
from molediff.molecules import Molecule
from shared.configuration import ConfigurationError

BITS = 1024
_PATHS = rdFingerprintGenerator.GetRDKitFPGenerator(maxPath=7, fpSize=BITS)
_CIRCLES = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=BITS)


def default_kind() -> str:
    """'fp2' where Open Babel is installed, else 'paths'."""
    return "fp2" if find_spec("openbabel") else "paths"


def fingerprint(structure: Molecule | str, kind: str = "paths") -> np.ndarray:
    """[1024] uint8 of 0 and 1.

    Args:
        structure: a molecule with bonds, or SMILES.
        kind: 'fp2' (Open Babel), 'paths' (RDKit, up to seven bonds) or 'morgan' (radius 2).

    Raises:
        ValueError: an unknown kind, unknown bonds, or a SMILES that cannot be read.
        ModuleNotFoundError: FP2 without Open Babel.
    """
    if kind not in KINDS:
        raise ValueError(f"fingerprint={kind!r}: choose one of {', '.join(KINDS)}.")
    smiles = structure if isinstance(structure, str) else structure.smiles()
    return KINDS[kind](smiles)


def tanimoto(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|a and b| / |a or b| over the last axis; 1 where both are empty, as in EEGSDE."""
    a, b = np.asarray(a, bool), np.asarray(b, bool)
    both, either = (a & b).sum(-1), (a | b).sum(-1)
    return np.where(either == 0, 1.0, both / np.maximum(either, 1))


def read_structure(text: str) -> Molecule:
    """A molecule from SMILES or from the first record of a file that tells bonds.

    Raises:
        ConfigurationError: neither; one line.
    """
    try:
        if Path(text).is_file():
            found = next(iter(read(text)))
            if not isinstance(found, Molecule):
                raise ValueError(found.reason)
            found.smiles()
            return found
        return Molecule.from_rdkit(_mol(text))
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"similar to '{text}': {error}; give SMILES or a file with bonds, such as SDF."
        ) from None


def _mol(smiles: str) -> Chem.Mol:
    with rdBase.BlockLogs():
        mol = Chem.MolFromSmiles(smiles)
    if mol is None or mol.GetNumAtoms() == 0:
        raise ValueError(f"{smiles[:60]!r} is not a SMILES that RDKit can read")
    return mol


def _paths(smiles: str) -> np.ndarray:
    bits: np.ndarray = _PATHS.GetFingerprintAsNumPy(_mol(smiles))
    return bits


def _morgan(smiles: str) -> np.ndarray:
    bits: np.ndarray = _CIRCLES.GetFingerprintAsNumPy(_mol(smiles))
    return bits


def _fp2(smiles: str) -> np.ndarray:
    try:
        from openbabel import pybel
    except ImportError:
        raise ModuleNotFoundError(
            "fingerprint='fp2' needs Open Babel: pip install openbabel-wheel"
        ) from None
    bits = np.zeros(BITS, np.uint8)
    set_bits = pybel.readstring("smi", smiles).calcfp("FP2").bits  # counted from 1
    bits[np.array(set_bits, dtype=np.int64) - 1] = 1
    return bits


KINDS: dict[str, Callable[[str], np.ndarray]] = {"fp2": _fp2, "paths": _paths, "morgan": _morgan}
