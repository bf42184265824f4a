"""Bonds from distances, by three rules that can be chosen by name."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from rdkit import Chem, rdBase
from rdkit.Chem import rdDetermineBonds

from molediff.molecules import Molecule, first_line
from molediff.tables import EDM_THRESHOLDS_PM

MAX_ITERATIONS = 2000
"""Valence assignments RDKit may try per molecule; real molecules need a few, and without a bound
a scrambled one can take minutes."""

COVALENT_FACTORS = (1.2, 1.15)
"""Atoms closer than this times the sum of their covalent radii are bonded; the second is tried
where the first gives no molecule. RDKit's own 1.3 joins atoms across small rings
and finds no molecule for many of the strained cages of QM9."""


def edm_bond_orders(atomic_numbers: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Bond orders 0..3 of EDM's distance table (Hoogeboom et al. 2022, appendix D).

    Args:
        atomic_numbers: [..., n]; 0 marks padding.
        positions: [..., n, 3] in Angstrom. NaN gives order 0.

    Returns:
        [..., n, n] int8, symmetric, zero on the diagonal and in the padding.
    """
    x = np.asarray(positions, dtype=np.float64)
    distance = 100.0 * np.sqrt(np.square(x[..., :, None, :] - x[..., None, :, :]).sum(-1))
    i, j = atomic_numbers[..., :, None], atomic_numbers[..., None, :]
    # most pairs are far apart: look thresholds up only where a bond is possible
    order = np.zeros(distance.shape, dtype=np.int8)
    near = np.nonzero(distance < EDM_THRESHOLDS_PM.max())
    z_i = np.broadcast_to(i, distance.shape)[near]
    z_j = np.broadcast_to(j, distance.shape)[near]
    order[near] = (distance[near] < EDM_THRESHOLDS_PM[:, z_i, z_j]).sum(0)
    diagonal = np.arange(order.shape[-1])
    order[..., diagonal, diagonal] = 0
    return order


def perceive(molecule: Molecule, method: str = "rdkit") -> Molecule:
    """The molecule with bonds read off its geometry; bonds it had are forgotten.

    Args:
        molecule: with positions; the total charge is that of its formal charges.
        method: ``edm`` (distance table, no charges, no aromatic bonds), ``rdkit``
            (``rdDetermineBonds``, may place formal charges) or ``openbabel`` (where installed).

    Raises:
        ValueError: an unknown method, no positions, or no bonds that make sense.
        ModuleNotFoundError: Open Babel is asked for and absent.
    """
    if method not in METHODS:
        raise ValueError(f"bonds={method!r}: expected one of {', '.join(METHODS)}")
    if molecule.positions is None:
        raise ValueError("bonds: the molecule has no positions to read bonds from")
    return METHODS[method](molecule, molecule.positions)


def _edm(molecule: Molecule, positions: np.ndarray) -> Molecule:
    order = edm_bond_orders(molecule.atomic_numbers, positions)
    i, j = np.nonzero(np.triu(order))
    return molecule.replace(
        bonds=np.stack([i, j], axis=1), orders=order[i, j], hydrogens=np.zeros(len(molecule))
    )


def _rdkit(molecule: Molecule, positions: np.ndarray) -> Molecule:
    bare = Molecule(molecule.atomic_numbers, positions).to_rdkit(sanitize=False)
    reason = ""
    for factor in COVALENT_FACTORS:
        mol = Chem.Mol(bare)
        try:
            with rdBase.BlockLogs():
                rdDetermineBonds.DetermineBonds(
                    mol,
                    charge=molecule.charge,
                    covFactor=factor,
                    embedChiral=False,
                    useVdw=True,
                    maxIterations=MAX_ITERATIONS,
                )
                Chem.SanitizeMol(mol)
            return _adopt(molecule, Molecule.from_rdkit(mol))
        except (ValueError, RuntimeError) as error:
            reason = reason or first_line(error)
    raise ValueError(f"rdDetermineBonds: {reason}")


def _openbabel(molecule: Molecule, positions: np.ndarray) -> Molecule:
    try:
        from openbabel import openbabel
    except ImportError:
        raise ModuleNotFoundError(
            "bonds='openbabel' needs Open Babel: pip install openbabel-wheel"
        ) from None
    mol = openbabel.OBMol()
    mol.BeginModify()
    for z, xyz in zip(molecule.atomic_numbers.tolist(), positions.tolist(), strict=True):
        atom = mol.NewAtom()
        atom.SetAtomicNum(z)
        atom.SetVector(*xyz)
    mol.EndModify()
    mol.SetTotalCharge(molecule.charge)
    level = openbabel.obErrorLog.GetOutputLevel()
    openbabel.obErrorLog.SetOutputLevel(0)
    mol.ConnectTheDots()
    mol.PerceiveBondOrders()
    openbabel.obErrorLog.SetOutputLevel(level)
    links = list(openbabel.OBMolBondIter(mol))
    pairs = [(b.GetBeginAtomIdx() - 1, b.GetEndAtomIdx() - 1) for b in links]
    return molecule.replace(
        bonds=np.array(pairs, dtype=np.int64).reshape(-1, 2),
        orders=np.array([b.GetBondOrder() for b in links], dtype=np.int64),
        charges=np.array([a.GetFormalCharge() for a in openbabel.OBMolAtomIter(mol)]),
        hydrogens=np.zeros(len(molecule)),
    )


def _adopt(molecule: Molecule, other: Molecule) -> Molecule:
    return molecule.replace(
        bonds=other.bonds, orders=other.orders, charges=other.charges, hydrogens=other.hydrogens
    )


METHODS: dict[str, Callable[[Molecule, np.ndarray], Molecule]] = {
    "edm": _edm,
    "rdkit": _rdkit,
    "openbabel": _openbabel,
}
