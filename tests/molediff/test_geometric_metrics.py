import math
import sys

import numpy as np
import pytest
from rdkit import Chem
from rdkit.Chem import rdDistGeom, rdForceFieldHelpers

from molediff.geometric import optional
from molediff.geometric.metrics import evaluate, ratio
from molediff.geometric.shapes import Measurements, distance, shape_distances
from molediff.molecules import Molecule, atomic_number
from shared.domains import Invalid
from shared.metrics import mean


def geometry(smiles, seed=7):
    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    rdDistGeom.EmbedMolecule(mol, randomSeed=seed)
    rdForceFieldHelpers.MMFFOptimizeMolecule(mol)
    return Molecule.from_rdkit(mol)


@pytest.fixture(scope="module")
def molecules():
    return [geometry(s) for s in ("CCO", "CO", "CC#N", "CCO", "C[NH3+]")]


def test_rates_have_the_right_denominators(molecules):
    scores = evaluate([*molecules, Invalid("x#6", "no atoms")], ["OCC", "CC"])
    plain = {name: (round(s.value, 6), s.n) for name, s in scores.items()}
    assert plain["read"] == (round(5 / 6, 6), 6)
    assert plain["molecule_stability"] == (round(4 / 6, 6), 6)  # EDM knows no charges
    assert plain["validity"] == (round(4 / 6, 6), 6)
    assert plain["uniqueness"] == (0.75, 4)
    assert plain["valid_and_unique"] == (0.5, 6)
    assert plain["novelty"] == (round(2 / 3, 6), 3)
    assert plain["connected"] == (round(5 / 6, 6), 6)
    assert plain["molecule_stability_valence"] == (round(5 / 6, 6), 6)
    assert plain["uniqueness_valence"] == (0.8, 5)
    assert plain["novelty_valence"] == (0.75, 4)
    assert plain["atom_stability_valence"] == (1.0, sum(len(m) for m in molecules))
    for score in scores.values():
        assert score.low <= score.value <= score.high
        assert score.low < score.high


def test_reference_molecules_and_their_smiles_agree(molecules):
    by_rule = evaluate(molecules, [geometry("CCO", 3), Invalid("a", "b")])
    by_text = evaluate(molecules, ["C(O)C"])
    by_graph = evaluate(molecules, [Molecule.from_rdkit(Chem.MolFromSmiles("OCC"))])
    assert by_rule == by_text == by_graph
    assert "novelty" not in evaluate(molecules)
    assert "novelty" not in evaluate(molecules, [Invalid("a", "b")])


def test_graphs_get_the_corrected_rule_only():
    graph = Molecule.from_rdkit(Chem.MolFromSmiles("c1ccccc1O"))
    scores = evaluate([graph])
    assert "molecule_stability" not in scores
    assert scores["molecule_stability_valence"].value == 1.0


def test_nothing_and_only_failures():
    assert math.isnan(evaluate([])["validity_valence"].value)
    scores = evaluate([Invalid("a", "b")] * 3)
    assert (scores["validity_valence"].value, scores["validity_valence"].n) == (0.0, 3)
    assert math.isnan(scores["uniqueness_valence"].value)
    assert (scores["molecule_stability"].value, scores["validity"].n) == (0.0, 3)
    assert math.isnan(scores["atom_stability"].value)
    assert evaluate([]).keys() == scores.keys()


def test_what_is_no_molecule_is_no_failed_molecule(molecules):
    for wrong in ("samples.sdf", [*molecules, molecules[0].to_rdkit()]):
        with pytest.raises(TypeError, match=r"no Molecule: read files with molediff\.read"):
            evaluate(wrong)
    with pytest.raises(TypeError, match="reference is a text"):
        evaluate(molecules, "train.smi")


@pytest.mark.golden
def test_published_summary_is_reproduced(golden):
    tensors, about = golden("09_edm_stability_mmff")
    d = {key: tensor.numpy() for key, tensor in tensors.items()}
    table = np.array([atomic_number(s) for s in about["atom_decoder"]])
    scores = evaluate(
        [
            Molecule(table[types[:n]], x[:n])
            for types, x, n in zip(d["atom_type"], d["positions"], d["n_atoms"], strict=True)
        ],
        perception="edm",
    )
    names = {
        "atom_stable": "atom_stability",
        "mol_stable": "molecule_stability",
        "validity": "validity",
        "uniqueness": "uniqueness",
        "valid_unique": "valid_and_unique",
    }
    for theirs, ours in names.items():
        assert scores[ours].value == pytest.approx(about["summary"][theirs], abs=1e-12)


