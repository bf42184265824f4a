"""The neighbourhood subgraph pairwise distance kernel (Costa & De Grave 2010) as explicit,
deterministic features.

Edges become vertices, so distances count twice. The neighbourhood of a root up to a radius is
the chain of its layers; a layer is the multiset of (label, degree) of its vertices. A feature is
an unordered pair of neighbourhoods of equal radius whose roots lie at some distance; a further
one ignores the first root. Counts are normalised for every (radius, distance), then as a whole.

The published evaluations hash Python strings into 16 bits, which collide and change with every
process (values move by 1-2 %). Here hashes are 64 bits wide and the same everywhere.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Sequence

import networkx as nx

Features = dict[int, float]


def _hash(*parts: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big")


def features(graph: nx.Graph, radius: int = 4, distance: int = 4) -> Features:
    """Feature -> weight, of unit length.

    Args:
        graph: nodes and edges with an attribute 'label'. radius, distance: largest ones.

    Raises:
        ValueError: a graph without nodes, or without labels.
    """
    if len(graph) == 0:
        raise ValueError("nspdk: a graph without nodes has no features.")
    expanded, labels = _expand(graph)
    layers = {root: _layers(expanded, root, 2 * max(radius, distance)) for root in graph}
    chains = {root: _chain(expanded, labels, found) for root, found in layers.items()}
    counts: defaultdict[tuple[int, int], Counter[int]] = defaultdict(Counter)
    for v in graph:
        for d in range(0, 2 * distance + 1, 2):
            for u in layers[v][d] if d < len(layers[v]) else ():
                reach = min(len(chains[v]), len(chains[u]), 2 * radius + 1)
                for r in range(0, reach, 2):
                    pair = sorted((chains[v][r], chains[u][r]))
                    counts[r, d][_hash(*pair, r, d)] += 1
                    counts[r, d][_hash(chains[u][r], r, d)] += 1
    return _normalised(counts.values())


def _expand(graph: nx.Graph) -> tuple[dict[object, list[object]], dict[object, str]]:
    """Neighbour lists and labels of the graph whose vertices are nodes and edges."""
    neighbours: dict[object, list[object]] = {v: [] for v in graph}
    labels: dict[object, str] = {}
    try:
        for v, data in graph.nodes(data=True):
            labels[v] = str(data["label"])
        for u, v, data in graph.edges(data=True):
            if u != v:
                edge = ("edge", u, v)
                labels[edge] = str(data["label"])
                neighbours[edge] = [u, v]
                neighbours[u].append(edge)
                neighbours[v].append(edge)
    except KeyError:
        raise ValueError("nspdk: every node and edge needs an attribute 'label'.") from None
    return neighbours, labels


def _layers(
    neighbours: dict[object, list[object]], root: object, deepest: int
) -> list[list[object]]:
    """The vertices at distance 0, 1, ... of ``root``."""
    depth = {root: 0}
    layers: list[list[object]] = [[root]]
    queue = deque([root])
    while queue:
        u = queue.popleft()
        if depth[u] == deepest:
            break
        for v in neighbours[u]:
            if v not in depth:
                depth[v] = depth[u] + 1
                if depth[v] == len(layers):
                    layers.append([])
                layers[depth[v]].append(v)
                queue.append(v)
    return layers


def _chain(
    neighbours: dict[object, list[object]],
    labels: dict[object, str],
    layers: Sequence[Sequence[object]],
) -> list[int]:
    """A hash of the neighbourhood for every radius."""
    chain, running = [], 0
    for layer in layers:
        running = _hash(running, sorted((labels[v], len(neighbours[v])) for v in layer))
        chain.append(running)
    return chain


def _normalised(blocks: Iterable[Counter[int]]) -> Features:
    out: Features = {}
    for block in blocks:
        norm = math.sqrt(sum(count * count for count in block.values()))
        out.update({feature: count / norm for feature, count in block.items()})
    norm = math.sqrt(sum(weight * weight for weight in out.values()))
    return {feature: weight / norm for feature, weight in out.items()}
