import sys

import numpy as np
import pytest
import torch
from rdkit import Chem
from rdkit.Chem import rdDistGeom, rdForceFieldHelpers

from molediff import xtb
from molediff.geometric import optional
from molediff.molecules import Molecule
from molediff.xtb import Electronic, compute, relaxed, stream
from shared.domains import Invalid

pytest.importorskip("tblite")
pytest.importorskip("dftd4")

WATER = Molecule(
    np.array([8, 1, 1]),
    np.array([[0.0, 0.0, 0.1173], [0.0, 0.7572, -0.4692], [0.0, -0.7572, -0.4692]]),
    name="water",
)


def geometry(smiles):
    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    rdDistGeom.EmbedMolecule(mol, randomSeed=7)
    rdForceFieldHelpers.MMFFOptimizeMolecule(mol)
    return Molecule.from_rdkit(mol)


def reason(molecule, **options):
    found = compute(molecule, **options)
    assert isinstance(found, Invalid)
    return found.reason


def test_water_has_the_values_of_the_programs(capfd):
    found = compute(WATER)
    assert found.energy == pytest.approx(-5.0703707645 * 27.211386246, abs=1e-6)
    assert found.homo == pytest.approx(-12.17693772, abs=1e-5)
    assert found.gap == pytest.approx(2.4527656 + 12.17693772, abs=1e-5)
    assert found.mu == pytest.approx(2.271101, abs=1e-4)
    assert found.alpha == pytest.approx(9.42778052, abs=1e-6)
    assert found.properties().keys() == xtb.UNITS.keys()
    assert found.properties()["gap"] == found.gap
    assert capfd.readouterr() == ("", "")


def test_values_do_not_depend_on_the_frame():
    generator = np.random.default_rng(0)
    turn, _ = np.linalg.qr(generator.normal(size=(3, 3)))
    moved = WATER.replace(positions=WATER.positions @ turn + generator.normal(size=3))
    stretched = WATER.replace(positions=WATER.positions * 1.05)
    found, same, other = (
        list(compute(m).properties().values()) for m in (WATER, moved, stretched)
    )
    assert same == pytest.approx(found, abs=1e-6)
    assert not np.isclose(other, found, rtol=1e-4).any()


def test_an_ion_has_its_own_charge():
    ammonium = geometry("[NH4+]")
    assert ammonium.charge == 1
    neutral = ammonium.replace(charges=np.zeros(5, int))
    assert compute(ammonium).homo < -15
    assert "odd number of electrons" in reason(neutral)


def test_a_relaxation_ends_in_a_minimum(capfd):
    stretched = WATER.replace(positions=WATER.positions * 1.15)
    found = compute(stretched, relax=True)
    assert found.released == pytest.approx(compute(stretched).energy - found.energy, abs=1e-3)
    assert found.released > 0.2
    assert found.energy == pytest.approx(compute(WATER, relax=True).energy, abs=1e-3)
    same, released = relaxed(stretched)
    assert released == pytest.approx(found.released, abs=1e-6)
    assert same.name == "water"
    assert optional.strain([stretched])["strain"].value == pytest.approx(23.060548 * released)
    assert "not relaxed within 1 steps" in reason(stretched, relax=True, steps=1)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("molecule", "words"),
    [
        (WATER.replace(positions=None), "no positions"),
        (WATER.replace(positions=np.zeros((3, 3))), "atoms 0 and 1 are 0 Angstrom apart"),
        (WATER.replace(positions=WATER.positions * 0.3), "Angstrom apart"),
        (WATER.replace(hydrogens=np.array([1, 0, 0])), "with_hydrogens"),
        (WATER.replace(charges=np.array([8, 0, 0])), "no valence electron"),
        (Molecule(np.array([1]), np.zeros((1, 3)), np.array([-1])), "no empty orbital"),
        (Molecule(np.array([118]), np.zeros((1, 3))), "Z >86"),
        (WATER.replace(positions=np.diag([0.0, 1e4, -1e4])), ""),
    ],
)
def test_a_failure_is_a_value_with_its_reason(molecule, words, capfd):
    assert words in reason(molecule)
    assert compute(molecule).record == molecule.name
    assert capfd.readouterr() == ("", "")


def test_scrambled_atoms_never_raise():
    generator = np.random.default_rng(0)
    for spread in (0.3, 1.0, 3.0):
        positions = generator.normal(0, spread, (10, 3))
        found = compute(Molecule(np.array([6] * 5 + [1] * 5), positions))
        assert isinstance(found, Invalid) or np.isfinite(list(found.properties().values())).all()


def test_a_stream_keeps_the_order_and_what_was_invalid():
    broken = Invalid("x#1", "no atoms")
    squeezed = WATER.replace(positions=WATER.positions * 0.1)
    items = [WATER, broken, squeezed, geometry("C")]
    here, there = list(stream(items)), list(stream(iter(items), processes=2))
    assert here[1] is broken
    for found in (here, there):
        assert [type(x) for x in found] == [Electronic, Invalid, Invalid, Electronic]
        assert [len(found[i].molecule) for i in (0, 3)] == [3, 5]
    assert there[3].properties() == pytest.approx(here[3].properties())


def test_the_threads_of_others_are_left_alone():
    torch.set_num_threads(2)
    compute(WATER)
    assert torch.get_num_threads() == 2


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "dftd4.interface", None)
    with pytest.raises(ModuleNotFoundError, match=r"dftd4: pip install 'molediff\[chemistry\]'"):
        compute(WATER)
