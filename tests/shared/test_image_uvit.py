"""U-ViT: published outputs and sizes."""

from __future__ import annotations

import pytest
import torch

from shared.images.backbones.uvit import SIZES, UViT, uvit_options, uvit_weights


def state_of(tensors):
    return {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}


@pytest.mark.golden
@pytest.mark.parametrize("name", ["08_uvit_p2_class", "08_uvit_p4_uncond"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 2e-6)])
def test_published_outputs(golden, name, dtype, tolerance):
    tensors, about = golden(name)
    state = state_of(tensors)
    options = uvit_options(state)
    assert options.pop("heads") == 1  # leaves no trace; one per 64 channels
    network = UViT(**options, heads=about["config"]["num_heads"])
    network.load_state_dict(uvit_weights(state))
    network.to(getattr(torch, dtype))
    x, t = (tensors[f"in.{k}"].to(getattr(torch, dtype)) for k in "xt")
    cond = {"label": tensors["in.y"]} if "in.y" in tensors else None
    with torch.no_grad():
        out = network({"x": x}, t, None, cond)["x"]
    torch.testing.assert_close(out, tensors[f"out.{dtype}"], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("size", "more", "millions"),
    [
        ("small", {"channels": 3, "side": 32, "patch": 2}, 44),  # CIFAR-10
        ("small", {"channels": 3, "side": 64, "patch": 4}, 44),  # CelebA
        ("small_deep", {"channels": 4, "side": 32, "patch": 2}, 58),
        ("mid", {"channels": 3, "side": 64, "patch": 4, "classes": 1000}, 131),
        ("large", {"channels": 3, "side": 64, "patch": 4, "classes": 1000}, 287),
        ("large", {"channels": 4, "side": 32, "classes": 1000, "last_conv": False}, 287),
        ("huge", {"channels": 4, "side": 32, "classes": 1000, "last_conv": False}, 501),
        ("huge", {"channels": 4, "side": 64, "patch": 4, "classes": 1000}, 501),
    ],
)
def test_sizes_of_the_published_settings(size, more, millions):
    """44 million parameters for CIFAR-10 are published (Bao et al. 2023); the others are counts of
    these networks, so that a change of the architecture shows."""
    with torch.device("meta"):
        network = UViT(**SIZES[size], **more)
    count = sum(p.numel() for p in network.parameters())
    assert round(count / 1e6) == millions


def test_options_are_read_off_the_weights():
    options = {
        "channels": 1,
        "side": 12,
        "patch": 3,
        "width": 64,
        "depth": 2,
        "heads": 1,
        "classes": 1000,
        "time_layers": True,
        "qkv_bias": True,
        "last_conv": False,
    }
    state = UViT(**options).state_dict()
    assert uvit_options(state) == options
    assert uvit_weights(state).keys() == state.keys()


def test_no_condition_is_any_class():
    torch.manual_seed(0)
    network = UViT(1, 8, width=16, depth=2, heads=2, classes=3)
    x, code = torch.randn(2, 1, 8, 8), torch.tensor([0.1, 3.0])

    def out(cond):
        return network({"x": x}, code, None, cond)["x"]

    assert torch.equal(out(None), out({"label": torch.tensor([3, 3])}))
    assert not torch.equal(out(None), out({"label": torch.tensor([1, 3])}))


@pytest.mark.parametrize("wrong", [{"side": 9}, {"heads": 3}, {"depth": 3}])
def test_sizes_that_do_not_fit_are_named(wrong):
    (value,) = wrong.values()
    settings = {"channels": 1, "side": 8, "width": 16, "depth": 2, "heads": 2, **wrong}
    with pytest.raises(ValueError, match=f"={value}"):
        UViT(**settings)
