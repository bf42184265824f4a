import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import points  # noqa: E402


@pytest.mark.parametrize("name", list(points.CASES))
def test_both_forms_give_the_same(name):
    a, b = torch.rand(
        2, 1, 1100, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    own, full = (function(a, b) for function in points.CASES[name])
    if name.startswith("k nearest"):
        torch.testing.assert_close(own[1], full)
    elif name.startswith("ball"):
        index, count = own
        real = torch.arange(points.K) < count[..., None]
        assert (full[~real] == b.shape[1]).all()
        torch.testing.assert_close(index[real], full[real])
    elif name.startswith("farthest"):
        torch.testing.assert_close(own[0], full)
    else:
        torch.testing.assert_close(own, full)


def test_seconds_and_errors_are_measured(monkeypatch):
    monkeypatch.setattr(points, "CENTRES", 8)
    seconds, memory = points.measure(points.full_chamfer, 100, 1, "cpu")
    assert seconds >= 0
    assert memory >= 0
    exact, few, many, alone, _ = points.earth_movers([200, 300], 250)
    assert [row[:2] for row in (exact, few, many, alone)] == [
        [200, None], [200, 8], [200, 32], [300, 8],
    ]  # fmt: skip
    assert exact[3] == 0 <= many[3] <= few[3] < 0.05
    assert alone[3] is None


def test_full_forms_stay_on_the_device_of_the_clouds():
    a = torch.rand(1, 40, 3, device="meta")
    assert points.full_ball(a, a).device == points.full_knn(a, a).device == a.device


def test_the_failure_of_a_case_ends_the_benchmark():
    with pytest.raises(KeyError):
        points.alone("no case", 0, 64, 1, "cpu")
