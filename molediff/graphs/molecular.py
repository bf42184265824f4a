"""Molecules as graphs of heavy atoms: nodes carry their element as a one-hot row, edges the bond
orders 0 to 3 of the kekulised molecule."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from rdkit import Chem
from rdkit.Chem import Descriptors
from rdkit.Chem.Draw import rdMolDraw2D
from torch import Tensor

from molediff import files
from molediff.graphs.chemistry import Reference, molecule_metrics
from molediff.graphs.decode import decode_molecule, with_coordinates
from molediff.graphs.pairs import PairDomain, Record
from molediff.molecules import AROMATIC, Molecule, atomic_number
from shared.configuration import ConfigurationError, nearest
from shared.domains import Invalid
from shared.metrics import Estimate
from shared.process import State

_DESCRIPTORS: dict[str, Callable[[Chem.Mol], float]] = dict(Descriptors.descList)


class MolecularGraphDomain(PairDomain[Molecule]):
    """Molecules as graphs of heavy atoms with bond orders.

    Args:
        data: a file of SMILES or a table with a column 'smiles'.
        elements: symbols, in the order of the node features.
        test_indices: a JSON list of rows (from 0) that are the test set, as GDSS ships them;
            in place of ``test``.
        most: use the first so many records only.
        properties: what a property model learns: numbers of the table, or descriptors of RDKit
            by their names there (qed, MolLogP, TPSA, ...).
        dimensions: of coordinates in files that hold some (.sdf): 2 a drawing, 3 a conformer with
            hydrogens.

    Raises:
        ValueError: dimensions other than 2 and 3.
    """

    name: ClassVar[str] = "molecular_graphs"

    def __init__(
        self,
        data: str | None = None,
        elements: Sequence[str] = ("C", "N", "O", "F"),
        nodes: int | None = None,
        test: float = 0.1,
        validation: float = 0.0,
        test_indices: str | None = None,
        most: int | None = None,
        properties: Sequence[str] = (),
        dimensions: int = 2,
    ) -> None:
        super().__init__(data, nodes, test, validation)
        if dimensions not in (2, 3):
            raise ValueError(f"{self.name}: dimensions={dimensions}; choose 2 or 3.")
        self.properties, self.dimensions = tuple(properties), dimensions
        self.elements = tuple(elements)
        self._numbers = [atomic_number(symbol) for symbol in elements]
        self.test_indices, self.most = test_indices, most

    def load(self) -> list[Molecule | Invalid]:
        items: list[Molecule | Invalid] = []
        for item in files.read(str(self.data)):
            if self.most is not None and len(items) == self.most:
                break
            items.append(item)
        if self.test_indices is None:
            return items
        rows = set(_indices(Path(self.test_indices)))
        first = [item for i, item in enumerate(items) if i in rows]
        rest = [item for i, item in enumerate(items) if i not in rows]
        self._test_size = sum(self._usable(item) for item in first)
        return first + rest

    def _usable(self, item: Molecule | Invalid) -> bool:
        return not isinstance(item, Invalid) and not isinstance(self.record(item), str)

    def _cut(self) -> int:
        total = len(self._loaded[0])
        return super()._cut() if self.test_indices is None else min(self._test_size, total - 1)

    @property
    def features(self) -> int:
        return len(self.elements)

    def statistics(self) -> dict[str, Any]:
        return {**super().statistics(), "elements": list(self.elements)}

    def restore(self, statistics: Mapping[str, Any]) -> None:
        super().restore(statistics)
        self.elements = tuple(statistics["elements"])
        self._numbers = [atomic_number(symbol) for symbol in self.elements]

    def record(self, item: Molecule) -> Record | str:
        if item.bonds is None or item.orders is None:
            return "a molecule without bonds; perceive them first (molediff.bonds)"
        try:
            plain = item.kekulised() if (item.orders == AROMATIC).any() else item
        except ValueError as error:
            return str(error)
        heavy = plain.atomic_numbers > 1
        strange = sorted(set(plain.atomic_numbers[heavy].tolist()) - set(self._numbers))
        if strange:
            names = ", ".join(Chem.GetPeriodicTable().GetElementSymbol(z) for z in strange)
            return f"elements that the model does not have: {names}"
        if not heavy.any():
            return "no heavy atom"
        if self._nodes is not None and heavy.sum() > self._nodes:
            return f"{heavy.sum()} heavy atoms, more than the model's {self._nodes}"
        types = np.array([self._numbers.index(z) for z in plain.atomic_numbers[heavy].tolist()])
        bonds, orders = np.asarray(plain.bonds), np.asarray(plain.orders)
        kept = heavy[bonds].all(1)
        place = np.cumsum(heavy) - 1
        values = np.array([_value(item, name) for name in self.properties])
        return Record(types, place[bonds[kept]].reshape(-1, 2), orders[kept], values)

    def decode(self, state: State, mask: Tensor | None) -> list[Molecule | Invalid]:
        """Molecules with the property 'valid_without_correction' (0 or 1)."""
        out: list[Molecule | Invalid] = []
        for k, (nodes, edges) in enumerate(zip(state["nodes"], state["edges"], strict=True)):
            if mask is not None:
                nodes, edges = nodes[mask[k]], edges[mask[k]][:, mask[k]]
            found = decode_molecule(nodes, edges, self._numbers, str(k))
            if isinstance(found, Invalid):
                out.append(found)
            else:
                flag = {"valid_without_correction": int(found.valid_without_correction)}
                out.append(found.molecule.replace(properties=flag))
        return out

    @property
    def suffix(self) -> str:
        return ".csv"

    def read(self, path: Path) -> Iterator[Molecule | Invalid]:
        return files.read(path)

    def write(self, path: Path, items: Iterable[Molecule]) -> None:
        """Append to a file of SMILES or, with coordinates made for it, of structures. Where no
        conformer is found the file has a drawing, and says so in a property."""
        if not any(part in (".smi", ".smiles", ".csv", ".tsv") for part in path.suffixes):
            items = (self._placed(item) for item in items)
        files.write(path, items)

    def _placed(self, item: Molecule) -> Molecule:
        try:
            return with_coordinates(item, self.dimensions)
        except ValueError as error:
            flat = with_coordinates(item, 2)
            return flat.replace(properties={**flat.properties, "coordinates": str(error)})

    def metrics(
        self, items: Sequence[Molecule | Invalid], reference: Sequence[Molecule] | None = None
    ) -> dict[str, Estimate]:
        """See :func:`molediff.graphs.chemistry.molecule_metrics`; ``reference`` is the test set,
        novelty is judged by the training set."""
        if self.data is None:
            return molecule_metrics(items, reference)
        goal = self._comparison if reference is None else reference
        return molecule_metrics(items, goal, self._known)

    @cached_property
    def _comparison(self) -> Reference | None:
        return Reference(self.test_items) if self.test_items else None

    @cached_property
    def _known(self) -> Reference:
        return Reference(self.training_items)

    def view(self, items: Sequence[Molecule]) -> str:
        """Structural formulas as SVG."""
        return "".join(_formula(molecule) for molecule in items[:24])


def _value(molecule: Molecule, name: str) -> float:
    """A number that came with the molecule, or a descriptor of RDKit; NaN where there is none.

    Raises:
        ConfigurationError: neither has that name.
    """
    if name in molecule.properties:
        try:
            return float(molecule.properties[name])
        except (TypeError, ValueError):
            return math.nan
    if name not in _DESCRIPTORS:
        raise ConfigurationError(
            f"domain.properties: no column and no descriptor '{name}'"
            f"{nearest(name, [*molecule.properties, *_DESCRIPTORS])}"
        )
    return float(_DESCRIPTORS[name](molecule.to_rdkit()))


def _indices(path: Path) -> list[int]:
    content = json.loads(path.read_text())
    rows = content.get("valid_idxs", []) if isinstance(content, dict) else content
    return [int(i) for i in rows]


def _formula(molecule: Molecule) -> str:
    drawer = rdMolDraw2D.MolDraw2DSVG(200, 160)
    drawer.DrawMolecule(Chem.Mol(molecule.to_rdkit()))
    drawer.FinishDrawing()
    return str(drawer.GetDrawingText()).split("?>", 1)[-1]
