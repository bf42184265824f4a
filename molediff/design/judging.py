"""Designed molecules under the eyes of oracles that did not steer them."""

from __future__ import annotations

import csv
import io
import lzma
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from rdkit import Chem, DataStructs, rdBase
from rdkit.Chem import rdFingerprintGenerator

from molediff.geometric.data import MoleculeData
from molediff.geometric.domain import TRAINING
from molediff.geometric.energies import Composition
from molediff.geometric.stability import valence_verdicts
from molediff.molecules import Molecule
from molediff.oracles import Oracle
from molediff.scorers import Scorer
from molediff.targets import Extreme, Properties, Target
from shared.checkpoints import write_atomically
from shared.domains import Invalid
from shared.metrics import Estimate, mean, proportion
from shared.models import Model
from shared.sample_folders import Folder
from shared.sampling import Record, Sink


@dataclass(frozen=True)
class Design:
    """One designed molecule. ``values``: '<property>_<oracle>' and the names of scorers -> value;
    ``score``: distance to all that was asked for, in mean absolute deviations of the training
    data (lower is better; infinite for an invalid molecule). ``novel`` and ``similarity`` (to
    the nearest training molecule, Tanimoto) are None where the training data are not known."""

    index: int
    molecule: Molecule
    valid: bool
    smiles: str
    values: Mapping[str, float]
    score: float
    novel: bool | None = None
    similarity: float | None = None

    def row(self) -> dict[str, Any]:
        """As a line of molecules.csv."""
        return {
            "index": self.index,
            "smiles": self.smiles,
            "valid": int(self.valid),
            "score": _short(self.score),
            **{name: _short(value) for name, value in self.values.items()},
            "atoms": len(self.molecule),
            "novel": "" if self.novel is None else int(self.novel),
            "similarity": _short(self.similarity),
        }


def _short(value: float | None) -> float | str:
    return "" if value is None or not math.isfinite(value) else float(f"{value:.6g}")


@dataclass(frozen=True)
class Judge:
    """Asks every oracle for the wanted properties.

    Args:
        targets: what was asked for. properties: unit, mean, mad, ... of the training data.
        oracles: short name -> oracle; the first one that knows a property ranks by it.
        composition, scorers: further wishes that count.
    """

    targets: Sequence[Target]
    properties: Properties
    oracles: Mapping[str, Oracle]
    composition: Composition | None = None
    scorers: Sequence[Scorer] = ()

    def columns(self, name: str) -> list[str]:
        """The names under which the values of a property stand."""
        return [f"{name}_{short}" for short, o in self.oracles.items() if name in o.accuracy]

    @property
    def warnings(self) -> list[str]:
        """Targets that no oracle judges, so that they do not count in the ranking."""
        unjudged = [target.name for target in self.targets if not self.columns(target.name)]
        return unjudged and [
            f"nothing judges {', '.join(unjudged)}: give oracle=RUN, a property model whose "
            "errors 'molediff oracle measure DATA run=RUN' has found."
        ]

    def __call__(self, items: Sequence[Molecule | Invalid]) -> list[Molecule | Invalid]:
        """The molecules with what the oracles say as their properties."""
        wanted = [target.name for target in self.targets]
        values: dict[str, np.ndarray] = {}
        for short, oracle in self.oracles.items():
            names = [name for name in wanted if name in oracle.accuracy]
            if names:
                found = oracle(items)
                values |= {f"{name}_{short}": found[name] for name in names}
        values |= {scorer.name: scorer.values(items) for scorer in self.scorers}
        judged: list[Molecule | Invalid] = []
        for i, item in enumerate(items):
            if isinstance(item, Molecule):
                own = {k: _short(float(v[i])) for k, v in values.items() if np.isfinite(v[i])}
                item = item.replace(properties={**item.properties, **own})
            judged.append(item)
        return judged

    def design(self, index: int, molecule: Molecule) -> Design:
        """A judged molecule as a design."""
        valid, smiles = verdict(molecule)
        names = [column for target in self.targets for column in self.columns(target.name)]
        names += [scorer.name for scorer in self.scorers]
        values = {name: float(molecule.properties.get(name, math.nan)) for name in names}
        score = self._score(molecule, values) if valid else math.inf
        return Design(index, molecule, valid, smiles, values, score)

    def _score(self, molecule: Molecule, values: Mapping[str, float]) -> float:
        total = 0.0
        for target in self.targets:
            columns = self.columns(target.name)
            if not columns:
                continue
            value, row = values[columns[0]], self.properties[target.name]
            if isinstance(target, Extreme):
                value = float(row["mean"]) - value if target.maximise else value - row["mean"]
            else:
                value = float(target.error(value))
            total += value / float(row["mad"] or 1.0)
        if self.composition is not None:
            total += self.composition.error(molecule)
        for scorer in self.scorers:
            total -= float(scorer.scores(np.array([values[scorer.name]]))[0])
        return total if math.isfinite(total) else math.inf


def verdict(molecule: Molecule) -> tuple[bool, str]:
    """Whether a molecule is neutral and valid by the corrected rule, and its SMILES."""
    found = valence_verdicts([molecule])
    smiles = found.smiles[0]
    return bool(found.stable[0]) and smiles is not None and not molecule.charge, smiles or ""


def ranked(designs: Sequence[Design]) -> list[Design]:
    """Best first; one that is not valid comes after all that are."""
    return sorted(designs, key=lambda d: (not d.valid, d.score, d.index))


