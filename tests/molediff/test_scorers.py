import numpy as np
import pytest
import torch
from rdkit import Chem
from rdkit.Chem import QED, rdDistGeom, rdForceFieldHelpers

import molediff
from molediff.molecules import Molecule
from molediff.scorers import (
    NAMED,
    WORST,
    Scorer,
    has,
    lacks,
    mask_of,
    reward,
    scorer,
    xtb_property,
)
from molediff.targets import Extreme, Range, Value
from shared.domains import Invalid
from shared.guidance import Steered
from shared.solvers.ancestral import DDPM

INVALID = Invalid("0", "no atoms")


def geometry(smiles):
    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    rdDistGeom.EmbedMolecule(mol, randomSeed=7)
    rdForceFieldHelpers.MMFFOptimizeMolecule(mol)
    return Molecule.from_rdkit(mol)


PHENOL, ETHANE = geometry("c1ccccc1O"), geometry("CC")


def test_descriptors_are_those_of_rdkit():
    mol = Chem.MolFromSmiles("c1ccccc1O")
    values = {name: scorer(name).values([PHENOL])[0] for name in NAMED if "xtb" not in name}
    assert values["qed"] == pytest.approx(QED.qed(mol))
    assert values["weight"] == pytest.approx(94.113, abs=1e-3)
    assert (values["rings"], values["donors"], values["heavy_atoms"]) == (1, 1, 7)
    assert 1.0 <= values["sa"] < 2.0
    assert scorer("bertzct").values([PHENOL])[0] > scorer("BertzCT").values([ETHANE])[0]
    assert all(np.isfinite(v) for v in values.values())


def test_what_cannot_be_judged_gets_a_stated_worst():
    salt = Molecule.from_rdkit(Chem.MolFromSmiles("[Na+].[Cl-]"))
    bare = PHENOL.replace(bonds=None, orders=None)
    items = [PHENOL, INVALID, bare, salt]
    for name, worst in (("qed", 0.0), ("logp", WORST), ("lacks:N", 0.0)):
        judge = scorer(name)
        assert judge.worst == worst
        scores = judge(items)
        np.testing.assert_array_equal(scores[1:3], worst)
        assert scores[0] > worst
    assert scorer("qed")(items)[3] == 0.0
    assert scorer("has:[Na+]")(items)[3] == 1.0
    assert scorer("qed")([]).shape == (0,)


def test_a_target_turns_a_value_into_a_distance():
    values = np.array([1.0, 4.0, np.nan])
    judge = Scorer("x", lambda m: 0.0, bounds=(0.0, 10.0))
    near = judge.aimed(Value("x", "", 3.0))
    np.testing.assert_array_equal(near.scores(values), [-2.0, -1.0, -7.0])
    above = judge.aimed(Range("x", "", low=2.0)).weighted(2.0)
    np.testing.assert_array_equal(above.scores(values), [-2.0, 0.0, -4.0])
    small = judge.aimed(Extreme("x", "", maximise=False))
    np.testing.assert_array_equal(small.scores(values), [-1.0, -4.0, -10.0])
    np.testing.assert_array_equal(judge.weighted(-1.0).scores(values), [-1.0, -4.0, -10.0])
    unbounded = Scorer("x", lambda m: np.inf).weighted(-0.5)
    assert unbounded([PHENOL])[0] == unbounded.worst == 0.5 * WORST


def test_patterns_are_looked_for_in_the_heavy_atoms():
    assert has("c[OH]")([PHENOL, ETHANE]).tolist() == [1.0, 0.0]
    assert lacks("c[OH]")([PHENOL, ETHANE]).tolist() == [0.0, 1.0]
    for wrong in ("", "c1ccc", "(("):
        with pytest.raises(ValueError, match="is not a SMARTS pattern"):
            has(wrong)


def test_a_property_by_xtb_is_the_oracles():
    pytest.importorskip("tblite")
    pytest.importorskip("dftd4")
    from molediff.oracles import XTBOracle

    judge, squeezed = scorer("xtb_gap"), ETHANE.replace(positions=np.zeros((8, 3)))
    values = judge.values([PHENOL, squeezed])
    assert values[0] == XTBOracle()([PHENOL])["gap"][0]
    assert np.isnan(values[1])
    assert judge.unit == "eV"
    with pytest.raises(ValueError, match="does not predict 'cv'"):
        xtb_property("cv")


