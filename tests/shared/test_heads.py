"""Variance heads: trained beside the weights, found by the solvers that need them."""

from __future__ import annotations

import pytest
import torch

from shared.batches import Batches
from shared.configuration import compose
from shared.heads import load_head, new_head, save_head, train_head, with_head
from shared.images.cli import PROGRAM
from shared.images.domain import Images
from shared.images.networks import image_denoiser
from shared.models import load
from shared.schedules import VPDiscrete
from shared.solvers import DDPM
from shared.toys import Toys
from shared.verbs import sample, train, variance


@pytest.fixture(scope="module")
def digits():
    domain = Images()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return domain, image_denoiser(domain, VPDiscrete.linear(), widths=(8, 8))


@pytest.mark.parametrize("kind", ["sn", "npr"])
def test_training_lowers_the_loss_and_files_round_trip(tmp_path, digits, kind):
    domain, denoiser = digits
    before = {name: v.clone() for name, v in denoiser.state_dict().items()}
    head = new_head(denoiser, domain, kind)
    batches = Batches(domain, head.process, domain.datasets()[0], 32, 0)
    losses = train_head(head, batches, 12, 3e-3)
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert all(torch.equal(v, before[name]) for name, v in denoiser.state_dict().items())
    save_head(tmp_path, head)
    again = load_head(tmp_path, denoiser, domain)
    assert again.kind == kind
    x, cond = {"x": torch.randn(2, 1, 8, 8)}, {"label": torch.tensor([1, 10])}
    with torch.no_grad():
        one, two = (h(x, 0.4, None, cond)["x"].form("var") for h in (head, again))
    assert torch.equal(one, two)


def test_only_solvers_that_need_a_head_get_one(tmp_path, digits):
    domain, denoiser = digits
    assert with_head(DDPM(), tmp_path, denoiser, domain) is denoiser
    with pytest.raises(FileNotFoundError, match="kind=npr"):
        with_head(DDPM(variance="head"), tmp_path, denoiser, domain)
    with pytest.raises(ValueError, match="kind=gamma"):
        new_head(denoiser, Toys())


def test_the_verb_trains_a_head_that_sampling_finds(tmp_path):
    out = tmp_path / "run"
    words = ["experiment=digits_unet", "trainer=debug", f"out={out}", "seed=0"]
    words += ["trainer.max_steps=1", "model.widths=[8,8]", "trainer.progress=false"]
    train(compose("train", words), PROGRAM)
    more = ["kind=sn", "updates=2", "batch=8"]
    outcome = variance(compose("variance", [f"run={out}", *more]), PROGRAM)
    assert outcome.path is not None
    assert outcome.path.parent == load(out).checkpoint.path
    asked = [f"run={out}", "solver=ddpm_head", "steps=3", "n=2", f"out={tmp_path / 'samples'}"]
    assert sample(compose("sample", asked), PROGRAM).ok
