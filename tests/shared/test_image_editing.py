"""Editing images from Python and the command line."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from shared.cli import main
from shared.configuration import ConfigurationError, compose
from shared.images.classifier import ImageClassifier, image_classifier, load_classifier
from shared.images.cli import PROGRAM
from shared.images.domain import Images
from shared.images.editing import Edit, edited, sheet, trajectory
from shared.images.networks import image_denoiser
from shared.models import load
from shared.process import Process
from shared.schedules import VPCosine, VPLinear
from shared.solvers import DDIM


@pytest.fixture(scope="module")
def model():
    return load("digits")


@pytest.fixture(scope="module")
def sources():
    domain = Images()
    images, labels = domain.pictures, domain.pictures.labels
    return list(images[domain.held_out & (labels == 3)][:4])


def run(model, sources, request_label=3, **settings):
    found = edited(
        model,
        sources,
        Edit(**settings),
        solver=DDIM(),
        grid="time_uniform",
        steps=8,
        label=request_label,
    )
    return np.stack(found).astype(float)


def gap(a, b):
    return np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).mean()


def test_sdedit_is_the_more_faithful_the_weaker(model, sources):
    gaps = [gap(run(model, sources, strength=s), sources) for s in (0.15, 0.8)]
    assert 0 < gaps[0] < 0.6 * gaps[1]


def test_egsde_keeps_the_coarse_structure(model, sources):
    settings = {"strength": 0.8, "classifier": "digits_classifier", "realistic": 5.0}
    plain = run(model, sources, 8, strength=0.8)
    close = run(model, sources, 8, method="egsde", **settings, faithful=2.0)
    assert gap(blocks(close), blocks(np.stack(sources))) < gap(
        blocks(plain), blocks(np.stack(sources))
    )


def blocks(images):
    return np.asarray(images, dtype=float).reshape(len(images), 4, 2, 4, 2).mean((2, 4))


def test_inpainting_keeps_what_is_given_and_changes_the_rest(model, sources):
    found = run(model, sources, method="inpaint", keep="top", resamples=2)
    assert np.array_equal(found[:, :4], np.stack(sources)[:, :4])
    assert gap(found[:, 4:], np.stack(sources)[:, 4:]) > 1.0
    mask = np.zeros((8, 8), dtype=bool)
    mask[:, 5] = True
    found = run(model, sources, method="inpaint", keep=mask, resamples=1)
    assert np.array_equal(found[:, :, 5], np.stack(sources)[:, :, 5])


def test_super_resolution_agrees_with_the_small_image(model, sources):
    small = np.rint(blocks(np.stack(sources))).astype(np.uint8)
    found = run(model, list(small), method="superres")
    assert found.shape == (4, 8, 8)
    free = model.sample(4, solver=DDIM(), grid="time_uniform", steps=8, seed=0, label=3)
    assert gap(blocks(found), small) < 0.6 * gap(blocks(np.stack(free)), small)


def test_mistakes_are_named(model, sources):
    for wrong, message in (
        ({"method": "warp"}, "method=warp"),
        ({"strength": 0.0}, "strength"),
        ({"method": "egsde"}, "classifier=RUN"),
    ):
        with pytest.raises(ValueError, match=message):
            Edit(**wrong)
    with pytest.raises(ValueError, match="give one of left"):
        run(model, sources, method="inpaint", keep="middle")
    with pytest.raises(ValueError, match="picture 0 is"):
        run(model, [np.zeros((9, 9), dtype=np.uint8)])
    with pytest.raises(ValueError, match="1 channels"):
        run(model, [np.zeros((8, 8, 3), dtype=np.uint8)])


def test_the_way_of_a_sample_as_a_picture(model, tmp_path):
    rows = trajectory(model, 3, solver="ddim", grid="time_uniform", steps=4, every=2, seed=1)
    assert rows.shape == (3, 3, 8, 8)
    (tmp_path / "a.png").write_bytes(sheet(list(rows)))
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (3 * 40, 3 * 40)


def test_the_verbs(model, sources, tmp_path):
    np.savez(tmp_path / "in.npz", images=np.stack(sources))
    words = ["edit", str(tmp_path / "in.npz"), "run=digits", "steps=4", f"out={tmp_path}/out"]
    assert main(PROGRAM, words) == 0
    with np.load(tmp_path / "out" / "edited.npz") as arrays:
        assert arrays["images"].shape == (4, 8, 8)
    picture = tmp_path / "way.png"
    assert main(PROGRAM, ["picture", "run=digits", "n=2", "steps=3", f"out={picture}"]) == 0
    grid = ["picture", str(tmp_path / "in.npz"), f"out={tmp_path}/grid.png"]
    assert main(PROGRAM, [*grid, "shape=[8,8]"]) == 0
    assert main(PROGRAM, grid) == 2
    assert main(PROGRAM, ["edit", str(tmp_path / "in.npz"), "run=digits", "edit.method=x"]) == 2


# -- the classifier, and models that enlarge --------------------------------------------------


def test_the_classifier_learns_only_from_visible_labels():
    domain = Images()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = image_classifier(domain, VPLinear(), widths=(8, 16))
    x = {"x": torch.zeros(3, 1, 8, 8)}
    cond = {"label": torch.tensor([1, 10, 9])}
    losses = model.losses(x, x, torch.full((3,), 0.5).double(), None, cond)["class"]
    assert losses[1] == 0
    assert losses[0] > 0
    with pytest.raises(ValueError, match="labels"):
        model.losses(x, x, torch.full((3,), 0.5).double())


def test_a_classifier_for_other_noise_is_refused():
    assert isinstance(
        load_classifier("digits_classifier", load("digits").denoiser.process), ImageClassifier
    )
    with pytest.raises(ValueError, match="noise levels"):
        load_classifier("digits_classifier", Process.single(VPCosine()))
    with pytest.raises(ValueError, match="experiment=digits_classifier"):
        load_classifier("digits", load("digits").denoiser.process)


def test_a_model_that_enlarges_sees_the_small_image(tmp_path):
    domain = Images(upscale=2)
    train, _ = domain.datasets()
    batch = domain.collate([train[0], train[1]])
    assert batch.cond["low"].shape == batch.state["x"].shape
    denoiser = image_denoiser(domain, VPLinear(), widths=(8, 8))
    losses = denoiser.loss(
        batch.state, batch.state, torch.full((2,), 0.5).double(), None, batch.cond
    )
    losses.sum().backward()
    np.savez(tmp_path / "small.npz", images=np.full((2, 4, 4), 200, dtype=np.uint8))
    template = domain.template(0, [0, 5], low=str(tmp_path / "small.npz"))
    assert float(template.cond["low"].min()) == pytest.approx(200 / 127.5 - 1, abs=1e-5)
    with pytest.raises(ValueError, match="low=FILE"):
        domain.template(0, [0])
    with pytest.raises(ValueError, match="low=FILE"):
        Images().template(0, [0], low=str(tmp_path / "small.npz"))
    with pytest.raises(ConfigurationError):
        compose("train", ["experiment=digits_superres", "domain.upscal=2"])
