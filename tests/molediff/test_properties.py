"""Property networks, the conditions they share with generators, and halves of labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_geometric_domain import embedded
from test_transformer import randomised

import molediff
from molediff.geometric.data import MoleculeData
from molediff.geometric.domain import Molecules
from molediff.geometric.models import property_egnn, property_transformer, transformer
from molediff.geometric.prepare import prepare
from molediff.geometric.records import visible
from shared.guidance.classifier_free import ClassifierFree
from shared.schedules import Polynomial

SMILES = ["CCO", "CC(=O)N", "C1CCCC1", "c1ccccc1", "CC#N", "O", "NCC(=O)O", "CCN", "CO", "C=O"]
SMALL = {"width": 32, "layers": 2, "heads": 4, "vectors": 8, "pairs": 16}
EGNN = {"width": 16, "layers": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("labelled")
    molecules = [
        embedded(s).replace(properties={"mass": 3.0 * len(s), "odd": float(i)})
        for i, s in enumerate(SMILES)
    ]
    molediff.write(base / "mine.sdf", molecules)
    prepare(base / "mine.sdf", base / "data", fractions=(0.8, 0.2, 0.0))
    return str(base / "data")


@pytest.fixture(scope="module")
def domain(folder):
    return Molecules(folder, properties=["odd", "mass"])


def batch(domain):
    training, _ = domain.datasets()
    return domain.collate([training[i] for i in range(len(training))])


def rotated(state):
    q, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(3)))
    return {**state, "positions": state["positions"] @ q}


@pytest.mark.parametrize(
    ("build", "options"), [(property_transformer, SMALL), (property_egnn, EGNN)]
)
@pytest.mark.parametrize("noisy", [True, False])
def test_predictions_turn_with_nothing_and_see_no_padding(domain, build, options, noisy):
    model = build(domain, Polynomial(), noisy=noisy, **options).eval()
    made = batch(domain)
    with torch.no_grad():
        y = model.predict(made.state, 0.1, made.mask)
        turned = model.predict(rotated(made.state), 0.1, made.mask)
        n = int(made.mask[0].sum())
        alone = model.predict({k: v[:1, :n] for k, v in made.state.items()}, 0.1)
    assert y.shape == (len(made), 2)
    torch.testing.assert_close(turned, y, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(alone, y[:1], atol=1e-5, rtol=1e-5)
    assert float(y.std(0).min()) > 1e-4


def test_losses_skip_what_is_unknown_and_do_not_see_the_answer(domain):
    model = property_transformer(domain, Polynomial(), **SMALL)
    made = batch(domain)
    noise = model.process.noise({k: torch.zeros_like(v) for k, v in made.state.items()}, made.mask)
    t = torch.full((len(made),), 0.2, dtype=torch.float64)
    target = made.cond["context"].clone()
    target[:, 1] = torch.nan
    losses = model.losses(made.state, noise, t, made.mask, {"context": target})
    assert losses.keys() == {"odd", "mass"}
    assert torch.equal(losses["mass"], torch.zeros(len(made)))
    found = model.predict(model.process.perturb(made.state, t, noise), t, made.mask)
    torch.testing.assert_close(losses["odd"], (found[:, 0] - target[:, 0]).abs())
    with pytest.raises(ValueError, match=r"domain\.properties"):
        model.losses(made.state, noise, t, made.mask)


def test_a_dipole_is_found_in_a_few_steps(domain):
    """Charges times positions, the form of the target, are learnt from ten molecules."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = property_transformer(domain, Polynomial(), noisy=False, **SMALL)
    made = batch(domain)
    noise = {k: torch.zeros_like(v) for k, v in made.state.items()}
    t = model.times.from_uniform(model.process.lead, torch.zeros(len(made), dtype=torch.float64))
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        terms = model.losses(made.state, noise, t, made.mask, made.cond)
        loss = torch.stack(list(terms.values())).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.25 * losses[0]


def test_halves_share_no_label(folder):
    data = MoleculeData(folder).subset("train")
    first, second = (visible(data, ["odd"], half) for half in ("first", "second"))
    assert not (first & second).any()
    assert (first | second).all()
    assert abs(int(first.sum()) - int(second.sum())) <= 1
    training, _ = Molecules(folder, properties=["odd"], labels="first", labelled=True).datasets()
    assert len(training) == int(first.sum())
    hidden, _ = Molecules(folder, properties=["odd"], labels="first").datasets()
    assert int(np.isnan(hidden.context).sum()) == int(second.sum())


def test_standard_and_physical_values_agree_with_the_data(domain, folder):
    data = MoleculeData(folder).subset("train")
    training, _ = domain.datasets()
    values = np.stack([data.column("odd"), data.column("mass")], 1)
    np.testing.assert_allclose(domain.physical(training.context), values, rtol=1e-5, atol=1e-4)
    assert abs(float(training.context[:, 0].mean())) < 1e-5
    with pytest.raises(ValueError, match="colour"):
        Molecules(folder, properties=["colour"]).datasets()


def test_wishes_become_conditions_and_sizes(domain):
    restored = Molecules()
    restored.restore(domain.statistics())
    assert restored.properties == ("odd", "mass")
    made = restored.template(0, range(6), mass="9<mass<12", atoms="3..9")
    context = restored.physical(made.cond["context"].numpy())
    assert np.isnan(context[:, 0]).all()
    assert ((context[:, 1] >= 9) & (context[:, 1] <= 12)).all()
    sizes = {}
    for mass in (9.0, 24.0):
        asked = restored.template(0, range(60), mass=mass)
        sizes[mass] = asked.mask.sum(1).float().mean()
    assert sizes[9.0] < sizes[24.0] - 1.0
    for wrong in ({"mass": "2..1"}, {"colour": 3}, {"atoms": "100..200"}, {"mass": "5 eV"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            restored.template(0, [0], **wrong)


def test_training_hides_conditions_and_sampling_does_not(domain):
    model = transformer(domain, Polynomial(), **SMALL)
    embedding = model.backbone.context
    told = embedding.train()._told(torch.zeros(4000, 2)).sum(1).float()
    assert abs(float((told == 0).float().mean()) - 0.15) < 0.03
    assert abs(float((told == 1).float().mean()) - 0.5) < 0.03
    made = batch(domain)
    model.eval()
    with torch.no_grad():
        randomised(model)
        outs = [model(made.state, 0.3, made.mask, made.cond)["types"].x0 for _ in range(2)]
        free = ClassifierFree(model, model.process, domain.null_condition(), scale=0.0)
        bare = free(made.state, 0.3, made.mask, made.cond)["types"].x0
    assert torch.equal(*outs)
    assert not torch.allclose(bare, outs[0])
    torch.testing.assert_close(bare, model(made.state, 0.3, made.mask)["types"].x0)
