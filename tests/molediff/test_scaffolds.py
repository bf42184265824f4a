from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from molediff import Molecule
from molediff.geometric.domain import Molecules
from molediff.geometric.fragments import Fragment
from molediff.geometric.models import transformer
from molediff.geometric.scaffolds import Agreement, Keep, Scaffolded, Spread
from shared.configuration import ConfigurationError
from shared.geometry import CentredPoints
from shared.guidance import Guided, Term, prior_spread
from shared.predictions import Prediction
from shared.process import Process, State
from shared.randomness import Draws
from shared.sampling import Memory, sample
from shared.schedules import Polynomial, VPLinear
from shared.solvers.ancestral import DDPM
from shared.solvers.grids import PowerTimes

F64 = torch.float64
RING = Fragment.read("C1CCOC1")
PAIR = Fragment(
    Molecule(
        np.array([6, 8, 6, 7]),
        np.array([[0.0, 0, 0], [1.4, 0, 0], [4.0, 1, 0], [5.3, 1.5, 0.4]]),
    ),
    "pair.sdf",
)


def plain_domain() -> Molecules:
    domain = Molecules()
    domain.restore(
        {
            "domain": "molecules",
            "elements": ["H", "C", "N", "O", "F"],
            "scale": 0.25,
            "charges": None,
            "charge_scale": 0.1,
            "position_std": 1.4,
            "sizes": {"4": 10, "5": 10, "8": 30, "12": 10},
            "element_counts": {},
            "properties": {},
        }
    )
    return domain


@pytest.fixture(scope="module")
def denoiser():
    options = {"width": 16, "layers": 2, "heads": 2, "vectors": 4, "pairs": 8}
    model = transformer(plain_domain(), Polynomial(), **options).eval()
    gen = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.copy_(torch.randn(p.shape, generator=gen) * 0.7 / p.shape[-1] ** 0.5)
    return model


def make(denoiser, domain, indices, *, guided=False, batch=16, resamples=2):
    memory = Memory()
    denoise = denoiser
    if guided:
        denoise = Guided(denoiser, denoiser.process, domain.terms(denoiser.process))
    sample(
        denoise,
        denoiser.process,
        domain,
        len(indices),
        domain.keeping(DDPM(), resamples=resamples),
        8,
        PowerTimes(),
        3,
        indices=indices,
        batch=batch,
        sink=memory,
    )
    return [memory.items[i] for i in indices]


@pytest.mark.parametrize("fragment", [RING, PAIR], ids=["grow", "link"])
@pytest.mark.parametrize("guided", [False, True])
def test_the_fragment_is_in_every_sample(denoiser, fragment, guided):
    items = make(denoiser, Scaffolded(plain_domain(), fragment), range(5), guided=guided)
    k, want = len(fragment), fragment.molecule.positions
    for item in items:
        assert len(item) > k
        assert item.atomic_numbers[:k].tolist() == fragment.molecule.atomic_numbers.tolist()
        shift = item.positions[0] - want[0]
        np.testing.assert_allclose(item.positions[:k], want + shift, atol=2e-5)
    assert np.abs(items[0].positions[k] - items[1].positions[k]).max() > 1e-2


def test_a_sample_does_not_depend_on_its_batch(denoiser):
    domain = Scaffolded(plain_domain(), RING, "2..9")
    together = make(denoiser, domain, range(5), guided=True)
    apart = make(denoiser, domain, range(5), guided=True, batch=2)
    alone = make(denoiser, domain, [3], guided=True)
    assert len({len(item) for item in together}) > 1
    for one, other in zip([*together, together[3]], [*apart, *alone], strict=True):
        assert one.symbols == other.symbols
        np.testing.assert_allclose(one.positions, other.positions, atol=1e-4)


