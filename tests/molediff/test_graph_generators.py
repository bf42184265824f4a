"""Synthetic sets of graphs."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest

from molediff.graphs.data import checked
from molediff.graphs.generators import GENERATORS, ego_graphs, generate
from shared.domains import Invalid

SIZES = {"community_small": (12, 20), "grid": (100, 361), "planar": (64, 64), "sbm": (40, 200)}


@pytest.mark.parametrize("name", GENERATORS)
def test_sets(name: str) -> None:
    graphs = generate(name, 6, seed=1)
    assert not any(isinstance(checked(graph, ""), Invalid) for graph in graphs)
    low, high = SIZES[name]
    assert all(low <= len(graph) <= high for graph in graphs)
    again = generate(name, 2, seed=1)
    assert all(nx.utils.graphs_equal(a, b) for a, b in zip(graphs, again, strict=False))
    assert set(generate(name, 1, seed=2)[0].edges) != set(graphs[0].edges)


def test_laws() -> None:
    communities = generate("community_small", 60)
    edges = np.mean([graph.number_of_edges() for graph in communities])
    nodes = np.mean([len(graph) for graph in communities])
    assert abs(edges - 38) < 5  # two halves of 0.7 k (k - 1) / 2 edges and about one bridge
    assert abs(nodes - 15.6) < 1
    assert all(nx.check_planarity(graph)[0] for graph in generate("planar", 3))
    assert {len(graph) for graph in generate("grid", 20)} <= {
        a * b for a in range(10, 20) for b in range(10, 20)
    }


def test_ego_graphs() -> None:
    network = nx.disjoint_union(nx.karate_club_graph(), nx.path_graph(3))
    egos = ego_graphs(network, low=4, high=10, most=7)
    assert len(egos) == 7
    assert all(4 <= len(graph) <= 10 for graph in egos)
    assert all(max(d for _, d in graph.degree()) == len(graph) - 1 for graph in egos)


def test_unknown_set() -> None:
    with pytest.raises(ValueError, match="community_small"):
        generate("communities")
