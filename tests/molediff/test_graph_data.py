"""Collections of graphs on disk."""

from __future__ import annotations

import pickle

import networkx as nx
import numpy as np
import pytest

from molediff.graphs.data import checked, read_graphs, read_tu, write_graphs
from shared.domains import Invalid

GRAPHS = [nx.path_graph(4), nx.cycle_graph(5), nx.complete_graph(3)]


def same(a: nx.Graph, b: nx.Graph) -> bool:
    return set(map(frozenset, a.edges)) == set(map(frozenset, b.edges)) and len(a) == len(b)


def weighted() -> nx.Graph:
    graph = nx.path_graph(3)
    graph[0][1]["weight"] = 2.5
    return graph


def looped() -> nx.Graph:
    graph = nx.path_graph(3)
    graph.add_edge(1, 1)
    return graph


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (nx.Graph(), "empty"),
        (nx.empty_graph(1), "single node"),
        (nx.empty_graph(3), "no edges"),
        (nx.DiGraph([(0, 1)]), "directed"),
        (weighted(), "weighted"),
        (looped(), "itself"),
        (nx.MultiGraph([(0, 1), (0, 1)]), "parallel"),
        (nx.disjoint_union(GRAPHS[0], GRAPHS[1]), "disconnected: 2 components"),
    ],
)
def test_graphs_that_a_model_cannot_hold(graph: nx.Graph, reason: str) -> None:
    found = checked(graph, "record 7")
    assert isinstance(found, Invalid)
    assert found.record == "record 7"
    assert reason in found.reason


def test_names_of_nodes_do_not_matter() -> None:
    graph = checked(nx.Graph([("a", "b"), ("b", (1, 2))]), "")
    assert same(graph, nx.path_graph(3))
    apart = nx.disjoint_union(GRAPHS[0], GRAPHS[1])
    assert same(checked(apart, "", connected=False), apart)


@pytest.mark.parametrize("suffix", [".npz", ".graphml", ".g6"])
def test_round_trip_and_appending(tmp_path, suffix: str) -> None:
    path = tmp_path / f"graphs{suffix}"
    write_graphs(path, GRAPHS[:2])
    write_graphs(path, GRAPHS[2:])
    found = list(read_graphs(path))
    assert all(same(a, b) for a, b in zip(found, GRAPHS, strict=True))


def test_pickled_networkx(tmp_path) -> None:
    path = tmp_path / "graphs.pkl"
    path.write_bytes(pickle.dumps([*GRAPHS, nx.DiGraph([(0, 1)]), weighted()]))
    *found, directed, heavy = read_graphs(path)
    assert all(same(a, b) for a, b in zip(found, GRAPHS, strict=True))
    assert "directed" in directed.reason
    assert "weighted" in heavy.reason
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match="networkx"):
        list(read_graphs(path))


@pytest.mark.golden
def test_community_small(data_folder) -> None:
    found = list(read_graphs(data_folder("gdss/community_small.npz")))
    assert len(found) == 100
    assert {len(graph) for graph in found} == {12, 14, 16, 18, 20}


def test_tu_data_set(tmp_path) -> None:
    (tmp_path / "TOY_A.txt").write_text("1, 2\n2, 1\n2, 3\n3, 2\n5, 6\n6, 5\n")
    (tmp_path / "TOY_graph_indicator.txt").write_text("1\n1\n1\n1\n2\n2\n")
    first, second = read_tu(tmp_path, "TOY")
    assert sorted(map(len, (first, second))) == [2, 3]  # node 4 has no edge
    assert same(next(read_graphs(tmp_path)), nx.path_graph(3))
    (tmp_path / "TOY_A.txt").write_text("1, 5\n")
    with pytest.raises(ValueError, match="between two graphs"):
        read_tu(tmp_path, "TOY")
    (tmp_path / "TOY_A.txt").write_text("1, 9\n")
    with pytest.raises(ValueError, match="pairs of node numbers"):
        read_tu(tmp_path, "TOY")


def test_folders_and_bad_files(tmp_path) -> None:
    with pytest.raises(FileNotFoundError):
        list(read_graphs(tmp_path / "none.g6"))
    with pytest.raises(ValueError, match="no file of"):
        list(read_graphs(tmp_path))
    write_graphs(tmp_path / "a.g6", GRAPHS[:1])
    write_graphs(tmp_path / "b.graphml", GRAPHS[1:])
    assert len(list(read_graphs(tmp_path))) == 3
    (tmp_path / "c.txt").write_text("")
    with pytest.raises(ValueError, match="graphs are read from"):
        list(read_graphs(tmp_path / "c.txt"))
    with pytest.raises(ValueError, match="written to"):
        write_graphs(tmp_path / "c.txt", GRAPHS)
    with (tmp_path / "a.g6").open("ab") as file:
        file.write(b"\x01\x02 nonsense\n" + nx.to_graph6_bytes(GRAPHS[1], header=False))
    good, bad, last = read_graphs(tmp_path / "a.g6")
    assert same(good, GRAPHS[0])
    assert "graph6" in bad.reason
    assert same(last, GRAPHS[1])
    np.savez(tmp_path / "d.npz", num_nodes=[2])
    (tmp_path / "e.graphml").write_text("<graphml><graph>")
    for name in ("d.npz", "e.graphml"):
        with pytest.raises(ValueError, match="damaged"):
            list(read_graphs(tmp_path / name))
