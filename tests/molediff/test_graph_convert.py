"""Published GDSS checkpoints as checkpoints of this program."""

from __future__ import annotations

import os
from pathlib import Path

import networkx as nx
import pytest
import torch
from omegaconf import OmegaConf

from molediff.graphs import convert
from molediff.graphs.data import write_graphs
from shared import checkpoints, inert
from shared.configuration import build
from shared.solvers import EulerMaruyama, PredictorCorrector, SymmetricSplitting

FILES = {"QM9": "gdss/gdss_qm9.pth", "community_small": "gdss/gdss_community_small.pth"}
BLOCKS = ("gnn_q", "gnn_k", "gnn_v")


def attention_state(
    depth: int, features: int, hidden: int, attention: int, channels: tuple, linears: int
) -> dict[str, torch.Tensor]:
    """Random weights of attention layers under the published names."""
    first, middle, last = channels
    state = {}
    for k in range(depth):
        inputs = hidden if k else features
        c_in, c_out = (middle if k else first), (last if k == depth - 1 else middle)
        width = 2 * max(c_in, c_out)
        for c in range(c_in):
            for block in BLOCKS:
                outputs = hidden if block == "gnn_v" or k == 0 else attention
                state[f"layers.{k}.attn.{c}.{block}.weight"] = torch.randn(inputs, outputs)
                state[f"layers.{k}.attn.{c}.{block}.bias"] = torch.randn(outputs)
        for part, ins, outs, n in (
            ("mlp", 2 * c_in, c_out, linears),
            ("multi_channel", c_in * hidden, hidden, 2),
        ):
            sizes = [ins, *[width] * (n - 1), outs]
            for i in range(n):
                state[f"layers.{k}.{part}.linears.{i}.weight"] = torch.randn(
                    sizes[i + 1], sizes[i]
                )
                state[f"layers.{k}.{part}.linears.{i}.bias"] = torch.randn(sizes[i + 1])
    return state


def with_final(state: dict, width: int, outputs: int) -> dict:
    sizes = [width, 2 * width, 2 * width, outputs]
    for i in range(3):
        state[f"final.linears.{i}.weight"] = torch.randn(sizes[i + 1], sizes[i])
        state[f"final.linears.{i}.bias"] = torch.randn(sizes[i + 1])
    return state


def zinc(prefix: str = "", name: str = "ZINC250k") -> dict:
    """A file like the second ZINC250k checkpoint: attention form, VP nodes, VE edges."""
    torch.manual_seed(0)
    channels, depth = (2, 8, 4), 3
    nodes = with_final(attention_state(2, 9, 16, 16, channels, 3), 9 + 2 * 16, 9)
    edges = with_final(attention_state(depth, 9, 16, 16, channels, 3), 2 + 8 * (depth - 1) + 4, 1)
    model = {"x": "ScoreNetworkX_GMH", "adj": "ScoreNetworkA", "conv": "GCN", "num_heads": 4,
             "c_hid": 8}  # fmt: skip
    sde = {
        "x": {"type": "VP", "beta_min": 0.1, "beta_max": 1.0, "num_scales": 1000},
        "adj": {"type": "VE", "beta_min": 0.2, "beta_max": 1.0, "num_scales": 1000},
    }
    config = {
        "data": {"data": name, "max_node_num": 38, "max_feat_num": 9},
        "sde": sde, "model": model, "train": {"eps": 1e-5, "ema": 0.999},
    }  # fmt: skip
    shadows = {
        key: {"decay": 0.999, "num_updates": 7, "shadow_params": [v + 1 for v in state.values()]}
        for key, state in (("ema_x", nodes), ("ema_adj", edges))
    }
    return {
        "model_config": config,
        "x_state_dict": {prefix + key: value for key, value in nodes.items()},
        "adj_state_dict": {prefix + key: value for key, value in edges.items()},
        **shadows,
    }


@pytest.mark.golden
@pytest.mark.parametrize("name", FILES)
def test_converted_folder_builds_the_same_model(data_folder, tmp_path, name: str) -> None:
    path = data_folder(FILES[name])
    content = inert.read_torch(path)
    convert.convert(content, path, tmp_path)
    stored = checkpoints.load(tmp_path)
    config = OmegaConf.create(dict(stored.config))
    domain = build(config.domain)
    domain.restore(stored.statistics)
    denoiser = build(config.model, domain=domain, schedule=build(config.schedule))
    checkpoints.apply(stored, denoiser)
    direct = convert.build_denoiser(convert.read(path))
    for key, value in direct.state_dict().items():
        assert torch.equal(denoiser.state_dict()[key], value), key
    assert not list(tmp_path.glob("*.pt"))
    assert stored.config["published"]["sampler"]["scales"] == 1000
    assert sum(domain.sizes.values()) == {"QM9": 120797, "community_small": 80}[name]
    assert domain.template(0, range(40)).mask.sum(1).max() <= domain.nodes
    assert isinstance(build(config.solver), PredictorCorrector)
    assert config.steps == 2000
    assert config.solver.corrector.snr == {"QM9": 0.2, "community_small": 0.05}[name]


