from __future__ import annotations

import pytest
import torch

from shared.geometry import CentredPoints, Euclidean, Geometry, Points, SymmetricEdges

MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)
CASES: list[tuple[Geometry, tuple[int, ...]]] = [
    (Points(), (3, 5, 4)),
    (CentredPoints(), (3, 5, 3)),
    (SymmetricEdges(), (3, 5, 5)),
    (SymmetricEdges(), (3, 5, 5, 2)),
]


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def padding(shape: tuple[int, ...], edges: bool) -> torch.Tensor:
    pairs = MASK[:, :, None] & MASK[:, None] if edges else MASK
    return ~pairs.reshape(*pairs.shape, *(1,) * (len(shape) - pairs.dim())).expand(shape)


@pytest.mark.parametrize(("geometry", "shape"), CASES)
@pytest.mark.parametrize("mask", [None, MASK])
def test_projection_is_idempotent_symmetric_and_leaves_padding_zero(geometry, shape, mask) -> None:
    x, y = gaussian(*shape), gaussian(*shape, seed=1)
    px, py = geometry.project(x, mask), geometry.project(y, mask)
    torch.testing.assert_close(geometry.project(px, mask), px, rtol=0.0, atol=1e-14)
    torch.testing.assert_close((px * y).sum(), (x * py).sum())  # self-adjoint: orthogonal
    if mask is not None:
        assert bool((px[padding(shape, isinstance(geometry, SymmetricEdges))] == 0).all())


@pytest.mark.parametrize(("geometry", "shape"), CASES)
def test_dim_is_the_rank_of_the_projection(geometry, shape) -> None:
    for row in range(3):
        size = gaussian(*shape)[0].numel()
        basis = torch.eye(size, dtype=torch.float64).reshape(size, *shape[1:])
        mask = MASK[row : row + 1].expand(size, -1)
        rank = torch.linalg.matrix_rank(geometry.project(basis, mask).flatten(1), atol=1e-9)
        assert float(geometry.dim(basis[:1], mask[:1])) == float(rank)


@pytest.mark.parametrize(("geometry", "shape"), CASES)
def test_noise_is_standard_on_the_subspace(geometry, shape) -> None:
    """The squared norm is chi-squared with dim degrees of freedom."""
    n = 20_000
    white = gaussian(n, *shape[1:])
    mask = MASK[1:2].expand(n, -1)
    noise = geometry.noise(white, mask)
    torch.testing.assert_close(geometry.project(noise, mask), noise, rtol=0.0, atol=1e-14)
    dim = float(geometry.dim(noise[:1], mask[:1]))
    norms = geometry.norm_squared(noise)
    assert float(norms.mean()) == pytest.approx(dim, abs=5 * (2 * dim / n) ** 0.5)
    assert float(norms.var()) == pytest.approx(2 * dim, rel=0.1)


def test_edges_keep_unit_variance_where_projection_halves_it() -> None:
    white = gaussian(20_000, 3, 3)
    assert float(SymmetricEdges().noise(white)[:, 0, 1].var()) == pytest.approx(1.0, abs=0.05)
    assert float(SymmetricEdges().project(white)[:, 0, 1].var()) == pytest.approx(0.5, abs=0.05)


def test_centred_points_use_the_mean_of_real_nodes() -> None:
    x = gaussian(3, 5, 3) + 10.0
    out = CentredPoints().project(x, MASK)
    torch.testing.assert_close(
        out.sum(1), torch.zeros(3, 3, dtype=torch.float64), atol=1e-12, rtol=0
    )
    torch.testing.assert_close(out[1, 0] - out[1, 1], x[1, 0] - x[1, 1])
    assert bool((out[2] == 0).all())  # a single atom has no degrees of freedom


def test_a_molecule_is_the_same_whatever_its_padding() -> None:
    x = gaussian(1, 5, 3)
    mask = torch.tensor([[True, True, True, False, False]])
    torch.testing.assert_close(
        CentredPoints().project(x, mask)[:, :3], CentredPoints().project(x[:, :3])
    )


def test_euclidean_is_the_whole_space() -> None:
    x = gaussian(2, 3, 4, 4)
    assert Euclidean().project(x) is x
    assert Euclidean().dim(x).tolist() == [48.0, 48.0]


def test_gradient_and_inner_product_count_every_edge_once() -> None:
    edges = SymmetricEdges()
    a = edges.noise(torch.randn(2, 4, 4, dtype=torch.float64)).requires_grad_()
    (slopes,) = torch.autograd.grad((a**3).sum(), a)  # sum over edges of 2 a_e^3
    torch.testing.assert_close(edges.gradient(slopes), 6.0 * a.detach() ** 2 * (a != 0))
    direction = edges.noise(torch.randn(2, 4, 4, dtype=torch.float64))
    torch.testing.assert_close(
        edges.inner(edges.gradient(slopes), direction), (slopes * direction).flatten(1).sum(1)
    )
