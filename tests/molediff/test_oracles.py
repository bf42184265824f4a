import json

import numpy as np
import pytest
from rdkit import Chem
from rdkit.Chem import rdDistGeom, rdForceFieldHelpers

from molediff import cli, oracles, xtb
from molediff.files import write
from molediff.geometric.prepare import prepare
from molediff.molecules import Molecule
from molediff.oracles import Calibration, XTBOracle, calibrate, check_properties, shipped
from shared.domains import Invalid
from shared.metrics import Estimate

pytest.importorskip("tblite")
pytest.importorskip("dftd4")

SMILES = ("C", "CC", "CO", "CCO", "C=C", "CC#N", "O", "N", "C1CC1", "OCCO", "C=O", "CN", "CCC")


def geometry(smiles):
    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    rdDistGeom.EmbedMolecule(mol, randomSeed=7)
    rdForceFieldHelpers.MMFFOptimizeMolecule(mol)
    return Molecule.from_rdkit(mol)


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    """A data set whose labels lie on straight lines of the xTB values."""
    folder = tmp_path_factory.mktemp("data")
    for smiles in SMILES:
        molecule = geometry(smiles)
        values = xtb.compute(molecule).properties()
        labels = {"gap": 0.5 * values["gap"] + 4.0, "mu": 0.8 * values["mu"], "other": 1.0}
        write(folder / "raw.sdf", [molecule.replace(properties=labels)])
    return prepare(folder / "raw.sdf", folder / "data", fractions=(0.6, 0.4, 0.0), seed=1)


def test_a_calibration_finds_the_lines_and_survives_its_file(made_up, tmp_path):
    seen = []
    made = calibrate(made_up, 100, 3, seed=2, progress=lambda *done: seen.append(done))
    n, held_out = (len(made_up.subset(split)) for split in ("train", "valid"))
    assert seen[-1] == (n + 3, n + 3)
    assert held_out > 3
    gap, mu = made.lines["gap"], made.lines["mu"]
    assert (gap.slope, gap.intercept) == (pytest.approx(0.5, abs=1e-3), pytest.approx(4, abs=1e-2))
    assert (mu.slope, mu.intercept) == (pytest.approx(0.8, abs=1e-3), 0.0)
    assert made.lines.keys() == {"gap", "mu"}
    assert (gap.n, gap.calibrated.n, gap.unit) == (n, 3, "eV")
    assert gap.calibrated.value < 1e-2 < gap.raw.value
    assert {"tblite", "dftd4", "python"} <= made.versions.keys()
    made.save(tmp_path / "new" / "c.json")
    assert Calibration.load(tmp_path / "new" / "c.json") == made


def test_a_line_bends_where_the_labels_do():
    x = np.random.default_rng(0).uniform(-3.0, 5.0, 400)
    y = 0.9 * x + 2.0 - 0.7 * np.maximum(x - 1.0, 0.0)
    slope, intercept, bend, knot = oracles._least_squares(x, y, bent=True)
    assert (slope, intercept) == (pytest.approx(0.9, abs=0.02), pytest.approx(2.0, abs=0.02))
    assert (bend, knot) == (pytest.approx(-0.7, abs=0.02), pytest.approx(1.0, abs=0.05))
    none = Estimate(0.0, 0, 0.0, 0.0)
    line = oracles.Line("eV", slope, intercept, bend, knot, 400, none, none)
    assert line([-1.0, 4.0]) == pytest.approx([1.1, 3.5], abs=0.05)
    assert oracles._least_squares(x, 2 * x, through_zero=True) == (
        pytest.approx(2.0),
        0.0,
        0.0,
        0.0,
    )


