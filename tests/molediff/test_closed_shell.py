from itertools import product

import pytest
import torch

from molediff.geometric.closed_shell import ClosedShell, given_even
from molediff.geometric.domain import Molecules
from molediff.geometric.models import transformer
from shared.schedules import Polynomial

ODD = torch.tensor([True, False, True, False])


def by_enumeration(p, odd):
    """Marginals of independent rows [n, k] given an even number of odd classes."""
    found, total = torch.zeros_like(p), 0.0
    for classes in product(range(p.shape[1]), repeat=p.shape[0]):
        if sum(bool(odd[c]) for c in classes) % 2 == 0:
            weight = torch.stack([p[i, c] for i, c in enumerate(classes)]).prod()
            total = total + weight
            for i, c in enumerate(classes):
                found[i, c] += weight
    return found / total


def test_the_closed_form_is_the_sum_over_all_assignments():
    p = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = (3 * p).softmax(-1)
    found = given_even(p, ODD)
    for row, expected in zip(found, p, strict=True):
        torch.testing.assert_close(row, by_enumeration(expected, ODD), rtol=1e-12, atol=1e-12)


def test_padding_does_not_count():
    p = torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    p = p.softmax(-1)
    mask = torch.tensor([[True, True, True, False, False]])
    torch.testing.assert_close(given_even(p, ODD, mask)[:, :3], given_even(p[:, :3], ODD))


def test_the_doubtful_atom_gives_way():
    sure, doubtful = [0.0, 1.0, 0.0, 0.0], [0.6, 0.4, 0.0, 0.0]
    found = given_even(torch.tensor([[sure, sure, doubtful]]), ODD)
    torch.testing.assert_close(found, torch.tensor([[sure, sure, sure]]))


def test_certainty_of_an_odd_sum_stays_finite_and_as_it_is():
    p = torch.eye(4)[None, [0, 1, 1]]
    torch.testing.assert_close(given_even(p, ODD), p)


@pytest.fixture
def domain():
    found = Molecules()
    found.restore(
        {
            "domain": "molecules", "elements": ["H", "C", "N", "O"], "scale": 0.25,
            "charges": None, "charge_scale": 0.1, "position_std": 1.4, "closed_shell": True,
            "sizes": {"7": 1},
        }
    )  # fmt: skip
    return found


def test_predicted_elements_are_those_of_an_even_sum_and_positions_stay(domain):
    torch.manual_seed(0)
    model = transformer(domain, Polynomial(), width=16, layers=1, heads=2, vectors=4, pairs=8)
    assert isinstance(model, ClosedShell)
    x = {"positions": torch.randn(4, 6, 3), "types": torch.randn(4, 6, 4)}
    plain = super(ClosedShell, model).forward(x, 0.05)
    found = model(x, 0.05)
    expected = 0.25 * given_even(plain["types"].x0 / 0.25, model.odd)
    torch.testing.assert_close(found["types"].x0, expected)
    torch.testing.assert_close(found["positions"].x0, plain["positions"].x0)
    assert not torch.allclose(found["types"].x0, plain["types"].x0, atol=1e-4)
    torch.testing.assert_close(found["types"].x0.sum(-1), torch.full((4, 6), 0.25))


def test_a_model_of_radicals_is_left_alone(domain):
    domain.restore({**domain.statistics(), "closed_shell": False})
    model = transformer(domain, Polynomial(), width=16, layers=1, heads=2, vectors=4, pairs=8)
    assert not isinstance(model, ClosedShell)
