"""A molecule as an immutable value, and its way to RDKit and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from rdkit import Chem, rdBase
from rdkit.Geometry import Point3D

MAX_COORDINATE = 1e4
"""Coordinates beyond this (Angstrom) are refused: they are always a mistake, and formats with
fixed columns cannot hold them."""

AROMATIC = 4
"""Order of an aromatic bond, as in an SDF file. It is a label: orders are never added up without
asking for it (see ``molediff.geometric.stability``)."""

_TYPE_OF_ORDER = {
    1: Chem.BondType.SINGLE,
    2: Chem.BondType.DOUBLE,
    3: Chem.BondType.TRIPLE,
    AROMATIC: Chem.BondType.AROMATIC,
}
_ORDER_OF_TYPE = {bond_type: order for order, bond_type in _TYPE_OF_ORDER.items()}
_TABLE = Chem.GetPeriodicTable()
SYMBOLS = tuple(_TABLE.GetElementSymbol(z) for z in range(119))
_NUMBERS = {symbol.upper(): z for z, symbol in enumerate(SYMBOLS) if z > 0} | {"D": 1, "T": 1}


def atomic_number(symbol: str) -> int:
    """Atomic number of an element given by symbol (any case) or by number.

    Raises:
        ValueError: no such element.
    """
    number = _NUMBERS.get(symbol.upper())
    if number is None and symbol.isascii() and symbol.isdigit() and 1 <= int(symbol[:4]) <= 118:
        number = int(symbol)
    if number is None:
        raise ValueError(f"unknown element {symbol[:12]!r}")
    return number


@dataclass(frozen=True, eq=False)
class Molecule:
    """Atoms, and what is known about them. Arrays are read-only copies.

    Attributes:
        atomic_numbers: [n] from 1 to 118.
        positions: [n, 3] in Angstrom, float32 or float64; None for a molecule known only as a
            graph.
        charges: [n] formal charges; zero where not given.
        bonds: [m, 2] pairs of atom indices, each pair once; None where bonds are unknown.
        orders: [m] 1, 2, 3 or ``AROMATIC``.
        hydrogens: [n] hydrogens of each atom that are not listed as atoms; zero where not given.
        properties: name -> number or text.
        name: title of the record.

    Raises:
        ValueError: no atoms, shapes that do not fit, an unknown element, a charge beyond that of
            the nucleus, coordinates that are not finite or beyond ``MAX_COORDINATE``, a bond to
            itself, twice, to no atom or of unknown order.
    """

    atomic_numbers: np.ndarray
    positions: np.ndarray | None = None
    charges: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int8))
    bonds: np.ndarray | None = None
    orders: np.ndarray | None = None
    hydrogens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int8))
    properties: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""

    def __post_init__(self) -> None:
        numbers = _integers("atomic_numbers", self.atomic_numbers, (-1,), 1, 118)
        n = len(numbers)
        if n == 0:
            raise ValueError("no atoms")
        self._set("atomic_numbers", numbers.astype(np.uint8))
        for key, low, high in (("charges", -9, 9), ("hydrogens", 0, 9)):
            given = np.asarray(getattr(self, key))
            values = _integers(key, given if given.size else np.zeros(n, np.int8), (n,), low, high)
            self._set(key, values.astype(np.int8))
        if (stripped := self.charges > self.atomic_numbers).any():  # which RDKit cannot write
            i = int(stripped.argmax())
            raise ValueError(f"charges: {self.charges[i]:+d} on {self.symbols[i]} (atom {i + 1})")
        if self.positions is not None:
            self._set("positions", _coordinates(self.positions, n))
        if (self.bonds is None) != (self.orders is None):
            raise ValueError("Molecule: give bonds and orders together, or neither")
        if self.bonds is not None and self.orders is not None:
            bonds, orders = _bonds(self.bonds, self.orders, n)
            self._set("bonds", bonds)
            self._set("orders", orders)
        object.__setattr__(self, "properties", MappingProxyType(dict(self.properties)))

    def _set(self, key: str, values: np.ndarray) -> None:
        values.setflags(write=False)
        object.__setattr__(self, key, values)

    def __len__(self) -> int:
        return len(self.atomic_numbers)

    def __reduce__(self) -> tuple[Any, ...]:
        arrays = (self.atomic_numbers, self.positions, self.charges, self.bonds, self.orders)
        return Molecule, (*arrays, self.hydrogens, dict(self.properties), self.name)

    @property
    def symbols(self) -> list[str]:
        return [SYMBOLS[z] for z in self.atomic_numbers]

    @property
    def charge(self) -> int:
        """Total formal charge."""
        return int(self.charges.sum(dtype=np.int64))

    def replace(self, **changes: Any) -> Molecule:
        """A copy with some attributes changed."""
        if changes.keys() <= {"name", "properties"}:  # nothing to check again
            twin = object.__new__(Molecule)
            twin.__dict__.update(vars(self), **changes)
            twin.__dict__["properties"] = MappingProxyType(dict(twin.properties))
            return twin
        return replace(self, **changes)

    @classmethod
    def from_rdkit(cls, mol: Chem.Mol, conformer: int = -1) -> Molecule:
        """Atoms, bonds as they stand (kekulised or aromatic), name, properties and, where there
        is one, a conformer. Hydrogens that are not atoms become ``hydrogens``.

        Raises:
            ValueError: an atom that is no element or a bond order without a value (dative, zero).
        """
        if mol.NeedsUpdatePropertyCache():
            mol = Chem.Mol(mol)
            mol.UpdatePropertyCache(strict=False)
        links = [(b.GetBeginAtomIdx(), b.GetEndAtomIdx(), b.GetBondType()) for b in mol.GetBonds()]
        odd = [str(kind) for *_, kind in links if kind not in _ORDER_OF_TYPE]
        if odd:
            raise ValueError(f"bond type {odd[0]}: expected single, double, triple or aromatic")
        atoms = [
            (a.GetAtomicNum(), a.GetFormalCharge(), a.GetTotalNumHs()) for a in mol.GetAtoms()
        ]
        numbers, charges, hydrogens = np.array(atoms, dtype=np.int64).reshape(-1, 3).T
        known = mol.GetNumConformers() > 0
        return cls(
            numbers,
            mol.GetConformer(conformer).GetPositions() if known else None,
            charges,
            np.array([pair for *pair, _ in links], dtype=np.int64).reshape(-1, 2),
            np.array([_ORDER_OF_TYPE[kind] for *_, kind in links], dtype=np.int64),
            hydrogens,
            mol.GetPropsAsDict(autoConvertStrings=False),
            mol.GetProp("_Name") if mol.HasProp("_Name") else "",
        )

    def to_rdkit(self, sanitize: bool = True) -> Chem.Mol:
        """The same molecule in RDKit; no hydrogen is added beyond ``hydrogens``. Unknown bonds
        give atoms without bonds. With ``sanitize``, aromaticity follows RDKit's model, so the
        kekulised and the aromatic form of a molecule become equal.

        Raises:
            ValueError: RDKit cannot sanitise the molecule (only with ``sanitize``).
        """
        mol = Chem.RWMol()
        per_atom = np.stack([self.atomic_numbers, self.charges, self.hydrogens], axis=1)
        for z, charge, hydrogens in per_atom.tolist():
            atom = Chem.Atom(z)
            atom.SetFormalCharge(charge)
            atom.SetNumExplicitHs(hydrogens)
            atom.SetNoImplicit(True)
            mol.AddAtom(atom)
        if self.bonds is not None and self.orders is not None:
            for (i, j), order in zip(self.bonds.tolist(), self.orders.tolist(), strict=True):
                mol.AddBond(i, j, _TYPE_OF_ORDER[order])
                if order == AROMATIC:
                    mol.GetBondBetweenAtoms(i, j).SetIsAromatic(True)
                    mol.GetAtomWithIdx(i).SetIsAromatic(True)
                    mol.GetAtomWithIdx(j).SetIsAromatic(True)
        if self.positions is not None:
            mol.AddConformer(_conformer(self.positions))
        mol.SetProp("_Name", self.name)
        return sanitized(mol) if sanitize else mol.GetMol()

    def kekulised(self) -> Molecule:
        """The same molecule with aromatic bonds written as single and double ones.

        Raises:
            ValueError: there is no such assignment.
        """
        mol = self.to_rdkit(sanitize=False)
        try:
            with rdBase.BlockLogs():
                mol.UpdatePropertyCache(strict=False)
                Chem.Kekulize(mol, clearAromaticFlags=True)
        except ValueError as error:
            raise ValueError(first_line(error)) from None
        return self._with_bonds_of(mol)

    def aromatised(self) -> Molecule:
        """The same molecule with the aromatic bonds of RDKit's model.

        Raises:
            ValueError: RDKit cannot sanitise the molecule.
        """
        return self._with_bonds_of(self.to_rdkit())

    def with_hydrogens(self) -> Molecule:
        """Hydrogens listed as atoms, at ideal places where positions are known.

        Raises:
            ValueError: RDKit cannot sanitise the molecule.
        """
        mol = Chem.AddHs(self.to_rdkit(), addCoords=self.positions is not None)
        return Molecule.from_rdkit(mol).replace(properties=self.properties, name=self.name)

    def smiles(self) -> str:
        """Canonical SMILES without stereo marks, hydrogens folded into their atoms.

        Raises:
            ValueError: bonds are unknown or RDKit cannot sanitise the molecule.
        """
        if self.bonds is None:
            raise ValueError("the bonds are unknown: perceive them with molediff.bonds.perceive")
        return canonical_smiles(self.to_rdkit())

    def _with_bonds_of(self, mol: Chem.Mol) -> Molecule:
        other = Molecule.from_rdkit(mol)
        return self.replace(bonds=other.bonds, orders=other.orders, hydrogens=other.hydrogens)


def sanitized(mol: Chem.Mol) -> Chem.Mol:
    """A sanitised copy.

    Raises:
        ValueError: the first problem RDKit finds.
    """
    mol = Chem.Mol(mol)
    try:
        with rdBase.BlockLogs():
            Chem.SanitizeMol(mol)
    except ValueError as error:
        raise ValueError(first_line(error)) from None
    return mol


def canonical_smiles(mol: Chem.Mol) -> str:
    """SMILES of a sanitised molecule without stereo marks, hydrogens folded into their atoms."""
    with rdBase.BlockLogs():
        return Chem.MolToSmiles(Chem.RemoveHs(mol, sanitize=False), isomericSmiles=False)


def first_line(error: Exception) -> str:
    """RDKit's messages carry a trace: the first line says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _conformer(positions: np.ndarray) -> Chem.Conformer:
    conformer = Chem.Conformer(len(positions))
    for i, (x, y, z) in enumerate(positions.tolist()):
        conformer.SetAtomPosition(i, Point3D(x, y, z))
    conformer.Set3D(True)
    return conformer


