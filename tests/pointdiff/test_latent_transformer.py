import pytest
import torch

from pointdiff.transformer import OCTAVES, LatentTransformer, waves


@pytest.fixture
def network():
    torch.manual_seed(0)
    made = LatentTransformer(
        points=16, width=32, heads=2, latents=6, blocks=2, tokens=12, neighbours=4, scan_layers=1
    ).double()
    torch.nn.init.normal_(made.head.weight)
    return made


@pytest.fixture
def scan():
    generator = torch.Generator().manual_seed(1)
    points = torch.randn(2, 40, 3, generator=generator, dtype=torch.float64)
    return torch.cat([points, torch.ones(2, 40, 1)], 2)


def test_points_are_a_set_and_any_number_will_do(network, scan):
    x = torch.randn(2, 30, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    code = torch.tensor([0.5, -1.0], dtype=torch.float64)
    tokens = network.condition(scan)
    out = network(x, tokens, code)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(network(x[:, order], tokens, code), out[:, order])
    assert out.std() > 0.1
    # twice the same points: attention averages, so nothing changes
    twice = network(torch.cat([x, x], 1), tokens, code)
    torch.testing.assert_close(twice, torch.cat([out, out], 1))
    alone = network(x[1:], network.condition(scan[1:]), code[1:])
    torch.testing.assert_close(alone, out[1:])
    assert not torch.allclose(network(x, tokens.flip(0), code), out, atol=1e-3)


def test_the_order_of_the_scan_matters_only_through_its_first_point(network, scan):
    order = torch.cat([torch.zeros(1, dtype=torch.long), torch.randperm(39) + 1])
    found, other = network.condition(scan), network.condition(scan[:, order])
    torch.testing.assert_close(other, found)
    few = network.condition(scan[:, :8])
    assert few.shape == (2, 8, 32)
    assert network.condition(torch.zeros_like(scan)).isfinite().all()


def test_a_new_network_predicts_nothing_and_all_of_it_trains(scan):
    network = LatentTransformer(points=16, width=32, heads=2, latents=4, blocks=1, tokens=8)
    x, code = torch.randn(2, 20, 3), torch.zeros(2)
    assert network(x, network.condition(scan.float()), code).abs().max() == 0
    torch.nn.init.normal_(network.head.weight)
    for module in network.modules():
        change = getattr(module, "change", None)
        if change is not None:
            torch.nn.init.normal_(change.weight, std=0.02)
    network(x, network.condition(scan.float()), code).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())


def test_waves_fade_where_the_noise_hides_them():
    x = torch.linspace(-1, 1, 7, dtype=torch.float64).reshape(1, -1, 1).expand(1, 7, 3)
    clean = waves(x)
    assert clean.shape == (1, 7, 6 * OCTAVES)
    sigma = torch.tensor([0.3], dtype=torch.float64)
    noise = torch.randn(200_000, 1, 1, dtype=torch.float64, generator=torch.Generator())
    mean = waves((x[:, :1] + 0.3 * noise).contiguous()).mean(0)
    torch.testing.assert_close(waves(x, sigma)[0, :1], mean, atol=5e-3, rtol=0)
