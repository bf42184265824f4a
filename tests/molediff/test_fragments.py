from __future__ import annotations

import numpy as np
import pytest
from rdkit import Chem
from rdkit.Chem import AllChem

import molediff
from molediff import Molecule
from molediff.geometric.fragments import Fragment
from shared.configuration import ConfigurationError


def embedded(smiles: str, shift: float = 0.0) -> Molecule:
    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    AllChem.EmbedMolecule(mol, randomSeed=7)
    molecule = Molecule.from_rdkit(mol)
    return molecule.replace(positions=molecule.positions + shift)


@pytest.fixture
def ethanol(tmp_path):
    """Atoms C C O, then hydrogens: three at 0, two at 1, one at 2."""
    molediff.write(tmp_path / "ethanol.sdf", [embedded("CCO")])
    return tmp_path / "ethanol.sdf"


@pytest.mark.parametrize(
    ("suffix", "atoms"),
    [
        ("", [0, 1, 2]),
        (":2,0", [2, 0]),
        (":0-2, 8", [0, 1, 2, 8]),
        (":1,1", [1]),
        ("@2", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("@0,1", [0, 1, 2, 8]),
    ],
)
def test_atoms_of_a_file(ethanol, suffix, atoms):
    whole = next(iter(molediff.read(ethanol)))
    kept = Fragment.read(f"{ethanol}{suffix}").molecule
    assert kept.atomic_numbers.tolist() == whole.atomic_numbers[atoms].tolist()
    np.testing.assert_array_equal(kept.positions, whole.positions[atoms])


def test_hydrogens_are_found_without_bonds(tmp_path):
    molecule = embedded("CCO")
    molediff.write(tmp_path / "ethanol.xyz", [molecule])
    kept = Fragment.read(f"{tmp_path / 'ethanol.xyz'}@2")
    assert kept.molecule.symbols == ["C", "C", "O", *"HHHHH"]


@pytest.mark.parametrize("records", [1, 2])
def test_two_fragments_keep_their_pose(tmp_path, records):
    first, second = embedded("CO"), embedded("CN", shift=4.0)
    path = tmp_path / "pair.sdf"
    if records == 2:
        molediff.write(path, [first, second])
    else:
        both = Chem.CombineMols(first.to_rdkit(), second.to_rdkit())
        molediff.write(path, [Molecule.from_rdkit(both)])
    kept = Fragment.read(str(path)).molecule
    assert kept.symbols == ["C", "O", "C", "N"]
    want = np.concatenate([first.positions[:2], second.positions[:2]])
    np.testing.assert_allclose(kept.positions, want, atol=1e-4)


def test_smiles_are_embedded():
    ring = Fragment.read("C1CCOC1").molecule
    assert ring.symbols == ["C", "C", "C", "O", "C"]
    ends = np.linalg.norm(ring.positions - np.roll(ring.positions, 1, axis=0), axis=1)
    assert ends == pytest.approx(1.5, abs=0.15)
    again = Fragment.read("C1CCOC1").molecule
    np.testing.assert_array_equal(ring.positions, again.positions)
    phenyl = Fragment.read("*c1ccccc1").molecule
    assert phenyl.symbols.count("C") == 6
    assert phenyl.symbols.count("H") == 5
    bare = np.linalg.norm(phenyl.positions[:6, None] - phenyl.positions[None, 6:], axis=-1).min(1)
    assert (bare > 1.5).tolist() == [True] + [False] * 5


def test_a_file_of_smiles_is_embedded_with_its_hydrogens(tmp_path):
    (tmp_path / "one.smi").write_text("CO methanol\n")
    assert Fragment.read(str(tmp_path / "one.smi")).molecule.symbols == ["C", "O"]
    assert len(Fragment.read(f"{tmp_path / 'one.smi'}@1")) == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("missing.sdf", r"'missing.sdf' cannot be read: missing.sdf: no such file"),
        ("missing.sdf:0,1", r"'missing.sdf' cannot be read"),
        ("C1CC", r"'C1CC' is neither a file of molecules nor a SMILES"),
        ("frag.mol2", r"'frag.mol2' is neither"),
        ("*", r"'\*' has no heavy atoms"),
        ("*(C)C", r"'\*\(C\)C' cannot be embedded in 3D: give a file"),
        ("C.O", r"'C.O' has several parts.*give a file"),
        ("{ethanol}:0,9", r"no atom 9; its 9 atoms are counted from 0 to 8"),
        ("{ethanol}:", r"'' is not an atom: write numbers from 0"),
        ("{ethanol}:0-", r"'0-' is not an atom"),
    ],
)
def test_mistakes_are_named_in_one_line(ethanol, text, message):
    with pytest.raises(ConfigurationError, match=message) as caught:
        Fragment.read(text.format(ethanol=ethanol))
    assert "\n" not in str(caught.value)


def test_files_that_are_no_fragment(tmp_path):
    broken, library, gas = (tmp_path / f"{n}.sdf" for n in ("broken", "library", "gas"))
    broken.write_text("not a molecule\n")
    with pytest.raises(ConfigurationError, match=r"broken.sdf' cannot be read"):
        Fragment.read(str(broken))
    molediff.write(library, [embedded("C")] * 20)
    with pytest.raises(ConfigurationError, match="holds more than 16 records"):
        Fragment.read(str(library))
    molediff.write(gas, [embedded("[H][H]")])
    with pytest.raises(ConfigurationError, match="no heavy atoms: list the atoms to keep"):
        Fragment.read(str(gas))
