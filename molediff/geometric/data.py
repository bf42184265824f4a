"""A data set of 3D molecules: memory-mapped arrays in a folder.

``molediff.geometric.prepare`` makes such a folder. It holds, for m molecules with a atoms in all:

============================  ===================================================================
``atomic_numbers.npy``        [a] uint8
``positions.npy``             [a, 3] float32, Angstrom
``charges.npy``               [a] int8, formal charges
``offsets.npy``               [m + 1] int64: molecule i has the atoms offsets[i] to offsets[i+1]
``properties.npy``            [m, p] float64 in the units of data.json; NaN where unknown
``split.npy``                 [m] int8: 0 train, 1 valid, 2 test
``record.npy``                [m] int64: number of the record in its source (QM9: gdb index)
``smiles.txt``                a line per molecule, empty where the source tells no bonds
``data.json``                 elements, histogram of sizes, property statistics, source, options
``invalid.jsonl``             records left out, each with its reason
============================  ===================================================================
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from molediff.molecules import SYMBOLS, Molecule

SPLITS = ("train", "valid", "test")
FORMAT = 1


class MoleculeData(Dataset[Molecule]):
    """The molecules of a prepared folder, or some of them.

    Args:
        path: folder made by ``prepare``.
        rows: which molecules, as rows of the folder; None for all.

    Raises:
        FileNotFoundError: no data.json there.
        ValueError: a folder of another version.
    """

    def __init__(self, path: str | Path, rows: np.ndarray | None = None) -> None:
        self.path = Path(path)
        if not (self.path / "data.json").exists():
            raise FileNotFoundError(f"{path} holds no data set: prepare one there first")
        self.info: dict[str, Any] = json.loads((self.path / "data.json").read_text())
        if self.info.get("format") != FORMAT:
            raise ValueError(f"{path} was made by another version: prepare it again")
        self.atomic_numbers = self._array("atomic_numbers")
        self.positions = self._array("positions")
        self.charges = self._array("charges")
        self.properties = self._array("properties")
        self.offsets = np.asarray(self._array("offsets"))
        self.split = np.asarray(self._array("split"))
        self.record = np.asarray(self._array("record"))
        self.rows = np.arange(len(self.record)) if rows is None else np.asarray(rows)
        self.sizes = np.diff(self.offsets)[self.rows]

    def _array(self, name: str) -> np.ndarray:
        array: np.ndarray = np.load(self.path / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        return array

    def __reduce__(self) -> tuple[Any, ...]:
        return MoleculeData, (self.path, self.rows)  # workers map the files themselves

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Molecule:
        row = int(self.rows[index])
        atoms = slice(int(self.offsets[row]), int(self.offsets[row + 1]))
        return Molecule(
            self.atomic_numbers[atoms],
            self.positions[atoms],
            self.charges[atoms],
            properties=dict(zip(self.property_names, self.properties[row].tolist(), strict=True)),
            name=str(self.record[row]),
        )

    def __iter__(self) -> Iterator[Molecule]:
        return (self[i] for i in range(len(self)))

    def take(self, indices: Sequence[int] | np.ndarray) -> MoleculeData:
        """Some of these molecules, by index or boolean mask."""
        return MoleculeData(self.path, self.rows[np.asarray(indices)])

    def subset(self, split: str) -> MoleculeData:
        """Those of ``train``, ``valid`` or ``test``.

        Raises:
            ValueError: another name.
        """
        if split not in SPLITS:
            raise ValueError(f"split={split!r}: expected one of {', '.join(SPLITS)}")
        return self.take(self.split[self.rows] == SPLITS.index(split))

    @property
    def elements(self) -> tuple[int, ...]:
        """Atomic numbers that occur, ascending."""
        return tuple(self.info["elements"])

    @property
    def property_names(self) -> tuple[str, ...]:
        return tuple(self.info["properties"])

    @property
    def statistics(self) -> dict[str, dict[str, Any]]:
        """Property -> unit, mean, mad (mean absolute deviation from the mean), min, max and the
        number n of known values, over the training molecules."""
        return dict(self.info["properties"])

    def histogram(self) -> dict[int, int]:
        """Number of atoms -> how many of these molecules have it."""
        sizes, counts = np.unique(self.sizes, return_counts=True)
        return dict(zip(sizes.tolist(), counts.tolist(), strict=True))

    def column(self, name: str) -> np.ndarray:
        """[len(self)] values of a property, NaN where unknown.

        Raises:
            ValueError: no such property.
        """
        if name not in self.property_names:
            known = ", ".join(self.property_names) or "none"
            raise ValueError(f"{self.path} has no property {name!r}; it has {known}")
        return np.asarray(self.properties[self.rows, self.property_names.index(name)])

    def smiles(self) -> list[str]:
        """SMILES as the source has them, empty where it tells none."""
        lines = (self.path / "smiles.txt").read_text().split("\n")
        return [lines[row] for row in self.rows.tolist()]

    def __repr__(self) -> str:
        elements = " ".join(SYMBOLS[z] for z in self.elements)
        return f"MoleculeData({str(self.path)!r}, {len(self)} molecules of {elements})"
