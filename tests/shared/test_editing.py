from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from shared.analytic import AnalyticDenoiser, Mixture
from shared.geometry import CentredPoints
from shared.guidance import SDEdit, interpolate, truncate
from shared.process import Process
from shared.randomness import Draws
from shared.schedules import Karras, VPLinear
from shared.solvers.ancestral import DDIM, DDPM

F64 = torch.float64
TIMES = [1.0, 0.7, 0.4, 0.2, 0.05, 1e-3]


def test_grid_from_a_later_start() -> None:
    assert truncate(TIMES, 0.5) == [0.5, 0.4, 0.2, 0.05, 1e-3]
    assert truncate(TIMES, 0.4) == [0.4, 0.2, 0.05, 1e-3]
    assert truncate(TIMES, 1.0) == TIMES
    for wrong in (1.1, 1e-3, 0.0):
        with pytest.raises(ValueError, match="not inside the time grid"):
            truncate(TIMES, wrong)


@pytest.mark.parametrize("schedule", [VPLinear(), Karras()])
def test_edits_of_a_gaussian_follow_its_law(schedule: VPLinear | Karras) -> None:
    """Noise at t and the exact flow of N(0, v): the end is affine in input and noise."""
    process = Process.single(schedule)
    var = 0.5
    base = AnalyticDenoiser.single(
        process, Mixture.gaussian(torch.zeros(1, dtype=F64), torch.full((1,), var, dtype=F64))
    )
    ends = [float(schedule.log_snr(t)) for t in (schedule.t_max, schedule.t_min)]
    times = schedule.t_from_log_snr(torch.linspace(*ends, 401, dtype=F64)).tolist()
    times[0] = schedule.t_max
    z = torch.tensor([[-1.0], [0.0], [1.0]], dtype=F64)
    source = torch.full((1, 1), 3.0, dtype=F64)
    for t in (0.2 * schedule.t_max, 0.02 * schedule.t_max):
        edit = SDEdit(DDIM(), {"x": source}, t)
        got = edit.solve(process, base, {"x": torch.zeros(3, 1, dtype=F64)}, times, lambda n, j: z)
        (a, s), (b, r) = (
            (float(schedule.alpha(u)), float(schedule.sigma(u))) for u in (t, times[-1])
        )
        gain = math.sqrt((b**2 * var + r**2) / (a**2 * var + s**2))
        torch.testing.assert_close(got["x"], gain * (a * 3.0 + s * z), atol=0.03, rtol=0)


def test_an_edit_does_not_depend_on_its_batch_and_never_reads_the_start() -> None:
    process = Process.single(VPLinear())
    base = AnalyticDenoiser.single(
        process, Mixture.gaussian(torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64))
    )

    def sample(indices: list[int], start: float) -> Tensor:
        draws, like = Draws(1, indices), torch.full((len(indices), 2), start, dtype=F64)
        edit = SDEdit(DDPM(), {"x": torch.ones(1, 2, dtype=F64)}, 0.5)
        return edit.solve(
            process, base, {"x": like}, TIMES, lambda name, j: draws.normal(name, j, like)
        )["x"]

    torch.testing.assert_close(sample([2, 5], 0.0)[1], sample([5], 9.0)[0], rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"fields \['h'\], the state \['x'\]"):
        SDEdit(DDPM(), {"h": torch.ones(1, 2)}, 0.5).solve(
            process, base, {"x": torch.zeros(1, 2)}, TIMES, lambda n, j: torch.zeros(1, 2)
        )


def test_interpolation_keeps_length_and_subspace() -> None:
    geometry = CentredPoints()
    process = Process.single(VPLinear(), geometry)
    gen = torch.Generator().manual_seed(0)
    a, b = (geometry.noise(torch.randn(2, 5, 3, generator=gen, dtype=F64)) for _ in range(2))
    b = b * (geometry.norm_squared(a) / geometry.norm_squared(b)).sqrt()[:, None, None]
    ends = [interpolate(process, {"x": a}, {"x": b}, share)["x"] for share in (0.0, 1.0)]
    torch.testing.assert_close(ends[0], a)
    torch.testing.assert_close(ends[1], b)
    between = interpolate(process, {"x": a}, {"x": b}, torch.tensor([0.3, 0.8], dtype=F64))["x"]
    torch.testing.assert_close(geometry.norm_squared(between), geometry.norm_squared(a))
    torch.testing.assert_close(geometry.project(between), between)
