from __future__ import annotations

import pytest
import torch

from shared.geometry import CentredPoints, SymmetricEdges
from shared.randomness import Draws, even_normal, stream


def test_a_sample_sees_the_same_numbers_in_any_batch_and_order() -> None:
    like = torch.zeros(4, 3, 8, 8)
    together = Draws(7, [0, 1, 2, 3]).normal("x", 5, like)
    for row in range(4):
        alone = Draws(7, [row]).normal("x", 5, like[:1])
        assert torch.equal(alone[0], together[row])
    swapped = Draws(7, [3, 2, 1, 0]).normal("x", 5, like)
    assert torch.equal(swapped.flip(0), together)


@pytest.mark.parametrize("other", [(8, 0, "x", 5), (7, 1, "x", 5), (7, 0, "y", 5), (7, 0, "x", 6)])
def test_every_part_of_the_key_changes_the_numbers(other) -> None:
    like = torch.zeros(1, 6)
    seed, index, name, number = other
    assert not torch.equal(
        Draws(7, [0]).normal("x", 5, like), Draws(seed, [index]).normal(name, number, like)
    )


@pytest.mark.parametrize(
    ("geometry", "small", "large"),
    [(CentredPoints(), (1, 3, 3), (1, 6, 3)), (SymmetricEdges(), (1, 3, 3), (1, 6, 6))],
)
def test_padding_does_not_change_a_sample(geometry, small, large) -> None:
    draws = Draws(0, [11])
    mask = torch.tensor([[True] * 3 + [False] * 3])
    tight = draws.normal("x", 0, torch.zeros(small), geometry, mask[:, :3])
    padded = draws.normal("x", 0, torch.zeros(large), geometry, mask)
    end = tuple(slice(n) for n in small)
    torch.testing.assert_close(padded[end], tight)
    assert float(padded.abs().sum()) == pytest.approx(float(tight.abs().sum()), rel=1e-6)


def test_precision_does_not_change_the_numbers() -> None:
    single = Draws(1, [2]).normal("x", 0, torch.zeros(1, 50))
    double = Draws(1, [2]).normal("x", 0, torch.zeros(1, 50, dtype=torch.float64))
    assert torch.equal(single.double(), double)


def test_the_numbers_are_standard_normal_and_uncorrelated_between_draws() -> None:
    draws = Draws(3, range(2000))
    a = draws.normal("x", 0, torch.zeros(2000, 16)).double()
    b = draws.normal("x", 1, torch.zeros(2000, 16)).double()
    assert abs(float(a.mean())) < 4 / 32_000**0.5
    assert float(a.var()) == pytest.approx(1.0, abs=4 * (2 / 32_000) ** 0.5)
    assert abs(float((a * b).mean())) < 4 / 32_000**0.5
    u = draws.uniform("u", 0)
    assert float(u.mean()) == pytest.approx(0.5, abs=4 * (1 / 12 / 2000) ** 0.5)
    assert 0.0 <= float(u.min())
    assert float(u.max()) < 1.0


@pytest.mark.parametrize("n", [100, 1024, 3000])
def test_even_noise_is_normal_and_more_even_than_independent_noise(n) -> None:
    even = even_normal(n, 3, stream(0, 0, "even", 0)).double()
    loose = torch.from_numpy(stream(0, 1, "even", 0).standard_normal((n, 3)))
    for quantile in (0.1, 0.5, 0.9):
        exact = torch.special.ndtri(torch.tensor(quantile, dtype=torch.float64))
        assert (even < exact).double().mean(0).sub(quantile).abs().max() < 3 / n**0.75
    assert even.mean(0).norm() < 0.3 * loose.mean(0).norm()
    covariance = [x.T @ x / n - torch.eye(3) for x in (even, loose)]
    assert covariance[0].norm() < 0.5 * covariance[1].norm()
    # neighbours in the list are not neighbours in space: any part of it will do
    assert even[: n // 2].mean(0).norm() < 4 / n**0.5


def test_even_noise_belongs_to_its_stream() -> None:
    one, again, other = (even_normal(64, 3, stream(0, i, "even", 0)) for i in (0, 0, 1))
    assert torch.equal(one, again)
    assert (one - other).abs().min() > 0


def test_negative_seeds_are_refused() -> None:
    with pytest.raises(ValueError, match="seed"):
        Draws(-1, [0])
