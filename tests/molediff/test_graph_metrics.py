"""Discrepancies between sets of graphs, orbit counts, validity and uniqueness."""

from __future__ import annotations

import math
from collections import Counter
from itertools import combinations

import networkx as nx
import numpy as np
import pytest

from molediff.graphs.generators import generate
from molediff.graphs.metrics import (
    STATISTICS,
    distinct,
    graph_mmds,
    is_planar,
    is_sbm,
    mean_orbits,
    mmd,
    nspdk_mmd,
    tidy,
    valid_unique_novel,
)
from molediff.graphs.nspdk import features
from molediff.graphs.orbits import orbit_counts
from shared.metrics import Estimate

NAMES = {"degree": "degree", "clustering": "cluster", "orbit": "orbit", "spectrum": "spectral"}

# graphlet of four nodes, by its sorted degrees and edges -> orbit of a node of some degree
ORBITS = {
    (1, 1, 2, 2): {1: 4, 2: 5},
    (1, 1, 1, 3): {1: 6, 3: 7},
    (2, 2, 2, 2): {2: 8},
    (1, 2, 2, 3): {1: 9, 2: 10, 3: 11},
    (2, 2, 3, 3): {2: 12, 3: 13},
    (3, 3, 3, 3): {3: 14},
}


def enumerated(graph: nx.Graph) -> np.ndarray:
    """Orbit counts by looking at every set of two, three and four nodes."""
    counts = np.zeros((len(graph), 15), dtype=int)
    for size in (2, 3, 4):
        for nodes in combinations(graph, size):
            part = graph.subgraph(nodes)
            if not nx.is_connected(part):
                continue
            degrees = dict(part.degree())
            shape = tuple(sorted(degrees.values()))
            small = {(1, 1): {1: 0}, (1, 1, 2): {1: 1, 2: 2}, (2, 2, 2): {2: 3}}
            table = ORBITS.get(shape) if size == 4 else small[shape]
            for node, degree in degrees.items():
                counts[node, table[degree]] += 1
    return counts


@pytest.mark.parametrize("p", [0.2, 0.5, 0.8])
def test_orbits_by_enumeration(p: float) -> None:
    graph = nx.gnp_random_graph(9, p, seed=3)
    assert np.array_equal(orbit_counts(nx.to_numpy_array(graph)), enumerated(graph))


@pytest.mark.golden
@pytest.mark.parametrize("item", ["09_mmd_community_halves", "09_mmd_community_vs_er"])
def test_published_discrepancies(golden, item: str) -> None:
    tensors, about = golden(item)
    sets = {
        key: [nx.from_numpy_array(matrix) for matrix in tensors[key].numpy()]
        for key in ("ref", "pred")
    }
    found = graph_mmds(sets["ref"], sets["pred"])
    for name, old in NAMES.items():
        assert float(found[name]) == pytest.approx(about["values"][old], abs=1e-12)
        assert found[name].low < float(found[name]) < found[name].high
    for key, graphs in sets.items():
        orbits = np.stack([mean_orbits(tidy(graph)) for graph in graphs])
        assert np.abs(orbits - tensors[f"{key}.orbit"].numpy()).max() < 1e-12


@pytest.mark.golden
def test_published_kernels(golden) -> None:
    tensors, _ = golden("09_mmd_community_halves")
    p, q = tensors["kernel.p"].numpy(), tensors["kernel.q"].numpy()
    found = {
        "gaussian_emd": STATISTICS["degree"].kernel([p], [q]),
        "gaussian_emd_sigma.1_scal100": STATISTICS["clustering"].kernel([p], [q]),
        "gaussian_sigma30": STATISTICS["orbit"].kernel([50 * p], [50 * q]),
    }
    for name, value in found.items():
        assert value.item() == pytest.approx(float(tensors[f"kernel.{name}"]), abs=1e-12)


def test_discrepancy_of_a_set_with_itself() -> None:
    graphs = generate("community_small", 8)
    for name, value in graph_mmds(graphs, graphs).items():
        assert abs(float(value)) < 1e-12, name
    other = generate("grid", 3)
    assert float(graph_mmds(graphs, other, ["degree", "orbit"])["orbit"]) > 0.05
    assert math.isnan(float(mmd(STATISTICS["degree"], graphs, [])))
    alone = mmd(STATISTICS["degree"], graphs, graphs[:2])
    assert math.isnan(alone.low)


