"""Molecules in 3D as a domain of the core.

A state has the fields 'positions' [b, n, 3] in Angstrom, centred, and 'types' [b, n, K], one-hot
rows times ``scale``; with ``charges`` also 'charges' [b, n, 1].
"""

from __future__ import annotations

import lzma
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from molediff.bonds import perceive
from molediff.files import read, write
from molediff.geometric import records
from molediff.geometric.data import MoleculeData
from molediff.geometric.metrics import evaluate
from molediff.geometric.records import Record, Records, visible
from molediff.molecules import SYMBOLS, Molecule, atomic_number
from molediff.targets import Target, as_texts
from molediff.views import gallery
from shared.configuration import reject_unknown
from shared.domains import Batch, Domain, Invalid
from shared.metrics import Estimate
from shared.process import State
from shared.randomness import stream

TRAINING = "smiles.txt.xz"
"""SMILES of the training molecules, beside the weights of a shared model."""


class Molecules(Domain[Molecule]):
    """Molecules in 3D.

    Args:
        data: folder made by ``molediff data prepare``; None for a model that only generates.
        scale: value of a set entry of 'types' (published: 1/4).
        properties: columns of the data that the model is told, or predicts.
        labels: whose properties training may see: 'all', or the 'first' or 'second' half of the
            labelled training molecules, so that a judge and what it judges learn from different
            labels (the protocol of EDM, halves drawn with seed 42).
        labelled: train only on molecules with at least one visible property.
        charges: None; 'formal': model formal charges; 'nuclear': EDM's redundant integer
            feature, the atomic number. charge_scale: value of one unit of charge.
        bonds: how bonds of generated molecules are read off their geometry: edm, rdkit or
            openbabel; a molecule that the rule cannot read is written without bonds.
    """

    name: ClassVar[str] = "molecules"
    # these lose least of those in benchmarks/molecules.py
    solver: ClassVar[str] = "dpmpp_2m_sde"
    grid: ClassVar[str] = "time_quadratic"
    # Heun fails on its long first steps (benchmarks/molecules.py); the others of several
    # evaluations a step are treated alike
    grids: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("Heun", "DPM2", "DPMSolverSinglestep"), "log_snr"
    )

    def __init__(
        self,
        data: str | None = None,
        scale: float = 0.25,
        charges: str | None = None,
        charge_scale: float = 0.1,
        bonds: str = "rdkit",
        properties: Sequence[str] = (),
        labels: str = "all",
        labelled: bool = False,
    ) -> None:
        if labels not in ("all", "first", "second"):
            raise ValueError(f"domain.labels={labels!r}: choose all, first or second.")
        if charges not in (None, "formal", "nuclear"):
            raise ValueError(f"domain.charges={charges!r}: choose formal, nuclear or null.")
        self.data, self.scale, self.bonds = data, scale, bonds
        self.charges, self.charge_scale = charges, charge_scale
        self.properties, self.labels, self.labelled = tuple(properties), labels, labelled
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
        return dict(self._measured if self._restored is None else self._restored)

    @cached_property
    def _measured(self) -> dict[str, Any]:
        training = self._loaded.subset("train")
        return {
            "domain": self.name,
            "elements": [SYMBOLS[z] for z in self._loaded.elements],
            "scale": self.scale,
            "charges": self.charges,
            "charge_scale": self.charge_scale,
            "position_std": records.position_std(training),
            "closed_shell": records.closed_shell(training),
            "sizes": {str(n): count for n, count in training.histogram().items()},
            "element_counts": records.element_counts(training),
            "properties": self._loaded.statistics,
            "context": list(self.properties),
            "known": self._known(training),
        }

    def _known(self, training: MoleculeData, most: int = 2000) -> list[list[float | None]]:
        """Number of atoms and properties of some molecules: where sizes that suit a wanted
        property are drawn from."""
        if not self.properties or self.labelled:
            return []
        values = self._values(training)
        rows = np.flatnonzero(~np.isnan(values).any(1))
        rows = stream(0, 0, "known", 0).permutation(rows)[:most]
        table = np.column_stack([training.sizes[rows], values[rows]])
        return [[float(f"{value:.5g}") for value in row] for row in table]

    def keepsakes(self) -> dict[str, bytes]:
        """SMILES of the training molecules, for novelty; none for a model of labels."""
        if self.labelled or self.data is None or not (Path(self.data) / "data.json").exists():
            return {}
        smiles = [text for text in self._loaded.subset("train").smiles() if text]
        return {TRAINING: lzma.compress("\n".join(smiles).encode())} if smiles else {}

    def restore(self, statistics: Mapping[str, Any]) -> None:
        found = statistics.get("domain")
        if found != self.name:
            raise ValueError(f"the checkpoint is of domain {found}, not {self.name}.")
        self._restored = dict(statistics)
        self.scale, self.charges = float(statistics["scale"]), statistics["charges"]
        self.properties = tuple(statistics.get("context", ()))
        self.charge_scale = float(statistics["charge_scale"])

    @cached_property
    def elements(self) -> tuple[int, ...]:
        """Atomic numbers of the columns of 'types'."""
        return tuple(atomic_number(symbol) for symbol in self.statistics()["elements"])

    @property
    def position_std(self) -> float:
        """Standard deviation of a centred coordinate over the training data, Angstrom."""
        return float(self.statistics()["position_std"])

    @property
    def closed_shell(self) -> bool:
        """Whether the atomic numbers of every training molecule add up to an even number, as in
        neutral molecules without radicals."""
        return bool(self.statistics().get("closed_shell", False))

    # -- training -----------------------------------------------------------------------------

    def datasets(self) -> tuple[Dataset[Record], Dataset[Record]]:
        return self._records("train"), self._records("valid")

    def _records(self, split: str) -> Records:
        data = self._loaded.subset(split)
        values = self._values(data)
        if split == "train":
            values[~visible(data, self.properties, self.labels)] = np.nan
        if self.labelled:
            rows = np.flatnonzero(~np.isnan(values).all(1))
            if not len(rows):
                raise ValueError(
                    f"domain.data={self.data}: no {split} molecule has any of "
                    f"{', '.join(self.properties) or 'no properties'}."
                )
            data, values = data.take(rows), values[rows]
        return Records(data, self.elements, self.standardise(values))

    def _values(self, data: MoleculeData) -> np.ndarray:
        """[m, k] values of the properties in the units of the data."""
        columns = [data.column(name) for name in self.properties]
        return np.stack(columns, 1) if columns else np.empty((len(data), 0))

    def standardise(self, values: np.ndarray) -> np.ndarray:
        """[..., k] values of the properties in their units -> (value - mean) / mean absolute
        deviation, as EDM does."""
        mean, mad = self._scales
        standard: np.ndarray = ((values - mean) / mad).astype(np.float32)
        return standard

    def physical(self, values: np.ndarray) -> np.ndarray:
        """The inverse of :meth:`standardise`."""
        mean, mad = self._scales
        physical: np.ndarray = np.asarray(values, np.float64) * mad + mean
        return physical

    @cached_property
    def _scales(self) -> tuple[np.ndarray, np.ndarray]:
        known = self.statistics()["properties"]
        missing = [name for name in self.properties if name not in known]
        if missing:
            raise ValueError(
                f"domain.properties: no {', '.join(missing)}; the data have "
                f"{', '.join(known) or 'no properties'}."
            )
        found = [known[name] for name in self.properties]
        for name, row in zip(self.properties, found, strict=True):
            if not row.get("mad"):
                raise ValueError(
                    f"domain.properties: {name} has no two different values among the training "
                    "molecules; leave it out."
                )
        return np.array([p["mean"] for p in found]), np.array([p["mad"] for p in found])

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
        state = {name: torch.from_numpy(arrays[name]) for name in batch.state}
        if not self.properties:
            return Batch(state, batch.mask)
        context = torch.from_numpy(np.stack([record.context for record in records]))
        return Batch(state, batch.mask, {"context": context})

    def _blank(self, sizes: Sequence[int]) -> Batch:
        b, n = len(sizes), max(sizes)
        widths = {"positions": 3, "types": len(self.elements), "charges": 1}
        names = [name for name in widths if name != "charges" or self.charges]
        state = {name: torch.zeros(b, n, widths[name]) for name in names}
        mask = torch.arange(n) < torch.tensor(sizes)[:, None]
        return Batch(state, None if min(sizes) == n else mask)

    # -- sampling -----------------------------------------------------------------------------

    def template(self, seed: int, indices: Sequence[int], **request: Any) -> Batch:
        """``request``: ``atoms``, the number of atoms of every molecule or a range '15..20' (by
        default drawn from the sizes of the training data), and any property that the model is
        told, as a value or in the words of :mod:`molediff.targets` ('2..3', '>5', 'max'). Sizes
        are drawn from training molecules near the wanted properties: (c, N) jointly, as EDM does.
        """
        reject_unknown("molecules, request", request, ("atoms", *self.properties))
        atoms = request.get("atoms")
        context = self._wanted(seed, indices, request)
        sizes = self._sizes(seed, indices, atoms, context)
        batch = self._blank(sizes)
        if not self.properties:
            return batch
        return Batch(batch.state, batch.mask, {"context": torch.from_numpy(context)})

    def targets(self, request: Mapping[str, Any]) -> list[Target]:
        """The wishes for properties in ``request``."""
        known = {k: v for k, v in self.statistics()["properties"].items() if k in self.properties}
        wishes = {k: v for k, v in request.items() if k in self.properties}
        return [Target.parse(text, known) for text in as_texts(wishes)]

    def _wanted(self, seed: int, indices: Sequence[int], request: Mapping[str, Any]) -> np.ndarray:
        """Standardised properties that the model is told [b, k], NaN where free."""
        values = np.full((len(indices), len(self.properties)), np.nan)
        known = self.statistics()["properties"]
        for target in self.targets(request):
            values[:, self.properties.index(target.name)] = target.draw(known, seed, indices)
        if not self.statistics().get("free", True):  # a network that must be told everything
            table = np.array(self.statistics()["known"], dtype=np.float64)[:, 1:]
            rows = [stream(seed, i, "told", 0).integers(len(table)) for i in indices]
            values = np.where(np.isnan(values), table[rows], values)
        return self.standardise(values) if self.properties else values.astype(np.float32)

    def _sizes(
        self, seed: int, indices: Sequence[int], atoms: Any, context: np.ndarray
    ) -> list[int]:
        if isinstance(atoms, Integral) and int(atoms) >= 1:
            return [int(atoms)] * len(indices)
        counts = {int(n): float(count) for n, count in self.statistics()["sizes"].items()}
        if not counts:
            raise ValueError("this model does not know the sizes of its data: give request.atoms.")
        allowed = _allowed(atoms, counts)
        draws = [stream(seed, i, "template", 0).random() for i in indices]
        return [
            _pick(u, self._size_weights(row, counts, allowed))
            for u, row in zip(draws, context, strict=True)
        ]

    def _size_weights(
        self, wanted: np.ndarray, counts: Mapping[int, float], allowed: Sequence[int]
    ) -> dict[int, float]:
        """How often a molecule with the properties ``wanted`` has so many atoms, by training
        molecules within about a quarter of a deviation."""
        given = ~np.isnan(wanted)
        known = np.array(self.statistics().get("known", []), dtype=np.float64)
        near = np.isin(known[:, 0], allowed) if len(known) else np.zeros(0, bool)
        if not given.any() or not near.any():
            return {n: counts.get(n, 0.0) for n in allowed}
        known = known[near]
        apart = (self.standardise(known[:, 1:]) - wanted)[:, given] / 0.25
        log = -0.5 * np.square(apart).sum(1)
        weights = np.exp(log - log.max())
        return {n: float(weights[known[:, 0] == n].sum()) for n in allowed}

    def null_condition(self) -> dict[str, Tensor]:
        """Nothing given: NaN for every property; none for a network that must be told all."""
        free = torch.full((1, len(self.properties)), torch.nan)
        needs_all = not (self._restored or {}).get("free", True)
        return {"context": free} if self.properties and not needs_all else {}

    def decode(self, state: State, mask: Tensor | None) -> list[Molecule | Invalid]:
        positions = state["positions"].float().numpy()
        numbers = np.asarray(self.elements)[state["types"].argmax(-1).numpy()]
        charges = np.zeros(numbers.shape, np.int8)
        if self.charges == "formal":
            units = state["charges"][..., 0].numpy() / self.charge_scale
            most = np.minimum(numbers, 9)
            charges = np.rint(np.nan_to_num(units)).clip(-9, most).astype(np.int8)
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


def _allowed(atoms: Any, counts: Mapping[int, float]) -> list[int]:
    """The sizes that a request allows."""
    if atoms is None:
        return sorted(counts)
    low, dots, high = str(atoms).partition("..")
    if not dots or not (low.strip().isdigit() and high.strip().isdigit()):
        raise ValueError(
            f"request.atoms={atoms}: give a whole number of at least 1, or a range such as 15..20."
        )
    found = [n for n in sorted(counts) if int(low) <= n <= int(high)]
    if not found:
        raise ValueError(
            f"request.atoms={atoms}: the training data have {min(counts)} to {max(counts)} atoms; "
            "choose a range that overlaps, or one number."
        )
    return found


def _pick(u: float, weights: Mapping[int, float]) -> int:
    """The size at the quantile ``u`` of ``weights``."""
    totals = np.cumsum(list(weights.values()))
    place = int(np.searchsorted(totals, u * totals[-1], "right"))
    return list(weights)[min(place, len(totals) - 1)]
