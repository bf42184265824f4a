"""The score networks of GDSS."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from molediff.graphs import convert, networks
from molediff.graphs.layers import Pairs, Perceptron, propagate, sum_of_sigmoids
from molediff.graphs.networks import GraphScoreNetwork

ROOT = Path(__file__).resolve().parents[2]
FILES = {"QM9": "gdss/gdss_qm9.pth", "community_small": "gdss/gdss_community_small.pth"}
CONFIGURATIONS = {
    "published": {"features": 4, "node_depth": 2, "edge_depth": 3, "hidden": 8, "attention": 8},
    "attention": {"features": 5, "node_depth": 2, "edge_depth": 2, "hidden": 8, "attention": 12,
                  "node_attention": True, "linears": 3},
    "odd": {"features": 3, "node_depth": 1, "edge_depth": 2, "hidden": 6, "attention": 4,
            "heads": 2, "channels": (2, 3, 5), "linears": 1},
}  # fmt: skip


def plain_network():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    return importlib.import_module("graphs_speed").PlainNetwork


def small(name: str) -> GraphScoreNetwork:
    torch.manual_seed(0)
    return GraphScoreNetwork.build(**CONFIGURATIONS[name]).double()


def graphs(batch: int, nodes: int, features: int, seed: int = 0) -> tuple[dict, Tensor]:
    """A noisy masked state; sizes differ, the last graph has a single node."""
    gen = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, nodes + 1, (batch,), generator=gen)
    sizes[0], sizes[-1] = nodes, 1
    mask = torch.arange(nodes) < sizes[:, None]
    x = torch.randn(batch, nodes, features, generator=gen).double() * mask[..., None]
    a = torch.randn(batch, nodes, nodes, generator=gen).double().triu(1)
    pairs = mask[:, :, None] & mask[:, None]
    return {"nodes": x, "edges": (a + a.transpose(1, 2)) * pairs}, mask


def unstacked(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of this program -> the published ones, one block per channel."""
    out = {}
    blocks = {"query": "gnn_q", "key": "gnn_k", "value": "gnn_v"}
    for name, tensor in state.items():
        *front, last = name.split(".")
        kind, _, bias = last.partition("_")
        if kind in blocks:
            for c, part in enumerate(tensor):
                ending = "bias" if bias else "weight"
                out[".".join([*front, "attn", str(c), blocks[kind], ending])] = part
        else:
            name = name.replace("mix_nodes", "multi_channel").replace("mix_edges", "mlp")
            out[name] = tensor
    return out


def complete(nodes: dict[str, Tensor], edges: dict[str, Tensor]) -> None:
    """Add the published blocks whose results are never used; any values will do."""
    for state in (nodes, edges):
        layer = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("layers"))
        last = f"layers.{layer - 1}"
        blocks = {key.split(".")[4] for key in state if key.startswith(f"{last}.attn")}
        if not blocks:
            continue
        channels = sum(f"{last}.attn.{c}.{min(blocks)}.weight" in state for c in range(99))
        width, attention = state[f"{last}.attn.0.{min(blocks)}.weight"].shape
        for block in {"gnn_q", "gnn_k", "gnn_v"} - blocks:
            outputs = hidden_width(state) if block == "gnn_v" else attention
            for c in range(channels):
                state[f"{last}.attn.{c}.{block}.weight"] = torch.zeros(width, outputs).double()
                state[f"{last}.attn.{c}.{block}.bias"] = torch.zeros(outputs).double()
        values = state[f"{last}.attn.0.gnn_v.weight"].shape[1]
        for part, rows in (("multi_channel", channels * values), ("mlp", 2 * channels)):
            if f"{last}.{part}.linears.0.weight" not in state:
                state[f"{last}.{part}.linears.0.weight"] = torch.zeros(values, rows).double()
                state[f"{last}.{part}.linears.0.bias"] = torch.zeros(values).double()


def hidden_width(state: dict[str, Tensor]) -> int:
    return state["layers.0.attn.0.gnn_v.weight"].shape[1]


@pytest.mark.golden
@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("name", ["QM9", "community_small"])
def test_published_outputs(golden, data_folder, name: str, averaged: bool) -> None:
    published = convert.read(data_folder(FILES[name]))
    if averaged and published.averages is None:
        pytest.skip("a checkpoint without moving averages")
    tensors, _ = golden(f"04_gdss_forward_{name}")
    network = convert.build_denoiser(published, averaged).backbone
    inputs = {"nodes": tensors["in.x"], "edges": tensors["in.adj"]}
    mask, suffix = tensors["in.flags"] > 0, "_ema" if averaged else ""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        with torch.no_grad():
            cast = {key: value.to(dtype) for key, value in inputs.items()}
            out = network.to(dtype)(cast, None, mask)
        for key, old in (("nodes", "x_net"), ("edges", "adj_net")):
            error = (out[key] - tensors[f"out.{old}{suffix}"]).abs().max()
            assert float(error) < tolerance, (dtype, key)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_plain_formulation(name: str) -> None:
    network = small(name)
    inputs, mask = graphs(20, 7, CONFIGURATIONS[name]["features"])
    heads = CONFIGURATIONS[name].get("heads", 4)
    states = [unstacked(part.state_dict()) for part in (network.nodes, network.edges)]
    complete(*states)
    plain = plain_network()(*states, heads)
    with torch.no_grad():
        out, wanted = network(inputs, None, mask), plain(inputs, mask)
    for key in out:
        assert float(wanted[key].abs().max()) > 1e-3
        assert torch.allclose(out[key], wanted[key], atol=1e-12), key


