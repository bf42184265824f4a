import pytest
import torch

from molediff.geometric.convert import gdm_weights
from molediff.geometric.egnn import EGNNOptions
from molediff.geometric.gdm import GDM, random_rotations


def test_random_rotations_are_orthogonal_and_uniform():
    turns = random_rotations(20_000, torch.Generator().manual_seed(0))
    eye = torch.eye(3, dtype=torch.float64)
    assert (turns @ turns.mT - eye).abs().max() < 1e-12
    # uniform on O(3): mean 0, second moments 1/3, both determinants (standard errors 0.003-0.007)
    assert turns.mean(0).abs().max() < 0.02
    assert (turns.square().mean(0) - 1 / 3).abs().max() < 0.02
    assert torch.linalg.det(turns).mean().abs() < 0.03
    assert torch.equal(turns, random_rotations(20_000, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("augment", [True, False])
def test_augmentation_only_in_training(augment):
    net = GDM({"types": 5}, augment=augment, options=EGNNOptions(width=8, layers=1))
    state = {"positions": torch.randn(2, 4, 3), "types": torch.randn(2, 4, 5)}
    code = torch.zeros(2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        train = [net(state, code)["positions"] for _ in range(2)]
        net.eval()
        test = [net(state, code)["positions"] for _ in range(2)]
    assert torch.equal(*train) != augment
    assert torch.equal(*test)


def test_augmentation_equals_rotated_data():
    net = GDM({"types": 5}, options=EGNNOptions(width=8, layers=1)).double()
    gen = torch.Generator().manual_seed(1)
    x = torch.randn(3, 4, 3, generator=gen, dtype=torch.float64)
    types = torch.randn(3, 4, 5, generator=gen, dtype=torch.float64)
    code = torch.zeros(3).double()
    with torch.random.fork_rng():
        torch.manual_seed(5)
        out = net({"positions": x, "types": types}, code)
        torch.manual_seed(5)
        turn = random_rotations(3)
    plain = net.eval()({"positions": x @ turn, "types": types}, code)
    torch.testing.assert_close(out["positions"], plain["positions"] @ turn.mT)
    torch.testing.assert_close(out["types"], plain["types"])


def test_published_names():
    net = GDM({"types": 5}, options=EGNNOptions(width=8, layers=2))
    names = {
        "edge.first": "edge_mlp.0",
        "edge.second": "edge_mlp.2",
        "attention": "att_mlp.0",
        "node.": "node_mlp.",
        "layers.": "gcl_",
        "readout": "embedding_out",
    }
    published = {}
    for key, value in net.state_dict().items():
        if key.startswith("readout"):  # a row for time, never used
            value = torch.cat([value, value[:1] * 0 + 7])
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        published[f"dynamics.gnn.{key}"] = value
    weights = gdm_weights(published, 5)
    assert weights.keys() == net.state_dict().keys()
    assert all(torch.equal(v, weights[k]) for k, v in net.state_dict().items())
    with pytest.raises(ValueError, match=r"'gnn\."):
        gdm_weights({"dynamics.egnn.embedding.weight": torch.zeros(1)}, 5)
