"""The U-Nets: published outputs, published sizes, and the details that tell the families apart."""

from __future__ import annotations

import pytest
import torch

from shared.images.backbones.diffusers import from_diffusers
from shared.images.backbones.unet import PRESETS, UNet, UNetOptions


@pytest.mark.golden
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_published_outputs_of_ddpm(golden, dtype):
    tensors, about = golden("08_ddpm_unet_small")
    state = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
    options, weights = from_diffusers(state, about["config"])
    network = UNet(UNetOptions(**options))
    network.load_state_dict(weights)
    network.to(getattr(torch, dtype))
    x, t = (tensors[f"in.{k}"].to(getattr(torch, dtype)) for k in "xt")
    with torch.no_grad():
        out = network({"x": x}, t, None, None)["x"]
    torch.testing.assert_close(out, tensors[f"out.{dtype}"], rtol=2e-5, atol=2e-5)


BIG = {**PRESETS["adm"], "width": 256, "blocks": 2, "classes": 1000, "outputs": 6}


@pytest.mark.parametrize(
    ("options", "millions"),
    [
        (PRESETS["ddpm"], 35.7),  # CIFAR-10
        ({"multipliers": (1, 1, 2, 2, 4, 4), "attention": (4,)}, 113.7),  # LSUN, 256 x 256
        (PRESETS["ddpmpp"], 61.8),
        ({**PRESETS["ddpmpp"], "blocks": 8}, 106.6),
        ({**PRESETS["ncsnpp"], "blocks": 8}, 107.6),
        ({**PRESETS["ddpmpp"], "multipliers": (2, 2, 2), "augment": 9, "label_first": True}, 55.7),
        ({**PRESETS["adm"], "classes": 1000, "outputs": 6}, 295.9),
        ({**BIG, "multipliers": (1, 1, 2, 3, 4), "attention": (2, 3, 4)}, 421.5),
        ({**BIG, "multipliers": (1, 1, 2, 2, 4, 4), "attention": (3, 4, 5)}, 553.8),
        (
            {
                **BIG,
                "enter": 128,
                "multipliers": (0.5, 1, 1, 2, 2, 4, 4),
                "attention": (4, 5, 6),
            },
            559.0,
        ),
    ],
)
def test_sizes_of_the_published_settings(options, millions):
    """Counts of these networks, so that a change of the architecture shows; that they are those of
    the publications rests on the published outputs and key names above, not on these numbers."""
    with torch.device("meta"):
        network = UNet(UNetOptions(**options))
    count = sum(p.numel() for p in network.parameters())
    assert round(count / 1e6, 1) == millions