def test_the_verb_writes_what_the_function_finds(made_up, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["oracle", "calibrate", str(made_up.path), "n=4", "held_out=2", "seed=3", f"out={out}"]
    assert cli.cli.main(cli.PROGRAM, words) == 0
    assert "mean absolute error" in capsys.readouterr().out
    assert Calibration.load(out / "calibration.json") == calibrate(made_up, 4, 2, seed=3)
    assert cli.cli.main(cli.PROGRAM, words[:-1]) == 2
    assert "give out=FOLDER" in capsys.readouterr().err


def test_what_cannot_be_calibrated_is_named(made_up, tmp_path):
    (tmp_path / "other.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(ValueError, match="molediff oracle calibrate"):
        Calibration.load(tmp_path / "other.json")
    write(tmp_path / "bare.sdf", [geometry("C")])
    bare = prepare(tmp_path / "bare.sdf", tmp_path / "bare")
    with pytest.raises(ValueError, match="none of the labels homo, lumo"):
        calibrate(bare)
    with pytest.raises(ValueError, match="too few"):
        calibrate(made_up, 2, 1)


@pytest.mark.parametrize("relax", [False, True])
def test_what_is_shipped_beats_the_bare_values(relax):
    found = shipped(relax)
    assert tuple(found.lines) == oracles.PROPERTIES
    assert found.relax is relax
    for line in found.lines.values():
        assert line.calibrated.n + found.failed >= 200
        assert line.calibrated.high < line.raw.low
        assert line.calibrated.low < line.calibrated.value < line.calibrated.high
        assert min(line.slope, line.slope + line.bend) > 0  # larger by xTB is larger
    assert {name for name, line in found.lines.items() if line.bend} == set(oracles.BENT)


def test_an_oracle_gives_nan_where_it_fails():
    oracle = XTBOracle()
    squeezed = geometry("C").replace(positions=np.zeros((5, 3)))
    found = oracle([geometry("C"), Invalid("x", "no atoms"), squeezed, geometry("O")])
    assert found.keys() == oracle.accuracy.keys() == set(oracles.PROPERTIES)
    for values in found.values():
        np.testing.assert_array_equal(np.isnan(values), [False, True, True, False])
    raw = xtb.compute(geometry("O")).gap
    line = oracle.calibration.lines["gap"]
    assert found["gap"][3] == line(raw)
    assert oracle([])["mu"].shape == (0,)
    reasons = [r.reason for r in oracle.stream([squeezed, Invalid("x", "no atoms")])]
    assert reasons == ["atoms 0 and 1 are 0 Angstrom apart", "no atoms"]


def test_properties_without_an_oracle_are_named():
    with pytest.raises(ValueError, match=r"GFN2-xTB does not predict 'cv'; it has homo, lumo"):
        check_properties(XTBOracle(), ["gap", "cv"])
    assert "eV to B3LYP" in str(XTBOracle().accuracy["gap"])


def test_a_relaxing_oracle_sees_the_minimum():
    pytest.importorskip("ase")
    water = geometry("O")
    stretched = water.replace(positions=water.positions * 1.1)
    still, relaxing = XTBOracle(), XTBOracle(shipped(relax=True))
    assert relaxing.name != still.name
    assert relaxing([stretched])["gap"] == pytest.approx(relaxing([water])["gap"], abs=0.02)
    assert abs(still([stretched])["gap"] - still([water])["gap"]) > 0.05


def test_the_error_it_claims_is_the_error_it_makes(data_folder):
    files = (data_folder("qm9") / f"{name}.npz" for name in ("geometries", "properties"))
    molecules, table = (dict(np.load(file, allow_pickle=False)) for file in files)
    columns = table["names"].tolist()
    labels = {int(i): row for i, row in zip(table["gdb_index"], table["values"], strict=True)}
    index, ends = molecules["gdb_index"], np.cumsum(molecules["num_atoms"])
    valid = [int(r) for r in np.flatnonzero(molecules["split"] == 1) if int(index[r]) in labels]
    rows = valid[5::120][:50]
    items = []
    for row in rows:
        atoms = slice(ends[row] - molecules["num_atoms"][row], ends[row])
        items.append(Molecule(molecules["atomic_numbers"][atoms], molecules["positions"][atoms]))
    oracle = XTBOracle()
    for name, values in oracle(items).items():
        unit = xtb.HARTREE if oracle.accuracy[name].unit == "eV" else 1.0
        truth = np.array([unit * labels[int(index[row])][columns.index(name)] for row in rows])
        claimed = oracle.accuracy[name].mae.value
        assert 0.4 * claimed < np.abs(values - truth).mean() < 1.8 * claimed, name