# -- novelty ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Known:
    """The training molecules as SMILES."""

    smiles: tuple[str, ...]

    @classmethod
    def of(cls, model: Model[Any]) -> Known | None:
        """Those of a generator: the file beside its weights, or its data where they still are."""
        file = model.checkpoint.path / TRAINING
        if file.exists():
            return cls(tuple(lzma.decompress(file.read_bytes()).decode().split()))
        folder = model.checkpoint.config["domain"].get("data")
        if folder and (Path(folder) / "data.json").exists():
            found = tuple(s for s in MoleculeData(folder).subset("train").smiles() if s)
            return cls(found) if found else None
        return None

    @cached_property
    def _fingerprints(self) -> tuple[list[str], list[Any]]:
        """Those that RDKit reads, and their fingerprints."""
        with rdBase.BlockLogs():
            mols = ((text, Chem.MolFromSmiles(text)) for text in self.smiles)
            good = [(text, _MORGAN.GetFingerprint(mol)) for text, mol in mols if mol is not None]
        return [text for text, _ in good], [bits for _, bits in good]

    def judged(self, designs: Sequence[Design]) -> list[Design]:
        """The designs with novelty and the similarity to the nearest training molecule."""
        return [self._judged(design) if design.valid else design for design in designs]

    def _judged(self, design: Design) -> Design:
        with rdBase.BlockLogs():
            mol = Chem.MolFromSmiles(design.smiles)
        if mol is None:
            return design
        texts, bits = self._fingerprints
        similar = np.array(DataStructs.BulkTanimotoSimilarity(_MORGAN.GetFingerprint(mol), bits))
        alike = (texts[i] for i in np.flatnonzero(similar > 1.0 - 1e-9))  # equal ones are here
        novel = _canonical(design.smiles) not in map(_canonical, alike)
        return replace(design, novel=novel, similarity=float(similar.max(initial=0.0)))


_MORGAN = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=1024)


def _canonical(smiles: str) -> str:
    return Chem.MolToSmiles(Chem.MolFromSmiles(smiles), isomericSmiles=False)


# -- where designs go -------------------------------------------------------------------------


@dataclass
class Judged:
    """A sink that judges before it stores, and tells ``seen`` about every new design.

    Args:
        sink: of :mod:`shared.sampling`. file: a CSV to which rows are added, if any.
    """

    sink: Sink
    judge: Judge
    seen: Callable[[Design], None] = lambda design: None
    file: Path | None = None
    designs: dict[int, Design] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.sink, Folder):
            for molecule in _stored(self.sink):
                self._note(int(molecule.name), molecule)
        if self.file is not None and _indices(self.file) != sorted(self.designs):
            write_rows(self.file, list(self.designs.values()))

    @property
    def records(self) -> Mapping[int, Record]:
        return self.sink.records

    def put(self, records: Sequence[Record], items: Sequence[Any]) -> None:
        """See :class:`shared.sampling.Sink`."""
        named = [
            item if isinstance(item, Invalid) else item.replace(name=str(record.index))
            for record, item in zip(records, items, strict=True)
        ]
        judged = self.judge(named)
        self.sink.put(records, judged)
        new = [self._note(int(m.name), m) for m in judged if isinstance(m, Molecule)]
        if self.file is not None and new:
            with self.file.open("a", newline="", encoding="utf-8") as out:
                out.write(_csv(new, header=out.tell() == 0))
                out.flush()
                os.fsync(out.fileno())

    def _note(self, index: int, molecule: Molecule) -> Design:
        design = self.judge.design(index, molecule)
        self.designs[index] = design
        self.seen(design)
        return design


def _stored(folder: Folder) -> list[Molecule]:
    if not folder.file.exists():
        return []
    return [m for m in folder.domain.read(folder.file) if isinstance(m, Molecule)]


def _indices(file: Path) -> list[int]:
    """Of the rows of a CSV, in order; none where the last one is torn."""
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    rows = csv.DictReader(io.StringIO(text, newline=""))
    return sorted(int(row["index"]) for row in rows) if text.endswith("\n") else []


def write_rows(file: Path, designs: Sequence[Design]) -> None:
    """The whole CSV, in the order given."""
    write_atomically(file, _csv(designs, header=True).encode())


def _csv(designs: Sequence[Design], header: bool) -> str:
    text = io.StringIO()
    rows = [design.row() for design in designs]
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


# -- what they amount to ----------------------------------------------------------------------


def summary(judge: Judge, designs: Sequence[Design], n: int) -> dict[str, Estimate]:
    """Rates over all ``n`` asked for, and the mean distance of valid molecules to every target by
    every oracle (for max and min: the mean value)."""
    valid = [design for design in designs if design.valid]
    unique = {design.smiles for design in valid}
    found = {"valid": proportion(len(valid), n), "unique": proportion(len(unique), len(valid))}
    known = [design for design in valid if design.novel is not None]
    if known:
        found["novel"] = proportion(sum(bool(d.novel) for d in known), len(known))
    for target in judge.targets:
        for column in judge.columns(target.name):
            values = np.array([design.values[column] for design in valid])
            values = values[np.isfinite(values)]
            extreme = isinstance(target, Extreme)
            name = f"{column} {'mean' if extreme else 'error'}"
            found[name] = mean(values if extreme else target.error(values))
    for scorer in judge.scorers:
        values = np.array([design.values[scorer.name] for design in valid])
        found[f"{scorer.name} mean"] = mean(values[np.isfinite(values)])
    return found
