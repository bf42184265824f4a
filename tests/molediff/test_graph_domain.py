"""Graphs and molecular graphs as domains."""

from __future__ import annotations

import json

import networkx as nx
import numpy as np
import pytest
import torch

from molediff.graphs.domain import GraphDomain
from molediff.graphs.models import graph_denoiser
from molediff.graphs.molecular import MolecularGraphDomain
from molediff.molecules import Molecule
from shared import solvers
from shared.domains import Invalid
from shared.sampling import Memory, sample
from shared.schedules import VPLinear

SMILES = ["CCO", "C1CC1", "c1ccccc1", "CC(=O)[O-]", "CS", "C" * 12, "not a molecule", "N", "C#N"]


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "molecules.csv"
    path.write_text("smiles\n" + "\n".join(SMILES) + "\n")
    return path


def community(**options) -> GraphDomain:
    return GraphDomain("community_small", **{"n": 20, **options})


def test_graphs_round_trip() -> None:
    domain = community()
    training, validation = domain.datasets()
    assert (len(training), len(validation), len(domain.test_items)) == (16, 16, 4)
    batch = domain.collate(training.records)
    assert batch.state["nodes"].shape == (16, domain.nodes, domain.features)
    assert torch.equal(batch.state["nodes"].sum(-1) > 0, batch.mask)
    degree = batch.state["edges"].sum(-1).long()
    assert torch.equal(batch.state["nodes"].argmax(-1)[batch.mask], degree[batch.mask])
    for graph, wanted in zip(
        domain.decode(batch.state, batch.mask), domain.training_items, strict=True
    ):
        assert nx.utils.graphs_equal(graph, wanted)


def test_molecules_round_trip_and_rejects(table) -> None:
    domain = MolecularGraphDomain(str(table), nodes=9, test=0.0)
    reasons = [item.reason for item in domain.rejected]
    assert len(reasons) == 3
    assert any("S" in reason and "elements" in reason for reason in reasons)
    assert any("12 heavy atoms" in reason for reason in reasons)
    batch = domain.collate(domain.datasets()[0].records)
    found = domain.decode(batch.state, batch.mask)
    smiles = [item.smiles() for item in found]
    assert smiles == ["CCO", "C1CC1", "c1ccccc1", "CC(=O)O", "N", "C#N"]  # charges are not kept
    assert all(item.properties["valid_without_correction"] == 1 for item in found)


def test_test_set_by_indices(table, tmp_path) -> None:
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps({"valid_idxs": ["0001", "0004", "0007"]}))
    domain = MolecularGraphDomain(str(table), nodes=9, test_indices=str(rows))
    assert [item.smiles() for item in domain.test_items] == ["C1CC1", "N"]
    assert len(domain.training_items) == 4
    assert len(MolecularGraphDomain(str(table), most=2, test=0.0).training_items) == 2


def test_statistics_travel() -> None:
    domain = community()
    statistics = json.loads(json.dumps(domain.statistics()))
    other = GraphDomain()
    other.restore(statistics)
    assert other.sizes == domain.sizes
    assert (other.nodes, other.features) == (domain.nodes, domain.features)
    assert other.second_moments == domain.second_moments
    records = domain.datasets()[0].records
    state, mask = (b := domain.collate(records)).state, b.mask
    pairs = mask[:, :, None] & mask[:, None] & ~torch.eye(domain.nodes, dtype=torch.bool)
    assert domain.second_moments["edges"] == pytest.approx(
        float(state["edges"][pairs].square().mean())
    )
    assert domain.second_moments["nodes"] == pytest.approx(
        float(state["nodes"][mask].square().mean())
    )
    with pytest.raises(ValueError, match="molecular_graphs"):
        other.restore({**statistics, "domain": "molecular_graphs"})


def test_template_follows_the_training_sizes() -> None:
    domain = community(n=60)
    sizes = domain.template(3, range(400)).mask.sum(1).tolist()
    assert set(sizes) == set(domain.sizes)
    wanted = np.average(list(domain.sizes), weights=list(domain.sizes.values()))
    assert abs(np.mean(sizes) - wanted) < 0.4
    assert domain.template(3, [7]).mask.sum() == sizes[7]
    assert domain.template(0, [0], nodes=4).mask.sum() == 4
    with pytest.raises(ValueError, match="1 to"):
        domain.template(0, [0], nodes=99)
    with pytest.raises(ValueError, match="node"):
        domain.template(0, [0], node=5)


def test_bad_settings(tmp_path) -> None:
    with pytest.raises(ValueError, match="shares"):
        community(test=1.0)
    with pytest.raises(ValueError, match="no data"):
        GraphDomain().datasets()
    with pytest.raises(ValueError, match="planar"):
        community(valid="plane")
    small = community(nodes=13)
    assert {item.reason.split(",")[0].split()[1] for item in small.rejected} == {"nodes"}
    assert any("degree" in item.reason for item in community(features=6).rejected)
    with pytest.raises(ValueError, match="no usable graph"):
        community(nodes=3).datasets()


def test_files_and_views(table, tmp_path) -> None:
    graphs = community()
    path = tmp_path / f"out{graphs.suffix}"
    graphs.write(path, graphs.test_items)
    assert len(list(graphs.read(path))) == 4
    assert graphs.view(graphs.test_items).count("<svg") == 4
    molecules = MolecularGraphDomain(str(table), nodes=9)
    path = tmp_path / f"out{molecules.suffix}"
    items = molecules.training_items
    molecules.write(path, [m.replace(properties={}) for m in items])
    found = list(molecules.read(path))
    assert [m.smiles() for m in found] == [m.smiles() for m in items]
    assert molecules.view(items).count("<svg") == len(items)


def test_metrics(table) -> None:
    graphs = community(valid="planar")
    found = graphs.metrics([*graphs.training_items[:4], Invalid("4", "x")])
    assert float(found["decoded"]) == 0.8
    assert {"degree", "clustering", "orbit", "average", "vun"} <= found.keys()
    assert float(found["novel"]) == 0.0
    molecules = MolecularGraphDomain(str(table), nodes=9, test=0.0)
    found = molecules.metrics(molecules.training_items)
    assert float(found["valid"]) == 1.0
    assert float(found["novel"]) == 0.0


@pytest.mark.parametrize("kind", ["graphs", "molecules"])
def test_train_one_step_and_sample(table, kind: str) -> None:
    domain = community()
    if kind == "molecules":
        domain = MolecularGraphDomain(str(table), nodes=9, test=0.0)
    torch.manual_seed(0)
    denoiser = graph_denoiser(domain, VPLinear(0.1, 1.0, 1e-5), None, 2, 2, 8, 8)
    batch = domain.collate(domain.datasets()[0].records)
    noise = denoiser.process.noise(
        {k: torch.randn_like(v) for k, v in batch.state.items()}, batch.mask
    )
    times = torch.full((len(batch),), 0.5, dtype=torch.float64)
    loss = denoiser.loss(batch.state, noise, times, batch.mask).mean()
    loss.backward()
    assert bool(torch.isfinite(loss))
    sink = Memory()
    summary = sample(
        denoiser, denoiser.process, domain, 5, solvers.SymmetricSplitting(), 4,
        solvers.LogSNRTimes(t_end=0.05), 0, batch=3, sink=sink,
    )  # fmt: skip
    assert summary.n == 5
    assert summary.failed == 0
    kinds = (nx.Graph, Molecule, Invalid)
    assert all(isinstance(item, kinds) for item in sink.items.values())
