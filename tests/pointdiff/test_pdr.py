import pytest
import torch

from pointdiff.pdr import layers
from pointdiff.pdr.convert import rename_all
from pointdiff.pdr.network import Branch, DualPath, Transfer
from pointdiff.pdr.refine import Refiner, upsample


def load(module, tensors, name):
    """The published weights of one module, evaluated in float64."""
    start = f"{name}.state."
    state = {k[len(start) :]: v for k, v in tensors.items() if k.startswith(start)}
    state = {k.replace("mlps.0.", "mlp.") if name == "sa" else k: v for k, v in state.items()}
    if name == "pnet":
        state = {f"pnet.{k}": v for k, v in state.items()}
        state = {k.removeprefix("whole."): v for k, v in rename_all(state).items()}
    else:
        state = rename_all(state)
    module.load_state_dict(state)
    return module.double()


def close(found, wanted, rtol=1e-8):
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=rtol)


@pytest.mark.golden
def test_published_attention(golden):
    want, _ = golden("10_pdr_modules")
    pool = load(layers.AttentionPool(7, 12, 32), want, "attention")
    inputs = [want[f"attention.{name}"] for name in ("feat", "grouped", "grouped_out")]
    close(pool(*inputs, want["attention.count"]), want["attention.out"])
    close(pool(*inputs), want["attention.out_all"])


@pytest.mark.golden
def test_published_feature_transfer(golden):
    want, _ = golden("10_pdr_modules")
    move = load(layers.FeatureTransfer([32, 32, 64], 9, 0.4, 8), want, "featuremap")
    names = ("xyz", "features", "new_xyz", "query")
    close(move(*(want[f"featuremap.{name}"] for name in names)), want["featuremap.out"])


@pytest.mark.golden
def test_published_set_abstraction(golden):
    want, _ = golden("10_pdr_modules")
    down = layers.SetAbstraction([32, 32, 32, 64], 16, 0.5, 8, (16, 24, 12))
    load(down, want, "sa")
    names = ("xyz", "features", "t_emb", "condition_emb", "second_condition_emb")
    centres, features = down(*(want[f"sa.{name}"] for name in names))
    assert torch.equal(centres, want["sa.out_xyz"])
    close(features, want["sa.out"])


@pytest.mark.golden
def test_published_feature_propagation(golden):
    want, _ = golden("10_pdr_modules")
    up = layers.FeaturePropagation([32, 32, 32], 9, 8, (16, 24, 12))
    up.mlp = layers.PointMlp([32 + 9 + 3, 64, 32], 16, 24)
    load(up, want, "knnfp")
    names = ("unknown", "unknown_feats", "known", "known_feats")
    names += ("t_emb", "condition_emb", "second_condition_emb")
    close(up(*(want[f"knnfp.{name}"] for name in names)), want["knnfp.out"])


@pytest.mark.golden
def test_published_global_feature(golden):
    want, _ = golden("10_pdr_modules")
    whole = load(layers.GlobalFeature([4, 32, 64], [64, 96]), want, "pnet")
    close(whole(want["pnet.in"]), want["pnet.out"])


@pytest.mark.golden
@pytest.mark.parametrize("factor", [2, 4, 8])
def test_published_upsampling(golden, factor):
    want, _ = golden("10_pdr_modules")
    coarse, moves = (want[f"upsample{factor}.{n}"] for n in ("coarse", "displacement"))
    refined, moved = upsample(coarse, moves, factor)
    close(refined, want[f"upsample{factor}.refined"])
    close(moved, want[f"upsample{factor}.mid"])
    refined, _ = upsample(coarse, moves[..., : 3 * factor], factor, centre=True)
    close(refined, want[f"upsample{factor}_centre.refined"])


@pytest.mark.golden
def test_published_grouping(golden):
    want, _ = golden("10_pdr_ops")
    xyz, new, features = want["xyz"], want["new_xyz"], want["features"]
    for subset in (0, 1):
        name = f"query_and_group/radius_subset{subset}"
        keys, count = layers.ball_group(new, xyz, features, 0.35, 8, bool(subset))
        assert torch.equal(count.int(), want[f"{name}/count"])
        close(keys, want[name], 1e-12)
    close(layers.knn_group(new, xyz, features, 8), want["group_knn/K8"], 1e-12)


def published_network():
    radii = (0.3, 0.5, 0.8, 1.2)
    return DualPath(
        Branch((64, 32, 16, 8), radii, (32, 32, 32, 32, 64), (32, 32, 32, 32, 64), 8, k=4),
        Branch((48, 24, 12, 6), radii, (32,) * 5, (32,) * 5, 8, k=4),
        Transfer((32,) * 4, (32,) * 5, radii, (*radii, 1.6), 8),
        whole=((4, 32, 64), (64, 64)),
        time=32,
        classes=4,
        class_width=32,
    )


@pytest.mark.golden
def test_published_network(golden):
    want, _ = golden("10_pdr_network")
    network = published_network()
    state = {k[6:]: v for k, v in want.items() if k.startswith("state.")}
    network.load_state_dict(rename_all(state))
    network.double()
    condition = network.condition(want["in.condition"])
    found = network(want["in.x"], condition, want["in.ts"], want["in.label"])
    close(found, want["out"], 1e-7)
    found = network(want["in.x2"], condition, want["in.ts"] + 1, want["in.label"])
    close(found, want["out2"], 1e-7)


def test_the_default_network_has_the_published_size():
    with torch.device("meta"):
        network = DualPath(classes=16)
    assert 9e6 < sum(p.numel() for p in network.parameters()) < 40e6


def test_levels_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="4 levels need as many radii"):
        Branch(radii=(0.1, 0.2))
    with pytest.raises(ValueError, match="must be equal"):
        Branch(decoder=(32, 32, 64, 64, 128))
    with pytest.raises(ValueError, match="k=20 points"):
        Branch(k=20)


def small(out, time=0):
    branch = Branch((16, 8), (0.5, 1.0), (8, 8, 16), (8, 8, 16), 4, k=4)
    transfer = Transfer((8, 8), (8, 8, 8), (0.5, 1.0), (0.5, 1.0, 2.0), 4)
    return DualPath(branch, branch, transfer, ((4, 8, 8), (8, 16)), time, out=out)


def test_refinement_moves_little_and_multiplies_points():
    torch.manual_seed(0)
    coarse, partial = torch.randn(2, 20, 3), torch.randn(2, 24, 4)
    same = Refiner(small(3))(coarse, partial)
    assert same.shape == coarse.shape
    assert 0 < (same - coarse).abs().max() < 0.02
    more = Refiner(small(15), factor=4)(coarse, partial)
    assert more.shape == (2, 80, 3)
    assert (more.unflatten(1, (20, 4)) - coarse[:, :, None]).abs().max() < 0.02
    more.sum().backward()
    with pytest.raises(ValueError, match="without time and with 15 outputs"):
        Refiner(small(3), factor=4)
    with pytest.raises(ValueError, match="without time"):
        Refiner(small(3, time=8))
