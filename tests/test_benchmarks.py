"""The smallest form of every benchmark runs and writes what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

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
    assert all(row["calls"] <= 10 and row["n"] == 8 for row in rows)
    assert all(0.0 <= row["scores"]["atom_stability"]["value"] <= 1.0 for row in rows)


def test_egnn(tmp_path):
    result = run("egnn", tmp_path)
    assert all(row["relative_difference"] < 1e-5 for row in result["comparison"])
    assert (tmp_path / "egnn.md").read_text().count("|") > 10


def test_the_tables_of_the_readme_are_those_of_the_benchmarks():
    page = (ROOT / "README.md").read_text()
    assert readme.filled(page, ROOT / "benchmarks" / "results") == page
