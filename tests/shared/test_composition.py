from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shared.analytic import AnalyticDenoiser
from shared.analytic import Mixture as Density
from shared.guidance import Conditioned, Mixture, Product
from shared.process import Process, State
from shared.schedules import Karras, RectifiedFlow, VPLinear
from shared.solvers.ancestral import DDIM

F64 = torch.float64
PROCESS = Process.single(VPLinear())
X = {"x": torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=F64)}


def gaussian(mean: list[float], var: list[float], process: Process = PROCESS) -> AnalyticDenoiser:
    values = torch.tensor(mean, dtype=F64), torch.tensor(var, dtype=F64)
    return AnalyticDenoiser.single(process, Density.gaussian(*values))


@pytest.mark.parametrize("schedule", [VPLinear(), Karras(), RectifiedFlow()])
@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.2, 0.8], [2.0, -1.0]])
def test_gaussians_of_one_covariance_compose_at_every_time(schedule, weights) -> None:
    process = Process.single(schedule)
    means, var = [[1.0, 0.0], [-0.5, 2.0]], [0.3, 0.5]
    product = Product([gaussian(m, var, process) for m in means], weights)
    mean = (torch.tensor(weights, dtype=F64)[:, None] * torch.tensor(means, dtype=F64)).sum(0)
    want = gaussian(mean.tolist(), var, process)
    start = 0.99 * schedule.t_max
    grid = [start, 0.5 * start, 0.1 * start, schedule.t_min or 1e-3]
    ends = [
        DDIM().solve(process, d, X, grid, lambda name, j: X["x"])["x"] for d in (product, want)
    ]
    torch.testing.assert_close(ends[0], ends[1], atol=1e-10, rtol=1e-10)


def test_product_of_any_gaussians_in_the_limit_of_no_noise() -> None:
    one, two = gaussian([1.0, 0.0], [0.3, 0.5]), gaussian([-0.5, 2.0], [0.6, 0.2])
    precision = torch.tensor([1 / 0.3 + 1 / 0.6, 1 / 0.5 + 1 / 0.2], dtype=F64)
    mean = torch.tensor([1.0 / 0.3 - 0.5 / 0.6, 2.0 / 0.2], dtype=F64) / precision
    got = Product([one, two], [1.0, 1.0])(X, 1e-7)["x"].score
    torch.testing.assert_close(got, -precision * (X["x"] - mean), rtol=1e-5, atol=1e-5)


def test_conjunction_and_negation_relative_to_a_base() -> None:
    base = gaussian([0.0, 0.0], [1.0, 1.0])
    one, two = gaussian([1.0, 0.0], [0.3, 0.5]), gaussian([-0.5, 2.0], [0.6, 0.2])
    eps = [d(X, 0.4)["x"].eps for d in (base, one, two)]
    got = Product([one, two], [1.5, -0.7], base)(X, 0.4)["x"]
    torch.testing.assert_close(got.eps, eps[0] + 1.5 * (eps[1] - eps[0]) - 0.7 * (eps[2] - eps[0]))
    torch.testing.assert_close(got.alpha * got.x0 + got.sigma * got.eps, X["x"])
    # two experts that agree with the base about everything change nothing
    torch.testing.assert_close(Product([base, base], [3.0, 2.0], base)(X, 0.4)["x"].eps, eps[0])


@pytest.mark.parametrize("t", [1e-3, 0.3, 1.0])
def test_mixture_is_exact_with_the_experts_densities(t: float) -> None:
    weight = torch.tensor([0.3, 0.7], dtype=F64)
    mean = torch.tensor([[1.0, 0.0], [-0.5, 2.0]], dtype=F64)
    var = torch.tensor([[0.3, 0.5], [0.6, 0.2]], dtype=F64)
    alpha, sigma = float(VPLinear().alpha(t)), float(VPLinear().sigma(t))

    def log_prob(x: State, t: float | Tensor, mask: object, cond: object) -> Tensor:
        parts = [Density.gaussian(mean[k], var[k]).log_prob(x["x"], alpha, sigma) for k in (0, 1)]
        return torch.stack(parts, 1) + 3.0  # a common constant does not matter

    experts = [gaussian(mean[k].tolist(), var[k].tolist()) for k in (0, 1)]
    got = Mixture(experts, [0.3, 0.7], log_prob)(X, t)["x"]
    want = AnalyticDenoiser.single(PROCESS, Density(weight, mean, var))(X, t)["x"]
    torch.testing.assert_close(got.eps, want.eps)
    torch.testing.assert_close(got.x0, want.x0)


def test_one_model_under_several_conditions() -> None:
    seen = []

    def denoise(x: State, t: float, mask: object, cond: dict) -> dict:
        seen.append({name: value.tolist() for name, value in cond.items()})
        return gaussian([0.0, 0.0], [1.0, 1.0])(x, t)

    experts = [Conditioned(denoise, {"label": torch.tensor([k])}) for k in (3, 4)]
    Product(experts, [0.5, 0.5])({"x": X["x"][:2]}, 0.5, None, {"other": torch.tensor([7, 8])})
    assert seen == [{"other": [7, 8], "label": [k, k]} for k in (3, 4)]


def test_errors() -> None:
    one = gaussian([0.0, 0.0], [1.0, 1.0])
    with pytest.raises(ValueError, match="Product: 1 experts and 2 weights"):
        Product([one], [1.0, 2.0])
    with pytest.raises(ValueError, match="weights must be positive"):
        Mixture([one], [0.0], lambda *a: X["x"])
    with pytest.raises(ValueError, match=r"log_prob has shape \(5, 2\).*\(5, 1\)"):
        Mixture([one], [1.0], lambda *a: X["x"])(X, 0.5)
