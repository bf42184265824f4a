"""Half-precision backbones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shared.denoisers import Denoiser
from shared.precision import Precision
from shared.process import Field, Process
from shared.schedules import VPLinear


class Spy(nn.Module):
    """Notes the dtypes it gets and computes."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        with torch.no_grad():
            self.layer.weight.copy_(torch.tensor([[0.3, -0.7], [0.9, 0.1]]))
            self.layer.bias.zero_()
        self.seen = {}

    def forward(self, inputs, code, mask, cond):
        self.seen = {name: x.dtype for name, x in inputs.items()}
        out = {name: self.layer(x) for name, x in inputs.items()}
        self.seen["product"] = out["h"].dtype
        return out


def run(precision):
    schedule = VPLinear()
    spy = Spy()
    process = Process({"x": Field(schedule), "h": Field(schedule)})
    denoiser = Denoiser(spy, process, precision=precision)
    x = {name: torch.linspace(-1, 1, 6).reshape(3, 2) for name in ("x", "h")}
    noise = {name: torch.ones(3, 2) for name in x}
    losses = denoiser.losses(x, noise, torch.tensor([0.2, 0.5, 0.9]).double())
    sum(loss.sum() for loss in losses.values()).backward()
    return spy, losses


def test_half_precision_stays_inside_the_backbone():
    spy, losses = run(Precision("bfloat16", keep=("x",)))
    assert spy.seen == {"x": torch.float32, "h": torch.bfloat16, "product": torch.bfloat16}
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    assert spy.layer.weight.grad.dtype == torch.float32


def test_full_precision_is_the_default():
    spy, losses = run(None)
    assert set(spy.seen.values()) == {torch.float32}
    _, half = run(Precision("bfloat16"))
    assert all(torch.allclose(losses[n], half[n], rtol=0.05, atol=0.05) for n in losses)


def test_unknown_dtype_is_named():
    with pytest.raises(ValueError, match="'bf16' is not one of float32, bfloat16, float16"):
        Precision("bf16")