def test_gradient_path_and_chunks_agree(monkeypatch) -> None:
    """The products used for training, for sampling and in chunks are the same function."""
    network = small("attention")
    inputs, mask = graphs(40, 6, 5)
    trained = network(inputs, None, mask)
    with torch.no_grad():
        sampled = network(inputs, None, mask)
        monkeypatch.setattr(networks, "CHUNK", 17 * 36)
        chunks = network(inputs, None, mask)
        alone = network({k: v[:1] for k, v in inputs.items()}, None, mask[:1])
    for key in trained:
        assert torch.allclose(trained[key], sampled[key], atol=1e-12)
        assert torch.allclose(trained[key], chunks[key], atol=1e-12)
        assert torch.allclose(trained[key][:1], alone[key], atol=1e-12)


def test_every_parameter_learns() -> None:
    for name in CONFIGURATIONS:
        network = small(name)
        inputs, mask = graphs(6, 5, CONFIGURATIONS[name]["features"])
        sum(out.square().sum() for out in network(inputs, None, mask).values()).backward()
        for key, parameter in network.named_parameters():
            assert float(parameter.grad.abs().max()) > 0.0, (name, key)


def test_geometry_of_the_outputs() -> None:
    network = small("attention")
    inputs, mask = graphs(8, 6, 5)
    out = network(inputs, None, mask)
    assert torch.equal(out["edges"], out["edges"].transpose(1, 2))
    assert not bool(out["edges"].diagonal(dim1=1, dim2=2).any())
    assert float(out["nodes"][~mask].abs().max()) == 0.0
    assert float((out["edges"] * ~(mask[:, :, None] & mask[:, None])).abs().max()) == 0.0


def test_permutation_and_padding() -> None:
    network = small("published")
    inputs, mask = graphs(5, 6, 4)
    out = network(inputs, None, mask)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    turned = {"nodes": inputs["nodes"][:, order], "edges": inputs["edges"][:, order][:, :, order]}
    other = network(turned, None, mask[:, order])
    assert torch.allclose(other["nodes"], out["nodes"][:, order], atol=1e-12)
    assert torch.allclose(other["edges"], out["edges"][:, order][:, :, order], atol=1e-12)
    wide = {
        "nodes": torch.nn.functional.pad(inputs["nodes"], (0, 0, 0, 3)),
        "edges": torch.nn.functional.pad(inputs["edges"], (0, 3, 0, 3)),
    }
    padded = network(wide, None, torch.nn.functional.pad(mask, (0, 3)))
    assert torch.allclose(padded["nodes"][:, :6], out["nodes"], atol=1e-12)
    assert torch.allclose(padded["edges"][:, :6, :6], out["edges"], atol=1e-12)


def test_products_have_two_forms() -> None:
    gen = torch.Generator().manual_seed(0)
    a, x = torch.randn(3, 5, 5, 20, generator=gen), torch.randn(4, 5, 20, generator=gen)
    q, k = torch.randn(2, 3, 4, 2, 5, 20, generator=gen)
    long, short = propagate(a, x), sum_of_sigmoids(q, k)
    with torch.no_grad():
        assert torch.allclose(propagate(a, x), long, atol=1e-5)
        assert torch.allclose(sum_of_sigmoids(q, k), short, atol=1e-5)
    products = torch.einsum("chdib,chdjb->chijb", q, k)
    wanted = (1.0 / (1.0 + 2.0**products)).sum(1)
    assert torch.allclose(short, wanted, atol=1e-6)
    assert torch.allclose(long, torch.einsum("cijb,fjb->cfib", a, x), atol=1e-5)


def test_pairs_round_trip() -> None:
    inputs, mask = graphs(4, 5, 2)
    pairs = Pairs.of(mask, torch.float64)
    dense = inputs["edges"].permute(1, 2, 0)[None].contiguous()
    assert torch.equal(pairs.scatter(pairs.gather(dense)), dense)
    assert len(pairs.upper) == int((mask.sum(1) * (mask.sum(1) - 1) // 2).sum())


def test_impossible_sizes() -> None:
    with pytest.raises(ValueError, match="heads"):
        GraphScoreNetwork.build(4, attention=10, hidden=8)
    with pytest.raises(ValueError, match="at least 1"):
        GraphScoreNetwork.build(4, edge_depth=0)
    with pytest.raises(ValueError, match="layers"):
        Perceptron(0, 2, 2, 2)
