"""Property networks of graphs, and what guidance by them and by plain energies does."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest
import torch
from torch import Tensor

from molediff.graphs.domain import GraphDomain
from molediff.graphs.models import graph_denoiser
from molediff.graphs.molecular import MolecularGraphDomain
from molediff.graphs.properties import (
    GraphRegressor,
    edge_density,
    graph_property,
    steer_density,
)
from shared import solvers
from shared.batches import Batches
from shared.guidance import Function, Guided, Term
from shared.optimisation import OptimizerSettings
from shared.process import Process
from shared.sampling import Memory, sample
from shared.schedules import VPLinear

SCHEDULE = VPLinear(0.1, 1.0, 1e-5)


def sampled(denoise, process, domain, n=12, steps=20):
    sink = Memory()
    sample(
        denoise, process, domain, n, solvers.DPMSolverMultistep(points=1), steps,
        solvers.PowerTimes(t_end=0.01), 0, batch=n, sink=sink,
    )  # fmt: skip
    return [sink.items[i] for i in range(n)]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Chains of carbon with up to four atoms of oxygen, which are the property."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(120):
        oxygens, carbons = int(rng.integers(0, 4)), int(rng.integers(4, 6))
        rows.append(f"{'C' * (carbons - oxygens)}{'CO' * oxygens},{oxygens}")
    path = tmp_path_factory.mktemp("data") / "table.csv"
    path.write_text("smiles,oxygens\n" + "\n".join(rows) + "\n")
    return path


def test_density_counts_the_edges_of_clean_graphs() -> None:
    domain = GraphDomain("community_small", n=6)
    batch = domain.collate(domain.datasets()[0].records)
    wanted = [nx.density(graph) for graph in domain.training_items]
    found = edge_density(batch.state, None, batch.mask)
    assert found.tolist() == pytest.approx(wanted, abs=0.02)
    padded = edge_density({"edges": batch.state["edges"][:, :25, :25]}, None, batch.mask[:, :25])
    assert torch.allclose(padded, found)


def test_density_reaches_its_target_without_a_network() -> None:
    domain = GraphDomain("community_small", n=20)
    torch.manual_seed(0)
    denoiser = graph_denoiser(domain, SCHEDULE, None, 2, 2, 8, 8).eval()
    process = denoiser.process
    errors = {}
    for target in (0.15, 0.6):
        guided = steer_density(denoiser, process, target, scale=2000.0)
        plain = np.array([nx.density(g) for g in sampled(denoiser, process, domain)])
        found = np.array([nx.density(g) for g in sampled(guided, process, domain)])
        errors[target] = abs(found - target).mean(), abs(plain - target).mean()
    assert all(guided < 0.5 * plain for guided, plain in errors.values()), errors


def test_regressor_ignores_padding_and_the_order_of_nodes() -> None:
    torch.manual_seed(0)
    network = GraphRegressor(4, 2, 2, 8).double()
    x, a = torch.randn(3, 5, 4).double(), torch.randn(3, 5, 5).double()
    a, code = a + a.transpose(1, 2), torch.zeros(3).double()
    mask = torch.ones(3, 5, dtype=torch.bool)
    out = network({"nodes": x, "edges": a}, code, mask)["properties"]
    order = torch.tensor([3, 0, 4, 1, 2])
    turned = {"nodes": x[:, order], "edges": a[:, order][:, :, order]}
    assert torch.allclose(network(turned, code, mask)["properties"], out)
    wide = {
        "nodes": torch.nn.functional.pad(x, (0, 0, 0, 2)),
        "edges": torch.nn.functional.pad(a, (0, 2, 0, 2)),
    }
    padded = torch.nn.functional.pad(mask, (0, 2))
    assert torch.allclose(network(wide, code, padded)["properties"], out)
    assert not torch.allclose(network({"nodes": -x, "edges": a}, code, mask)["properties"], out)


def test_properties_of_tables_and_descriptors(table) -> None:
    domain = MolecularGraphDomain(str(table), nodes=9, properties=["oxygens", "qed"])
    batch = domain.collate(domain.datasets()[0].records)
    context = batch.cond["context"]
    assert context.shape == (len(batch), 2)
    assert context.mean(0).abs().max() < 1e-5
    assert float(context.abs().mean()) == pytest.approx(1.0, abs=1e-4)
    rows = domain.statistics()["properties"]
    assert (rows["oxygens"]["min"], rows["oxygens"]["max"]) == (0.0, 3.0)
    other = MolecularGraphDomain(nodes=9)
    other.restore(domain.statistics())
    assert other.properties == ("oxygens", "qed")
    with pytest.raises(ValueError, match="did you mean 'qed'"):
        MolecularGraphDomain(str(table), properties=["qedd"]).datasets()
    with pytest.raises(ValueError, match="domain.properties is empty"):
        graph_property(MolecularGraphDomain(str(table)), SCHEDULE)


def test_a_trained_network_pulls_the_property(table) -> None:
    domain = MolecularGraphDomain(str(table), nodes=9, properties=["oxygens"], test=0.0)
    torch.manual_seed(0)
    model = graph_property(domain, SCHEDULE, depth=2, hidden=16)
    optimizer = OptimizerSettings("adam", lr=3e-3).build(model.parameters())
    batches = Batches(domain, model.process, domain.datasets()[0], 32, 0)
    losses: list[Tensor] = []
    for number in range(120):
        noisy = batches[number]
        t = model.times.from_uniform(model.process.lead, noisy.u)
        terms = model.losses(noisy.batch.state, noisy.noise, t, noisy.batch.mask, noisy.batch.cond)
        loss = terms["oxygens"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    assert torch.stack(losses[-20:]).mean() < 0.6 * torch.stack(losses[:5]).mean()
    denoiser = graph_denoiser(domain, SCHEDULE, None, 2, 2, 8, 8).eval()

    def predicted(x, t, mask, cond):
        return -model.eval().predict(x, t, mask, cond)[:, 0]

    term = Term(Function(predicted, "oxygens"), scale=30.0)
    guided = Guided(denoiser, denoiser.process, [term])
    counts = [
        np.mean([(m.atomic_numbers == 8).sum() for m in sampled(d, denoiser.process, domain)])
        for d in (denoiser, guided)
    ]
    assert counts[1] > counts[0] + 1.0, counts


def test_density_of_what_is_no_graph_is_refused():
    with pytest.raises(ValueError, match="density of edges: the model has only x"):
        steer_density(lambda *_: {}, Process.single(VPLinear()))
