"""The sampler of consistency models."""

from __future__ import annotations

import torch

from shared.analytic import AnalyticDenoiser, Mixture
from shared.process import Process
from shared.schedules import VPLinear
from shared.solvers import Consistency


def test_every_state_is_a_fresh_perturbation_of_the_estimate():
    schedule = VPLinear()
    plan = Consistency().plan(schedule, [1.0, 0.6, 0.3, 1e-3])
    assert plan.nfe == 3
    process = Process.single(schedule)
    point = Mixture.gaussian(torch.tensor([2.0]).double(), torch.tensor([1e-12]).double())
    denoise = AnalyticDenoiser.single(process, point)
    seen = []

    def after(x, time):
        seen.append((time, x["x"]))
        return x

    own = torch.Generator().manual_seed(0)
    draws = [torch.randn(4000, 1, generator=own, dtype=torch.float64) for _ in range(3)]
    end = Consistency().solve(
        process, denoise, {"x": draws[2]}, [1.0, 0.6, 1e-3], lambda n, j: draws[j], None, after
    )
    time, state = seen[0]
    alpha, sigma = float(schedule.alpha(time)), float(schedule.sigma(time))
    torch.testing.assert_close(state, 2.0 * alpha + sigma * draws[0])
    torch.testing.assert_close(end["x"], torch.full((4000, 1), 2.0).double(), atol=1e-6, rtol=0)
