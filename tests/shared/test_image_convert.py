"""`imagediff convert` on tiny checkpoints of every family."""

from __future__ import annotations

import json
import math
import os
import pickle

import pytest
import test_image_published as reference
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import save_file

from shared import cli, verbs
from shared.cli import main
from shared.images.backbones.diffusers import from_pipeline
from shared.images.backbones.uvit import UViT
from shared.images.cli import PROGRAM
from shared.images.convert import read, tensors_of
from shared.models import load
from shared.predictions import KarrasPreconditioned, Velocity
from shared.schedules import Karras, VarianceExploding, VPDiscrete, VPLinear

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def converted(path, out):
    """The model after ``imagediff convert PATH out=OUT``."""
    assert cli.main(PROGRAM, ["convert", str(path), f"out={out}"]) == 0
    return verbs.load(out)


def refused(path, out, capsys):
    """What the command says instead."""
    assert cli.main(PROGRAM, ["convert", str(path), f"out={out}"]) == 2
    return capsys.readouterr().err


def float32(drawn):
    return {name: value.float() for name, value in drawn.items()}


def raw(model, code, **cond):
    """The backbone's own output."""
    with torch.no_grad():
        out = model.denoiser.backbone({"x": X}, code, None, cond)
    return torch.cat(list(out.values()), 1)


CODE = reference.CODE.float()


@pytest.fixture(scope="module")
def pipeline():
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        network = UNet2DModel(
            sample_size=8,
            block_out_channels=(16, 32),
            norm_num_groups=8,
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )
    scheduler = DDPMScheduler(50, beta_schedule="scaled_linear", prediction_type="v_prediction")
    return DDPMPipeline(network.eval(), scheduler)


@pytest.mark.parametrize("safe", [True, False])
def test_a_diffusers_folder(pipeline, tmp_path, safe):
    pipeline.save_pretrained(tmp_path / "theirs", safe_serialization=safe)
    model = converted(tmp_path / "theirs", tmp_path / "ours")
    direct = from_pipeline(pipeline)
    assert isinstance(model.denoiser.heads["x"].parameterisation, Velocity)
    assert tuple(model.denoiser.process.lead.betas) == direct.process.lead.betas
    with torch.no_grad():
        for t in (0.02, 0.4, 1.0):
            ours, theirs = (d({"x": X}, t)["x"].x0 for d in (model.denoiser, direct))
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_converted_model_samples(pipeline, tmp_path):
    pipeline.unet.save_pretrained(tmp_path / "theirs")  # no scheduler: the table of DDPM
    model = converted(tmp_path / "theirs", tmp_path / "ours")
    assert model.denoiser.process.lead == VPDiscrete.linear()
    words = ["sample", f"run={tmp_path / 'ours'}", "n=2", "steps=2", "seed=0"]
    assert cli.main(PROGRAM, [*words, f"out={tmp_path / 'samples'}"]) == 0
    items = list(model.domain.read(next((tmp_path / "samples").glob("*.npy"))))
    assert [item.shape for item in items] == [(8, 8, 3)] * 2


@pytest.mark.parametrize("kind", ["ddpm", "ddpmpp", "ncsnpp"])
def test_score_sde_with_averages_in_the_order_of_parameters(kind, tmp_path):
    published = reference.Drawn()
    expected = reference.ScoreSDE(published, kind)(X.double()).float()
    own = {f"module.{n}": torch.zeros_like(v).float() for n, v in published.items()}
    if kind == "ncsnpp":
        own["module.all_modules.0.W"] = published["all_modules.0.W"].float()
    shadow = [v.float() for n, v in published.items() if n != "all_modules.0.W"]
    content = {
        "optimizer": {"state": {}},
        "model": {"module.sigmas": torch.ones(9), **own},
        "ema": {"decay": 0.9999, "num_updates": 7, "shadow_params": shadow},
        "step": 7,
    }
    torch.save(content, tmp_path / "checkpoint_8.pth")
    model = converted(tmp_path / "checkpoint_8.pth", tmp_path / "ours")
    sign = -1.0 if kind == "ncsnpp" else 1.0
    torch.testing.assert_close(raw(model, CODE), sign * expected, rtol=1e-3, atol=1e-4)
    kinds = {"ddpm": VPDiscrete, "ddpmpp": VPLinear, "ncsnpp": VarianceExploding}
    assert isinstance(model.denoiser.process.lead, kinds[kind])
    assert model.domain.shape == (3, 32, 32)


