"""Collections of graphs on disk: reading, checking, writing.

| what | how it is stored |
|---|---|
| .npz | ``num_nodes`` [m], ``edges`` [e, 2] and ``edge_offsets`` [m + 1], node numbers per graph |
| .graphml | one or more graphs |
| .g6 | graph6, one graph per line; grows by appending |
| .pkl | a list of networkx graphs, read without running code |
| .edges, .cites, .graph | one network: a list of edges, or Planetoid's dictionary of neighbours |
| a folder | raw files of a TU data set (NAME_A.txt, ...), or files of the formats above |

A graph that a model cannot hold becomes an ``Invalid`` with its place and the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np

from shared.domains import Invalid
from shared.inert import Placeholder, read_pickle


def checked(graph: nx.Graph, record: str, connected: bool = True) -> nx.Graph | Invalid:
    """A simple undirected graph with nodes 0..n-1, or why it is none; ``connected`` refuses
    graphs of several components."""
    reason = _fault(graph, connected)
    if reason is not None:
        return Invalid(record, reason)
    nodes = {node: i for i, node in enumerate(graph)}
    plain = nx.empty_graph(len(nodes))
    plain.add_edges_from((nodes[a], nodes[b]) for a, b in graph.edges())
    return plain


def _fault(graph: nx.Graph, connected: bool) -> str | None:
    if graph.is_directed():
        return "a directed graph; make it undirected first"
    if graph.is_multigraph() and nx.Graph(graph).number_of_edges() < graph.number_of_edges():
        return "parallel edges; merge them first"
    if len(graph) < 2:
        return "an empty graph" if len(graph) == 0 else "a single node"
    if nx.number_of_selfloops(graph):
        return "an edge from a node to itself; remove such edges first"
    weights = {w for _, _, w in graph.edges(data="weight", default=1)}
    if any(w is not None and w != 1 for w in weights):
        return "weighted edges; these models know unweighted graphs only"
    if graph.number_of_edges() == 0:
        return "no edges"
    parts = nx.number_connected_components(graph) if connected else 1
    return None if parts == 1 else f"disconnected: {parts} components"


# -- reading ----------------------------------------------------------------------------------


def read_graphs(path: str | Path, connected: bool = True) -> Iterator[nx.Graph | Invalid]:
    """Stream the graphs of a file or folder, each checked.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: an unknown format, or a damaged file.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    for i, graph in enumerate(_raw(path)):
        record = f"{path.name}, graph {i}"
        if isinstance(graph, str):
            yield Invalid(record, graph)
        else:
            yield checked(graph, record, connected)


def _raw(path: Path) -> Iterator[nx.Graph | str]:
    """Graphs as they are, or what is wrong with one that can be skipped."""
    if path.is_dir():
        yield from _folder(path)
    elif path.suffix in _READERS:
        try:
            yield from _READERS[path.suffix](path)
        except (KeyError, IndexError, nx.NetworkXException, SyntaxError, TypeError) as error:
            raise ValueError(f"{path}: damaged ({type(error).__name__}: {error})") from error
    else:
        raise ValueError(f"{path}: graphs are read from {', '.join(_READERS)} and TU folders.")


def _folder(path: Path) -> Iterator[nx.Graph | str]:
    tu = sorted(path.glob("*_A.txt"))
    if tu:
        yield from read_tu(path, tu[0].name.removesuffix("_A.txt"))
        return
    files = [file for file in sorted(path.iterdir()) if file.suffix in _READERS]
    if not files:
        raise ValueError(f"{path}: no file of {', '.join(_READERS)} in it, nor a TU data set.")
    for file in files:
        yield from _raw(file)


def read_tu(folder: Path, name: str) -> list[nx.Graph]:
    """The graphs of a TU data set (Morris et al. 2020) from its raw files, without nodes that
    have no edge.

    Raises:
        FileNotFoundError: a file of the set is missing.
        ValueError: an edge between two graphs, or other damage.
    """
    owner = np.loadtxt(folder / f"{name}_graph_indicator.txt", dtype=np.int64, ndmin=1)
    edges = np.loadtxt(folder / f"{name}_A.txt", dtype=np.int64, delimiter=",", ndmin=2) - 1
    if edges.shape[1:] != (2,) or not ((edges >= 0) & (edges < len(owner))).all():
        raise ValueError(f"{folder}: {name}_A.txt does not hold pairs of node numbers.")
    if (owner[edges[:, 0]] != owner[edges[:, 1]]).any():
        raise ValueError(f"{folder}: {name}_A.txt has an edge between two graphs.")
    graphs = [nx.Graph() for _ in range(int(owner.max()))]
    for a, b in edges[np.argsort(owner[edges[:, 0]], kind="stable")].tolist():
        if a != b:
            graphs[owner[a] - 1].add_edge(a, b)
    return graphs


