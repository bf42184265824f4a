"""Searched and published time grids."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from shared.schedules import VPDiscrete, VPLinear
from shared.solvers.base import check_times
from shared.solvers.search import (
    FastDPMTimes,
    LeastCostTimes,
    TableTimes,
    fastdpm_betas,
    fastdpm_times,
    least_cost_path,
    least_cost_times,
    table_steps,
    table_times,
    variance_cost,
)
from shared.variance import Gamma

TABLE = VPDiscrete.linear()


def gaussian_gamma(table: VPDiscrete, *variances: float) -> Gamma:
    """Of independent Gaussian dimensions."""
    times = torch.arange(1, table.steps + 1, dtype=torch.float64) / table.steps
    ratio = torch.exp(2.0 * table.log_snr(times))  # SNR
    mean = torch.stack([1.0 / (ratio * var + 1.0) for var in variances]).mean(0)
    return Gamma(tuple(times.tolist()), tuple(mean.tolist()))


# -- the path ---------------------------------------------------------------------------------


def test_least_cost_path_equals_exhaustive_search() -> None:
    cost = np.random.default_rng(0).uniform(size=(9, 9))
    for edges in range(1, 9):
        candidates = [[0, *inner, 8] for inner in itertools.combinations(range(1, 8), edges - 1)]
        best = min(candidates, key=lambda p: sum(cost[a, b] for a, b in itertools.pairwise(p)))
        assert least_cost_path(cost, edges) == best


def test_least_cost_path_ignores_what_does_not_go_forward() -> None:
    cost = np.full((4, 4), -1e9)
    cost[np.triu_indices(4, 1)] = 1.0
    assert least_cost_path(cost, 2) in ([0, 1, 3], [0, 2, 3])


def test_least_cost_path_refusals() -> None:
    with pytest.raises(ValueError, match="use 1..3"):
        least_cost_path(np.ones((4, 4)), 4)
    with pytest.raises(ValueError, match="NaN"):
        least_cost_path(np.full((4, 4), math.nan), 2)
    with pytest.raises(ValueError, match="finite"):
        least_cost_path(np.full((4, 4), math.inf), 2)


def test_cost_of_analytic_dpm_is_additive_where_gamma_is_one() -> None:
    """With Gamma = 1 (data at a point) every trajectory costs the same: log sigma_ts ratios."""
    ones = Gamma((0.1, 0.2, 0.3, 0.4), (1.0,) * 4)
    cost = variance_cost(VPLinear(), ones)
    snr = VPLinear().log_snr(torch.tensor(ones.times))
    assert cost[0, 3] == pytest.approx(2 * float(snr[3] - snr[0]))
    assert cost[0, 1] + cost[1, 3] == pytest.approx(cost[0, 3])
    assert np.isinf(cost[2, 1])


def price(schedule: VPDiscrete, gamma: Gamma, times: list[float]) -> float:
    cost = variance_cost(schedule, gamma)
    nodes = [round(schedule.steps * t) - 1 for t in reversed(times[:-1])]
    return sum(cost[a, b] for a, b in itertools.pairwise(nodes))


def test_least_cost_trajectory_beats_the_even_one() -> None:
    schedule = VPDiscrete.linear(99, 5e-4, 0.2)
    gamma = gaussian_gamma(schedule, 1e-3, 1.0)  # one number cannot serve both dimensions
    found = least_cost_times(schedule, gamma, 10)
    assert len(found) == 11
    even = table_times(schedule, 10)
    assert price(schedule, gamma, found) < price(schedule, gamma, even) - 0.01


def test_every_trajectory_costs_the_same_where_the_steps_are_exact() -> None:
    """Gaussian data with one variance: the optimal reverse steps are the true ones."""
    schedule = VPDiscrete.linear(99, 5e-4, 0.2)
    gamma = gaussian_gamma(schedule, 0.1)
    paths = (least_cost_times(schedule, gamma, 10), table_times(schedule, 10))
    first, second = (price(schedule, gamma, times) for times in paths)
    assert first == pytest.approx(second, abs=1e-9)


def test_tail_of_bad_estimates_is_spread_evenly() -> None:
    n = 100
    values = [0.5] * 90 + [1.01] + [0.9] * 9  # the first Gamma > 1 at 91 of 100
    gamma = Gamma(tuple((i + 1) / n for i in range(n)), tuple(values))
    found = [round(n * t) for t in least_cost_times(VPLinear(), gamma, 20)]
    tail = [t for t in found if t > 80]
    assert found[0] == 100
    assert len(tail) == 3  # 20 - ceil((1 - 0.8 * 20/100) 20) steps
    assert len(found) == 21
    with pytest.raises(ValueError, match="estimate Gamma better"):
        least_cost_times(VPLinear(), Gamma(gamma.times, (1.5,) * n), 20)


# -- published outputs ------------------------------------------------------------------------


@pytest.mark.golden
def test_analytic_dpm_trajectories(golden) -> None:
    tensors, about = golden("06_analytic_dpm_linear")
    table = VPDiscrete(tuple(tensors["betas"][1:].tolist()))
    times = tuple(n / 1000 for n in range(1, 1001))
    gamma = Gamma(times, tuple(tensors["Gamma"][1:].tolist()))
    for k in (10, 25, 50):
        info = about["info"]
        searched = [round(1000 * t) for t in least_cost_times(table, gamma, k)]
        assert searched[::-1][1:] == info[f"steps/dp_seg/{k}"]
        assert table_steps(1000, k) == info[f"steps/linear/{k}"]
        assert table_steps(1000, k, "quadratic") == sorted(set(info[f"steps/quad_ddim/{k}"]))


@pytest.mark.golden
@pytest.mark.parametrize("spacing", ["linear", "quadratic"])
@pytest.mark.parametrize("steps", [10, 20, 50])
def test_fastdpm_levels_and_steps(golden, spacing: str, steps: int) -> None:
    tensors, _ = golden("07_fastdpm_pdr")
    prefix = f"T1000/var/{spacing}/S{steps}"
    eta = tensors[f"{prefix}/eta"].numpy()
    assert np.abs(np.array(fastdpm_betas(TABLE, steps, spacing)) / eta - 1).max() < 1e-4
    taus = np.array(fastdpm_times(TABLE, steps, spacing)[:-1]) * 1000 - 1
    # the original's approximation of log alpha is off by up to 0.01 of a step
    assert np.abs(taus - tensors[f"{prefix}/tau"].numpy()).max() < 2e-2
    published = tensors[f"T1000/step/{spacing}/S{steps}/steps"].tolist()
    kind = "floor" if spacing == "linear" else "quadratic"
    assert [n - 1 for n in table_steps(1000, steps, kind)] == sorted(set(published))


# -- grids ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "grid",
    [
        TableTimes(),
        TableTimes("quadratic"),
        FastDPMTimes(),
        FastDPMTimes("linear"),
        LeastCostTimes({"x": gaussian_gamma(TABLE, 1e-3, 0.3)}),
    ],
)
@pytest.mark.parametrize("intervals", [10, 20])
def test_grids_decrease_to_zero(grid, intervals: int) -> None:
    times = grid(TABLE, intervals)
    check_times(TABLE, times)
    assert len(times) == intervals + 1
    assert times[-1] == 0.0


def test_ddim_quadratic_steps_end_at_eight_tenths() -> None:
    assert table_steps(1000, 10, "quadratic")[-1] == 801


def test_entries_that_fall_together_are_visited_once() -> None:
    found = table_steps(1000, 50, "quadratic")
    assert len(found) == len(set(found)) < 50


def test_few_quadratic_levels_start_from_less_noise() -> None:
    assert fastdpm_times(TABLE, 10)[0] < 0.7
    assert fastdpm_times(TABLE, 50)[0] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TableTimes()(VPLinear(), 10), "VPDiscrete"),
        (lambda: TableTimes()(TABLE, 10, t_start=0.5), "drop t_start"),
        (lambda: TableTimes("cubic")(TABLE, 10), "cubic"),
        (lambda: TableTimes()(TABLE, 1), "2 or more"),
        (lambda: FastDPMTimes("cubic")(TABLE, 10), "quadratic"),
    ],
)
def test_impossible_grids_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
