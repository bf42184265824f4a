"""The learned range of the reverse variance, from the formulas of Nichol & Dhariwal (2021)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from shared.denoisers import Denoiser, Head
from shared.geometry import CentredPoints
from shared.losses import UniformTime, range_bound
from shared.process import Process
from shared.schedules import VPDiscrete

STEPS = 20
SCHEDULE = VPDiscrete.linear(STEPS, 1e-3, 0.3)
BETAS = torch.tensor(SCHEDULE.betas, dtype=torch.float64)
BAR = torch.cat([torch.ones(1).double(), (1 - BETAS).cumprod(0)])


def textbook(n, v, x0, x0_hat, x):
    """L_n in bits with the DDPM formulas, from a table of betas."""
    beta, bar, before = BETAS[n - 1], BAR[n], BAR[n - 1]

    def mean(x0):
        first = before.sqrt() * beta / (1 - bar) * x0
        return first + (1 - beta).sqrt() * (1 - before) / (1 - bar) * x

    first = max(n, 2)
    small = BETAS[first - 1] * (1 - BAR[first - 1]) / (1 - BAR[first])
    variance = torch.exp(v * beta.log() + (1 - v) * small.log())
    model = Normal(mean(x0_hat), variance.sqrt())
    if n == 1:
        return -model.log_prob(x0) / math.log(2)
    return kl_divergence(Normal(mean(x0), small.sqrt()), model) / math.log(2)


@pytest.mark.parametrize("n", [1, 2, 7, STEPS])
def test_range_bound_is_the_textbook_bound(n):
    gen = torch.Generator().manual_seed(n)
    v, x0, x0_hat, x = torch.randn(4, 3, 5, generator=gen, dtype=torch.float64)
    t = torch.full((3,), n / STEPS, dtype=torch.float64)
    found = range_bound(SCHEDULE, t, STEPS, v, x0 - x0_hat)
    torch.testing.assert_close(found, textbook(n, v, x0, x0_hat, x), rtol=1e-9, atol=1e-9)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(0.3).double())
        self.range = nn.Parameter(torch.tensor(-0.4).double())

    def forward(self, inputs, code, mask, cond):
        one = torch.ones_like(inputs["x"])
        return {"x": self.mean * inputs["x"], "x_variance": self.range * self.mean * one}


def build(**head):
    head = {"learned_range": True, **head}
    return Denoiser(
        TwoHeads(), Process.single(SCHEDULE), Head(**head), times=UniformTime(steps=STEPS)
    )


def data():
    gen = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 6, 4, generator=gen, dtype=torch.float64)
    return {"x": x0}, {"x": eps}, torch.arange(1, 7).double() * 3 / STEPS


def test_loss_is_the_simple_one_plus_the_bound():
    x0, eps, t = data()
    found = build(bound_weight=0.01).losses(x0, eps, t)
    plain = build(learned_range=False).losses(x0, eps, t)
    assert torch.equal(found["x"], plain["x"])
    denoiser = build()
    x = denoiser.process.perturb(x0, t, eps)
    prediction = denoiser(x, t)["x"]
    fraction = (1 - 0.4 * 0.3) / 2
    torch.testing.assert_close(prediction.form("var"), torch.full_like(x["x"], fraction))
    for row, time in enumerate(t):
        n = round(float(time) * STEPS)
        rows = (value[row] for value in (x0["x"], prediction.x0, x["x"]))
        bits = textbook(n, torch.tensor(fraction).double(), *rows).mean()
        torch.testing.assert_close(found["x_variance"][row], 0.01 * STEPS * bits)


def test_the_bound_does_not_move_the_mean():
    x0, eps, t = data()

    class Detached(TwoHeads):
        def forward(self, inputs, code, mask, cond):
            out = super().forward(inputs, code, mask, cond)
            return {**out, "x_variance": self.range + 0 * inputs["x"]}

    denoiser = build()
    denoiser.backbone = Detached()
    denoiser.losses(x0, eps, t)["x_variance"].sum().backward()
    backbone = denoiser.backbone
    assert backbone.mean.grad is None or float(backbone.mean.grad) == 0.0
    assert float(backbone.range.grad) != 0.0


@pytest.mark.parametrize(
    ("process", "head", "times", "message"),
    [
        (Process.single(SCHEDULE), {}, None, r"UniformTime\(steps=...\)"),
        (Process.single(SCHEDULE, CentredPoints()), {}, UniformTime(20), "not independent"),
        (Process.single(SCHEDULE), {"categories": 1.0}, UniformTime(20), "both categories"),
    ],
)
def test_impossible_ranges_are_named(process, head, times, message):
    with pytest.raises(ValueError, match=message):
        Denoiser(TwoHeads(), process, Head(learned_range=True, **head), times=times)
