from __future__ import annotations

import json
import math

import numpy as np
import pytest

from shared.metrics import mean, proportion


def test_wilson_interval_of_a_known_case() -> None:
    estimate = proportion(82, 100)
    assert (estimate.value, estimate.n) == (0.82, 100)
    assert estimate.low == pytest.approx(0.7333, abs=5e-4)
    assert estimate.high == pytest.approx(0.8830, abs=5e-4)
    assert proportion(0, 10).low == 0.0
    assert proportion(0, 10).high > 0.2


def test_intervals_cover_the_truth_about_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    hits = [
        abs(e.value - 3.0) <= e.high - e.value
        for e in (mean(rng.normal(3.0, 2.0, 12)) for _ in range(2000))
    ]
    assert np.mean(hits) == pytest.approx(0.95, abs=0.02)


def test_an_interval_is_shown_where_there_is_one() -> None:
    assert str(mean([2.0])) == "2 (n=1)"
    assert str(proportion(1, 2)) == "0.5 [0.09453, 0.9055] (n=2)"


def test_nan_is_never_hidden() -> None:
    assert math.isnan(mean([1.0, math.nan]).value)
    assert math.isnan(proportion(0, 0).value)
    assert math.isnan(mean([]).value)
    assert math.isnan(mean([2.0]).low)
    assert json.loads(json.dumps(mean([]).as_json()))["value"] is None


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="5 successes of 3"):
        proportion(5, 3)