def _read_npz(path: Path) -> Iterator[nx.Graph]:
    with np.load(path, allow_pickle=False) as arrays:
        sizes, edges, ends = (arrays[k] for k in ("num_nodes", "edges", "edge_offsets"))
    for i, n in enumerate(sizes.tolist()):
        graph = nx.empty_graph(n)
        graph.add_edges_from(edges[ends[i] : ends[i + 1]].tolist())
        yield graph


def _read_graphml(path: Path) -> Iterator[nx.Graph]:
    yield from nx.readwrite.graphml.GraphMLReader()(path=str(path))


def _read_graph6(path: Path) -> Iterator[nx.Graph | str]:
    for line in path.read_bytes().splitlines():
        if line.strip():
            try:
                yield nx.from_graph6_bytes(line.strip())
            except (nx.NetworkXError, ValueError, IndexError) as error:
                yield f"not graph6: {error}"


def _read_pickle(path: Path) -> Iterator[nx.Graph]:
    content = read_pickle(path)
    if isinstance(content, dict) and not isinstance(content, Placeholder):
        lists = {node: list(others) for node, others in content.items()}
        yield _simple(nx.from_dict_of_lists(lists))  # a network of Planetoid
        return
    for graph in content if isinstance(content, list | tuple) else [content]:
        if not isinstance(graph, Placeholder):
            raise ValueError(f"{path}: not a list of networkx graphs.")
        yield _from_state(type(graph).__name__, graph.state)


def _read_edges(path: Path) -> Iterator[nx.Graph]:
    yield _simple(nx.read_edgelist(path, comments="#"))


def _simple(graph: nx.Graph) -> nx.Graph:
    """Citation networks cite themselves here and there."""
    graph.remove_edges_from(list(nx.selfloop_edges(graph)))
    return graph


def _from_state(kind: str, state: dict[Any, Any]) -> nx.Graph:
    """A networkx graph of any version from the attributes it was pickled with."""
    neighbours = state.get("_adj", state.get("_succ", state.get("adj", {})))
    graph = nx.DiGraph() if "Di" in kind else nx.Graph()
    graph.add_nodes_from(neighbours)
    for node, others in neighbours.items():
        for other, data in others.items():
            weight = data.get("weight", 1) if isinstance(data, dict) else 1
            graph.add_edge(node, other, weight=weight)
    return graph


_READERS: dict[str, Callable[[Path], Iterator[nx.Graph | str]]] = {
    ".npz": _read_npz,
    ".graphml": _read_graphml,
    ".g6": _read_graph6,
    ".pkl": _read_pickle,
    ".graph": _read_pickle,
    ".edges": _read_edges,
    ".cites": _read_edges,
}


# -- writing ----------------------------------------------------------------------------------


def write_graphs(path: str | Path, graphs: Iterable[nx.Graph]) -> None:
    """Append graphs to a .g6, .graphml or .npz file, made where absent.

    Raises:
        ValueError: another suffix.
    """
    path, graphs = Path(path), list(graphs)
    if path.suffix not in (".g6", ".graphml", ".npz"):
        raise ValueError(f"{path}: graphs are written to .g6, .graphml and .npz files.")
    if path.suffix == ".g6":
        with path.open("ab") as file:
            for graph in graphs:
                file.write(nx.to_graph6_bytes(graph, header=False))
        return
    old = [g for g in _raw(path) if not isinstance(g, str)] if path.exists() else []
    if path.suffix == ".npz":
        _write_npz(path, [*old, *graphs])
        return
    writer = nx.readwrite.graphml.GraphMLWriter(prettyprint=True)
    writer.add_graphs([*old, *graphs])
    with path.open("wb") as file:
        writer.dump(file)


def _write_npz(path: Path, graphs: list[nx.Graph]) -> None:
    edges = [np.array(g.edges(), dtype=np.int32).reshape(-1, 2) for g in graphs]
    np.savez_compressed(
        path,
        num_nodes=np.array([len(g) for g in graphs], dtype=np.int32),
        edges=np.concatenate([np.zeros((0, 2), dtype=np.int32), *edges]),
        edge_offsets=np.cumsum([0, *map(len, edges)]),
    )
