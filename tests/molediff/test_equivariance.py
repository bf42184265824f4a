"""What every network for molecules promises, and that the check can fail: rotation, reflection,
translation, permutation, padding, independence of the batch, through a whole sampler too."""

import pytest
import torch
from torch import nn

from molediff.geometric.e3nn_network import TensorProductNetwork
from molediff.geometric.edm import EDMSampler
from molediff.geometric.egnn import EGNN, EGNNOptions
from molediff.geometric.gdm import GDM, random_rotations
from molediff.geometric.process import karras_heads, molecule_process
from molediff.geometric.transformer import EquivariantTransformer
from shared.denoisers import Denoiser

FEATURES = {"types": 5}


def egnn(layers=9):
    return EGNN(FEATURES, context=1, options=EGNNOptions(width=32, layers=layers))


def transformer():
    return EquivariantTransformer(
        FEATURES, context=1, width=32, layers=3, heads=4, vectors=8, pairs=16, angstrom=1.4
    )


def tensor_product():
    return TensorProductNetwork(
        FEATURES, context=1, scalars=8, vectors=4, tensors=2, layers=2, angstrom=1.4
    )


class Broken(nn.Module):
    """An EGNN one of whose layers looks at the x coordinate."""

    def __init__(self):
        super().__init__()
        self.net = egnn(2)
        self.net.blocks[1].register_forward_pre_hook(
            lambda _, args: (args[0] + 1e-3 * args[1][..., :1], *args[1:])
        )

    def forward(self, *args):
        return self.net(*args)


EQUIVARIANT = [egnn, transformer, tensor_product]
ALL = [*EQUIVARIANT, lambda: GDM(FEATURES, context=1, options=EGNNOptions(width=16, layers=2))]


def build(make, dtype):
    """Random weights everywhere, so that zero-initialised outputs do not hide anything."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    gen = torch.Generator().manual_seed(0)
    try:
        net = make().to(dtype).eval()
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for p in net.parameters():
            if p.dim() > 1:
                noise = torch.randn(p.shape, generator=gen, dtype=torch.float64)
                p.copy_(noise * 0.6 / p.shape[-1] ** 0.5)
        for name, p in net.named_parameters():
            if name.endswith("length.weight"):
                p.mul_(0.02)
    return net


def inputs(dtype, sizes=(9, 4, 1, 7)):
    gen = torch.Generator().manual_seed(1)
    mask = torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]
    keep = mask[..., None]
    shape = (len(sizes), max(sizes))
    x = torch.randn(*shape, 3, generator=gen, dtype=torch.float64) * keep
    types = torch.randn(*shape, 5, generator=gen, dtype=torch.float64) * keep
    code = torch.randn(len(sizes), generator=gen, dtype=torch.float64)
    cond = {"context": torch.randn(len(sizes), 1, generator=gen, dtype=torch.float64).to(dtype)}
    return {"positions": x.to(dtype), "types": types.to(dtype)}, code.to(dtype), mask, cond


def deviation(a, b):
    """Largest difference over the size of the values, over all fields."""
    return max(float((a[k] - b[k]).abs().max() / b[k].abs().max()) for k in b)


def turned(state, turn):
    return {**state, "positions": state["positions"] @ turn}


def rotation_error(net, dtype):
    state, code, mask, cond = inputs(dtype)
    out = net(state, code, mask, cond)
    assert out["positions"].abs().max() > 1e-3  # something to rotate
    turns = random_rotations(4, torch.Generator().manual_seed(2)).to(dtype)
    assert {1, -1} == set(torch.linalg.det(turns).round().int().tolist())  # both kinds
    return deviation(net(turned(state, turns), code, mask, cond), turned(out, turns))


PRECISION = [(torch.float64, 1e-12), (torch.float32, 5e-5)]


@pytest.mark.parametrize(("dtype", "limit"), PRECISION)
@pytest.mark.parametrize("make", EQUIVARIANT)
@torch.no_grad()
def test_rotations_and_reflections(make, dtype, limit):
    assert rotation_error(build(make, dtype), dtype) < limit


@pytest.mark.parametrize(("dtype", "limit"), PRECISION)
@pytest.mark.parametrize("make", [Broken, ALL[-1]])
@torch.no_grad()
def test_broken_networks_are_caught(make, dtype, limit):
    assert rotation_error(build(make, dtype), dtype) > 2 * limit


@pytest.mark.parametrize("make", EQUIVARIANT)
@torch.no_grad()
def test_translations(make):
    net = build(make, torch.float64)
    state, code, mask, cond = inputs(torch.float64)
    shift = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) * mask[..., None]
    moved = {**state, "positions": state["positions"] + shift}
    assert deviation(net(moved, code, mask, cond), net(state, code, mask, cond)) < 1e-11


@pytest.mark.parametrize("make", ALL)
@torch.no_grad()
def test_permutations(make):
    net = build(make, torch.float64)
    state, code, mask, cond = inputs(torch.float64)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(3))
    out = net(state, code, mask, cond)
    shuffled = net({k: v[:, order] for k, v in state.items()}, code, mask[:, order], cond)
    assert deviation(shuffled, {k: v[:, order] for k, v in out.items()}) < 1e-12


@pytest.mark.parametrize("make", ALL)
@torch.no_grad()
def test_padding_and_company_change_nothing(make):
    """Every molecule alone and without padding, with garbage kept out of the padding."""
    net = build(make, torch.float64)
    state, code, mask, cond = inputs(torch.float64)
    out = net(state, code, mask, cond)
    for name, value in out.items():
        assert value[~mask].abs().max() == 0.0
        means = value.sum(1)[:, 0].abs().max()
        assert name != "positions" or means < 1e-13 * 9 * value.abs().max() * 10
    for i, n in enumerate(mask.sum(1).tolist()):
        alone = net(
            {k: v[i : i + 1, :n] for k, v in state.items()},
            code[i : i + 1],
            None,
            {k: v[i : i + 1] for k, v in cond.items()},
        )
        for name, value in alone.items():
            scale = out[name].abs().max()
            assert (value[0] - out[name][i, :n]).abs().max() < 1e-12 * scale


@pytest.mark.parametrize("make", EQUIVARIANT)
@torch.no_grad()
def test_sampler_is_equivariant(make):
    """Rotated noise gives rotated molecules, atom types stay."""
    process = molecule_process()
    model = Denoiser(build(make, torch.float64), process, karras_heads(5))
    _, _, mask, cond = inputs(torch.float64)
    gen = torch.Generator().manual_seed(4)
    shapes = {"positions": (4, 9, 3), "types": (4, 9, 5)}
    white = [
        {k: torch.randn(s, generator=gen, dtype=torch.float64) for k, s in shapes.items()}
        for _ in range(11)
    ]
    noise = [process.noise(z, mask) for z in white]
    turn = random_rotations(1, gen)[0]

    def sample(draws):
        return EDMSampler().solve(
            process,
            lambda x, t: model(x, t, mask, cond),
            process.prior(draws[0]),
            [1.0 - i / 9 for i in range(10)],
            lambda name, j: draws[1 + j][name],
            lambda name, x: process.fields[name].geometry.project(x, mask),
        )

    plain = sample(noise)
    assert plain["positions"].sum(1).abs().max() < 1e-12
    rotated = sample([turned(z, turn) for z in noise])
    assert deviation(rotated, turned(plain, turn)) < 1e-10
