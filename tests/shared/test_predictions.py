from __future__ import annotations

import pytest
import torch

from shared.predictions import (
    Data,
    Flow,
    KarrasPreconditioned,
    Noise,
    Parameterisation,
    Prediction,
    Score,
    Velocity,
)

PARAMETERISATIONS = [Noise(), Data(), Velocity(), Flow(), Score(), KarrasPreconditioned(0.7)]


def normals(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", PARAMETERISATIONS, ids=lambda k: type(k).__name__)
@pytest.mark.parametrize(("alpha", "sigma"), [(0.8, 0.6), (1.0, 3.0), (0.3, 0.7), (0.01, 0.9)])
def test_a_perfect_output_gives_back_data_and_noise(kind: Parameterisation, alpha, sigma) -> None:
    x0, eps = normals(5, 3), normals(5, 3, seed=1)
    x = alpha * x0 + sigma * eps
    prediction = kind.predict(kind.target(x0, eps, alpha, sigma), x, alpha, sigma)
    torch.testing.assert_close(prediction.x0, x0)
    torch.testing.assert_close(prediction.eps, eps)
    torch.testing.assert_close(prediction.score, -eps / sigma)


@pytest.mark.parametrize("kind", PARAMETERISATIONS, ids=lambda k: type(k).__name__)
def test_eps_gain_is_the_slope_of_eps(kind: Parameterisation) -> None:
    x, out, step, alpha, sigma = normals(4), normals(4, seed=1), normals(4, seed=2), 0.6, 0.5
    moved = kind.predict(out + step, x, alpha, sigma).eps - kind.predict(out, x, alpha, sigma).eps
    torch.testing.assert_close(moved, kind.eps_gain(alpha, sigma) * step)


def test_karras_preconditioning_scales_to_unit_variance() -> None:
    kind, x0, eps = KarrasPreconditioned(1.7), 1.7 * normals(200_000), normals(200_000, seed=1)
    for alpha, sigma in [(1.0, 0.05), (1.0, 40.0), (0.6, 0.8)]:
        x = alpha * x0 + sigma * eps
        assert float((kind.scale_in(alpha, sigma) * x).std()) == pytest.approx(1.0, abs=0.01)
        assert float(kind.target(x0, eps, alpha, sigma).std()) == pytest.approx(1.0, abs=0.01)


def test_a_correction_changes_x0_and_leaves_eps_raw() -> None:
    x, eps = 3.0 * normals(4), normals(4, seed=1)
    raw = Prediction(x, 0.8, 0.6, eps=eps)
    clamped = raw.corrected(lambda v: v.clamp(-1, 1))
    assert float(clamped.x0.abs().max()) == 1.0
    torch.testing.assert_close(clamped.eps, eps)
    halved = clamped.corrected(lambda v: 0.5 * v)
    torch.testing.assert_close(halved.x0, 0.5 * clamped.x0)
    moved = clamped.with_eps(eps + 1.0)
    assert float(moved.x0.abs().max()) <= 1.0
    torch.testing.assert_close(moved.eps, eps + 1.0)


def test_a_missing_variance_head_is_named() -> None:
    with pytest.raises(ValueError, match="variance head"):
        Prediction(normals(2), 0.8, 0.6, eps=normals(2)).form("var")
    with pytest.raises(ValueError, match="x0, eps or both"):
        Prediction(normals(2), 0.8, 0.6)


def test_flow_and_velocity_are_finite_where_alpha_or_sigma_vanish() -> None:
    x, out = normals(3), normals(3, seed=1)
    for kind in (Velocity(), Flow(), KarrasPreconditioned(1.0)):
        for alpha, sigma in [(0.0, 1.0), (1.0, 0.0)]:
            prediction = kind.predict(out, x, alpha, sigma)
            assert bool(torch.isfinite(prediction.x0).all())
            assert bool(torch.isfinite(prediction.eps).all())
