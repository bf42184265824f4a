"""The smallest form of every benchmark runs and writes what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rdkit import Chem
from rdkit.Chem import rdDistGeom

import molediff
from molediff.geometric.prepare import prepare
from molediff.molecules import Molecule

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import common  # noqa: E402
import readme  # noqa: E402


def run(script: str, out: Path, *arguments: str) -> dict:
    command = [sys.executable, str(ROOT / "benchmarks" / f"{script}.py"), "--small"]
    done = subprocess.run(
        [*command, "--threads", "1", "--out", str(out), *arguments],
        capture_output=True, text=True, check=False, cwd=out,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((out / f"{script}.json").read_text())


def test_solvers(tmp_path):
    result = run("solvers", tmp_path)
    errors = {(r["solver"], r["calls"]): r["error"] for r in result["deterministic"]}
    assert errors["UniPC-2", 10] < errors["DDIM", 10]
    assert errors["DPM-Solver++(2M)", 10] < errors["DPM-Solver++(2M)", 5]
    assert all(row["ratio"] < 1.0 for row in result["overhead"])
    assert (tmp_path / "solvers.png").stat().st_size > 10_000
    assert result["environment"]["versions"]["torch"]


def test_molecules(tmp_path):
    rows = run("molecules", tmp_path)["rows"]
    assert {row["solver"] for row in rows} == {"ddim", "dpmpp_2m"}
    assert all(row["nfe"] <= 10 and row["n"] == 8 for row in rows)
    assert all(0.0 <= row["scores"]["atom_stability"]["value"] <= 1.0 for row in rows)


def test_egnn(tmp_path):
    result = run("egnn", tmp_path)
    assert all(row["relative_difference"] < 1e-5 for row in result["comparison"])
    assert (tmp_path / "egnn.md").read_text().count("|") > 10


def test_oracles(tmp_path):
    for package in ("tblite", "dftd4"):
        pytest.importorskip(package)
    for k, smiles in enumerate(("C", "O", "CC", "CO", "CN", "C=O", "CCO", "C#N")):
        mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
        rdDistGeom.EmbedMolecule(mol, randomSeed=7)
        labels = {"gap": 7.0 + k, "mu": 0.5 * k}
        molediff.write(tmp_path / "raw.sdf", [Molecule.from_rdkit(mol).replace(properties=labels)])
    prepare(tmp_path / "raw.sdf", tmp_path / "data", fractions=(0.5, 0.5, 0.0))
    result = run("oracles", tmp_path, "--data", str(tmp_path / "data"))
    found = {(row["property"], row["relaxed"]): row for row in result["rows"]}
    assert found.keys() == {(name, relaxed) for name in ("gap", "mu") for relaxed in (False, True)}
    row = found["gap", False]
    assert (row["n"], row["failed"], row["unit"]) == (4, 0, "eV")
    for error in row["mae"].values():
        assert 0.0 <= error["value"] <= error["high"]
    assert {"tblite", "dftd4"} <= result["programs"].keys()
    assert (tmp_path / "oracles.md").read_text().count("B3LYP") == 2


def test_the_tables_of_the_readme_are_those_of_the_benchmarks():
    page = (ROOT / "README.md").read_text()
    assert readme.filled(page, ROOT / "benchmarks" / "results") == page


def test_design(tmp_path):
    rows = run("design", tmp_path, "--no-xtb", "--energies", "qm9_energy")["rows"]
    assert len(rows) == 1
    assert rows[0]["errors"]["gap_network"]["n"] == 4
    assert rows[0]["nfe"] == 4
    options = ("--no-xtb", "--energies", "qm9_energy", "--particles", "2")
    rows = run("design", tmp_path, *options)["rows"]
    assert [(row["particles"], row["nfe"]) for row in rows] == [(1, 4), (2, 4)]


def test_rows_are_kept_while_their_subject_is_the_same(tmp_path):
    def table(rows):
        return "".join(f"{row['calls']} {row['value']}\n" for row in rows)

    rows = common.Rows(tmp_path, "some", {"weights": "a"}, lambda row: row["calls"], table)
    rows.add({"calls": 20, "value": 2})
    again = common.Rows(tmp_path, "some", {"weights": "a"}, lambda row: row["calls"], table)
    assert again.has(calls=20)
    assert not again.has(calls=10)
    again.add({"calls": 10, "value": 1}, limit=3)
    assert (tmp_path / "some.md").read_text() == "10 1\n20 2\n"
    assert json.loads((tmp_path / "some.json").read_text())["limit"] == 3
    other = common.Rows(tmp_path, "some", {"weights": "b"}, lambda row: row["calls"], table)
    assert other.read() == []


def test_weights_tell_models_apart():
    model, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    assert common.weights(model) == common.weights(model) != common.weights(other)


def test_similarity(tmp_path):
    for k, smiles in enumerate(("CC", "CO", "CN", "C=O", "CCO", "C#N")):
        mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
        rdDistGeom.EmbedMolecule(mol, randomSeed=k)
        molediff.write(tmp_path / "raw.sdf", [Molecule.from_rdkit(mol)])
    prepare(tmp_path / "raw.sdf", tmp_path / "data", fractions=(0.5, 0.5, 0.0))
    result = run("similarity", tmp_path, "--data", str(tmp_path / "data"))
    assert [row["strength"] for row in result["rows"]] == [0.0, 0.5]
    assert all(0.0 <= row["tanimoto"]["value"] <= 1.0 for row in result["rows"])
    assert {row["kind"] for row in result["rows"]} == {"morgan"}
