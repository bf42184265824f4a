"""Models of latents, from training an autoencoder to judging samples."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from shared.cli import main
from shared.images.cli import PROGRAM
from shared.images.data import load
from shared.images.domain import Images
from shared.images.latents import DiffusersAutoencoder, Latents, open_autoencoder
from shared.models import load as load_model

QUICK = ["trainer.progress=false", "trainer.validate_every=null", "seed=0"]


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "vae"
    words = ["train", "experiment=digits_vae", "trainer.max_steps=40", "model.widths=[8,16]"]
    assert main(PROGRAM, [*words, *QUICK, f"out={run}"]) == 0
    return str(run)


@pytest.fixture(scope="module")
def model(autoencoder):
    run = f"{autoencoder}/../latent"
    words = ["train", "experiment=digits_latent", f"domain.autoencoder={autoencoder}"]
    words += ["trainer.max_steps=3", "model.widths=[8,8]", f"out={run}"]
    assert main(PROGRAM, [*words, *QUICK]) == 0
    return run


def test_from_training_to_judging(model, tmp_path, capsys):
    out = tmp_path / "samples"
    words = ["sample", f"run={model}", "n=5", "steps=3", "seed=1", f"out={out}"]
    assert main(PROGRAM, words) == 0
    images = np.load(out / "samples.npy")
    assert images.shape == (5, 8, 8)
    assert images.dtype == np.uint8
    assert main(PROGRAM, ["evaluate", str(out)]) == 0
    metrics = json.loads((out / "metrics.json").read_text())["metrics"]
    assert {"valid", "frechet_pca32"} <= metrics.keys()
    assert main(PROGRAM, ["bits", f"run={model}"]) == 2
    assert "density of latents" in capsys.readouterr().err
    way = tmp_path / "way.png"
    assert main(PROGRAM, ["picture", f"run={model}", "n=2", "steps=2", f"out={way}"]) == 0


def test_editing_works_where_it_can(model, tmp_path, capsys):
    np.savez(tmp_path / "in.npz", images=Images().pictures[:2])
    words = ["edit", str(tmp_path / "in.npz"), f"run={model}", "steps=3", f"out={tmp_path}/out"]
    assert main(PROGRAM, words) == 0
    assert load(tmp_path / "out" / "edited.npz")[0].shape == (2, 8, 8)
    assert main(PROGRAM, [*words, "edit.method=inpaint"]) == 2
    assert "works on pixels" in capsys.readouterr().err


def test_constants_travel_and_latents_have_unit_size(autoencoder, model):
    domain = load_model(model).domain
    assert domain.shape == (2, 4, 4)
    assert domain.picture_shape == (1, 8, 8)
    constants = domain.statistics()["latents"]
    assert constants["shape"] == [2, 4, 4]
    fresh = Images(autoencoder=autoencoder)
    assert fresh.statistics()["latents"] == constants
    train = fresh.datasets()[0]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        x = torch.stack([train[i]["x"] for i in range(400)])
        assert not torch.equal(train[0]["x"], train[0]["x"])
    assert float(x.std()) == pytest.approx(1.0, abs=0.1)
    mean = fresh.encode(fresh.pictures[:8])
    network = open_autoencoder(autoencoder)
    pixels = Images().encode(fresh.pictures[:8])
    assert torch.allclose(mean, network.moments(pixels)[0] * constants["scale"], atol=1e-5)
    decoded = np.stack(fresh.decode({"x": mean}, None))
    again = Images().decode({"x": network.images(network.moments(pixels)[0])}, None)
    assert np.abs(decoded.astype(int) - np.stack(again)).max() <= 1


def test_another_autoencoder_is_refused(autoencoder, model):
    domain = load_model(model).domain
    statistics = domain.statistics()
    other = Images(autoencoder=autoencoder)
    other.restore({**statistics, "latents": {**statistics["latents"], "weights": "0" * 16}})
    with pytest.raises(ValueError, match="is not the one that the model was trained with"):
        other.decode({"x": torch.zeros(1, 2, 4, 4)}, None)
    with pytest.raises(ValueError, match=r"domain\.autoencoder goes with"):
        Images().restore(statistics)
    with pytest.raises(ValueError, match="holds no autoencoder; train one"):
        open_autoencoder("digits")
    colour = np.zeros((2, 8, 8, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match=r"does not take images \[3, 8, 8\]"):
        list(Latents(autoencoder).blocks(colour))


def test_prepared_latents_are_read_instead_of_computed(autoencoder, tmp_path, monkeypatch):
    np.savez(tmp_path / "a.npz", images=Images().pictures[:50])
    out = tmp_path / "out"
    assert main(PROGRAM, ["prepare", str(tmp_path / "a.npz"), f"out={out}"]) == 0
    assert main(PROGRAM, ["prepare", str(out), f"autoencoder={autoencoder}"]) == 0
    there, here = (Images(str(d), autoencoder=autoencoder) for d in (out, tmp_path / "a.npz"))
    constants = here.statistics()["latents"]
    assert there.statistics()["latents"] == constants
    computed = here.datasets()[0].read.moments
    monkeypatch.setattr(Latents, "blocks", None)
    stored = there.datasets()[0].read.moments
    assert stored.dtype == np.float16
    assert np.abs(stored - computed).max() < 0.01
    rows = np.load(next(out.glob("moments-*.npy")))
    np.save(next(out.glob("moments-*.npy")), rows[:-1])
    with pytest.raises(ValueError, match="49 latents of 50 pictures"):
        there.datasets()


def test_an_autoencoder_of_diffusers(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        network = diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            latent_channels=4,
            norm_num_groups=4,
            scaling_factor=0.25,
        )
    folder = tmp_path / "pipeline" / "vae"
    network.save_pretrained(str(folder))
    np.savez(tmp_path / "a.npz", images=np.full((20, 8, 8, 3), 99, dtype=np.uint8))
    domain = Images(str(tmp_path / "a.npz"), autoencoder=str(tmp_path / "pipeline"))
    assert domain.shape == (4, 4, 4)
    assert domain.statistics()["latents"]["scale"] == 0.25
    opened = open_autoencoder(str(folder))
    assert isinstance(opened, DiffusersAutoencoder)
    x = domain.encode(domain.pictures[:2])
    with torch.no_grad():
        truth = network.encode(torch.full((2, 3, 8, 8), 99 / 127.5 - 1)).latent_dist.mean
    assert torch.allclose(x, 0.25 * truth, atol=1e-5)
    assert domain.decode({"x": x}, None)[0].shape == (8, 8, 3)
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "away")
    with pytest.raises(FileNotFoundError, match="pickled weights are not read"):
        open_autoencoder(str(folder))
    (folder / "config.json").write_text('{"_class_name": "VQModel"}')
    with pytest.raises(ValueError, match="VQModel, and no AutoencoderKL"):
        open_autoencoder(str(folder))
