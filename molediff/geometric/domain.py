"""Molecules in 3D as a domain of the core.

A state has the fields 'positions' [b, n, 3] in Angstrom, centred, and 'types' [b, n, K], one-hot
rows times ``scale``; with ``charges`` also 'charges' [b, n, 1].
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from molediff.bonds import perceive
from molediff.files import read, write
from molediff.geometric.data import MoleculeData
from molediff.geometric.metrics import evaluate
from molediff.molecules import SYMBOLS, Molecule, atomic_number
from molediff.views import gallery
from shared.configuration import reject_unknown
from shared.domains import Batch, Domain, Invalid
from shared.metrics import Estimate
from shared.process import State
from shared.randomness import stream


class Record(NamedTuple):
    """One molecule as arrays: ``elements`` [n] index into the element list, ``positions`` [n, 3],
    ``charges`` [n]."""

    elements: np.ndarray
    positions: np.ndarray
    charges: np.ndarray


class Records(Dataset[Record]):
    """The molecules of a prepared data set as model input; ``lengths`` are their sizes."""

    def __init__(self, data: MoleculeData, elements: Sequence[int]) -> None:
        self.data, self.lengths = data, data.sizes
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
        )


class Molecules(Domain[Molecule]):
    """Molecules in 3D.

    Args:
        data: folder made by ``molediff data prepare``; None for a model that only generates.
        scale: value of a set entry of 'types' (published: 1/4).
        charges: None; 'formal': model formal charges; 'nuclear': EDM's redundant integer
            feature, the atomic number. charge_scale: value of one unit of charge.
        bonds: how bonds of generated molecules are read off their geometry: edm, rdkit or
            openbabel; a molecule that the rule cannot read is written without bonds.
    """

    name: ClassVar[str] = "molecules"
    solver: ClassVar[str] = "ddpm"  # loses least of those in benchmarks/molecules.py
    grid: ClassVar[str] = "time_uniform"

    def __init__(
        self,
        data: str | None = None,
        scale: float = 0.25,
        charges: str | None = None,
        charge_scale: float = 0.1,
        bonds: str = "rdkit",
    ) -> None:
        if charges not in (None, "formal", "nuclear"):
            raise ValueError(f"domain.charges={charges!r}: choose formal, nuclear or null.")
        self.data, self.scale, self.bonds = data, scale, bonds
        self.charges, self.charge_scale = charges, charge_scale
        self._restored: Mapping[str, Any] | None = None

    # -- constants ----------------------------------------------------------------------------

    @cached_property
    def _loaded(self) -> MoleculeData:
        if self.data is None:
            raise ValueError(
                "domain.data is not set: give a folder made by `molediff data prepare`."
            )
        return MoleculeData(self.data)

    def statistics(self) -> dict[str, Any]:
        if self._restored is not None:
            return dict(self._restored)
        training = self._loaded.subset("train")
        return {
            "domain": self.name,
            "elements": [SYMBOLS[z] for z in self._loaded.elements],
            "scale": self.scale,
            "charges": self.charges,
            "charge_scale": self.charge_scale,
            "position_std": _position_std(training),
            "sizes": {str(n): count for n, count in training.histogram().items()},
            "element_counts": _element_counts(training),
            "properties": self._loaded.statistics,
        }

    def restore(self, statistics: Mapping[str, Any]) -> None:
        found = statistics.get("domain")
        if found != self.name:
            raise ValueError(f"the checkpoint is of domain {found}, not {self.name}.")
        self._restored = dict(statistics)
        self.scale, self.charges = float(statistics["scale"]), statistics["charges"]
        self.charge_scale = float(statistics["charge_scale"])

    @cached_property
    def elements(self) -> tuple[int, ...]:
        """Atomic numbers of the columns of 'types'."""
        return tuple(atomic_number(symbol) for symbol in self.statistics()["elements"])

    @property
    def position_std(self) -> float:
        """Standard deviation of a centred coordinate over the training data, Angstrom."""
        return float(self.statistics()["position_std"])

    # -- training -----------------------------------------------------------------------------

    def datasets(self) -> tuple[Dataset[Record], Dataset[Record]]:
        training, validation = (self._loaded.subset(split) for split in ("train", "valid"))
        return Records(training, self.elements), Records(validation, self.elements)

    def collate(self, records: Sequence[Record]) -> Batch:
        sizes = [len(record.elements) for record in records]
        b, n, numbers = len(records), max(sizes), np.asarray(self.elements)
        batch = self._blank(sizes)
        types = np.zeros((b, n, len(self.elements)), np.float32)
        positions, charges = np.zeros((b, n, 3), np.float32), np.zeros((b, n, 1), np.float32)
        for row, record in enumerate(records):
            size = sizes[row]
            types[row, np.arange(size), record.elements] = self.scale
            positions[row, :size] = record.positions - record.positions.mean(0)
            units = record.charges if self.charges == "formal" else numbers[record.elements]
            charges[row, :size, 0] = self.charge_scale * units
        arrays = {"positions": positions, "types": types, "charges": charges}
        return Batch({name: torch.from_numpy(arrays[name]) for name in batch.state}, batch.mask)

    def _blank(self, sizes: Sequence[int]) -> Batch:
        b, n = len(sizes), max(sizes)
        widths = {"positions": 3, "types": len(self.elements), "charges": 1}
        names = [name for name in widths if name != "charges" or self.charges]
        state = {name: torch.zeros(b, n, widths[name]) for name in names}
        mask = torch.arange(n) < torch.tensor(sizes)[:, None]
        return Batch(state, None if min(sizes) == n else mask)

    # -- sampling -----------------------------------------------------------------------------

    def template(self, seed: int, indices: Sequence[int], **request: Any) -> Batch:
        """``request``: ``atoms``, the number of atoms of every molecule (by default drawn from
        the sizes of the training data)."""
        reject_unknown("molecules, request", request, ("atoms",))
        atoms = request.get("atoms")
        if atoms is not None:
            if not isinstance(atoms, int) or atoms < 1:
                raise ValueError(f"request.atoms={atoms}: give a whole number of at least 1.")
            return self._blank([atoms] * len(indices))
        sizes = self.statistics()["sizes"]
        if not sizes:
            raise ValueError("this model does not know the sizes of its data: give request.atoms.")
        values, counts = [int(n) for n in sizes], np.cumsum([sizes[n] for n in sizes])
        draws = [stream(seed, i, "template", 0).integers(counts[-1]) for i in indices]
        return self._blank([values[np.searchsorted(counts, d, "right")] for d in draws])

    def decode(self, state: State, mask: Tensor | None) -> list[Molecule | Invalid]:
        positions = state["positions"].float().numpy()
        numbers = np.asarray(self.elements)[state["types"].argmax(-1).numpy()]
        charges = np.zeros(numbers.shape, np.int8)
        if self.charges == "formal":
            units = state["charges"][..., 0].numpy() / self.charge_scale
            charges = np.rint(np.nan_to_num(units)).clip(-9, 9).astype(np.int8)
        sizes = [numbers.shape[1]] * len(numbers) if mask is None else mask.sum(1).tolist()
        return [
            self._molecule(str(row), numbers[row, :n], positions[row, :n], charges[row, :n])
            for row, n in enumerate(sizes)
        ]

    def _molecule(
        self, record: str, numbers: np.ndarray, positions: np.ndarray, charges: np.ndarray
    ) -> Molecule | Invalid:
        try:
            molecule = Molecule(numbers, positions, charges)
        except ValueError as error:
            return Invalid(record, str(error))
        try:
            return perceive(molecule, self.bonds)
        except ValueError:
            return molecule  # its geometry is kept; metrics count it as invalid

    # -- files and reports --------------------------------------------------------------------

    @property
    def suffix(self) -> str:
        return ".sdf"

    def read(self, path: Path) -> Iterator[Molecule | Invalid]:
        return read(path)

    def write(self, path: Path, items: Iterable[Molecule]) -> None:
        write(path, items)

    def metrics(
        self,
        items: Sequence[Molecule | Invalid],
        reference: Sequence[Molecule] | None = None,
    ) -> dict[str, Estimate]:
        """See :func:`molediff.evaluate`."""
        return evaluate(items, reference)

    def view(self, items: Sequence[Molecule]) -> str:
        """Rotatable structures, 2D drawings and histograms, against the data where known."""
        known = self.data is not None or self._restored is not None
        return gallery(items, self.statistics() if known else {})


def _position_std(data: MoleculeData, most: int = 5000) -> float:
    """Over the first ``most`` molecules: the constant needs two digits."""
    rows = [np.asarray(m.positions) for m in data.take(np.arange(min(most, len(data))))]
    square = sum(float(((x - x.mean(0)) ** 2).sum()) for x in rows)
    freedoms = sum(3 * max(len(x) - 1, 1) for x in rows)
    return float((square / freedoms) ** 0.5)


def _element_counts(data: MoleculeData) -> dict[str, int]:
    mask = np.zeros(len(data.split), dtype=bool)
    mask[data.rows] = True
    atoms = np.repeat(mask, np.diff(data.offsets))
    numbers, counts = np.unique(np.asarray(data.atomic_numbers)[atoms], return_counts=True)
    return {SYMBOLS[z]: int(c) for z, c in zip(numbers, counts, strict=True)}
