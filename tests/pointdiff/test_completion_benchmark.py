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
    monkeypatch.setattr(sys, "argv", [*words, "--pcn-seconds", "0.2", "--n", "2"])
    monkeypatch.setattr(
        completion.pcn, "complete", lambda network, domain, scan, frame: scan + 0.5
    )
    completion.main()
    result = json.loads((out / "completion.json").read_text())
    rows, own = (
        {(r["completion"], r["kept"]): r for r in result["rows"] if (r["frame"] == "own") is known}
        for known in (False, True)
    )
    assert (len(rows), len(own)) == (7, 4)
    assert all(row["n"] == 2 for row in rows.values())
    chamfer = {key: row["chamfer_l2"]["value"] for key, row in rows.items()}
    # the copies are found by their scans, too, but not placed exactly
    found = own["nearest training shape", False]["chamfer_l2"]["value"]
    assert chamfer["nearest training shape", False] < found < chamfer["the scan", False]
    # half of the object is missing from the scan
    assert chamfer["nearest training shape", False] < chamfer["the scan", False]
    assert chamfer["encoder-decoder", False] > chamfer["the scan", False]
    f1 = {key: row["f1"]["value"] for key, row in rows.items()}
    assert f1["nearest training shape", True] > f1["encoder-decoder", False]
    assert "| nearest training shape | given | yes |" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*words, "--pcn-seconds", "0.2", "--all"])
    completion.main()
    found = json.loads((out / "completion.json").read_text())["rows"]
    whole = [row for row in found if row["n"] == 4]
    assert len(whole) == 6
    assert all(row["kept"] for row in whole if row["completion"] != "the scan")
    assert 0 < min(row["chamfer_l2_median"] for row in found)
    assert capsys.readouterr().out.count("<details>") == 6  # the other rows are folded away


def test_the_encoder_decoder_gives_clouds_in_the_coordinates_of_the_scan(shapes):
    domain = completion.Completion(str(shapes), 128, completion.Scanner(points=128))
    network = completion.pcn.trained(domain, 1e-3, None)
    scan = domain.shapes[0][:150] * 9 + 70
    cloud = completion.pcn.complete(network, domain, scan)
    assert cloud.shape == (2048, 3)
    np.testing.assert_allclose(cloud.mean(0), 70, atol=10)


def test_the_encoder_decoder_is_trained_on_and_kept(shapes, tmp_path, monkeypatch):
    domain = completion.Completion(str(shapes), 128, completion.Scanner(points=128))
    calls = []
    monkeypatch.setattr(
        completion.pcn, "train", lambda network, domain, *seconds: calls.append(seconds)
    )
    file = tmp_path / "pcn.safetensors"
    for seconds in (3.0, 3.0, 5.0):
        completion.pcn.trained(domain, seconds, file)
    assert calls == [(3.0, 0.0), (2.0, 3.0)]
    with pytest.raises(ValueError, match="trained for 5 s, more than 4"):
        completion.pcn.trained(domain, 4.0, file)