def test_turning_fragment_and_draws_turns_the_molecules(denoiser):
    model = transformer(
        plain_domain(), Polynomial(), width=16, layers=2, heads=2, vectors=4, pairs=8
    )
    model.load_state_dict(denoiser.state_dict())
    model = model.double().eval()
    domain = Scaffolded(plain_domain(), PAIR, 3)
    draws, process = Draws(0, range(2)), model.process
    turn = torch.linalg.qr(
        torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
    )[0]

    def run(rotation):
        value = {n: v.double() for n, v in domain.known_state().items()}
        value["positions"] = value["positions"] @ rotation
        like = {n: torch.zeros(2, 7, v.shape[-1], dtype=F64) for n, v in value.items()}

        def draw(name, number):
            z = draws.normal(name, number, like[name], process.fields[name].geometry)
            return z @ rotation if name == "positions" else z

        energy = Agreement(process, value, dict.fromkeys(value, Spread(1.0)))
        guided = Guided(model, process, [Term(energy, at="estimate")])
        start = process.prior({name: draw(name, 1 << 50) for name in like})
        times = torch.linspace(1.0, 0.0, 7).tolist()
        project = {n: f.geometry.project for n, f in process.fields.items()}
        with torch.no_grad():
            return Keep(DDPM(), value, 2, 2).solve(
                process, guided, start, times, draw, lambda n, x: project[n](x)
            )

    straight, turned = run(torch.eye(3, dtype=F64)), run(turn)
    torch.testing.assert_close(
        straight["positions"] @ turn, turned["positions"], rtol=0, atol=1e-9
    )
    torch.testing.assert_close(straight["types"], turned["types"], rtol=0, atol=1e-9)
    assert (straight["positions"] - turned["positions"]).abs().max() > 0.1


# -- sizes ------------------------------------------------------------------------------------


def sizes(domain, **request):
    batch = domain.template(0, range(400), **request)
    width = batch.state["positions"].shape[1]
    return [width] * len(batch) if batch.mask is None else batch.mask.sum(1).tolist()


def test_sizes_leave_room_for_the_fragment():
    drawn = sizes(Scaffolded(plain_domain(), RING))  # of 8 and 12 atoms, three to one
    assert set(drawn) == {8, 12}
    assert drawn.count(8) / 400 == pytest.approx(0.75, abs=0.09)
    assert set(sizes(Scaffolded(plain_domain(), RING, 3))) == {8}
    assert set(sizes(Scaffolded(plain_domain(), RING, "1..3"))) == {8}
    assert set(sizes(Scaffolded(plain_domain(), RING, (2, 2)))) == {7}
    assert set(sizes(Scaffolded(plain_domain(), RING), atoms=9)) == {9}


def test_the_plain_domain_stays_as_it_is():
    domain = plain_domain()
    Scaffolded(domain, RING, 3)
    assert 4 in sizes(domain)
    assert not isinstance(domain, Scaffolded)


@pytest.mark.parametrize("new", ["0", "5..2", "many", "1..2..3", -1, (0, 2)])
def test_impossible_numbers_of_new_atoms(new):
    with pytest.raises(ConfigurationError, match="new atoms"):
        Scaffolded(plain_domain(), RING, new)


def test_impossible_fragments():
    with pytest.raises(ConfigurationError, match="does not know Br; it makes molecules of H, C"):
        Scaffolded(plain_domain(), Fragment.read("CBr"))
    long = Fragment.read("C" * 12)
    with pytest.raises(ConfigurationError, match="has 12 atoms, the model's largest molecules 12"):
        Scaffolded(plain_domain(), long)
    assert set(sizes(Scaffolded(plain_domain(), long, 2))) == {14}
    with pytest.raises(ConfigurationError, match="atoms=5 leaves nothing to add to the 5 atoms"):
        Scaffolded(plain_domain(), RING).template(0, [0], atoms=5)


# -- the law ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Springs:
    """The exact denoiser of centred points x ~ N(0, C) per axis, C on the zero-mean space."""

    process: Process
    cov: torch.Tensor

    def __call__(self, x: State, t: float, mask: object = None, cond: object = None) -> dict:
        alpha, sigma = float(self.process.lead.alpha(t)), float(self.process.lead.sigma(t))
        total = alpha**2 * self.cov + sigma**2 * torch.eye(len(self.cov), dtype=F64)
        x0 = alpha * self.cov @ torch.linalg.solve(total, x["positions"])
        return {"positions": Prediction(x["positions"], alpha, sigma, x0=x0)}


