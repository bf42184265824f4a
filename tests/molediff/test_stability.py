import numpy as np
import pytest
from rdkit import Chem
from rdkit.Chem import rdDistGeom, rdForceFieldHelpers

from molediff.bonds import edm_bond_orders
from molediff.geometric import stability
from molediff.geometric.stability import (
    edm_verdicts,
    elements_unknown_to_edm,
    stable_atoms,
    valence_verdicts,
)
from molediff.molecules import AROMATIC, Molecule, atomic_number

GOLDEN = ["09_edm_stability_mmff", "09_edm_stability_real_qm9", "09_geom_stability_mmff"]


def graph(smiles):
    return Molecule.from_rdkit(Chem.AddHs(Chem.MolFromSmiles(smiles)))


def geometry(smiles):
    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    rdDistGeom.EmbedMolecule(mol, randomSeed=7)
    rdForceFieldHelpers.MMFFOptimizeMolecule(mol)
    return Molecule.from_rdkit(mol)


@pytest.mark.golden
@pytest.mark.parametrize("name", GOLDEN)
def test_published_verdicts_are_reproduced_exactly(golden, name):
    tensors, about = golden(name)
    d = {key: tensor.numpy() for key, tensor in tensors.items()}
    table = np.array([atomic_number(s) for s in about["atom_decoder"]])
    molecules = [
        Molecule(table[types[:n]], x[:n])
        for types, x, n in zip(d["atom_type"], d["positions"], d["n_atoms"], strict=True)
    ]
    verdicts = edm_verdicts(molecules, single_bonds="geom" in name)
    np.testing.assert_array_equal(verdicts.stable_atoms, d["stable_atoms"])
    np.testing.assert_array_equal(verdicts.stable, d["mol_stable"].astype(bool))
    assert list(verdicts.smiles) == about["smiles"]
    for molecule, expected in zip(molecules, d.get("bond_order", []), strict=False):
        orders = edm_bond_orders(molecule.atomic_numbers, molecule.positions)
        orders = np.minimum(orders, 1) if "geom" in name else orders
        np.testing.assert_array_equal(orders, expected[: len(molecule), : len(molecule)])


@pytest.mark.parametrize(
    ("smiles", "stable"),
    [
        ("c1ccccc1", True),
        ("C[NH3+]", True),
        ("[NH4+]", True),
        ("O=c1cc[nH]cc1", True),
        ("c1ccc2[nH]ccc2c1", True),
        ("C[N+](=O)[O-]", True),
        ("CS(=O)(=O)N", True),
        ("[CH3]", False),
        ("[O]", False),
        ("C.O", False),  # two fragments
        ("[Na]C", False),  # an element the table lacks
    ],
)
def test_golden_molecules_under_the_corrected_rule(smiles, stable):
    aromatic = graph(smiles)
    verdicts = valence_verdicts([aromatic, aromatic.kekulised()])
    assert verdicts.stable.tolist() == [stable, stable]
    assert verdicts.stable_atoms[0] == verdicts.stable_atoms[1]


def test_kekulised_and_aromatic_benzene_are_equal_as_written_too():
    benzene = graph("c1ccccc1")
    assert stable_atoms(benzene).all()
    assert stable_atoms(benzene.kekulised()).all()
    assert valence_verdicts([benzene]).smiles == valence_verdicts([benzene.kekulised()]).smiles


def test_aromatic_bonds_are_neither_single_nor_one_and_a_half():
    water = Molecule(np.array([1, 8, 1]), bonds=[[0, 1], [1, 2]], orders=[AROMATIC] * 2)
    assert stable_atoms(water).tolist() == [False, True, False]  # O with two is in the table
    verdicts = valence_verdicts([water])
    assert (verdicts.stable[0], verdicts.smiles[0]) == (False, None)
    # methane whose bonds are all aromatic: as 1 each they would add up to 4
    methane = graph("C")
    assert not stable_atoms(methane.replace(orders=np.full(4, AROMATIC))).any()


def test_nh4_without_its_charge_is_not_stable():
    ammonium = graph("[NH4+]")
    neutral = ammonium.replace(charges=np.zeros(5))
    assert valence_verdicts([ammonium]).stable_atoms[0] == 5
    assert valence_verdicts([neutral]).stable_atoms[0] == 4
    assert valence_verdicts([neutral]).smiles == (None,)


def test_unlisted_hydrogens_count():
    heavy = Molecule.from_rdkit(Chem.MolFromSmiles("CCO"))
    assert valence_verdicts([heavy, heavy.replace(hydrogens=np.zeros(3))]).stable.tolist() == [
        True,
        False,
    ]


def test_positions_without_bonds_are_perceived():
    bare = geometry("CC(=O)Nc1ccccc1").replace(bonds=None, orders=None)
    scrambled = bare.replace(positions=bare.positions * 3)
    verdicts = valence_verdicts([bare, scrambled])
    assert verdicts.stable.tolist() == [True, False]
    assert verdicts.smiles == ("CC(=O)Nc1ccccc1", None)
    assert verdicts.stable_atoms.tolist() == [len(bare), 0]


def test_edm_rule_on_small_molecules():
    methane, ammonium, water = geometry("C"), geometry("[NH4+]"), geometry("O")
    far = Molecule(
        np.concatenate([methane.atomic_numbers, water.atomic_numbers]),
        np.concatenate([methane.positions, water.positions + 50]),
    )
    verdicts = edm_verdicts([methane, ammonium, water, far])
    assert verdicts.stable.tolist() == [True, False, True, True]  # charges and parts unseen
    assert verdicts.fragments.tolist() == [1, 1, 1, 2]
    assert verdicts.smiles == ("[H]C([H])([H])[H]", None, "[H]O[H]", "[H]C([H])([H])[H]")
    with pytest.raises(ValueError, match="no positions"):
        edm_verdicts([graph("C")])


def test_verdicts_do_not_depend_on_the_batch(monkeypatch):
    molecules = [geometry(s) for s in ("CCO", "O", "c1ccccc1", "C", "CC#N")]
    together = edm_verdicts(molecules)
    monkeypatch.setattr(stability, "PAIRS_AT_ONCE", 1)
    apart = edm_verdicts(molecules)
    np.testing.assert_array_equal(together.stable_atoms, apart.stable_atoms)
    assert together.smiles == apart.smiles
    assert together.atoms.tolist() == [9, 3, 12, 5, 6]


def test_no_molecules_and_unknown_elements():
    assert edm_verdicts([]).stable.shape == valence_verdicts([]).stable.shape == (0,)
    sodium = Molecule(np.array([11, 1]), [[0, 0, 0], [0, 0, 1.9]])
    assert elements_unknown_to_edm([sodium]) == {"Na"}
    assert edm_verdicts([sodium]).stable_atoms.tolist() == [0]
