"""FID, KID, Inception Score, precision and recall: against torchmetrics, and where the answer is
known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from shared.images.domain import Images
from shared.images.features import Features
from shared.images.pictures import Pictures
from shared.images.quality import (
    coverage,
    frechet_distance,
    inception_score,
    kernel_distance,
    scores,
)


class Given(nn.Module):
    """Features as they are."""

    num_features = 6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.fixture
def points():
    own = np.random.default_rng(0)
    a = own.normal(size=(80, 6))
    return a, own.normal(size=(60, 6)) @ np.diag([1, 2, 1, 0.5, 1, 1]) + 0.3


def test_distances_equal_torchmetrics(points):
    a, b = points
    fid = FrechetInceptionDistance(Given()).set_dtype(torch.float64)
    fid.update(torch.tensor(b), real=True)
    fid.update(torch.tensor(a), real=False)
    assert frechet_distance(a, b) == pytest.approx(float(fid.compute()), rel=1e-6)
    kid = KernelInceptionDistance(Given(), subsets=1, subset_size=60)
    kid.update(torch.tensor(b), real=True)
    kid.update(torch.tensor(a[:60]), real=False)
    assert kernel_distance(a[:60], b) == pytest.approx(float(kid.compute()[0]), rel=1e-5)


def test_inception_score_equals_torchmetrics_and_knows_its_ends(points):
    score = InceptionScore(Given(), splits=1)
    score.update(torch.tensor(points[0]))
    assert inception_score(points[0]) == pytest.approx(float(score.compute()[0]), rel=1e-5)
    assert inception_score(np.eye(10) * 100.0) == pytest.approx(10.0)
    assert inception_score(np.zeros((5, 10))) == pytest.approx(1.0)


def test_precision_and_recall_tell_fidelity_from_variety():
    own = np.random.default_rng(1)
    data = own.normal(size=(300, 2))
    narrow, far = 0.2 * data[:200], data[:200] + 50.0
    assert float(coverage(narrow, data)) > 0.95  # precise
    assert float(coverage(data, narrow)) < 0.3  # but without variety
    assert float(coverage(far, data)) == 0.0
    assert math.isnan(float(coverage(data, data[:2])))


def test_worse_digits_score_worse():
    domain = Images()
    images, held = domain.pictures, domain.held_out
    noise = np.random.default_rng(0).integers(-120, 120, size=images[held].shape)
    broken = (images[held].astype(int) + noise).clip(0, 255).astype(np.uint8)
    good, bad = (domain.metrics(list(these)) for these in (images[held], broken))
    names = [name for name in good if name.startswith(("fid_", "kid_"))]
    assert names == ["fid_digits_vs_train1617", "kid_digits_vs_train1617"]
    for name in names:
        assert float(good[name]) < 0.5 * float(bad[name])
        assert good[name].low <= good[name].value <= good[name].high
    for name in ("precision_digits_vs_train1617", "inception_score_digits"):
        assert float(good[name]) > float(bad[name])
    assert float(good["precision_digits_vs_train1617"]) > 0.7


def test_the_kernel_distance_takes_so_many_samples_at_most(points, monkeypatch):
    monkeypatch.setattr("shared.images.quality.KERNEL", 25)
    features = Features("plain", lambda x: (x.flatten(1).double(), None))
    pictures = np.random.default_rng(0).integers(0, 9, (60, 2, 3, 3), dtype=np.uint8)
    found = scores(features, pictures[:40], pictures[40:], "given")
    assert found["kid_plain_vs_given20"].n == 25
    assert found["fid_plain_vs_given20"].n == 40
    found = scores(features, pictures[:20], Pictures.of(pictures[20:]), "train")
    assert {"kid_plain_vs_train25", "fid_plain_vs_train40"} <= found.keys()