def test_new_atoms_follow_the_conditional_law():
    """Three points; the shape of the first two is given, so the mean of the third's distance from
    them is linear in it."""
    process = Process.single(VPLinear(), CentredPoints(), "positions")
    centre = torch.eye(3, dtype=F64) - 1.0 / 3.0
    root = centre @ torch.tensor([[1.0, 0.2, 0], [0, 0.8, 0.3], [0.9, 0.0, 0.7]], dtype=F64)
    cov = root @ root.T
    shape = torch.tensor([[0.9, 0.0, -0.4], [-0.9, 0.0, 0.4]], dtype=F64)
    given = torch.tensor([1.0, -1.0, 0.0], dtype=F64)  # x_1 - x_2
    slope = cov @ given / (given @ cov @ given)
    want = slope[:, None] * (shape[0] - shape[1])

    n = 4000
    gen, made = torch.Generator().manual_seed(0), {}

    def draw(name, j):
        if j not in made:
            made[j] = centre @ torch.randn(n, 3, 3, generator=gen, dtype=F64)
        return made[j]

    times = torch.linspace(1.0, 1e-3, 25, dtype=F64).tolist()
    value = {"positions": shape[None]}
    far = {}
    for resamples in (1, 10):
        made.clear()
        end = Keep(DDPM(), value, 1, resamples).solve(
            process, Springs(process, cov), {"positions": draw("", 1 << 60)}, times, draw
        )["positions"]
        between = end[:, 0] - end[:, 1]
        torch.testing.assert_close(between, (shape[0] - shape[1]).expand(n, 3), rtol=0, atol=1e-12)
        far[resamples] = float((end.mean(0) - want)[2].abs().max())
    scale = float(want[2].abs().max())
    assert far[1] > 0.1 * scale  # plain replacement misses the mean
    assert far[10] < 0.5 * far[1]


def test_agreement_with_the_true_spread_is_the_likelihood():
    """For points of one variance, grad -log p(fragment | x_t) in closed form."""
    process = Process.single(VPLinear(), CentredPoints(), "positions")
    centre = torch.eye(4, dtype=F64) - 0.25
    var, t = 0.7, 0.4
    value = {"positions": torch.tensor([[[0.5, 0, 0], [-0.5, 0, 0]]], dtype=F64)}
    energy = Agreement(process, value, {"positions": Spread(var**0.5)}, std=1e-6)
    alpha, sigma = (float(f(t)) for f in (process.lead.alpha, process.lead.sigma))
    x = centre @ torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    guided = Guided(Springs(process, var * centre), process, [Term(energy, at="estimate")])
    plain = Springs(process, var * centre)({"positions": x}, t)["positions"]
    push = (guided({"positions": x}, t)["positions"].eps - plain.eps) / sigma
    gain = alpha * var / (alpha**2 * var + sigma**2)
    apart = value["positions"] - plain.x0[:, :2] + plain.x0[:, :2].mean(1, keepdim=True)
    spread = prior_spread(var**0.5)(alpha, sigma)
    torch.testing.assert_close(push[:, :2], -gain * apart / spread, rtol=1e-6, atol=1e-8)
    assert float(push[:, 2:].abs().max()) < 1e-8  # independent points feel nothing


def test_spreads_shrink_where_the_surroundings_tell():
    plain, told = Spread(1.4), Spread(1.4, settled=0.3, least=0.3)
    for sigma in (5.0, 0.3, 0.01):
        assert float(plain(0.5, sigma)) == pytest.approx(prior_spread(1.4)(0.5, sigma))
    shares = [float(told(1.0, s) / plain(1.0, s)) for s in (30.0, 0.3, 0.01)]
    assert shares == pytest.approx([1.0, 0.5, 0.3], abs=1e-3)
