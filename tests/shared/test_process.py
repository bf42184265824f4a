from __future__ import annotations

import pytest
import torch

from shared.geometry import CentredPoints, Points
from shared.process import Field, Process, alpha_sigma
from shared.schedules import Karras, LearnedGamma, Polynomial, VPLinear

MOLECULES = Process(
    {
        "positions": Field(Polynomial(), CentredPoints()),
        "types": Field(Polynomial(), Points()),
    }
)
MASK = torch.tensor([[True] * 4, [True, True, False, False]])


def state() -> dict[str, torch.Tensor]:
    gen = torch.Generator().manual_seed(0)
    white = {
        "positions": torch.randn(2, 4, 3, generator=gen, dtype=torch.float64),
        "types": torch.randn(2, 4, 5, generator=gen, dtype=torch.float64),
    }
    return MOLECULES.noise(white, MASK)


def test_perturb_follows_the_forward_law_and_stays_on_the_geometry() -> None:
    x0, eps = MOLECULES.project(state(), MASK), state()
    t = torch.tensor([0.2, 0.9], dtype=torch.float64)
    x = MOLECULES.perturb(x0, t, eps)
    schedule = Polynomial()
    for row in range(2):
        for key in x0:
            expected = (
                schedule.alpha(t[row]) * x0[key][row] + schedule.sigma(t[row]) * eps[key][row]
            )
            torch.testing.assert_close(x[key][row], expected)
    assert bool((x["positions"][1, 2:] == 0).all())
    torch.testing.assert_close(
        x["positions"].sum(1), torch.zeros(2, 3, dtype=torch.float64), atol=1e-12, rtol=0.0
    )


def test_prior_has_the_std_of_the_schedules_end_unless_told() -> None:
    noise = {"x": torch.ones(1, 2)}
    assert float(Process.single(Karras()).prior(noise)["x"][0, 0]) == 80.0
    told = Process({"x": Field(Karras(), prior_std=2.0)})
    assert float(told.prior(noise)["x"][0, 0]) == 2.0


def test_dim_counts_the_degrees_of_freedom_of_all_fields() -> None:
    assert MOLECULES.dim(state(), MASK).tolist() == [3 * 3 + 4 * 5, 3 + 2 * 5]


def test_float_and_tensor_times_agree() -> None:
    x = torch.zeros(2, 3, dtype=torch.float64)
    for schedule in (VPLinear(), LearnedGamma()):
        alpha, sigma = alpha_sigma(schedule, 0.37, x)
        alphas, sigmas = alpha_sigma(schedule, torch.tensor([0.37, 0.37], dtype=torch.float64), x)
        assert isinstance(alpha, float)
        assert isinstance(sigma, float)
        assert alphas.shape == (2, 1)
        assert float(alphas[0]) == pytest.approx(alpha, rel=1e-12)
        assert float(sigmas[1]) == pytest.approx(sigma, rel=1e-12)


def test_a_learned_schedule_is_not_cached_while_it_trains() -> None:
    schedule, x = LearnedGamma(), torch.zeros(1, 1)
    before = alpha_sigma(schedule, 0.5, x)
    with torch.no_grad():
        schedule.gamma_1 += 3.0
    assert alpha_sigma(schedule, 0.5, x) != before


def test_processes_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one field"):
        Process({})
    with pytest.raises(ValueError, match="different times"):
        Process({"a": Field(VPLinear()), "b": Field(Karras())})
