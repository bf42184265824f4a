from __future__ import annotations

import torch

from shared.analytic import AnalyticDenoiser, Mixture
from shared.process import Process
from shared.schedules import VPLinear

MIXTURE = Mixture(
    torch.tensor([0.3, 0.7], dtype=torch.float64),
    torch.tensor([[-1.0, 0.5], [1.5, 0.0]], dtype=torch.float64),
    torch.tensor([[0.04, 0.3], [0.2, 0.1]], dtype=torch.float64),
)
X = torch.randn(7, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_noise_prediction_is_minus_sigma_times_the_score() -> None:
    for alpha, sigma in [(0.9, 0.4), (1.0, 5.0), (0.1, 0.99)]:
        x = X.clone().requires_grad_(True)
        (score,) = torch.autograd.grad(MIXTURE.log_prob(x, alpha, sigma).sum(), x)
        torch.testing.assert_close(MIXTURE.eps_mean(X, alpha, sigma), -sigma * score)
        x0 = (X + sigma**2 * score) / alpha
        torch.testing.assert_close(MIXTURE.x0_mean(X, alpha, sigma), x0)


def test_posterior_variance_is_the_second_order_tweedie_term() -> None:
    alpha, sigma = 0.7, 0.6
    x = X.clone().requires_grad_(True)
    mean = MIXTURE.x0_mean(x, alpha, sigma)
    for d in range(2):
        (slope,) = torch.autograd.grad(mean[:, d].sum(), x, retain_graph=True)
        variance = sigma**2 / alpha * slope[:, d]
        torch.testing.assert_close(MIXTURE.x0_variance(X, alpha, sigma)[:, d], variance)


def test_density_integrates_to_one_and_samples_have_its_moments() -> None:
    grid = torch.linspace(-5, 5, 401, dtype=torch.float64)
    xy = torch.cartesian_prod(grid, grid)
    total = MIXTURE.log_prob(xy, 0.8, 0.5).exp().sum() * 0.025**2
    torch.testing.assert_close(total, torch.tensor(1.0, dtype=torch.float64), rtol=1e-6, atol=0)
    samples = MIXTURE.sample(200_000, torch.Generator().manual_seed(1))
    mean = (MIXTURE.weight[:, None] * MIXTURE.mean).sum(0)
    torch.testing.assert_close(samples.mean(0), mean, rtol=0, atol=0.015)


def test_denoiser_takes_float_and_per_sample_times_of_any_shape() -> None:
    denoise = AnalyticDenoiser.single(Process.single(VPLinear()), MIXTURE, variance=True)
    image = X.reshape(7, 1, 2, 1)
    alone = denoise({"x": image}, 0.3)["x"]
    batch = denoise({"x": image}, torch.full((7,), 0.3, dtype=torch.float64))["x"]
    assert alone.x0.shape == image.shape
    torch.testing.assert_close(alone.x0, batch.x0)
    torch.testing.assert_close(alone.eps, batch.eps)
    torch.testing.assert_close(alone.form("var"), batch.form("var"))