def test_ncsnpp_is_told_the_noise_level_in_its_own_units(tmp_path):
    published = reference.Drawn()
    reference.ScoreSDE(published, "ncsnpp")(X.double())
    torch.save(float32(published), tmp_path / "a.pth")
    denoiser = converted(tmp_path / "a.pth", tmp_path / "ours").denoiser
    t = torch.tensor([0.3], dtype=torch.float64)
    sigma = denoiser.process.lead.sigma(t) / 2  # of images in [0, 1]
    torch.testing.assert_close(denoiser.time_code(denoiser.process.lead, t), sigma.log())


def test_guided_diffusion(tmp_path):
    published, label = reference.Drawn(), torch.tensor([0, 2])
    expected = reference.adm(published, X.double(), label).float()
    torch.save(float32(published), tmp_path / "64x64_diffusion.pt")
    model = converted(tmp_path / "64x64_diffusion.pt", tmp_path / "ours")
    torch.testing.assert_close(raw(model, CODE, label=label), expected, rtol=1e-3, atol=1e-4)
    assert model.domain.classes == 3
    assert model.denoiser({"x": X}, 0.5, None, {"label": label})["x"].var.shape == X.shape


def test_uvit(tmp_path):
    network = UViT(3, 8, width=64, depth=2, heads=1)
    torch.save(network.state_dict(), tmp_path / "nnet_ema.pth")
    model = converted(tmp_path / "nnet_ema.pth", tmp_path / "ours")
    with torch.no_grad():
        expected = network({"x": X}, CODE, None, None)["x"]
    torch.testing.assert_close(raw(model, CODE), expected)


# -- pickled modules --------------------------------------------------------------------------


class Rebuild:
    """Pickles like the persistent classes of NVlabs: a call with source code and attributes."""

    def __init__(self, state):
        self.state = state

    def __reduce__(self):
        meta = {
            "type": "class",
            "version": 6,
            "module_src": "raise SystemExit('code ran')",
            "class_name": "Net",
            "state": self.state,
        }
        return rebuild, (meta,)


def rebuild(meta):
    raise AssertionError("code ran")


def module_of(tensors):
    """Nested persistent modules from dotted names, as torch keeps them."""
    parameters, children = {}, {}
    for name, value in tensors.items():
        head, dot, rest = name.partition(".")
        if dot:
            children.setdefault(head, {})[rest] = value
        else:
            parameters[name] = torch.nn.Parameter(value)
    modules = {name: module_of(inner) for name, inner in children.items()}
    return Rebuild({"_parameters": parameters, "_buffers": {}, "_modules": modules})


@pytest.mark.parametrize("kind", ["ddpmpp", "adm"])
def test_edm(kind, tmp_path):
    published, label = reference.Drawn(), torch.tensor([1, 3])
    augment = torch.zeros(2, 9)
    expected = reference.edm(published, X.double(), label, augment.double(), kind).float()
    content = {"ema": module_of({f"model.{n}": v for n, v in float32(published).items()}), "x": 1}
    path = tmp_path / "network-snapshot.pkl"
    path.write_bytes(pickle.dumps(content))
    model = converted(path, tmp_path / "ours")
    torch.testing.assert_close(raw(model, CODE, label=label), expected, rtol=1e-3, atol=1e-4)
    assert model.domain.shape == (3, 8, 8)
    assert model.denoiser.process.lead == Karras()
    assert model.denoiser.heads["x"].parameterisation == KarrasPreconditioned(0.5)
    code = model.denoiser.time_code(Karras(), torch.tensor([2.0], dtype=torch.float64))
    assert float(code) == pytest.approx(math.log(2.0) / 4)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("suffix", [".pkl", ".pt"])