def test_ratio_is_over_molecules_and_refuses_nan():
    totals = np.array([10, 10, 10, 10])
    estimate = ratio(np.array([10, 0, 10, 0]), totals)
    assert (estimate.value, estimate.n) == (0.5, 40)
    assert estimate.low == 0.0  # four molecules say little, forty independent atoms would say more
    perfect = ratio(totals, totals)
    assert (perfect.value, perfect.high) == (1.0, 1.0)
    assert 0.4 < perfect.low < 0.6
    with pytest.raises(ValueError, match="between 0"):
        ratio(np.array([np.nan]), np.array([1.0]))
    assert math.isnan(ratio(np.zeros(0), np.zeros(0)).value)


def test_nan_never_becomes_a_score(molecules):
    with pytest.raises(ValueError, match="finite"):
        Molecule(np.array([6]), [[np.nan, 0, 0]])
    assert math.isnan(mean([1.0, math.nan]).value)


def test_wasserstein_distance_of_shifted_kinds():
    rng = np.random.default_rng(0)
    values = rng.normal(size=400)
    owners = np.repeat(np.arange(100), 4)
    kinds = np.tile([0, 0, 0, 1], 100)
    wanted = Measurements(kinds, values, owners, 100)
    shifted = Measurements(kinds, values + np.where(kinds == 1, 0.8, 0.4), owners, 100)
    assert distance(wanted, wanted).value == 0.0
    estimate = distance(shifted, wanted)
    assert estimate.value == pytest.approx(0.75 * 0.4 + 0.25 * 0.8)
    assert 0 < estimate.high - estimate.value < 0.3
    nothing = Measurements(kinds + 7, values, owners, 100)
    assert math.isnan(distance(nothing, wanted).value)


def test_shapes_of_stretched_molecules_are_far(molecules):
    same = shape_distances(molecules, molecules)
    assert same["bond_length_distance"].value == same["bond_angle_distance"].value == 0.0
    stretched = [m.replace(positions=m.positions * 1.1) for m in molecules]
    scores = shape_distances(stretched, molecules)
    assert 0.09 < scores["bond_length_distance"].value < 0.16
    assert scores["bond_angle_distance"].value < 1e-6
    assert scores["bond_length_distance"].n == sum(len(m.bonds) for m in molecules)


def test_resamples_without_the_kinds_of_the_data_are_left_out(molecules):
    scores = shape_distances([molecules[0], geometry("Cl")], molecules[:1])
    for score in scores.values():
        assert score.low <= score.value <= score.high


def test_extras_that_cannot_be_had_say_so(molecules, monkeypatch):
    with pytest.raises(ValueError, match="none of fcd"):
        evaluate(molecules, extras=["magic"])
    with pytest.raises(ValueError, match="give reference"):
        evaluate(molecules, extras=["fcd"])
    with pytest.raises(ValueError, match="give reference"):
        evaluate(molecules, ["CCO"], extras=["shape"])
    monkeypatch.setitem(sys.modules, "fcd_torch", None)
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        evaluate(molecules, ["CCO"], extras=["fcd"])


def test_frechet_distance_of_gaussians():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(4000, 3))
    y = x * np.array([2.0, 1.0, 1.0]) + np.array([0.0, 3.0, 0.0])
    centre, root = y.mean(0), optional._root(np.cov(y.T))
    shift, spread = np.square(x.mean(0) - centre).sum(), x[:, 0].std(ddof=1) ** 2
    assert optional.frechet(x, centre, root) == pytest.approx(shift + spread, rel=2e-2)
    assert optional.frechet(y, centre, root) == pytest.approx(0.0, abs=1e-9)


def test_fcd_equals_the_package_it_names():
    package = pytest.importorskip("fcd_torch")
    ours, theirs = ["CCO", "CCN", "CCC", "c1ccccc1"], ["CC", "CCCl", "CC=O", "CCS", "CNC"]
    estimate = optional.fcd(ours, theirs)
    assert estimate.value == pytest.approx(package.FCD(device="cpu")(theirs, ours), rel=1e-3)
    assert estimate.low <= estimate.value <= estimate.high
    assert math.isnan(optional.fcd(["C"], theirs).value)


def test_strain_is_released_by_stretched_molecules():
    pytest.importorskip("tblite")
    pytest.importorskip("ase")
    water = geometry("O")
    stretched = water.replace(positions=water.positions * 1.15)
    graph = water.replace(positions=None)
    scores = optional.strain([water, stretched, graph])
    assert (scores["strain_relaxed"].value, scores["strain"].n) == (pytest.approx(2 / 3), 2)
    assert 0 <= optional.strain([water])["strain"].value < 1 < scores["strain"].value * 2 < 60


def test_posebusters_passes_water_and_fails_nonsense():
    pytest.importorskip("posebusters")
    methanol = geometry("CO")
    squeezed = methanol.replace(positions=methanol.positions * 0.3)
    estimate = optional.posebusters([methanol, squeezed, methanol.replace(positions=None)])
    assert (estimate.value, estimate.n) == (pytest.approx(1 / 3), 3)
