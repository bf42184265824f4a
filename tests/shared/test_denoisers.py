from __future__ import annotations

import pytest
import torch
from torch import nn

from shared.denoisers import Denoiser, Head, TimeCode
from shared.geometry import CentredPoints, Points
from shared.losses import EDMWeight, Native, Simple, UniformTime
from shared.predictions import (
    Data,
    Flow,
    KarrasPreconditioned,
    Noise,
    Score,
    Velocity,
)
from shared.process import Field, Process
from shared.schedules import Karras, LearnedGamma, RectifiedFlow, VPLinear

PARAMETERISATIONS = [Noise(), Data(), Velocity(), Flow(), Score(), KarrasPreconditioned(0.7)]


def normals(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Recorder(nn.Module):
    """A backbone that answers with fixed outputs and remembers what it was shown."""

    def __init__(self, out: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.out = out

    def forward(self, inputs, code, mask, cond):
        self.inputs, self.code = inputs, code
        return dict(self.out)


def test_karras_preconditioning_matches_edm(golden) -> None:
    tensors, _ = golden("11_karras_precond")
    kind = KarrasPreconditioned(0.5)
    for i, sigma in enumerate(tensors["sigma"].tolist()):
        x = tensors["x"][i] * sigma
        seen = kind.scale_in(1.0, sigma) * x
        torch.testing.assert_close(
            seen, tensors["EDMPrecond.model_input"][i], rtol=1e-9, atol=1e-12
        )
        code = TimeCode("karras")(Karras(), torch.tensor([sigma], dtype=torch.float64))
        out = torch.sin(seen) * (1 + 0.1 * torch.tanh(code))
        x0 = kind.predict(out, x, 1.0, sigma).x0
        torch.testing.assert_close(x0, tensors["EDMPrecond.D"][i], rtol=1e-9, atol=1e-12)


def test_the_backbone_sees_scaled_inputs_and_the_time_code() -> None:
    backbone = Recorder({"x": torch.zeros(2, 3, dtype=torch.float64)})
    heads = Head(KarrasPreconditioned(0.5), Native())
    denoiser = Denoiser(backbone, Process.single(Karras()), heads, TimeCode("karras"))
    x = normals(2, 3)
    denoiser({"x": x}, 2.0)
    torch.testing.assert_close(backbone.inputs["x"], x / (4.0 + 0.25) ** 0.5)
    torch.testing.assert_close(backbone.code, torch.full((2,), 0.25 * 0.6931471805599453).double())


def test_discrete_time_code_gives_integer_steps() -> None:
    code = TimeCode("time", scale=1000.0, shift=-1.0)
    steps = code(VPLinear(), torch.tensor([0.001, 1.0], dtype=torch.float64))
    torch.testing.assert_close(steps, torch.tensor([0.0, 999.0], dtype=torch.float64))
    with pytest.raises(ValueError, match="kind 'sine'"):
        TimeCode("sine")


@pytest.mark.parametrize("kind", PARAMETERISATIONS, ids=lambda k: type(k).__name__)
def test_simple_weighting_is_the_noise_error_for_every_parameterisation(kind) -> None:
    x0, eps, t = normals(6, 4), normals(6, 4, seed=1), torch.linspace(0.1, 0.9, 6).double()
    out = normals(6, 4, seed=2)
    process = Process.single(VPLinear())
    denoiser = Denoiser(Recorder({"x": out}), process, Head(kind, Simple()))
    loss = denoiser.loss({"x": x0}, {"x": eps}, t)
    predicted = denoiser(process.perturb({"x": x0}, t, {"x": eps}), t)["x"].eps
    torch.testing.assert_close(loss, (predicted - eps).square().mean(1))


def test_native_weighting_of_karras_is_edms() -> None:
    x0, eps = normals(6, 4), normals(6, 4, seed=1)
    t, out = torch.logspace(-2, 1.5, 6, dtype=torch.float64), normals(6, 4, seed=2)
    process, kind = Process.single(Karras()), KarrasPreconditioned(0.5)
    losses = [
        Denoiser(Recorder({"x": out}), process, Head(kind, w)).loss({"x": x0}, {"x": eps}, t)
        for w in (Native(), EDMWeight(0.5))
    ]
    torch.testing.assert_close(losses[0], losses[1])


def test_loss_counts_real_degrees_of_freedom() -> None:
    """Padding a molecule changes nothing; the mean is over (n - 1) * 3 and n * k numbers."""
    process = Process(
        {
            "positions": Field(VPLinear(), CentredPoints()),
            "types": Field(VPLinear(), Points()),
        }
    )
    mask = torch.tensor([[True, True, True, False, False]])
    shapes = {"positions": (1, 5, 3), "types": (1, 5, 4)}
    noise = process.noise({k: normals(*s) for k, s in shapes.items()}, mask)
    x0 = process.noise({k: normals(*s, seed=1) for k, s in shapes.items()}, mask)
    out = {k: normals(*s, seed=2) for k, s in shapes.items()}
    t = torch.tensor([0.4], dtype=torch.float64)
    padded = Denoiser(Recorder(out), process).loss(x0, noise, t, mask)
    short = {k: v[:, :3] for k, v in out.items()}
    cut = [{k: v[:, :3] for k, v in d.items()} for d in (x0, noise)]
    tight = Denoiser(Recorder(short), process).loss(*cut, t)
    torch.testing.assert_close(padded, tight)
    projected = process.project(out, mask)
    by_hand = sum(
        (projected[k] - noise[k]).square().sum() / d for k, d in (("positions", 6), ("types", 12))
    )
    torch.testing.assert_close(padded[0], by_hand)


def test_categorical_head_starts_from_bayes_rule() -> None:
    """With a silent network and balanced classes, x0_hat is the exact posterior mean."""
    scale = 0.25
    process = Process({"types": Field(VPLinear(), Points())})
    silent = Recorder({"types": torch.zeros(1, 6, 4, dtype=torch.float64)})
    denoiser = Denoiser(silent, process, Head(categories=scale))
    t = float(VPLinear().t_from_log_snr(0.0))
    x = normals(1, 6, 4)
    alpha, sigma = float(VPLinear().alpha(t)), float(VPLinear().sigma(t))
    classes = alpha * scale * torch.eye(4, dtype=torch.float64)

    def log_posterior(x: torch.Tensor) -> torch.Tensor:
        square = (x[..., None, :] - classes).square().sum(-1)
        return (-square / (2 * sigma**2)).log_softmax(-1)

    torch.testing.assert_close(
        denoiser({"types": x}, t)["types"].x0, scale * log_posterior(x).exp()
    )
    one_hot = torch.eye(4, dtype=torch.float64)[[0, 1, 2, 3, 0, 1]][None]
    loss = denoiser.loss({"types": scale * one_hot}, {"types": x}, torch.tensor([t]).double())
    noisy = alpha * scale * one_hot + sigma * x
    surprise = -(one_hot * log_posterior(noisy)).sum(-1).mean()
    torch.testing.assert_close(loss[0], surprise, rtol=1e-6, atol=1e-6)


def test_a_learned_schedule_is_trained_and_saved_with_the_denoiser() -> None:
    process = Process.single(LearnedGamma())
    denoiser = Denoiser(nn.Identity(), process)
    assert any("gamma_0" in key for key in denoiser.state_dict())


def test_heads_must_fit_the_process() -> None:
    with pytest.raises(ValueError, match="heads for"):
        Denoiser(nn.Identity(), Process.single(RectifiedFlow()), {"y": Head()})


def test_times_default_to_the_schedules_range() -> None:
    denoiser = Denoiser(nn.Identity(), Process.single(VPLinear()))
    assert isinstance(denoiser.times, UniformTime)