def test_attention_form_and_two_kinds_of_sde(tmp_path) -> None:
    file = tmp_path / "zinc.pth"
    torch.save(zinc("module."), file)
    published = convert.read(file)
    assert published.attention
    assert published.sampler["scale_eps"] == 0.8
    denoiser = convert.build_denoiser(published)
    edges = denoiser.process.fields["edges"]
    assert type(edges.schedule).__name__ == "VarianceExploding"
    assert (edges.schedule.sigma_min, edges.schedule.sigma_max) == (0.2, 1.0)
    assert type(denoiser.process.lead).__name__ == "VPLinear"
    assert edges.prior_std == 1.0
    state = convert.weights(published)
    key = "backbone.edges.layers.1.query"
    first = published.edges["layers.1.attn.0.gnn_q.weight"]
    assert torch.equal(state[key][0], first)
    averaged = convert.weights(published, averaged=True)
    assert torch.equal(averaged[key][0], first + 1)
    assert "backbone.nodes.layers.1.query" not in state  # the last layer's edges are not used


def test_numbers_of_nodes(tmp_path) -> None:
    content = zinc(name="something")
    out = tmp_path / "out"
    assert "request.nodes" in convert.convert(content, Path("zinc.pth"), out)
    config, statistics = checkpoints.load(out).config, checkpoints.load(out).statistics
    domain = build(OmegaConf.create(dict(config)).domain)
    domain.restore(statistics)
    with pytest.raises(ValueError, match=r"request\.nodes"):
        domain.template(0, [0])
    assert int(domain.template(0, [0, 1], nodes=5).mask.sum()) == 10
    graphs = [nx.path_graph(n) for n in (20, 20, 20, 30)]
    write_graphs(tmp_path / "data.g6", graphs)
    assert convert.convert(content, Path("zinc.pth"), out, str(tmp_path / "data.g6")) is None
    domain.restore(checkpoints.load(out).statistics)
    sizes = domain.template(0, range(400)).mask.sum(1)
    assert set(sizes.tolist()) == {20, 30}
    assert 0.65 < float((sizes == 20).float().mean()) < 0.85
    assert domain.second_moments["edges"] > 0.0
    write_graphs(tmp_path / "large.g6", [nx.path_graph(39)])
    with pytest.raises(ValueError, match="39 nodes"):
        convert.convert(content, Path("zinc.pth"), out, str(tmp_path / "large.g6"))


@pytest.mark.parametrize(
    ("name", "mean", "low", "high"),
    [("ZINC250k", 23.2, 6, 38), ("ego_small", 6.4, 4, 18), ("ENZYMES", 33.0, 10, 125)],
)
def test_sizes_of_sets_that_are_not_here(name: str, mean: float, low: int, high: int) -> None:
    sizes = convert.approximate_sizes(name)
    assert low <= min(sizes) <= max(sizes) <= high
    found = sum(n * k for n, k in sizes.items()) / sum(sizes.values())
    assert found == pytest.approx(mean, rel=0.05)


def test_samplers_of_all_sets() -> None:
    content = zinc()
    kinds = {"ENZYMES": SymmetricSplitting, "ego_small": EulerMaruyama, "grid": PredictorCorrector}
    for name, kind in kinds.items():
        content["model_config"]["data"]["data"] = name
        published = convert.parse(content, Path("x"))
        solver = build(convert.solver_config(published.sampler))
        assert type(solver) is kind
        assert published.sampler["use_ema"] == (name != "ego_small")
        assert convert.denoiser_calls(published.sampler) == (2000 if name == "grid" else 1000)
    content["model_config"]["data"]["data"] = "mine"
    content["model_config"]["sampler"] = {"predictor": "Reverse", "corrector": None, "snr": 0.3}
    assert convert.parse(content, Path("x")).sampler["snr"] == 0.3


def test_recognises() -> None:
    keys = frozenset(f"adj_state_dict.module.{k}" for k in zinc()["adj_state_dict"])
    assert convert.recognises(keys)
    assert not convert.recognises(frozenset({"model.layers.0.weight"}))


class Harmful:
    def __reduce__(self):
        return os.system, ("touch harmed",)


def test_nothing_in_a_file_runs(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({**zinc(), "more": Harmful()}, "bad.pth")
    with pytest.raises(ValueError, match="refused"):
        convert.read(Path("bad.pth"))
    assert not Path("harmed").exists()


def test_bad_files(tmp_path) -> None:
    with pytest.raises(FileNotFoundError):
        convert.read(tmp_path / "none.pth")
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04 and nothing more")
    with pytest.raises(ValueError, match="truncated"):
        convert.read(tmp_path / "cut.pth")
    torch.save({"weights": torch.ones(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="no GDSS checkpoint"):
        convert.read(tmp_path / "other.pth")
    content = zinc()
    content["ema_x"]["shadow_params"].pop()
    with pytest.raises(ValueError, match="moving averages"):
        convert.parse(content, Path("x"))
    content = zinc()
    content["model_config"]["sde"]["x"]["type"] = "odd"
    with pytest.raises(ValueError, match="'odd'"):
        convert.full_config(convert.parse(content, Path("x")))
    content = zinc()
    content["model_config"]["model"]["conv"] = "MLP"
    with pytest.raises(ValueError, match="'MLP'"):
        convert.full_config(convert.parse(content, Path("x")))
