import pickle

import numpy as np
import pytest
from rdkit import Chem
from rdkit.Chem import rdDistGeom

from molediff.molecules import AROMATIC, Molecule, atomic_number


def embedded(smiles):
    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    rdDistGeom.EmbedMolecule(mol, randomSeed=1)
    return mol


def test_arrays_are_checked_read_only_copies():
    numbers, x = np.array([8, 1, 1]), np.zeros((3, 3), np.float32)
    molecule = Molecule(numbers, x, properties={"mu": 1.5}, name="water")
    x[0, 0] = 7.0
    assert molecule.positions[0, 0] == 0.0
    assert molecule.positions.dtype == np.float32
    assert (len(molecule), molecule.symbols, molecule.charge) == (3, ["O", "H", "H"], 0)
    with pytest.raises(ValueError, match="read-only"):
        molecule.positions[0, 0] = 1.0
    with pytest.raises(TypeError):
        molecule.properties["mu"] = 2.0


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"atomic_numbers": []}, "no atoms"),
        ({"atomic_numbers": [0, 1]}, "outside 1..118"),
        ({"atomic_numbers": [1.5, 1]}, "whole numbers"),
        ({"positions": np.zeros((3, 3))}, "shape"),
        ({"positions": np.full((2, 3), np.nan)}, "finite"),
        ({"positions": np.full((2, 3), -np.inf)}, "finite"),
        ({"positions": np.full((2, 3), 10_001.0)}, "beyond 10000"),
        ({"charges": [0]}, "charges: shape"),
        ({"charges": [0, 2]}, r"charges: \+2 on H \(atom 2\)"),
        ({"bonds": [[0, 1]]}, "together"),
        ({"bonds": [[0, 2]], "orders": [1]}, "outside 0..1"),
        ({"bonds": [[1, 1]], "orders": [1]}, "itself"),
        ({"bonds": [[0, 1], [1, 0]], "orders": [1, 1]}, "twice"),
        ({"bonds": [[0, 1]], "orders": [5]}, "orders"),
        ({"bonds": [[0, 1]], "orders": [1.5]}, "whole numbers"),
    ],
)
def test_nonsense_is_refused(change, match):
    fields = {"atomic_numbers": np.array([6, 1]), "positions": np.zeros((2, 3))} | change
    with pytest.raises(ValueError, match=match):
        Molecule(**fields)


@pytest.mark.parametrize("symbol", ["", "Xx", "0", "119", "C1", "²"])
def test_unknown_elements_are_refused(symbol):
    with pytest.raises(ValueError, match="unknown element"):
        atomic_number(symbol)


def test_elements_by_symbol_in_any_case_or_by_number():
    assert [atomic_number(s) for s in ("H", "cl", "CL", "6", "D")] == [1, 17, 17, 6, 1]


@pytest.mark.parametrize("smiles", ["c1ccccc1", "C[NH3+]", "O=C([O-])c1cc[nH]c1", "N#CC=CO"])
def test_there_and_back_with_rdkit(smiles):
    mol = embedded(smiles)
    molecule = Molecule.from_rdkit(mol)
    again = molecule.to_rdkit()
    assert Chem.MolToSmiles(again) == Chem.MolToSmiles(mol)
    np.testing.assert_array_equal(again.GetConformer().GetPositions(), molecule.positions)
    assert molecule.smiles() == Chem.MolToSmiles(Chem.RemoveHs(mol), isomericSmiles=False)
    assert molecule.charge == Chem.GetFormalCharge(mol)


def test_hydrogens_that_are_not_atoms_are_counted_and_come_back():
    pyrrole = Molecule.from_rdkit(Chem.MolFromSmiles("c1cc[nH]c1"))
    assert pyrrole.hydrogens.tolist() == [1, 1, 1, 1, 1]
    assert pyrrole.positions is None
    assert len(pyrrole.with_hydrogens()) == 10
    assert pyrrole.with_hydrogens().smiles() == pyrrole.smiles() == "c1cc[nH]c1"


def test_open_valences_are_not_filled():
    methyl = Molecule(np.array([6, 1, 1, 1]), bonds=[[0, 1], [0, 2], [0, 3]], orders=[1, 1, 1])
    assert methyl.smiles() == "[CH3]"


def test_kekulised_and_aromatic_forms_are_the_same_molecule():
    benzene = Molecule.from_rdkit(embedded("c1ccccc1"))
    kekulised = benzene.kekulised()
    assert sorted(kekulised.orders.tolist()) == [1] * 9 + [2] * 3
    assert (benzene.orders == AROMATIC).sum() == 6
    np.testing.assert_array_equal(kekulised.aromatised().orders, benzene.orders)
    assert kekulised.smiles() == benzene.smiles() == "c1ccccc1"
    with pytest.raises(ValueError, match="aromatic"):
        Molecule(np.array([8, 1, 1]), bonds=[[0, 1], [0, 2]], orders=[AROMATIC] * 2).kekulised()


def test_smiles_need_bonds_and_bonds_need_orders():
    with pytest.raises(ValueError, match="perceive"):
        Molecule(np.array([6]), np.zeros((1, 3))).smiles()
    dative = Chem.MolFromSmiles("[NH3]->[Cu]", sanitize=False)
    with pytest.raises(ValueError, match="DATIVE"):
        Molecule.from_rdkit(dative)
    with pytest.raises(ValueError, match="outside 1..118"):
        Molecule.from_rdkit(Chem.MolFromSmiles("*C"))


def test_pickling_keeps_everything():
    molecule = Molecule.from_rdkit(embedded("CO")).replace(name="methanol", properties={"a": 1})
    again = pickle.loads(pickle.dumps(molecule))
    assert again.name == "methanol"
    assert again.properties == {"a": 1}
    np.testing.assert_array_equal(again.bonds, molecule.bonds)
