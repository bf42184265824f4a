"""Molecules of a prepared data set as records, and what a model remembers of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset

from molediff.geometric.data import MoleculeData
from molediff.molecules import SYMBOLS


class Record(NamedTuple):
    """One molecule as arrays: ``elements`` [n] index into the element list, ``positions`` [n, 3],
    ``charges`` [n], ``context`` [k] standardised properties, NaN where unknown."""

    elements: np.ndarray
    positions: np.ndarray
    charges: np.ndarray
    context: np.ndarray = np.empty(0, np.float32)


class Records(Dataset[Record]):
    """The molecules of a prepared data set as model input; ``lengths`` are their sizes,
    ``context`` [m, k] their standardised properties.

    Raises:
        ValueError: the data hold an element that is not in the list.
    """

    def __init__(
        self, data: MoleculeData, elements: Sequence[int], context: np.ndarray | None = None
    ) -> None:
        self.data, self.lengths = data, data.sizes
        self.context = np.empty((len(data), 0), np.float32) if context is None else context
        if unknown := [SYMBOLS[z] for z in data.elements if z not in elements]:
            raise ValueError(
                f"domain.data={data.path} holds {', '.join(unknown)}; the model knows "
                f"{', '.join(SYMBOLS[z] for z in elements)}."
            )
        self._place = np.full(119, -1)
        self._place[list(elements)] = np.arange(len(elements))

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Record:
        row = int(self.data.rows[index])
        atoms = slice(int(self.data.offsets[row]), int(self.data.offsets[row + 1]))
        numbers = np.asarray(self.data.atomic_numbers[atoms])
        return Record(
            self._place[numbers],
            np.array(self.data.positions[atoms]),
            np.asarray(self.data.charges[atoms]),
            self.context[index],
        )


def visible(data: MoleculeData, properties: Sequence[str], labels: str) -> np.ndarray:
    """Which molecules show their properties [m] (boolean): all, or one half of those that have
    one, in the order of numpy's seed 42 (Hoogeboom et al. 2022, Sec. 5.2)."""
    if labels == "all" or not properties:
        return np.ones(len(data), dtype=bool)
    values = np.stack([data.column(name) for name in properties], 1)
    rows = np.flatnonzero(~np.isnan(values).all(1))
    order = np.random.RandomState(42).permutation(len(rows))
    half = order[: len(rows) // 2] if labels == "first" else order[len(rows) // 2 :]
    shown = np.zeros(len(data), dtype=bool)
    shown[rows[half]] = True
    return shown


def position_std(data: MoleculeData, most: int = 5000) -> float:
    """Over the first ``most`` molecules: the constant needs two digits; 1 for single atoms."""
    rows = [np.asarray(m.positions) for m in data.take(np.arange(min(most, len(data))))]
    square = sum(float(((x - x.mean(0)) ** 2).sum()) for x in rows)
    freedoms = sum(3 * max(len(x) - 1, 1) for x in rows)
    return float((square / freedoms) ** 0.5) or 1.0


def closed_shell(data: MoleculeData, least: int = 32) -> bool:
    """Fewer than ``least`` molecules could be even by chance."""
    totals = np.concatenate([[0], np.cumsum(data.atomic_numbers, dtype=np.int64)])[data.offsets]
    return len(data) >= least and not (np.diff(totals)[data.rows] % 2).any()


def element_counts(data: MoleculeData) -> dict[str, int]:
    """Symbol -> atoms of that element."""
    mask = np.zeros(len(data.split), dtype=bool)
    mask[data.rows] = True
    atoms = np.repeat(mask, np.diff(data.offsets))
    numbers, counts = np.unique(np.asarray(data.atomic_numbers)[atoms], return_counts=True)
    return {SYMBOLS[z]: int(c) for z, c in zip(numbers, counts, strict=True)}
