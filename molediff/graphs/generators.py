"""Synthetic sets of graphs that papers on graph generation use, drawn from a seed."""

from __future__ import annotations

from collections.abc import Callable

import networkx as nx
import numpy as np
from scipy.spatial import Delaunay

Draw = Callable[[np.random.Generator], nx.Graph]


def community_small(rng: np.random.Generator) -> nx.Graph:
    """Two communities of 6 to 10 nodes with edge probability 0.7, and 0.05 n edges between them
    on average, at least one (Niu et al. 2020)."""
    half = int(rng.integers(12, 21)) // 2
    parts = [nx.gnp_random_graph(half, 0.7, seed=rng) for _ in range(2)]
    graph = nx.disjoint_union_all(parts)
    groups = [sorted(c) for c in nx.connected_components(graph)]
    for i, group in enumerate(groups):
        for other in groups[i + 1 :]:
            bridges = rng.random((len(group), len(other))) < 0.1 / half
            pairs = [(group[a], other[b]) for a, b in np.argwhere(bridges)]
            graph.add_edges_from(pairs or [(group[0], other[0])])
    return graph


def grid(rng: np.random.Generator) -> nx.Graph:
    """A rectangular grid with sides of 10 to 19 nodes (Jo et al. 2022)."""
    rows, columns = rng.integers(10, 20, size=2)
    return nx.convert_node_labels_to_integers(nx.grid_2d_graph(int(rows), int(columns)))


def planar(rng: np.random.Generator, nodes: int = 64) -> nx.Graph:
    """Delaunay triangulation of random points of the unit square (Martinkus et al. 2022)."""
    triangles = Delaunay(rng.random((nodes, 2))).simplices
    graph = nx.empty_graph(nodes)
    for a, b in ((0, 1), (1, 2), (2, 0)):
        graph.add_edges_from(triangles[:, (a, b)].tolist())
    return graph


def sbm(rng: np.random.Generator) -> nx.Graph:
    """Connected stochastic block model: 2 to 5 blocks of 20 to 40 nodes, edge probability 0.3
    inside and 0.005 between (Martinkus et al. 2022)."""
    while True:
        sizes = rng.integers(20, 41, size=int(rng.integers(2, 6)))
        p = np.full((len(sizes), len(sizes)), 0.005)
        np.fill_diagonal(p, 0.3)
        graph = nx.stochastic_block_model(sizes.tolist(), p.tolist(), seed=rng)
        if nx.is_connected(graph):
            return nx.Graph(graph.edges)


GENERATORS: dict[str, tuple[Draw, int]] = {
    "community_small": (community_small, 100),
    "grid": (grid, 100),
    "planar": (planar, 200),
    "sbm": (sbm, 200),
}
"""Name -> (one graph, number of graphs in the usual set)."""


def generate(name: str, n: int | None = None, seed: int = 0) -> list[nx.Graph]:
    """``n`` graphs of a synthetic set, the usual number by default; graph i depends on the seed
    and on i alone.

    Raises:
        ValueError: no such set.
    """
    if name not in GENERATORS:
        raise ValueError(f"graphs: no generator '{name}'; there are {', '.join(GENERATORS)}.")
    draw, usual = GENERATORS[name]
    return [draw(np.random.default_rng([seed, i])) for i in range(usual if n is None else n)]


def ego_graphs(
    network: nx.Graph, radius: int = 1, low: int = 4, high: int = 18, most: int = 200
) -> list[nx.Graph]:
    """Ego graphs of ``low`` to ``high`` nodes in the largest component of a network. With the
    Citeseer citation network and these values: ego-small (You et al. 2018)."""
    largest = network.subgraph(max(nx.connected_components(network), key=len))
    out: list[nx.Graph] = []
    for node in largest:
        ego = nx.Graph(nx.ego_graph(largest, node, radius=radius))
        ego.remove_edges_from(list(nx.selfloop_edges(ego)))
        if low <= len(ego) <= high and len(out) < most:
            out.append(nx.convert_node_labels_to_integers(ego))
    return out