def test_nothing_in_a_file_runs(suffix, tmp_path, capsys):
    path, trap = tmp_path / f"evil{suffix}", tmp_path / "trap"
    content = {"ema": Evil(trap), "map_layer0.weight": torch.ones(1)}
    if suffix == ".pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    assert str(path) in refused(path, tmp_path / "ours", capsys)
    assert not trap.exists()


# -- mistakes ---------------------------------------------------------------------------------


def test_mistakes_are_one_line(pipeline, tmp_path, capsys):
    out = tmp_path / "ours"
    assert "no file or folder" in refused(tmp_path / "nothing.pt", out, capsys)
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refused(tmp_path / "empty", out, capsys)
    short = tmp_path / "short.safetensors"
    short.write_bytes(b"\x10\x00")
    assert "truncated" in refused(short, out, capsys)
    cut = tmp_path / "cut.pkl"
    cut.write_bytes(pickle.dumps({"ema": 1})[:-3])
    assert "truncated or no pickle" in refused(cut, out, capsys)
    save_file({"a.weight": torch.ones(1)}, tmp_path / "other.safetensors")
    assert "no converter" in refused(tmp_path / "other.safetensors", out, capsys)
    pipeline.unet.save_pretrained(tmp_path / "theirs")
    alone = tmp_path / "theirs" / "diffusion_pytorch_model.safetensors"
    assert "give the folder" in refused(alone, out, capsys)
    config = tmp_path / "theirs" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "sample_size": None}))
    assert "sample_size=None" in refused(tmp_path / "theirs", out, capsys)


def test_latents_need_their_autoencoder(tmp_path, capsys):
    torch.save(UViT(4, 8, width=64, depth=2, heads=1).state_dict(), tmp_path / "latent.pth")
    text = refused(tmp_path / "latent.pth", tmp_path / "ours", capsys)
    assert "give autoencoder=FOLDER" in text


@pytest.mark.parametrize("width", [64, 1152])
def test_uvit_of_latents(tmp_path, capsys, width):
    diffusers = pytest.importorskip("diffusers")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        network = UViT(4, 4, patch=4, width=width, depth=2, heads=1, classes=3)
        blocks = {
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "block_out_channels": (8, 8),
        }
        autoencoder = diffusers.AutoencoderKL(**blocks, latent_channels=4, norm_num_groups=4)
    autoencoder.save_pretrained(str(tmp_path / "vae"))
    torch.save(network.state_dict(), tmp_path / "latent.pth")
    words = ["convert", str(tmp_path / "latent.pth"), f"autoencoder={tmp_path / 'vae'}"]
    assert main(PROGRAM, [*words, f"out={tmp_path / 'ours'}"]) == 0
    model = load(tmp_path / "ours")
    assert (model.domain.shape, model.domain.picture_shape) == ((4, 4, 4), (3, 8, 8))
    schedule = model.denoiser.process.lead
    if width == 1152:
        betas = torch.tensor(schedule.betas, dtype=torch.float64)
        assert (float(betas[0]), float(betas[-1])) == pytest.approx((0.00085, 0.012))
        assert betas.sqrt().diff().std() < 1e-12
        assert float(model.denoiser.time_code(schedule, torch.tensor(1.0))) == 1000.0
    else:
        assert type(schedule).__name__ == "VPLinear"
    (picture,) = model.sample(1, steps=2, seed=0)
    assert picture.shape == (8, 8, 3)
    torch.save(UViT(5, 4, patch=4, width=64, depth=2, heads=1).state_dict(), tmp_path / "b.pth")
    words = ["convert", str(tmp_path / "b.pth"), f"autoencoder={tmp_path / 'vae'}"]
    capsys.readouterr()
    assert main(PROGRAM, [*words, f"out={tmp_path / 'no'}"]) == 2
    assert "has no latents [5, 4, 4]" in capsys.readouterr().err


def test_averages_that_do_not_fit_are_refused(tmp_path):
    content = {"model": {"module.a": torch.ones(2)}, "ema": {"shadow_params": [torch.ones(3)]}}
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="averaged weights"):
        tensors_of(read(tmp_path / "a.pth"))
