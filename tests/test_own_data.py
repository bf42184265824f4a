"""A chemist's own molecules, by the commands of the README: prepared, learned, made, measured."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from rdkit import Chem
from rdkit.Chem import rdDistGeom

import molediff
from molediff.cli import PROGRAM
from molediff.molecules import Molecule
from shared import cli

PARTS = ("C", "CC", "OC", "NC", "C(C)", "C(N)", "C(O)", "C(=O)", "C(C#N)", "C(CO)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two hundred molecules with a property that no program knows."""
    home, made = tmp_path_factory.mktemp("own"), []
    for k in range(200):
        smiles = "C" + "".join(PARTS[(k // 10**j) % 10] for j in range(3))
        mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
        assert rdDistGeom.EmbedMolecule(mol, randomSeed=1) == 0
        made.append(Molecule.from_rdkit(mol).replace(properties={"sweetness": 0.1 * k}))
    molediff.write(home / "mine.sdf", made)
    return home


@pytest.fixture(scope="module")
def trained(folder) -> Path:
    data, run = folder / "data", folder / "run"
    assert cli.main(PROGRAM, ["data", "prepare", str(folder / "mine.sdf"), f"out={data}"]) == 0
    words = [f"domain.data={data}", "domain.properties=[sweetness]", f"out={run}"]
    small = ["model.width=32", "model.layers=2", "trainer.max_steps=4", "trainer.batch_size=8"]
    assert cli.main(PROGRAM, ["train", "experiment=qm9_small", *words, *small]) == 0
    return run


def test_sample_and_evaluate(folder, trained):
    new = folder / "new"
    assert cli.main(
        PROGRAM, ["sample", f"run={trained}", "n=6", "steps=5", "seed=0", f"out={new}"]
    ) in (0, 1)
    assert cli.main(PROGRAM, ["evaluate", str(new), f"reference={folder / 'mine.sdf'}"]) == 0
    scores = json.loads((new / "metrics.json").read_text())
    assert "atom_stability" in json.dumps(scores)


def test_the_own_property_is_a_target(folder, trained, capsys):
    out = folder / "sweet"
    words = ["design", f"run={trained}", "sweetness=3.5", "n=4", "steps=5", "seed=0"]
    words.append(f"out={out}")
    assert cli.main(PROGRAM, words) in (0, 1)
    assert (out / "report.html").exists()
    with (out / "molecules.csv").open() as file:
        assert len(list(csv.DictReader(file))) <= 4
    capsys.readouterr()
    assert cli.main(PROGRAM, [*words[:2], "sweetness=300", f"out={folder / 'far'}"]) == 2
    assert "19.9" in capsys.readouterr().err  # the end of the training data