def _integers(
    key: str, values: ArrayLike, shape: tuple[int, ...], low: int, high: int
) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != len(shape) or (shape[0] >= 0 and array.shape != shape):
        raise ValueError(f"{key}: shape {array.shape} where {shape} was expected")
    whole = array
    if array.dtype.kind not in "iu":
        with np.errstate(invalid="ignore"):
            whole = array.astype(np.int64)
        if not np.array_equal(whole, array):
            raise ValueError(f"{key}: expected whole numbers")
    if whole.size and not (low <= whole.min() and whole.max() <= high):
        worst = int(whole.min()) if whole.min() < low else int(whole.max())
        raise ValueError(f"{key}: {worst} is outside {low}..{high}")
    return whole


def _coordinates(values: ArrayLike, n: int) -> np.ndarray:
    given = np.asarray(values)
    array = np.array(given, dtype=np.float32 if given.dtype == np.float32 else np.float64)
    if array.shape != (n, 3):
        raise ValueError(f"positions: shape {array.shape} where ({n}, 3) was expected")
    if not np.isfinite(array).all():
        raise ValueError("positions: not all finite")
    if array.size and np.abs(array).max() > MAX_COORDINATE:
        raise ValueError(f"positions: a coordinate is beyond {MAX_COORDINATE:g} Angstrom")
    return array


def _bonds(bonds: ArrayLike, orders: ArrayLike, n: int) -> tuple[np.ndarray, np.ndarray]:
    pairs = np.asarray(bonds, dtype=np.int64).reshape(-1, 2)
    values = _integers("orders", orders, (len(pairs),), 1, AROMATIC)
    if pairs.size and not (0 <= pairs.min() and pairs.max() < n):
        raise ValueError(f"bonds: an index is outside 0..{n - 1}")
    if (pairs[:, 0] == pairs[:, 1]).any():
        raise ValueError("bonds: an atom is bonded to itself")
    if len({(i, j) if i < j else (j, i) for i, j in pairs.tolist()}) < len(pairs):
        raise ValueError("bonds: the same pair appears twice")
    return pairs.astype(np.int32), values.astype(np.int8)
