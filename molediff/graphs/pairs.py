"""What plain graphs and molecular graphs share as domains: records, constants, batches, templates.

A state has the fields 'nodes' [b, n, F], one-hot rows, and 'edges' [b, n, n].
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from shared.configuration import reject_unknown
from shared.domains import Batch, Domain, Invalid
from shared.randomness import stream

Item = TypeVar("Item")


@dataclass(frozen=True)
class Record:
    """One graph as integers. ``types`` [n]: index of a node's feature; ``pairs`` [e, 2] and
    ``orders`` [e]: edges and their values; ``values`` [k]: properties in their units, NaN where
    unknown."""

    types: np.ndarray
    pairs: np.ndarray
    orders: np.ndarray
    values: np.ndarray = field(default_factory=lambda: np.empty(0))


class Records(Dataset[Record]):
    """A list of records as a data set."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = list(records)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        return self.records[index]


class PairDomain(Domain[Item]):
    """What both domains share. Subclasses read their data and turn items into records.

    Args:
        data: where the data are; None for a model that only generates.
        nodes: largest number of nodes; None: that of the data.
        test: share of the data, from the beginning, kept for comparison, as GDSS splits.
        validation: share of the rest that validates.

    Raises:
        ValueError: shares outside [0, 1), or data without any usable graph.
    """

    solver: ClassVar[str] = "s4"
    grid: ClassVar[str] = "gdss"
    properties: tuple[str, ...] = ()
    """What a property model of these graphs predicts."""

    def __init__(
        self, data: str | None, nodes: int | None, test: float, validation: float
    ) -> None:
        if not (0 <= test < 1 and 0 <= validation < 1):
            raise ValueError(f"{self.name}: test and validation are shares in [0, 1).")
        self.data, self.test, self.validation = data, test, validation
        self._nodes = nodes
        self._restored: Mapping[str, Any] | None = None

    # -- data and constants

    @abstractmethod
    def load(self) -> list[Item | Invalid]:
        """All items of ``data``, with those that cannot be used as ``Invalid``."""

    @abstractmethod
    def record(self, item: Item) -> Record | str:
        """The record of an item, or why the model cannot hold it."""

    @property
    @abstractmethod
    def features(self) -> int:
        """Width of a node's row."""

    @cached_property
    def _loaded(self) -> tuple[list[tuple[Item, Record]], list[Invalid]]:
        if self.data is None:
            raise ValueError(f"{self.name}: no data; set domain.data to a file or generator.")
        good: list[tuple[Item, Record]] = []
        bad: list[Invalid] = []
        for i, item in enumerate(self.load()):
            if isinstance(item, Invalid):
                bad.append(item)
                continue
            record = self.record(item)
            if isinstance(record, str):
                bad.append(Invalid(f"{self.data}, record {i}", record))
            else:
                good.append((item, record))
        if not good:
            why = f" ({bad[0].record}: {bad[0].reason})" if bad else ""
            raise ValueError(f"{self.name}: {self.data} has no usable graph{why}.")
        return good, bad

    @property
    def rejected(self) -> list[Invalid]:
        """Items of the data that the model cannot hold, and why."""
        return self._loaded[1]

    def _cut(self) -> int:
        return int(self.test * len(self._loaded[0]))

    @property
    def training_items(self) -> list[Item]:
        return [item for item, _ in self._loaded[0][self._cut() :]]

    @property
    def test_items(self) -> list[Item]:
        return [item for item, _ in self._loaded[0][: self._cut()]]

    @cached_property
    def _training_records(self) -> list[Record]:
        return [record for _, record in self._loaded[0][self._cut() :]]

    @property
    def nodes(self) -> int:
        """Largest number of nodes of a graph."""
        if self._restored is not None:
            return int(self._restored["nodes"])
        return self._nodes or max(len(r.types) for _, r in self._loaded[0])

    @property
    def sizes(self) -> dict[int, int]:
        """Number of nodes -> number of training graphs."""
        if self._restored is not None:
            return {int(n): int(count) for n, count in self._restored["sizes"].items()}
        return dict(sorted(Counter(len(r.types) for r in self._training_records).items()))

    @property
    def second_moments(self) -> dict[str, float]:
        """Mean squares of the entries of each field over the training graphs."""
        if self._restored is not None:
            return dict(self._restored["second_moments"])
        nodes = sum(len(r.types) for r in self._training_records)
        pairs = sum(len(r.types) * (len(r.types) - 1) for r in self._training_records)
        squares = sum(2.0 * float(np.square(r.orders).sum()) for r in self._training_records)
        return {"nodes": nodes / (nodes * self.features), "edges": squares / max(pairs, 1)}

    @cached_property
    def property_statistics(self) -> dict[str, dict[str, float]]:
        """Property -> mean, mean absolute deviation, min and max over the training graphs."""
        if self._restored is not None:
            return dict(self._restored.get("properties", {}))
        values = [r.values for r in self._training_records] if self.properties else []
        found = {}
        for name, column in zip(self.properties, np.array(values).T, strict=True):
            known = column[~np.isnan(column)]
            if not len(known):
                raise ValueError(f"domain.properties: '{name}' is unknown for every graph.")
            mad = float(np.abs(known - known.mean()).mean())
            found[name] = {"mean": float(known.mean()), "mad": mad or 1.0,
                           "min": float(known.min()), "max": float(known.max())}  # fmt: skip
        return found

    def statistics(self) -> dict[str, Any]:
        more = {"properties": self.property_statistics} if self.properties else {}
        return {
            **more,
            "domain": self.name,
            "nodes": self.nodes,
            "features": self.features,
            "sizes": {str(n): count for n, count in self.sizes.items()},
            "second_moments": self.second_moments,
        }

    def restore(self, statistics: Mapping[str, Any]) -> None:
        if statistics.get("domain") != self.name:
            raise ValueError(
                f"the checkpoint is of domain {statistics.get('domain')}, not {self.name}."
            )
        self._restored = dict(statistics)
        self.properties = tuple(statistics.get("properties", ()))

    def datasets(self) -> tuple[Dataset[Any], Dataset[Any]]:
        records = self._training_records
        held = int(self.validation * len(records))
        return Records(records[held:]), Records(records[:held] or records)

    def collate(self, records: Sequence[Record]) -> Batch:
        batch = self._empty([len(r.types) for r in records])
        nodes, edges = batch.state["nodes"], batch.state["edges"]
        for k, r in enumerate(records):
            nodes[k, torch.arange(len(r.types)), torch.from_numpy(r.types)] = 1.0
            i, j = torch.from_numpy(r.pairs).T
            value = torch.from_numpy(r.orders).to(edges.dtype)
            edges[k, i, j] = value
            edges[k, j, i] = value
        if not self.properties:
            return batch
        values = torch.from_numpy(np.stack([r.values for r in records]))
        return Batch(batch.state, batch.mask, {"context": self._standardised(values)})

    def _standardised(self, values: Tensor) -> Tensor:
        """Properties [b, k] -> (value - mean) / mean absolute deviation, float32."""
        rows = [self.property_statistics[name] for name in self.properties]
        mean, mad = (torch.tensor([row[key] for row in rows]) for key in ("mean", "mad"))
        return ((values - mean) / mad).float()

    def _empty(self, sizes: Sequence[int]) -> Batch:
        n = self.nodes
        state = {
            "nodes": torch.zeros(len(sizes), n, self.features),
            "edges": torch.zeros(len(sizes), n, n),
        }
        return Batch(state, torch.arange(n) < torch.tensor(sizes)[:, None])

    def template(self, seed: int, indices: Sequence[int], **request: Any) -> Batch:
        """``request.nodes``: the number of nodes of every graph; by default it is drawn from the
        training graphs."""
        reject_unknown(f"{self.name}, request", request, ("nodes",))
        wanted = request.get("nodes")
        if wanted is not None:
            if not 1 <= int(wanted) <= self.nodes:
                raise ValueError(f"request.nodes={wanted}: the model has 1 to {self.nodes} nodes.")
            return self._empty([int(wanted)] * len(indices))
        if not self.sizes:
            raise ValueError(
                "the checkpoint came without numbers of nodes; set request.nodes, or convert it "
                "again together with its training graphs."
            )
        numbers, counts = zip(*self.sizes.items(), strict=True)
        edges = np.cumsum(counts) / sum(counts)
        draws = [stream(seed, i, "template", 0).random() for i in indices]
        return self._empty([numbers[int(k)] for k in np.searchsorted(edges, draws, "right")])
