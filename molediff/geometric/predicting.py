"""Property networks at work: predictions for clean molecules, and labels for data without any."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from molediff.geometric.data import MoleculeData
from molediff.geometric.domain import Molecules
from molediff.geometric.properties import PropertyModel
from molediff.geometric.records import Record, visible
from molediff.molecules import Molecule
from molediff.oracles import REFERENCE, Accuracy, labelled
from shared.checkpoints import write_atomically
from shared.cli import Outcome, Program, Progress
from shared.domains import Invalid
from shared.metrics import Estimate, mean
from shared.models import Model, beside, find_device, load

ACCURACY = "accuracy.json"


@dataclass(frozen=True)
class Predictor:
    """A trained :class:`PropertyModel` as a function of molecules."""

    model: Model[Any]

    def __post_init__(self) -> None:
        if not isinstance(self.model.denoiser, PropertyModel):
            raise ValueError(
                f"run {self.model.run.folder} is not a property model: train one with "
                "experiment=qm9_oracle or qm9_energy."
            )

    @classmethod
    def load(cls, run: str | Path, device: str | torch.device = "cpu") -> Predictor:
        """From a run folder or the name of a pretrained model."""
        model = load(run)
        predictor = cls(model)
        model.denoiser.to(device)
        return predictor

    @property
    def domain(self) -> Molecules:
        domain = self.model.domain
        assert isinstance(domain, Molecules)
        return domain

    @property
    def names(self) -> tuple[str, ...]:
        """The properties that it predicts."""
        return self.domain.properties

    @property
    def statistics(self) -> Mapping[str, Mapping[str, Any]]:
        """Property -> unit, mean, mad, min and max of the training data."""
        known: Mapping[str, Mapping[str, Any]] = self.domain.statistics()["properties"]
        return known

    def __call__(
        self, molecules: Sequence[Molecule | Invalid], batch: int = 128
    ) -> dict[str, np.ndarray]:
        """Property -> values [len(molecules)] in its unit; NaN for what is Invalid, has no
        positions or holds an element that the network does not know."""
        values = np.full((len(molecules), len(self.names)), np.nan)
        records = {i: self._record(m) for i, m in enumerate(molecules)}
        known = {i: record for i, record in records.items() if record is not None}
        for rows in _by_size(known, batch):
            values[rows] = self._predict([known[i] for i in rows])
        return dict(zip(self.names, values.T, strict=True))

    def _record(self, molecule: Molecule | Invalid) -> Record | None:
        if isinstance(molecule, Invalid) or molecule.positions is None:
            return None
        place = {z: k for k, z in enumerate(self.domain.elements)}
        numbers = molecule.atomic_numbers.tolist()
        if not all(z in place for z in numbers):
            return None
        elements = np.array([place[z] for z in numbers])
        free = np.full(len(self.names), np.nan, np.float32)
        return Record(elements, molecule.positions, molecule.charges, free)

    @property
    def network(self) -> PropertyModel:
        """What predicts standardised properties of states at any time."""
        assert isinstance(self.model.denoiser, PropertyModel)
        return self.model.denoiser

    def _predict(self, records: Sequence[Record]) -> np.ndarray:
        model = self.network
        batch = self.domain.collate(records).to(next(model.parameters()).device)
        with torch.no_grad():
            y = model.predict(batch.state, model.process.lead.t_min, batch.mask)
        return self.domain.physical(y.cpu().numpy())


def _by_size(records: Mapping[int, Record], batch: int) -> Iterator[list[int]]:
    """Rows in chunks of equal size of molecule."""
    rows = sorted(records, key=lambda i: len(records[i].elements))
    start = 0
    for k in range(1, len(rows) + 1):
        ends = k == len(rows) or len(records[rows[k]].elements) != len(
            records[rows[start]].elements
        )
        if ends or k - start == batch:
            yield rows[start:k]
            start = k


# -- as an oracle -----------------------------------------------------------------------------


@dataclass(frozen=True)
class NetworkOracle:
    """A property network that judges molecules, with the errors that ``molediff oracle measure``
    found on molecules which neither it nor the generator has seen the labels of."""

    predictor: Predictor

    @classmethod
    def load(cls, run: str | Path, device: torch.device | str = "cpu") -> NetworkOracle:
        """From a run folder or the name of a pretrained model."""
        return cls(Predictor.load(run, device))

    @property
    def name(self) -> str:
        return "network"

    @cached_property
    def accuracy(self) -> dict[str, Accuracy]:
        """Its errors; empty where they were never measured."""
        file = self.predictor.model.checkpoint.path / ACCURACY
        rows = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        return {
            name: Accuracy(row["unit"], Estimate(**row["mae"]), row["reference"])
            for name, row in rows.items()
        }

    def __call__(self, molecules: Sequence[Molecule | Invalid]) -> dict[str, np.ndarray]:
        return self.predictor(molecules)


def measure(
    predictor: Predictor, data: MoleculeData, n: int = 10_000, seed: int = 0
) -> dict[str, Accuracy]:
    """Mean absolute errors on ``n`` labelled validation molecules (all where there are fewer).

    Raises:
        ValueError: no labels there.
    """
    known = [name for name in predictor.names if name in data.property_names]
    if not known:
        raise ValueError(f"{data.path} has none of the labels {', '.join(predictor.names)}.")
    held_out = labelled(data.subset("valid"), known, n, seed)
    if not len(held_out):
        raise ValueError(f"{data.path} has no validation molecules with these labels.")
    found = predictor(list(held_out))
    reference = f"labels of {data.info['source'].get('kind', 'the data')}"
    return {
        name: Accuracy(
            predictor.statistics[name]["unit"],
            mean(np.abs(found[name] - held_out.column(name))),
            REFERENCE if data.info["source"].get("kind") == "qm9" else reference,
        )
        for name in known
    }


def measure_verb(config: Any, program: Program, progress: Progress | None = None) -> Outcome:
    """``molediff oracle measure``: the errors of a property model, beside its weights."""
    predictor = Predictor.load(config.run, find_device(config.device))
    folder = beside(predictor.model, config.out)
    found = measure(predictor, MoleculeData(config.path), config.n, config.seed)
    rows = {
        name: {"unit": a.unit, "mae": a.mae.as_json(), "reference": a.reference}
        for name, a in found.items()
    }
    file = folder / ACCURACY
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(file, (json.dumps(rows, indent=1) + "\n").encode())
    return Outcome([*(f"{name}: {a}" for name, a in found.items()), f"written: {file}"], file)


# -- labels -----------------------------------------------------------------------------------


def label(
    data: str | Path,
    predictor: Predictor,
    out: str | Path,
    *,
    keep: str = "all",
    progress: Progress | None = None,
) -> MoleculeData:
    """A copy of a prepared data set in which ``predictor`` fills in missing properties of the
    training molecules, so that a generator can learn conditions from all of them.

    Args:
        keep: whose own labels stay: 'all', or the 'first' or 'second' half (see
            :class:`Molecules`); the labels of the other half are replaced too.

    Raises:
        ValueError: a property that the data do not have; ``out`` exists.
    """
    source, out = MoleculeData(data), Path(out)
    missing = [name for name in predictor.names if name not in source.property_names]
    if missing:
        raise ValueError(f"{data} has no {', '.join(missing)}, which the predictor gives.")
    if out.exists():
        raise ValueError(f"out={out} exists already; choose another folder.")
    training = source.subset("train")
    shown = visible(training, predictor.names, keep)
    values = np.array(source.properties)
    columns = np.array([source.property_names.index(name) for name in predictor.names])
    own = values[np.ix_(training.rows, columns)]
    own[~shown] = np.nan
    todo = np.flatnonzero(np.isnan(own).any(1))
    for start in range(0, len(todo), 4096):
        rows = todo[start : start + 4096]
        found = np.stack(list(predictor([training[int(i)] for i in rows]).values()), 1)
        own[rows] = np.where(np.isnan(own[rows]), found, own[rows])
        if progress is not None:
            progress(min(start + 4096, len(todo)), len(todo))
    values[np.ix_(training.rows, columns)] = own
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(source.path, part)
    np.save(part / "properties.npy", values)
    labelled = {"by": str(predictor.model.run.folder.name), "keep": keep, "n": len(todo)}
    own_mark = hashlib.sha256(f"{source.info['fingerprint']} {labelled}".encode()).hexdigest()
    info = source.info | {"labelled": labelled, "fingerprint": own_mark}
    (part / "data.json").write_text(json.dumps(info, indent=1))
    part.rename(out)
    return MoleculeData(out)
