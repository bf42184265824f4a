"""How close generated graphs come to real ones.

Maximum mean discrepancies are the squared, biased ones of the published evaluations
(V-statistic: pairs of a graph with itself included), with the kernels of Jo et al. (2022). Their
intervals (jackknife) describe the scatter over generated graphs; with 20 graphs it is as large as
the differences between published models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import networkx as nx
import numpy as np
from scipy.spatial.distance import cdist
from scipy.stats import chi2, t

from molediff.graphs.nspdk import Features
from molediff.graphs.nspdk import features as nspdk_features
from molediff.graphs.orbits import orbit_counts
from shared.metrics import Estimate, proportion

# -- discrepancies ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Statistic:
    """A summary of a graph and the kernel that compares two of them.

    ``describe``: graph -> vector; shorter vectors are padded with zeros. ``histogram``: vectors
    are normalised to sum 1 and compared by exp(-EMD^2 / 2 sigma^2), where the earth mover's
    distance between bins i and j is |i - j| / ``scaling``; otherwise by their Euclidean distance.
    """

    describe: Callable[[nx.Graph], np.ndarray]
    sigma: float = 1.0
    scaling: float = 1.0
    histogram: bool = True

    def vectors(self, graphs: Sequence[nx.Graph]) -> list[np.ndarray]:
        return [self.describe(graph) for graph in graphs]

    def kernel(self, a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> np.ndarray:
        """Kernel values [len(a), len(b)]."""
        width = max(len(v) for v in (*a, *b))
        x, y = (
            np.stack([np.pad(v, (0, width - len(v))) for v in s]).astype(float) for s in (a, b)
        )
        if self.histogram:
            x, y = (np.cumsum(v / v.sum(1, keepdims=True), axis=1) for v in (x, y))
            distance = cdist(x, y, "cityblock") / self.scaling
        else:
            distance = cdist(x, y)
        return np.asarray(np.exp(-(distance**2) / (2 * self.sigma**2)))


def degree_histogram(graph: nx.Graph) -> np.ndarray:
    return np.array(nx.degree_histogram(graph))


def clustering_histogram(graph: nx.Graph) -> np.ndarray:
    return np.histogram(list(nx.clustering(graph).values()), bins=100, range=(0.0, 1.0))[0]


def mean_orbits(graph: nx.Graph) -> np.ndarray:
    return np.asarray(orbit_counts(nx.to_numpy_array(graph, weight=None)).mean(0))


def spectrum_histogram(graph: nx.Graph) -> np.ndarray:
    laplacian = nx.normalized_laplacian_matrix(graph, weight=None).toarray()
    return np.histogram(np.linalg.eigvalsh(laplacian), bins=200, range=(-1e-5, 2.0))[0]


STATISTICS: Mapping[str, Statistic] = {
    "degree": Statistic(degree_histogram),
    "clustering": Statistic(clustering_histogram, sigma=0.1, scaling=100.0),
    "orbit": Statistic(mean_orbits, sigma=30.0, histogram=False),
    "spectrum": Statistic(spectrum_histogram),
}
"""The published choices."""


def tidy(graph: nx.Graph) -> nx.Graph:
    """A copy without edges from a node to itself and without nodes that have no edge, as the
    published evaluations see it; at least one node."""
    out = nx.Graph(graph.edges())
    out.remove_edges_from(list(nx.selfloop_edges(out)))
    out.remove_nodes_from(list(nx.isolates(out)))
    if len(out) == 0:
        out.add_node(0)
    return nx.convert_node_labels_to_integers(out)


def mmd(statistic: Statistic, reference: Sequence[nx.Graph], made: Sequence[nx.Graph]) -> Estimate:
    """The squared discrepancy of one statistic; NaN when a set is empty."""
    if not reference or not made:
        return Estimate(math.nan, len(made), math.nan, math.nan)
    a, b = statistic.vectors(reference), statistic.vectors(made)
    constant = float(statistic.kernel(a, a).mean())
    within, across = statistic.kernel(b, b), statistic.kernel(a, b).mean(0)
    return _jackknifed(constant, within, across)


def graph_mmds(
    reference: Sequence[nx.Graph], made: Sequence[nx.Graph], names: Collection[str] | None = None
) -> dict[str, Estimate]:
    """The discrepancies of :data:`STATISTICS` on tidied graphs, and their mean over degree,
    clustering and orbit as papers report it ('average')."""
    reference, made = [tidy(g) for g in reference], [tidy(g) for g in made]
    chosen = STATISTICS if names is None else {name: STATISTICS[name] for name in names}
    out = {name: mmd(statistic, reference, made) for name, statistic in chosen.items()}
    parts = [out[name] for name in ("degree", "clustering", "orbit") if name in out]
    if len(parts) == 3:
        low, value, high = (
            float(np.mean([getattr(part, key) for part in parts]))
            for key in ("low", "value", "high")
        )
        out["average"] = Estimate(value, len(made), low, high)
    return out


def _jackknifed(constant: float, within: np.ndarray, across: np.ndarray) -> Estimate:
    """constant + mean(within) - 2 mean(across) with its jackknife interval over the rows."""
    n = len(across)
    value = constant + within.mean() - 2.0 * across.mean()
    if n < 3:
        return Estimate(float(value), n, math.nan, math.nan)
    rows = within.sum(1)
    left = within.sum() - 2.0 * rows + np.diag(within)
    each = constant + left / (n - 1) ** 2 - 2.0 * (across.sum() - across) / (n - 1)
    error = math.sqrt((n - 1) / n * float(np.square(each - each.mean()).sum()))
    half = float(t.ppf(0.975, n - 1)) * error
    return Estimate(float(value), n, float(value) - half, float(value) + half)


def nspdk_mmd(reference: Sequence[nx.Graph] | Features, made: Sequence[nx.Graph]) -> Estimate:
    """The squared discrepancy under the neighbourhood subgraph pairwise distance kernel, of
    labelled graphs (see :func:`molediff.graphs.nspdk.features`); ``reference``: graphs, or their
    :func:`nspdk_mean`."""
    made = [graph for graph in made if len(graph)]
    goal = reference if isinstance(reference, dict) else nspdk_mean(reference)
    if not goal or not made:
        return Estimate(math.nan, len(made), math.nan, math.nan)
    vectors = [nspdk_features(graph) for graph in made]
    mean = _mean(vectors)
    value = sum((mean.get(k, 0.0) - goal.get(k, 0.0)) ** 2 for k in {*mean, *goal})
    # |m - g|^2 is linear in each vector to first order: its infinitesimal jackknife
    slopes = [
        2.0 * sum(w * (mean[k] - goal.get(k, 0.0)) for k, w in vector.items())
        for vector in vectors
    ]
    n = len(vectors)
    half = 1.96 * float(np.std(slopes)) / math.sqrt(n)
    return Estimate(value, n, value - half, value + half)


def nspdk_mean(graphs: Iterable[nx.Graph]) -> Features:
    """The mean feature vector of labelled graphs."""
    return _mean([nspdk_features(graph) for graph in graphs])


def _mean(vectors: Sequence[Features]) -> Features:
    out: Features = {}
    for vector in vectors:
        for key, weight in vector.items():
            out[key] = out.get(key, 0.0) + weight / len(vectors)
    return out


# -- valid, unique, novel ---------------------------------------------------------------------


def distinct(graphs: Sequence[nx.Graph]) -> list[nx.Graph]:
    """The first of every class of isomorphic graphs."""
    groups: dict[bytes, list[nx.Graph]] = {}
    for graph in graphs:
        group = groups.setdefault(_invariant(graph), [])
        if not any(_same(graph, g) for g in group):
            group.append(graph)
    return [graph for group in groups.values() for graph in group]


def _invariant(graph: nx.Graph) -> bytes:
    """Equal for isomorphic graphs, rarely for others: the sorted orbit counts of the nodes."""
    counts = orbit_counts(nx.to_numpy_array(graph, weight=None))
    return counts[np.lexsort(counts.T)].tobytes()


def _same(a: nx.Graph, b: nx.Graph) -> bool:
    return bool(nx.is_isomorphic(a, b))


def is_planar(graph: nx.Graph) -> bool:
    """A connected planar graph."""
    return len(graph) > 0 and nx.is_connected(graph) and bool(nx.check_planarity(graph)[0])


def is_sbm(graph: nx.Graph, inside: float = 0.3, between: float = 0.005) -> bool:
    """A graph that looks like the stochastic block models of Martinkus et al. (2022): 2 to 5
    blocks of 20 to 40 nodes, and block densities that a Wald test accepts on average (mean
    p-value above 0.9).

    Blocks are found as communities of greatest modularity, then moved node by node to where
    their edges fit; the published evaluation infers them by minimal description length.
    """
    blocks = _blocks(graph)
    sizes = [len(block) for block in blocks]
    if not 2 <= len(blocks) <= 5 or min(sizes) < 20 or max(sizes) > 40:
        return False
    p_values = []
    for i, a in enumerate(blocks):
        for j, b in enumerate(blocks[: i + 1]):
            edges = nx.cut_size(graph, a, b) if i != j else graph.subgraph(a).number_of_edges()
            pairs = len(a) * len(b) if i != j else len(a) * (len(a) - 1) / 2
            p, wanted = edges / pairs, between if i != j else inside
            p_values.append(chi2.sf((p - wanted) ** 2 / (p * (1 - p) + 1e-6), 1))
    return float(np.mean(p_values)) > 0.9


def _blocks(graph: nx.Graph) -> list[set[int]]:
    blocks = [set(c) for c in nx.community.louvain_communities(graph, seed=0) if c]
    for _ in range(10):
        moved = False
        for node in graph:
            home = next(k for k, block in enumerate(blocks) if node in block)
            ties = [
                sum(v in block for v in graph[node]) / max(len(block - {node}), 1)
                for block in blocks
            ]
            best = int(np.argmax(ties))
            if ties[best] > ties[home] and len(blocks[home]) > 1:
                blocks[home].remove(node)
                blocks[best].add(node)
                moved = True
        if not moved:
            break
    return blocks


VALID: Mapping[str, Callable[[nx.Graph], bool]] = {"planar": is_planar, "sbm": is_sbm}


def valid_unique_novel(
    made: Sequence[nx.Graph], training: Sequence[nx.Graph], valid: Callable[[nx.Graph], bool]
) -> dict[str, Estimate]:
    """Shares of all generated graphs: valid, unique, novel, and all three ('vun', a class of
    isomorphic graphs counted once)."""
    n = len(made)
    known: dict[bytes, list[nx.Graph]] = {}
    for graph in training:
        known.setdefault(_invariant(graph), []).append(graph)
    novel = [g for g in made if not any(_same(g, k) for k in known.get(_invariant(g), ()))]
    good = [g for g in novel if valid(g)]
    return {
        "valid": proportion(sum(map(valid, made)), n),
        "unique": proportion(len(distinct(made)), n),
        "novel": proportion(len(novel), n),
        "vun": proportion(len(distinct(good)), n),
    }
