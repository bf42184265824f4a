import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import completion  # noqa: E402


@pytest.fixture
def shapes(tmp_path):
    """Every shape of the test split has a slightly disturbed copy in the training split."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 300, 3)).astype(np.float32)
    x *= rng.uniform(0.2, 1, (8, 1, 3)) / np.linalg.norm(x, axis=2, keepdims=True)
    x[4:] = x[:4] + 0.002 * rng.normal(size=x[:4].shape)
    np.savez(tmp_path / "shapes.npz", points=x.astype(np.float32), split=np.arange(8) // 4 == 1)
    return tmp_path / "shapes.npz"


def test_the_baselines_are_in_the_table(shapes, monkeypatch, capsys):
    out = shapes.parent / "results"
    words = ["completion.py", "--data", str(shapes), "--points", "128", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    completion.main()
    result = json.loads((out / "completion.json").read_text())
    rows = {row[0]: [float(cell) for cell in row[1:4]] for row in result["rows"]}
    scan, copy = rows["the scan"], rows["nearest training shape"]
    assert len(rows) == 3
    assert copy[0] < scan[0]  # half of the object is missing from the scan
    assert "| nearest training shape |" in capsys.readouterr().out
