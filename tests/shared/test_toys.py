"""The toy domain: exact distributions, files, metrics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from shared.domains import Invalid
from shared.toys import SHAPES, PlaneNetwork, Toys, energy_distance, sliced_wasserstein


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_data_follow_the_mixture(shape):
    domain = Toys(shape, components=9, size=4000)
    train, validation = domain.datasets()
    assert (len(train), len(validation)) == (4000, 400)
    batch = domain.collate([train[i] for i in range(4000)])
    points = list(batch.state["x"].numpy())
    metrics = domain.metrics(points)
    assert metrics["energy_distance"].low < 0 < metrics["energy_distance"].high
    assert metrics["on_a_component"].value == pytest.approx(1 - math.exp(-4.5), abs=0.01)


def test_metrics_see_a_wrong_distribution():
    domain = Toys()
    metrics = domain.metrics(list(Toys(components=7).exact(1000, 0).numpy()))
    assert metrics["energy_distance"].low > 0
    assert metrics["on_a_component"].high < 0.8


def test_metrics_of_broken_samples():
    domain = Toys()
    broken = domain.decode({"x": torch.tensor([[math.nan, 0.0], [math.inf, 0.0], [1e6, 0]])}, None)
    assert all(isinstance(item, Invalid) for item in broken)
    assert domain.metrics(broken)["valid"].value == 0.0
    assert set(domain.metrics(broken)) == {"valid"}
    assert domain.metrics([*broken, np.zeros(2, np.float32)])["valid"].value == 0.25


def test_energy_distance_of_shifted_normals():
    # E|X - Y| of N(0,1), N(m,1) in one dimension is that of N(m, 2)
    rng, m = np.random.default_rng(0), 1.5
    a, b = rng.standard_normal((2000, 1)), rng.standard_normal((2000, 1)) + m
    s = math.sqrt(2)
    folded = s * math.sqrt(2 / math.pi) * math.exp(-(m**2) / 4) + m * math.erf(m / (s * s))
    expected = 2 * folded - 2 * s * math.sqrt(2 / math.pi)
    assert energy_distance(a, b) == pytest.approx(expected, abs=0.06)
    assert energy_distance(a, a[::-1]) == pytest.approx(0.0, abs=0.01)


def test_sliced_wasserstein_of_a_shift():
    points = np.random.default_rng(0).standard_normal((500, 2))
    # the mean of cos^2 over all directions is 1/2
    assert sliced_wasserstein(points, points + [2.0, 0.0]) == pytest.approx(math.sqrt(2.0))
    assert sliced_wasserstein(points, points) == 0.0


@pytest.mark.parametrize("suffix", [".csv", ".npz"])
def test_files_round_trip_and_grow(tmp_path, suffix):
    domain, path = Toys(), tmp_path / f"points{suffix}"
    points = list(domain.exact(5, 0).float().numpy())
    domain.write(path, points[:2])
    domain.write(path, points[2:])
    assert np.array_equal(np.stack(list(domain.read(path))), np.stack(points))


def test_bad_files_are_refused_record_by_record(tmp_path):
    domain, path = Toys(), tmp_path / "points.csv"
    path.write_text("x,y\n1,2\n1\nhello,2\nnan,1\n3,4\n")
    items = list(domain.read(path))
    assert [isinstance(item, Invalid) for item in items] == [False, True, True, True, False]
    assert items[1].record == "points.csv, line 3"
    with pytest.raises(FileNotFoundError):
        list(domain.read(tmp_path / "absent.csv"))
    with pytest.raises(ValueError, match=r"\.csv and \.npz"):
        list(domain.read(tmp_path))


def test_statistics_rebuild_the_domain():
    domain = Toys("grid", components=4, std=0.05)
    other = Toys()
    other.restore(domain.statistics())
    assert torch.equal(other.mixture.mean, domain.mixture.mean)
    with pytest.raises(ValueError, match="not toys"):
        other.restore({"domain": "images"})


@pytest.mark.parametrize(
    "options", [{"shape": "rnig"}, {"components": 0}, {"std": 0.0}, {"shape": "grid"}]
)
def test_impossible_toys(options):
    with pytest.raises(ValueError, match="toys"):
        Toys(**options)


def test_the_network_starts_at_zero_and_learns():
    network, x = PlaneNetwork(16, 2), torch.ones(3, 2)
    out = network({"x": x}, torch.zeros(3), None, None)["x"]
    assert torch.equal(out, torch.zeros(3, 2))
    out.sum().backward()
    assert network.leave.weight.grad.abs().sum() > 0
