"""Predictions of trained property models for molecules, and labels made by them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import test_properties
from test_geometric_domain import embedded

from molediff import Invalid, Molecule
from molediff.cli import PROGRAM
from molediff.geometric.data import MoleculeData
from molediff.geometric.predicting import NetworkOracle, Predictor, label
from shared import cli

folder = test_properties.folder


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """A short training through the command line."""
    out = tmp_path_factory.mktemp("runs") / "oracle"
    words = ["train", "experiment=qm9_oracle", f"domain.data={folder}", "domain.labels=all"]
    words += ["domain.properties=[odd,mass]", "model.width=32", "model.layers=1", f"out={out}"]
    words += ["trainer.max_steps=3", "trainer.batch_size=4", "trainer.compile=false", "seed=0"]
    assert cli.main(PROGRAM, [*words, "model.vectors=8", "model.pairs=8"]) == 0
    return out


def test_predictions_keep_the_order_and_name_what_cannot_be_predicted(run):
    predictor = Predictor.load(run)
    molecules = [embedded(s) for s in ("CCO", "O", "CCN")]
    odd = Molecule([17, 1], np.array([[0.0, 0, 0], [1.3, 0, 0]]))
    mixed = [molecules[0], Invalid("x", "broken"), odd, *molecules[1:]]
    values = predictor(mixed, batch=2)
    assert list(values) == ["odd", "mass"]
    assert np.isnan(values["mass"]).tolist() == [False, True, True, False, False]
    for i in (0, 3, 4):
        alone = predictor([mixed[i]])
        np.testing.assert_allclose(alone["mass"], values["mass"][i : i + 1], rtol=1e-5)
    turned = molecules[0].replace(positions=molecules[0].positions[:, [1, 2, 0]] + 5.0)
    np.testing.assert_allclose(predictor([turned])["odd"], values["odd"][:1], rtol=1e-4)


def test_labels_fill_gaps_and_keep_half(folder, run, tmp_path):
    out = tmp_path / "labelled"
    words = ["data", "label", folder, f"run={run}", "keep=first", f"out={out}"]
    assert cli.main(PROGRAM, words) == 0
    before, after = MoleculeData(folder), MoleculeData(out)
    kept = test_properties.visible(before.subset("train"), ["odd", "mass"], "first")
    rows = before.subset("train").rows
    same = np.isclose(after.properties[rows], before.properties[rows]).all(1)
    assert same.tolist() == kept.tolist()
    predicted = Predictor.load(run)(list(after.subset("train")))
    column = after.subset("train").column("mass")
    np.testing.assert_allclose(column[~kept], predicted["mass"][~kept], rtol=1e-5)
    assert json.loads((out / "data.json").read_text())["labelled"]["n"] == int((~kept).sum())
    valid = before.subset("valid").rows
    np.testing.assert_array_equal(after.properties[valid], before.properties[valid])


def test_mistakes_are_named(folder, run, tmp_path):
    with pytest.raises(ValueError, match="exists already"):
        label(folder, Predictor.load(run), tmp_path)
    with pytest.raises(ValueError, match="not a property model"):
        Predictor.load("qm9")


def test_an_oracle_knows_its_own_error(folder, run):
    assert cli.main(PROGRAM, ["oracle", "measure", folder, f"run={run}"]) == 0
    oracle = NetworkOracle.load(run)
    held_out = MoleculeData(folder).subset("valid")
    errors = np.abs(oracle(list(held_out))["mass"] - held_out.column("mass"))
    assert oracle.accuracy["mass"].mae.value == pytest.approx(errors.mean(), rel=1e-5)
    assert oracle.accuracy["mass"].mae.n == len(held_out)


def test_a_shared_model_predicts_the_same_without_the_data(run, tmp_path):
    assert cli.main(PROGRAM, ["share", f"run={run}", f"out={tmp_path / 'small'}"]) == 0
    names = {path.name.partition("-")[0] for path in (tmp_path / "small").iterdir()}
    assert names - {"accuracy.json"} == {"checkpoint.json", "weights"}
    assert not names & {"training", "ema"}
    molecules = [embedded(s) for s in ("CCO", "O")]
    ours, theirs = (Predictor.load(r)(molecules)["mass"] for r in (run, tmp_path / "small"))
    np.testing.assert_allclose(ours, theirs, rtol=2e-2, atol=0.1)
    stored = json.loads((tmp_path / "small" / "checkpoint.json").read_text())
    assert stored["config"]["domain"]["data"] is None
    assert cli.main(PROGRAM, ["share", f"run={run}", f"out={tmp_path / 'small'}"]) == 2
