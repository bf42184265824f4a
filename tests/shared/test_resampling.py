"""Jackknife intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest

from shared.resampling import jackknife


def test_the_interval_of_a_mean_covers_it_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = [
        (e := jackknife(lambda v: float(v.mean()), rng.exponential(size=200))).low < 1 < e.high
        for _ in range(300)
    ]
    assert 0.91 < np.mean(hits) < 0.98


def test_the_width_of_a_mean_is_that_of_its_group_means():
    values = np.random.default_rng(1).standard_normal(1000)
    estimate = jackknife(lambda v: float(v.mean()), values)
    means = np.array([values[np.arange(1000) % 10 == g].mean() for g in range(10)])
    assert estimate.value == pytest.approx(values.mean())
    half = 2.2621571628 * means.std(ddof=1) / math.sqrt(10)
    assert estimate.high - estimate.low == pytest.approx(2 * half)


def test_few_values_have_no_interval():
    estimate = jackknife(lambda v: float(v.mean()), np.ones(19))
    assert (estimate.value, estimate.n) == (1.0, 19)
    assert math.isnan(estimate.low)
    assert math.isnan(jackknife(lambda v: 0.0, np.ones(0)).value)
