"""Published networks as denoisers: from configurations, and between here and diffusers."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    UNet2DModel,
)
from omegaconf import OmegaConf

from shared.configuration import ConfigurationError, build, choose, compose, option
from shared.images.backbones.diffusers import (
    from_pipeline,
    from_scheduler,
    scheduler_config,
)
from shared.images.domain import Images
from shared.predictions import Noise, Score, Velocity
from shared.schedules import Karras, Polynomial, VarianceExploding, VPCosine, VPDiscrete, VPLinear
from shared.solvers.plan import run


def changed(name, **changes):
    """A shipped model with other values."""
    return OmegaConf.create({**OmegaConf.to_container(option("model", name)), **changes})


@pytest.mark.parametrize("name", ["unet_ddpm", "unet_ddpmpp", "unet_adm", "uvit"])
def test_shipped_models_are_built_for_the_data(name):
    small = {
        "unet_ddpm": {"width": 32, "multipliers": [1, 2]},
        "unet_ddpmpp": {"width": 32, "multipliers": [1, 2], "blocks": 1},
        "unet_adm": {"width": 64, "multipliers": [1, 1], "attention": [1], "blocks": 1},
        "uvit": {"width": 32, "depth": 2, "heads": 2},
    }[name]
    domain = Images()
    schedule = choose("schedule", "karras" if name == "unet_ddpmpp" else "vp_linear")
    config = changed(name, **small)
    denoiser = build(config, domain=domain, schedule=schedule)
    batch = domain.template(0, [0, 1])
    out = denoiser(batch.state, 0.5, None, batch.cond)["x"].x0
    assert out.shape == (2, 1, 8, 8)
    noise = {"x": torch.ones_like(batch.state["x"])}
    loss = denoiser.loss(batch.state, noise, torch.tensor([0.2, 0.7]), None, batch.cond)
    loss.sum().backward()
    assert all(p.grad is not None for p in denoiser.parameters())


def test_a_learned_range_doubles_the_output():
    config = changed(
        "unet_ddpm",
        width=32,
        multipliers=[1, 2],
        groups=8,
        head={"_target_": "shared.denoisers.Head", "learned_range": True},
        times={"_target_": "shared.losses.UniformTime", "steps": 10},
    )
    domain = Images()
    denoiser = build(config, domain=domain, schedule=VPLinear())
    found = denoiser(domain.template(0, [0]).state, 0.5)["x"]
    assert found.var.shape == (1, 1, 8, 8)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("unet_ddpm", {"preset": "dpm"}, "model.preset=dpm"),
        ("unet_ddpm", {"multipliers": [1, 2, 2, 2, 2]}, "divisible by 16"),
        ("unet_ddpm", {"attention": [7]}, "attention on level 7"),
        ("unet_ddpm", {"time": "cos"}, "time='cos'"),
        ("unet_ddpm", {"weight": 3}, "weight"),
        ("uvit", {"size": "tiny"}, "model.size=tiny"),
        ("uvit", {"patch": 3}, "patch=3"),
    ],
)
def test_mistakes_are_named(name, wrong, message):
    config = changed(name, **wrong)
    with pytest.raises(ConfigurationError, match=message):
        build(config, domain=Images(), schedule=VPLinear())


def test_digits_unet_is_small():
    config = compose("train", ["experiment=digits_unet"])
    schedule = build(config.schedule)
    with torch.device("meta"):
        denoiser = build(config.model, domain=Images(), schedule=schedule)
    assert sum(p.numel() for p in denoiser.parameters()) < 1_000_000


# -- diffusers --------------------------------------------------------------------------------


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
    return DDIMPipeline(network.eval(), DDIMScheduler(clip_sample=False))


def test_our_ddim_with_their_network_is_their_ddim(pipeline):
    denoiser, scheduler = from_pipeline(pipeline), pipeline.scheduler
    scheduler.set_timesteps(10)
    start = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    theirs = start
    with torch.no_grad():
        for step in scheduler.timesteps:
            theirs = scheduler.step(pipeline.unet(theirs, step).sample, step, theirs).prev_sample
        times = [*((scheduler.timesteps.double() + 1) / 1000).tolist(), 0.0]
        plans = choose("solver", "ddim").plans(denoiser.process, times)
        ours = run(plans, denoiser, {"x": start}, lambda name, j: torch.zeros_like(start))["x"]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours, start, atol=0.1)


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_their_schedules_are_read(kind):
    scheduler = DDPMScheduler(num_train_timesteps=50, beta_schedule=kind)
    schedule = from_scheduler(scheduler.config)
    expected = scheduler.alphas_cumprod.double().sqrt()
    t = torch.arange(1, 51, dtype=torch.float64) / 50
    kept = t <= schedule.t_max
    torch.testing.assert_close(schedule.alpha(t)[kept], expected[kept], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "schedule",
    [VPDiscrete.linear(), VPLinear(), VPCosine(), Polynomial(), VPDiscrete.edm_cosine()],
)
def test_our_schedules_are_exported(schedule):
    config = scheduler_config(schedule, Velocity(), steps=200)
    theirs = DDPMScheduler.from_config(config)
    n = len(theirs.alphas_cumprod)
    t = torch.arange(1, n + 1, dtype=torch.float64) * (schedule.t_max / n)
    expected = schedule.alpha(t) ** 2
    torch.testing.assert_close(theirs.alphas_cumprod.double(), expected, rtol=1e-4, atol=1e-6)
    assert theirs.config.prediction_type == "v_prediction"
    assert from_scheduler(theirs.config).betas == pytest.approx(config["trained_betas"])


def test_karras_is_exported():
    theirs = EDMEulerScheduler.from_config(scheduler_config(Karras(0.01, 50.0)))
    theirs.set_timesteps(5)
    assert theirs.sigmas[0] == pytest.approx(50.0)
    assert theirs.sigmas[-2] == pytest.approx(0.01)


def test_what_diffusers_lacks_is_refused():
    with pytest.raises(ValueError, match="VarianceExploding"):
        scheduler_config(VarianceExploding(), Noise())
    with pytest.raises(ValueError, match="Score"):
        scheduler_config(VPLinear(), Score())
    with pytest.raises(ValueError, match="beta_schedule=sigmoid"):
        from_scheduler(DDPMScheduler(beta_schedule="sigmoid").config)
