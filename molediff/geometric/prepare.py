"""Any source of molecules -> one compact data set (see ``data`` for its layout)."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from molediff.geometric.data import FORMAT, SPLITS, MoleculeData
from molediff.geometric.sources import Source, find_source
from molediff.molecules import Molecule
from shared.domains import Invalid


@dataclass(frozen=True)
class Options:
    """What decides the content of a data set besides its source.

    Attributes:
        properties: names to keep; None keeps every property that is a number.
        units: name -> unit, for properties whose source does not tell.
        fractions: shares of train, valid and test where the source has no split of its own.
        seed: of the split and of conformers made from SMILES.
        hydrogens: False leaves hydrogen atoms out.
        conformers: keep at most so many of each molecule, the first ones of the file.
        limit: read at most so many records.
    """

    properties: tuple[str, ...] | None = None
    units: Mapping[str, str] = field(default_factory=dict)
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    seed: int = 0
    hydrogens: bool = True
    conformers: int | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        if min(self.fractions) < 0 or not math.isclose(sum(self.fractions), 1, abs_tol=1e-9):
            raise ValueError(f"fractions={self.fractions}: three shares that add up to 1")
        for key in ("conformers", "limit"):
            if (number := getattr(self, key)) is not None and number < 1:
                raise ValueError(f"{key}={number}: expected at least 1")


def prepare(
    source: str | Path,
    out: str | Path,
    *,
    properties: Sequence[str] | None = None,
    units: Mapping[str, str] | None = None,
    fractions: Sequence[float] = (0.8, 0.1, 0.1),
    seed: int = 0,
    hydrogens: bool = True,
    conformers: int | None = None,
    limit: int | None = None,
    uncharacterized: str | Path | None = None,
) -> MoleculeData:
    """Read ``source`` (see ``sources.find_source``) once and write the data set ``out``.

    QM9 gets EDM's split and energies in eV; anything else a random split by ``seed`` in which all
    conformers of a molecule stay together. Records that cannot be read are counted and listed in
    invalid.jsonl with their reasons. The folder appears whole or not at all; where the very same
    data set lies there already, it is opened and nothing is done. Other arguments: ``Options``.

    Raises:
        FileNotFoundError: no source.
        ValueError: ``out`` holds something else, nothing could be read, a property that no record
            has, or options that make no sense.
    """
    properties = [properties] if isinstance(properties, str) else properties
    options = Options(
        None if properties is None else tuple(properties),
        dict(units or {}),
        (fractions[0], fractions[1], fractions[2]),
        seed,
        hydrogens,
        conformers,
        limit,
    )
    found, out = find_source(source, uncharacterized, seed), Path(out)
    sha = found.sha256()
    fingerprint = _fingerprint(sha, options)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        return _same(out, fingerprint)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    part.mkdir()
    try:
        _build(part, found, options, {"path": Path(source).name, "sha256": sha}, fingerprint)
        os.replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return MoleculeData(out)


def _fingerprint(sha: str, options: Options) -> str:
    text = json.dumps([FORMAT, sha, asdict(options)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _same(out: Path, fingerprint: str) -> MoleculeData:
    try:
        data = MoleculeData(out)
        if data.info["fingerprint"] == fingerprint:
            return data
    except (FileNotFoundError, ValueError, KeyError):
        pass
    raise ValueError(
        f"{out} holds something else (another source or other options): "
        "choose another folder or remove it"
    )


class _Column:
    """An .npy file that grows; its header is written again when the length is known."""

    def __init__(self, path: Path, dtype: str, tail: tuple[int, ...] = ()) -> None:
        self.dtype, self.tail, self.n = np.dtype(dtype), tail, 0
        self.file: IO[bytes] = open(path, "wb")
        self._header()

    def _header(self) -> None:
        # numpy leaves room for the first dimension to grow
        shape = (self.n, *self.tail)
        np.lib.format.write_array_header_1_0(
            self.file, {"descr": self.dtype.str, "fortran_order": False, "shape": shape}
        )

    def append(self, values: Any) -> None:
        block = np.ascontiguousarray(values, dtype=self.dtype)
        self.file.write(block.tobytes())
        self.n += len(block)

    def close(self) -> None:
        self.file.seek(0)
        self._header()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


class _Writer:
    """Streams molecules into the arrays of a folder; small per-molecule facts stay in memory."""

    def __init__(self, folder: Path, options: Options) -> None:
        self.options, self.atoms = options, 0
        self.arrays = {
            "atomic_numbers": _Column(folder / "atomic_numbers.npy", "uint8"),
            "positions": _Column(folder / "positions.npy", "float32", (3,)),
            "charges": _Column(folder / "charges.npy", "int8"),
        }
        self.smiles = open(folder / "smiles.txt", "w", encoding="utf-8")
        self.invalid = open(folder / "invalid.jsonl", "w", encoding="utf-8")
        self.reasons: Counter[str] = Counter()
        self.offsets, self.records, self.groups = array("q", [0]), array("q"), array("q")
        self.columns: dict[str, array[float]] = {}
        self.group_of: dict[bytes, int] = {}
        self.conformers: Counter[int] = Counter()
        self.elements: set[int] = set()
        self.excluded = self.open_hydrogens = 0

    def add(self, record: int, item: Molecule | Invalid) -> None:
        if isinstance(item, Molecule) and not self.options.hydrogens:
            item = without_hydrogens(item)
        if isinstance(item, Invalid):
            self.reasons[item.reason] += 1
            self.invalid.write(json.dumps({"record": item.record, "reason": item.reason}) + "\n")
            return
        group = self._group(item)
        self.conformers[group] += 1
        if self.conformers[group] > (self.options.conformers or math.inf):
            self.excluded += 1
            return
        for name, values in zip(
            self.arrays, (item.atomic_numbers, item.positions, item.charges), strict=True
        ):
            self.arrays[name].append(values)
        self.offsets.append(self.offsets[-1] + len(item))
        self.records.append(record)
        self.groups.append(group)
        self.elements.update(item.atomic_numbers.tolist())
        self.open_hydrogens += bool(item.hydrogens.any())
        self.smiles.write(_smiles(item) + "\n")
        self._properties(item)

    def _properties(self, molecule: Molecule) -> None:
        wanted = self.options.properties
        for name, value in molecule.properties.items():
            if isinstance(value, (int, float)) and (wanted is None or name in wanted):
                column = self.columns.setdefault(name, array("d"))
                column.extend([math.nan] * (len(self.records) - 1 - len(column)))
                column.append(float(value))

    def _group(self, molecule: Molecule) -> int:
        """Conformers share atoms and bonds, or atoms and a name where bonds are unknown."""
        if molecule.bonds is None and not molecule.name:
            return -1 - len(self.records)  # a molecule of its own
        bonds = b"" if molecule.bonds is None else molecule.bonds.tobytes()
        name = molecule.name.encode() if molecule.bonds is None else b""
        parts = (molecule.atomic_numbers.tobytes(), molecule.charges.tobytes(), bonds, name)
        key = hashlib.sha256(b"|".join(parts)).digest()
        return self.group_of.setdefault(key, len(self.group_of))

    def close(self) -> None:
        for column in self.arrays.values():
            column.close()
        self.smiles.close()
        self.invalid.close()


def without_hydrogens(molecule: Molecule) -> Molecule | Invalid:
    """The other atoms, with the hydrogens bonded to them counted where bonds are known."""
    keep = molecule.atomic_numbers > 1
    if not keep.any():
        return Invalid(molecule.name, "nothing is left without hydrogens")
    number = np.cumsum(keep) - 1
    bonds, orders, hydrogens = molecule.bonds, molecule.orders, molecule.hydrogens
    if bonds is not None and orders is not None:
        counted = hydrogens.astype(np.int64)
        for a, b in ((0, 1), (1, 0)):
            np.add.at(counted, bonds[:, a], ~keep[bonds[:, b]])
        inner = keep[bonds].all(axis=1)
        bonds, orders, hydrogens = number[bonds[inner]], orders[inner], counted
    return molecule.replace(
        atomic_numbers=molecule.atomic_numbers[keep],
        positions=None if molecule.positions is None else molecule.positions[keep],
        charges=molecule.charges[keep],
        hydrogens=hydrogens[keep],
        bonds=bonds,
        orders=orders,
    )


def _smiles(molecule: Molecule) -> str:
    given = molecule.properties.get("smiles")
    if isinstance(given, str):
        return " ".join(given.split())
    try:
        return molecule.smiles() if molecule.bonds is not None else ""
    except ValueError:
        return ""


def _build(
    folder: Path, source: Source, options: Options, origin: dict[str, str], fingerprint: str
) -> None:
    writer = _Writer(folder, options)
    try:
        for record, item in islice(source.records(), options.limit):
            left_out = source.split is not None and source.split[record] < 0
            if left_out and isinstance(item, Molecule):
                writer.excluded += 1
            else:
                writer.add(record, item)
    finally:
        writer.close()
    if not writer.records:
        reasons = "; ".join(reason for reason, _ in writer.reasons.most_common(3))
        raise ValueError(f"{origin['path']} holds no molecule that can be used: {reasons}")
    records = np.array(writer.records)
    if source.split is None:
        split = random_split(np.array(writer.groups), options.fractions, options.seed)
    else:
        split = source.split[records]
    arrays = {
        "offsets": np.array(writer.offsets),
        "record": records,
        "split": split,
        "properties": _property_array(writer, len(records)),
    }
    for name, content in arrays.items():
        np.save(folder / f"{name}.npy", content, allow_pickle=False)
    info = {
        "format": FORMAT,
        "source": {"kind": source.name, **origin},
        "options": asdict(options),
        "fingerprint": fingerprint,
        **_description(writer, arrays, {**source.units, **options.units}),
    }
    (folder / "data.json").write_text(json.dumps(info, indent=1) + "\n")


def _description(
    writer: _Writer, arrays: Mapping[str, np.ndarray], units: Mapping[str, str]
) -> dict[str, Any]:
    split, reasons = arrays["split"], writer.reasons
    return {
        "molecules": len(split),
        "atoms": int(writer.offsets[-1]),
        "elements": sorted(writer.elements),
        "splits": {name: int((split == k).sum()) for k, name in enumerate(SPLITS)},
        "histogram": _histogram(np.diff(arrays["offsets"])[split == 0]),
        "properties": _statistics(writer.columns, arrays["properties"][split == 0], units),
        "open_hydrogens": writer.open_hydrogens,
        "excluded": writer.excluded,
        "invalid": {"count": reasons.total(), "reasons": dict(reasons.most_common(50))},
    }


def random_split(groups: np.ndarray, fractions: Sequence[float], seed: int) -> np.ndarray:
    """[m] int8: 0, 1, 2 in these shares; rows of one group share a part."""
    _, members = np.unique(groups, return_inverse=True)
    count = int(members.max()) + 1
    rank = np.random.default_rng(seed).permutation(count)
    edges = np.rint(np.cumsum(fractions)[:2] * count)
    return np.searchsorted(edges, rank, side="right").astype(np.int8)[members]


def _property_array(writer: _Writer, m: int) -> np.ndarray:
    absent = set(writer.options.properties or ()) - writer.columns.keys()
    if absent:
        raise ValueError(f"properties: no record has a number {sorted(absent)[0]!r}")
    values = np.full((m, len(writer.columns)), np.nan)
    for k, column in enumerate(writer.columns.values()):
        values[: len(column), k] = column
    return values


def _histogram(sizes: np.ndarray) -> dict[str, int]:
    values, counts = np.unique(sizes, return_counts=True)
    return {str(n): c for n, c in zip(values.tolist(), counts.tolist(), strict=True)}


def _statistics(
    names: Mapping[str, Any], values: np.ndarray, units: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    table = {}
    for name, column in zip(names, values.T, strict=True):
        x = column[np.isfinite(column)]
        row: dict[str, Any] = {"unit": units.get(name, ""), "n": len(x)}
        if len(x):
            row |= {"mean": float(x.mean()), "mad": float(np.abs(x - x.mean()).mean())}
            row |= {"min": float(x.min()), "max": float(x.max())}
        table[name] = row
    return table
