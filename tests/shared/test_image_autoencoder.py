"""The variational autoencoder, and how it trains."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from shared.images.autoencoder import KLAutoencoder, divergence, kl_autoencoder
from shared.images.domain import Images
from shared.schedules import VPCosine


def built(**options) -> KLAutoencoder:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return kl_autoencoder(options.pop("domain", Images()), VPCosine(), **options)


def test_the_divergence_is_that_of_normals():
    generator = torch.Generator().manual_seed(0)
    mean, deviation = (torch.randn(5, 2, 3, 3, generator=generator).double() for _ in range(2))
    deviation = deviation.exp()
    truth = kl_divergence(Normal(mean, deviation), Normal(0.0, 1.0)).flatten(1).sum(1)
    assert torch.allclose(divergence(mean, deviation), truth, rtol=1e-12)


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_every_level_but_the_first_halves_the_sides(levels):
    domain = Images()
    domain.restore({"domain": "images", "shape": [3, 16, 24], "class_counts": []})
    latent = min(4, 3 * 4 ** (levels - 1))
    model = built(domain=domain, latent=latent, widths=(8,) * levels)
    images = torch.zeros(2, 3, 16, 24)
    mean, deviation = model.moments(images)
    side = 2 ** (levels - 1)
    assert mean.shape == deviation.shape == (2, latent, 16 // side, 24 // side)
    assert (deviation > 0).all()
    assert model.images(mean).shape == images.shape


def test_the_loss_is_error_and_weighted_divergence_with_the_given_noise():
    model = built(latent=2, widths=(8, 8), kl_weight=0.5)
    generator = torch.Generator().manual_seed(1)
    x, noise = (torch.randn(3, 1, 8, 8, generator=generator) for _ in range(2))
    terms = model.losses({"x": x}, {"x": noise}, torch.zeros(3))
    mean, deviation = model.moments(x)
    white = noise.flatten(1)[:, :32].reshape(3, 2, 4, 4)
    found = model.images(mean + deviation * white)
    assert torch.allclose(terms["x"], (found - x).square().mean((1, 2, 3)))
    assert torch.allclose(terms["kl"], 0.5 * divergence(mean, deviation) / 64)
    other = model.losses({"x": x}, {"x": -noise}, torch.zeros(3))
    assert not torch.allclose(terms["x"], other["x"])


def test_a_few_steps_lower_the_loss():
    domain = Images()
    model = built(domain=domain, latent=2, widths=(8, 16))
    x = domain.encode(domain.pictures[:64])
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        total = model.loss({"x": x}, {"x": noise}, torch.zeros(64)).mean()
        total.backward()
        optimizer.step()
        losses.append(float(total.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert all(math.isfinite(loss) for loss in losses)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"model\.latent=5: more numbers.*at most 4"):
        built(latent=5, widths=(8, 8))
    with pytest.raises(ValueError, match="divisible by 16"):
        built(widths=(8,) * 5)
    with pytest.raises(ValueError, match=r"autoencoder=null"):
        built(domain=Images(autoencoder="x"))
    model = built(latent=2, widths=(8, 8))
    with pytest.raises(ValueError, match="domain.autoencoder=RUN"):
        model({"x": torch.zeros(1, 1, 8, 8)}, 0.5)
