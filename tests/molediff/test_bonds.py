import builtins

import numpy as np
import pytest
from rdkit import Chem
from rdkit.Chem import rdDistGeom, rdForceFieldHelpers

from molediff.bonds import edm_bond_orders, perceive
from molediff.molecules import SYMBOLS, Molecule, atomic_number
from molediff.tables import EDM_THRESHOLDS_PM, EDM_VALENCE_OK, REFERENCE_VALENCES


def geometry(smiles):
    """Atoms and MMFF94 positions; charges where the SMILES has them."""
    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    rdDistGeom.EmbedMolecule(mol, randomSeed=7)
    rdForceFieldHelpers.MMFFOptimizeMolecule(mol)
    return Molecule.from_rdkit(mol).replace(bonds=None, orders=None)


def pair(a, b, distance):
    numbers = np.array([atomic_number(a), atomic_number(b)])
    return int(edm_bond_orders(numbers, np.array([[0.0, 0, 0], [0, 0, distance]]))[0, 1])


@pytest.mark.parametrize(
    ("a", "b", "distance", "order"),
    [
        ("C", "C", 1.64, 0),  # 154 + 10 pm is not below the threshold
        ("C", "C", 1.639, 1),
        ("C", "C", 1.389, 2),
        ("C", "C", 1.229, 3),
        ("C", "O", 1.159, 3),
        ("O", "C", 1.161, 2),
        ("N", "O", 1.25, 2),
        ("H", "H", 0.83, 1),
        ("C", "Bi", 1.0, 0),  # a pair the table lacks
        ("C", "C", np.nan, 0),
    ],
)
def test_single_pairs_of_the_distance_table(a, b, distance, order):
    assert pair(a, b, distance) == pair(b, a, distance) == order


def test_tables_are_symmetric_and_nested():
    assert (EDM_THRESHOLDS_PM == EDM_THRESHOLDS_PM.transpose(0, 2, 1)).all()
    higher = np.isfinite(EDM_THRESHOLDS_PM[1:])
    assert (EDM_THRESHOLDS_PM[1:][higher] < EDM_THRESHOLDS_PM[:-1][higher]).all()
    assert np.isfinite(EDM_THRESHOLDS_PM).sum((1, 2)).tolist() == [117, 15, 6]
    known = {SYMBOLS[z] for z in np.nonzero(EDM_VALENCE_OK.any(1))[0]}
    assert known == set("H B C N O F Al Si P S Cl As Br I Hg Bi".split())
    assert EDM_VALENCE_OK.sum() == 19
    assert (0, 4) in REFERENCE_VALENCES[7, 1]
    assert sum(len(v) for v in REFERENCE_VALENCES.values()) == 58


def test_batched_and_padded_orders_equal_single_ones():
    benzene, water = geometry("c1ccccc1"), geometry("O")
    numbers = np.zeros((2, 12), dtype=int)
    positions = np.zeros((2, 12, 3))
    for row, molecule in enumerate((benzene, water)):
        numbers[row, : len(molecule)] = molecule.atomic_numbers
        positions[row, : len(molecule)] = molecule.positions
    orders = edm_bond_orders(numbers, positions)
    np.testing.assert_array_equal(orders[0], edm_bond_orders(numbers[0], positions[0]))
    assert orders[1].sum() == 4
    assert (orders == orders.transpose(0, 2, 1)).all()
    assert not np.diagonal(orders, axis1=1, axis2=2).any()


@pytest.mark.parametrize("smiles", ["c1cc[nH]c1", "C#CC(=O)NC", "FC(Cl)Br", "C1C2C3C1N1C2C31"])
def test_rdkit_perception_finds_the_graph_it_started_from(smiles):
    assert perceive(geometry(smiles)).smiles() == Chem.CanonSmiles(smiles)


def test_rdkit_perception_places_the_charges_it_is_told_of():
    ammonium = geometry("C[NH3+]")
    assert ammonium.charge == 1
    found = perceive(ammonium)
    assert found.smiles() == "C[NH3+]"
    assert perceive(geometry("[O-]C=O")).charge == -1
    assert perceive(geometry("C[N+](=O)[O-]")).smiles() == "C[N+](=O)[O-]"


def test_edm_perception_has_no_charges_and_no_aromatic_bonds():
    found = perceive(geometry("CC=O"), "edm")
    assert found.smiles() == "CC=O"
    assert set(found.orders.tolist()) == {1, 2}


def test_openbabel_perception_where_installed():
    pytest.importorskip("openbabel")
    assert perceive(geometry("CC=O"), "openbabel").smiles() == "CC=O"


def test_what_cannot_be_perceived_says_why(monkeypatch):
    water = geometry("O")
    with pytest.raises(ValueError, match="expected one of edm, rdkit, openbabel"):
        perceive(water, "magic")
    with pytest.raises(ValueError, match="no positions"):
        perceive(water.replace(positions=None))
    with pytest.raises(ValueError, match="rdDetermineBonds"):
        perceive(Molecule(np.array([6, 1]), [[0, 0, 0], [0, 0, 1.1]]))
    real = builtins.__import__
    monkeypatch.setattr(
        builtins,
        "__import__",
        lambda name, *rest: real("no_such_module" if name == "openbabel" else name, *rest),
    )
    with pytest.raises(ModuleNotFoundError, match="pip install openbabel-wheel"):
        perceive(water, "openbabel")
