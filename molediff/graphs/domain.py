"""Plain graphs as a domain: nodes carry their degree as a one-hot row, edges are 0 or 1."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import networkx as nx
import numpy as np
from torch import Tensor

from molediff.graphs.data import read_graphs, write_graphs
from molediff.graphs.decode import decode_graph
from molediff.graphs.generators import GENERATORS, ego_graphs, generate
from molediff.graphs.metrics import VALID, graph_mmds, valid_unique_novel
from molediff.graphs.pairs import PairDomain, Record
from shared.configuration import reject_unknown
from shared.domains import Invalid
from shared.metrics import Estimate, proportion
from shared.process import State


class GraphDomain(PairDomain[nx.Graph]):
    """Plain graphs.

    Args:
        data: the name of a generator (community_small, grid, planar, sbm), or a file or folder
            (see :mod:`molediff.graphs.data`).
        features: width of the one-hot degree; None: largest degree of the data plus 1.
        connected: refuse graphs of several components.
        ego: the data are one network, and the graphs the neighbourhoods of its nodes up to this
            distance (see :func:`molediff.graphs.generators.ego_graphs`).
        n, seed: how many graphs to generate, and from which seed.
        valid: 'planar' or 'sbm' adds validity, uniqueness and novelty to the metrics.
    """

    name: ClassVar[str] = "graphs"

    def __init__(
        self,
        data: str | None = None,
        nodes: int | None = None,
        features: int | None = None,
        test: float = 0.2,
        validation: float = 0.0,
        connected: bool = True,
        ego: int | None = None,
        n: int | None = None,
        seed: int = 0,
        valid: str | None = None,
    ) -> None:
        super().__init__(data, nodes, test, validation)
        if valid is not None:
            reject_unknown("graphs, valid", [valid], VALID)
        self._features, self.connected, self.n, self.seed = features, connected, n, seed
        self.valid, self.ego = valid, ego

    def load(self) -> list[nx.Graph | Invalid]:
        if self.data in GENERATORS:
            return list(generate(str(self.data), self.n, self.seed))
        if self.ego is None:
            return list(read_graphs(str(self.data), self.connected))
        found = list(read_graphs(str(self.data), connected=False))
        networks = [graph for graph in found if not isinstance(graph, Invalid)]
        if not networks:
            raise ValueError(f"graphs: {self.data} holds no network ({found[0]}).")
        most = {} if self._nodes is None else {"high": self._nodes}
        return list(ego_graphs(networks[0], self.ego, **most))

    @property
    def features(self) -> int:
        if self._restored is not None:
            return int(self._restored["features"])
        if self._features is not None:
            return self._features
        return 1 + max(int(r.types.max()) for _, r in self._loaded[0])

    def record(self, item: nx.Graph) -> Record | str:
        degrees = np.array([d for _, d in item.degree()], dtype=np.int64)
        if self._nodes is not None and len(item) > self._nodes:
            return f"{len(item)} nodes, more than the model's {self._nodes}"
        if self._features is not None and degrees.max() >= self._features:
            return f"a node of degree {degrees.max()}; the model has {self._features} degrees"
        pairs = np.array(item.edges(), dtype=np.int64).reshape(-1, 2)
        return Record(degrees, pairs, np.ones(len(pairs)))

    def decode(self, state: State, mask: Tensor | None) -> list[nx.Graph | Invalid]:
        masks = [None] * len(state["edges"]) if mask is None else list(mask)
        return [decode_graph(edges, m) for edges, m in zip(state["edges"], masks, strict=True)]

    @property
    def suffix(self) -> str:
        return ".g6"

    def read(self, path: Path) -> Iterator[nx.Graph | Invalid]:
        return read_graphs(path, connected=False)

    def write(self, path: Path, items: Iterable[nx.Graph]) -> None:
        write_graphs(path, items)

    def metrics(
        self, items: Sequence[nx.Graph | Invalid], reference: Sequence[nx.Graph] | None = None
    ) -> dict[str, Estimate]:
        """Discrepancies to ``reference`` (by default the test graphs): see
        :func:`molediff.graphs.metrics.graph_mmds`. Reports larger than the published test sets
        have less bias: compare sets of equal size only."""
        made = [item for item in items if not isinstance(item, Invalid)]
        out = {"decoded": proportion(len(made), len(items))}
        if not made:
            return out
        if reference is None and self.data is not None:
            reference = self.test_items or self.training_items
        out.update(graph_mmds(reference, made) if reference else {})
        if self.valid is not None and self.data is not None:
            out.update(valid_unique_novel(made, self.training_items, VALID[self.valid]))
        return out

    def view(self, items: Sequence[nx.Graph]) -> str:
        """Drawings as SVG."""
        return "".join(_drawing(graph) for graph in items[:24])


def _drawing(graph: nx.Graph, side: int = 160) -> str:
    place = nx.spring_layout(graph, seed=0) if len(graph) > 1 else {next(iter(graph)): (0.0, 0.0)}
    at = {v: (side * (0.5 + 0.45 * p[0]), side * (0.5 + 0.45 * p[1])) for v, p in place.items()}
    lines = "".join(
        f'<line x1="{at[a][0]:.1f}" y1="{at[a][1]:.1f}" x2="{at[b][0]:.1f}" y2="{at[b][1]:.1f}"/>'
        for a, b in graph.edges()
    )
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in at.values())
    return (
        f'<svg width="{side}" height="{side}" role="img" aria-label="graph of {len(graph)} nodes">'
        f'<g stroke="#a0aec0">{lines}</g><g fill="#2b6cb0">{dots}</g></svg>'
    )