def test_interval_covers_the_scatter() -> None:
    """Over many sets, the interval has about the width of the scatter."""
    graphs = generate("community_small", 440)
    reference, rest = graphs[:40], graphs[40:]
    found = [mmd(STATISTICS["degree"], reference, rest[i : i + 40]) for i in range(0, 400, 40)]
    scatter = np.std([float(f) for f in found], ddof=1)
    widths = np.mean([(f.high - f.low) / 4 for f in found])
    assert 0.4 < widths / scatter < 2.5


def test_tidy() -> None:
    graph = nx.Graph([(3, 5), (5, 5)])
    graph.add_node(9)
    assert sorted(tidy(graph).edges) == [(0, 1)]
    assert len(tidy(nx.empty_graph(4))) == 1


# -- NSPDK ------------------------------------------------------------------------------------


def labelled(graph: nx.Graph, node: str = "C", edge: str = "1") -> nx.Graph:
    nx.set_node_attributes(graph, node, "label")
    nx.set_edge_attributes(graph, edge, "label")
    return graph


def test_features_of_an_edge_by_hand() -> None:
    """One edge: nodes u, v alike. At (radius, distance) = (r, 0), r = 0, 1: one pair feature and
    one half feature counted twice; at (r, 2) the same; radius counts in halves of an edge."""
    found = features(labelled(nx.path_graph(2)))
    assert len(found) == 8
    assert np.allclose(list(found.values()), 1 / math.sqrt(8))


def test_features_are_those_of_the_labelled_graph() -> None:
    a = labelled(nx.path_graph(5))
    b = nx.relabel_nodes(a, {0: 4, 1: 3, 2: 2, 3: 1, 4: 0})
    assert features(a) == pytest.approx(features(b))
    assert sum(w * w for w in features(a).values()) == pytest.approx(1.0)
    c = a.copy()
    c.nodes[0]["label"] = "N"
    assert features(a).keys() != features(c).keys()
    d = a.copy()
    d.edges[0, 1]["label"] = "2"
    assert features(a).keys() != features(d).keys()
    with pytest.raises(ValueError, match="label"):
        features(nx.path_graph(3))
    with pytest.raises(ValueError, match="without nodes"):
        features(nx.Graph())


def test_hashes_are_the_same_everywhere() -> None:
    found = sorted(features(labelled(nx.path_graph(2))))
    assert found[0] == 2998691095071889555


def test_nspdk_discrepancy() -> None:
    a = [labelled(nx.path_graph(n)) for n in (3, 4, 5, 6)]
    b = [labelled(nx.cycle_graph(n)) for n in (4, 5, 6)]
    assert float(nspdk_mmd(a, a)) == pytest.approx(0.0, abs=1e-12)
    found = nspdk_mmd(a, b)
    direct = np.mean([_dot(x, y) for x in a for y in a])
    direct += np.mean([_dot(x, y) for x in b for y in b])
    direct -= 2 * np.mean([_dot(x, y) for x in a for y in b])
    assert float(found) == pytest.approx(direct, abs=1e-12)
    assert math.isnan(float(nspdk_mmd(a, [])))


def _dot(x: nx.Graph, y: nx.Graph) -> float:
    a, b = features(x), features(y)
    return sum(weight * b.get(key, 0.0) for key, weight in a.items())


# -- valid, unique, novel ---------------------------------------------------------------------


def test_distinct_up_to_isomorphism() -> None:
    turned = nx.relabel_nodes(nx.path_graph(4), {0: 2, 1: 0, 2: 3, 3: 1})
    assert len(distinct([nx.path_graph(4), turned, nx.star_graph(3)])) == 2


def test_planar() -> None:
    made = generate("planar", 4, seed=1)
    found = valid_unique_novel(
        [*made, made[0], nx.complete_graph(5), nx.disjoint_union(made[0], made[1])],
        made[3:],
        is_planar,
    )
    values = {key: float(value) * 7 for key, value in found.items()}
    assert values == pytest.approx({"valid": 5, "unique": 6, "novel": 6, "vun": 3})
    assert isinstance(found["vun"], Estimate)


def test_stochastic_block_models() -> None:
    """The test of the published evaluations refuses some graphs of the model itself."""
    assert sum(map(is_sbm, generate("sbm", 10, seed=3))) >= 7
    others = [nx.gnp_random_graph(100, 0.1, seed=i) for i in range(5)] + generate("planar", 3)
    assert not any(map(is_sbm, others))


def test_orbit_rows_tell_graphs_apart() -> None:
    counts = Counter(orbit_counts(nx.to_numpy_array(nx.star_graph(4)))[:, 7].tolist())
    assert counts == {4: 1, 0: 4}