def test_a_function_of_the_user(tmp_path):
    file = tmp_path / "mine: 1.py"
    file.write_text(
        "import math\n"
        "def size(molecule):\n    return len(molecule)\n"
        "def odd(molecule):\n    return math.nan if len(molecule) % 2 else 1\n"
        "def broken(molecule):\n    return 1 / 0\n"
        "def text(molecule):\n    return 'large'\n"
        "number = 3\n"
    )
    assert scorer(f"{file}:size")([PHENOL, ETHANE, INVALID]).tolist() == [13.0, 8.0, WORST]
    assert scorer(f"{file}:odd")([PHENOL, ETHANE]).tolist() == [WORST, 1.0]
    named = ETHANE.replace(name="seven")
    for name, words in (("broken", "ZeroDivisionError"), ("text", "could not convert")):
        with pytest.raises(ValueError, match=rf"mine: 1.py:{name}' fails on .*seven \(CC\)"):
            scorer(f"{file}:{name}")([named])
        with pytest.raises(ValueError, match=words):
            scorer(f"{file}:{name}")([ETHANE])
    for name in ("absent", "number"):
        with pytest.raises(ValueError, match=f"has no function '{name}'"):
            scorer(f"{file}:{name}")
    with pytest.raises(ValueError, match=r"there is no file .*no\.py"):
        scorer(f"{tmp_path}/no.py:size")
    with pytest.raises(ValueError, match=r"write FILE\.py:FUNCTION"):
        scorer(f"{file}:")
    file.write_text("x = ")
    with pytest.raises(ValueError, match="cannot be run: SyntaxError"):
        scorer(f"{file}:size")


def test_an_unknown_scorer_is_told_the_known_ones():
    with pytest.raises(
        ValueError, match=r"'qqed'; did you mean 'qed'\? Known: qed, logp, .*SMARTS"
    ):
        scorer("qqed")


# -- steering ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return molediff.load("qm9")


def generate(model, solver, steps, **request):
    return model.generate(8, solver=solver, steps=steps, grid="time_uniform", seed=0, **request)


def test_the_padding_of_estimates_is_not_decoded(model):
    batch = model.domain.template(0, range(6))
    sizes = batch.mask.sum(1).tolist()
    assert len(set(sizes)) > 1
    found, judge = [], Scorer("size", len)
    solver = Steered(
        DDPM(), lambda x: found.append(mask_of(x)) or reward(model.domain, judge)(x), 2
    )
    out = model.generate(6, solver=solver, steps=8, seed=0)
    assert [len(m) for m in out.items] == sizes
    for mask in found:
        assert torch.equal(mask, batch.mask)
    assert mask_of({"positions": torch.zeros(2, 1, 3)}) is None  # lone atoms


def test_steering_improves_what_is_scored(model):
    judge = scorer("qed")
    plain = generate(model, DDPM(), 20, atoms=14)
    steered = generate(
        model, Steered(DDPM(), reward(model.domain, judge), 3, scale=30.0), 60, atoms=14
    )
    assert steered.summary.nfe == 60
    assert judge(steered.items).mean() > judge(plain.items).mean() + 0.05


def test_a_sample_is_steered_by_its_own_reward_only(model):
    solver = Steered(DDPM(), reward(model.domain, scorer("tpsa"), scorer("has:O")), 2)
    settings = {"solver": solver, "steps": 16, "seed": 3, "atoms": 9}
    whole = model.generate(4, **settings).items
    halves = model.generate(4, **settings, batch=2).items
    for one, other in zip(whole, halves, strict=True):
        np.testing.assert_array_equal(one.atomic_numbers, other.atomic_numbers)
        np.testing.assert_allclose(one.positions, other.positions, atol=2e-3)


def test_the_best_of_n_is_the_best_of_its_tries(model):
    judge, tries = scorer("weight"), []
    score = reward(model.domain, judge)

    def watched(x):
        tries.append(score(x))
        return tries[-1]

    best = generate(model, Steered.best_of(DDPM(), watched, 3), 30, atoms=10)
    assert len(tries) == 3  # one per try, at the end only
    rewards = torch.stack(tries)
    np.testing.assert_array_equal(judge(best.items), rewards.max(0).values)
    first = generate(model, DDPM(), 10, atoms=10)  # the first try is the sample without steering
    np.testing.assert_allclose(judge(first.items), rewards[0])
    assert (rewards.max(0).values > rewards[0]).any()


def test_a_reward_wants_a_scorer(model):
    with pytest.raises(ValueError, match="at least one"):
        reward(model.domain)


def test_similar():
    ethanol, ether = (Molecule.from_rdkit(Chem.MolFromSmiles(s)) for s in ("CCO", "COC"))
    judge = scorer("similar:OCC")
    values = judge([ethanol, ether, Invalid("x", "nothing")])
    assert values[0] == 1.0
    assert 0.0 < values[1] < 0.5
    assert values[2] == judge.worst == 0.0
    with pytest.raises(ValueError, match="give SMILES or a file"):
        scorer("similar:no molecule")
