"""Where molecules come from: QM9 in its published layouts, and any file of molecules."""

from __future__ import annotations

import csv
import gzip
import hashlib
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rdkit import Chem, rdBase
from rdkit.Chem import rdDistGeom, rdForceFieldHelpers

from molediff.files import FORMATS, read
from molediff.formats import number
from molediff.molecules import Molecule, atomic_number
from shared.domains import Invalid

EV_PER_HARTREE = 27.2114
"""EDM's value, so that errors in meV compare with published ones."""

QM9_UNITS = {
    "A": "GHz", "B": "GHz", "C": "GHz", "mu": "D", "alpha": "bohr^3", "homo": "eV", "lumo": "eV",
    "gap": "eV", "r2": "bohr^2", "zpve": "eV", "u0": "eV", "u298": "eV", "h298": "eV",
    "g298": "eV", "cv": "cal/(mol K)",
}  # fmt: skip
"""QM9's properties in the order of its files; energies become eV on the way in."""

QM9_COUNT, QM9_UNCHARACTERIZED, QM9_TRAIN = 133_885, 3_054, 100_000

Record = tuple[int, "Molecule | Invalid"]


@dataclass(frozen=True)
class Source:
    """``records`` streams (number of the record, molecule or why not); ``files`` are what is
    read; ``split`` maps record numbers to 0, 1, 2 or, for those to leave out, -1."""

    name: str
    files: tuple[Path, ...]
    records: Callable[[], Iterator[Record]]
    units: Mapping[str, str] = field(default_factory=dict)
    split: np.ndarray | None = None

    def sha256(self) -> str:
        """Of the content, or of names and sizes where there are more than 100 files."""
        digest = hashlib.sha256()
        for path in self.files:
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
            if len(self.files) <= 100:
                with open(path, "rb") as file:
                    while block := file.read(1 << 20):
                        digest.update(block)
        return digest.hexdigest()


def find_source(
    path: str | Path, uncharacterized: str | Path | None = None, seed: int = 0
) -> Source:
    """What lies at ``path``.

    - a folder with ``geometries.npz`` (and ``properties.npz``): QM9 as compact arrays
    - a folder or tar archive of ``dsgdb9nsd_*.xyz``: QM9 as published
    - ``gdb9.sdf``, or a folder with it, beside ``gdb9.sdf.csv``: QM9 as SDF
    - a molecule file (see ``molediff.read``), or a folder of them: SDF with several conformers
      per molecule, XYZ, CSV or SMILES (embedded by ETKDG and MMFF94)

    Args:
        path: as above.
        uncharacterized: QM9's list of 3,054 molecules to leave out; by default a file
            ``uncharacterized.txt`` or ``3195404`` beside the data.
        seed: of ETKDG.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: nothing there that can be read, or no list of uncharacterized molecules.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    inside = path.is_dir()
    if inside and (path / "geometries.npz").exists():
        return _qm9_arrays(path)
    beside = path if inside else path.parent
    if inside and (path / "gdb9.sdf").exists():
        path = path / "gdb9.sdf"
    if path.name == "gdb9.sdf":
        table = path.with_name("gdb9.sdf.csv")
        return _qm9(beside, (path, table), lambda: _qm9_sdf(path, table), uncharacterized)
    if inside and (files := sorted(path.glob("dsgdb9nsd*.xyz"))):
        return _qm9(beside, tuple(files), lambda: _qm9_texts(_texts(files)), uncharacterized)
    if not inside and path.suffix not in FORMATS and tarfile.is_tarfile(path):
        if not re.search(r"dsgdb9nsd_\d+\.xyz$", next(_tar_texts(path), ("",))[0]):
            raise ValueError(f"{path} is no archive of QM9's xyz files: unpack it first")
        return _qm9(beside, (path,), lambda: _qm9_texts(_tar_texts(path)), uncharacterized)
    return _plain(path, seed)


# QM9


def qm9_edm_split(uncharacterized: np.ndarray) -> np.ndarray:
    """[133886] by gdb index: EDM's split of the 130,831 characterized molecules into 100,000 for
    training, 17,748 and the last tenth for testing; -1 elsewhere.

    Raises:
        ValueError: not the list of 3,054 indices.
    """
    out = np.unique(np.asarray(uncharacterized, dtype=np.int64))
    if len(out) != QM9_UNCHARACTERIZED or out[0] < 1 or out[-1] > QM9_COUNT:
        raise ValueError(f"expected {QM9_UNCHARACTERIZED} uncharacterized gdb indices: {len(out)}")
    kept = np.setdiff1d(np.arange(1, QM9_COUNT + 1), out)
    # the published split is this legacy generator's permutation
    order = kept[np.random.RandomState(0).permutation(len(kept))]  # noqa: NPY002
    split = np.full(QM9_COUNT + 1, -1, dtype=np.int8)
    split[order] = 1
    split[order[:QM9_TRAIN]] = 0
    split[order[len(order) - len(order) // 10 :]] = 2
    return split


def read_uncharacterized(path: str | Path) -> np.ndarray:
    """gdb indices of QM9's list: as published (rows that begin with an index, under nine lines of
    heading and over two of footing), or one index per line.

    Raises:
        ValueError: not 3,054 rows.
    """
    lines = Path(path).read_text(errors="replace").split("\n")
    for part in (lines[9:-2], lines):
        firsts = [line.split()[0] for line in part if line.strip()]
        rows = [int(word) for word in firsts if word.isdigit()]
        if len(rows) == QM9_UNCHARACTERIZED:
            return np.array(rows)
    raise ValueError(f"{path}: {len(rows)} rows where QM9's list has {QM9_UNCHARACTERIZED}")


def _qm9(
    folder: Path,
    files: tuple[Path, ...],
    records: Callable[[], Iterator[Record]],
    uncharacterized: str | Path | None,
) -> Source:
    places = [folder / "uncharacterized.txt", folder / "3195404"]
    found = [Path(uncharacterized)] if uncharacterized else [p for p in places if p.exists()]
    if not found:
        raise ValueError(
            f"QM9 in {folder}: the list of uncharacterized molecules is needed to leave them out. "
            "Put it there as uncharacterized.txt (figshare file 3195404) or name it by "
            "uncharacterized=..."
        )
    split = qm9_edm_split(read_uncharacterized(found[0]))
    return Source("qm9", (*files, found[0]), records, QM9_UNITS, split)


def _texts(paths: list[Path]) -> Iterator[tuple[str, str]]:
    for path in paths:
        yield path.name, path.read_text(errors="replace")


def _tar_texts(path: Path) -> Iterator[tuple[str, str]]:
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isfile() and member.name.endswith(".xyz"):
                    file = archive.extractfile(member)
                    content = file.read() if file is not None else b""
                    yield Path(member.name).name, content.decode(errors="replace")
            _check_end(archive)
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}): fetch it again") from error


def _check_end(archive: tarfile.TarFile) -> None:
    """tarfile takes the first header that is cut short or makes no sense for the end."""
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    header = archive.fileobj.read(tarfile.BLOCKSIZE)
    if header.strip(b"\0") or 0 < len(header) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"no file at byte {archive.offset}")


def _qm9_texts(texts: Iterator[tuple[str, str]]) -> Iterator[Record]:
    for name, text in texts:
        index = re.search(r"(\d{6})\.xyz$", name)
        gdb = int(index[1]) if index else 0
        try:
            if not 1 <= gdb <= QM9_COUNT:
                raise ValueError(f"the name holds no gdb index from 1 to {QM9_COUNT}")
            yield gdb, parse_qm9(text)
        except (ValueError, IndexError) as error:
            yield min(gdb, QM9_COUNT), Invalid(name, str(error))


def parse_qm9(text: str) -> Molecule:
    """One of QM9's own xyz files: 15 properties in the comment, Mulliken charges as fifth column,
    numbers such as ``1.2*^-6``, then frequencies and SMILES (the relaxed one is kept).

    Raises:
        ValueError: not such a file.
    """
    lines = text.splitlines()
    if len(lines) < 2 or not lines[0].strip().isdigit() or not lines[1].startswith("gdb"):
        raise ValueError("not a QM9 xyz file")
    n = int(lines[0])
    numbers = lines[1].split()[2:]
    rows = [line.split() for line in lines[2 : n + 2]]
    if len(rows) < n or len(numbers) != len(QM9_UNITS) or any(len(row) < 4 for row in rows):
        raise ValueError("the file is not complete")
    smiles = lines[n + 3].split() if len(lines) > n + 3 else []
    values = dict(zip(QM9_UNITS, (number(t) for t in numbers), strict=True))
    return Molecule(
        np.array([atomic_number(row[0]) for row in rows]),
        np.array([[number(t) for t in row[1:4]] for row in rows]),
        properties=_to_ev(values) | ({"smiles": smiles[-1]} if smiles else {}),
    )


def _to_ev(values: Mapping[str, float]) -> dict[str, float | str]:
    return {k: v * EV_PER_HARTREE if QM9_UNITS[k] == "eV" else v for k, v in values.items()}


def _qm9_sdf(path: Path, table: Path) -> Iterator[Record]:
    if not table.exists():
        raise ValueError(f"{table} is missing: it holds QM9's properties")
    with open(table, newline="") as file:
        for item, row in zip(read(path), csv.DictReader(file), strict=False):
            gdb = int(row["mol_id"].rpartition("_")[2])
            if isinstance(item, Molecule):
                values = {name: number(row[name]) for name in QM9_UNITS if name in row}
                item = item.replace(properties=_to_ev(values))
            yield gdb, item


def _qm9_arrays(folder: Path) -> Source:
    files = [folder / name for name in ("geometries.npz", "properties.npz", "smiles.csv.gz")]
    with np.load(files[0], allow_pickle=False) as arrays:
        gdb, given = arrays["gdb_index"], arrays["split"]
    split = np.full(QM9_COUNT + 1, -1, dtype=np.int8)
    split[gdb] = given
    present = tuple(f for f in files if f.exists())
    return Source("qm9", present, lambda: _array_records(*files), QM9_UNITS, split)


def _array_records(geometries: Path, properties: Path, smiles: Path) -> Iterator[Record]:
    with np.load(geometries, allow_pickle=False) as d:
        gdb, numbers, positions = d["gdb_index"], d["atomic_numbers"], d["positions"]
        ends = np.cumsum(d["num_atoms"], dtype=np.int64)
    labels: dict[int, dict[str, float | str]] = {}
    if properties.exists():
        with np.load(properties, allow_pickle=False) as d:
            names = d["names"].tolist()
            for index, row in zip(d["gdb_index"].tolist(), d["values"].tolist(), strict=True):
                labels[index] = _to_ev(dict(zip(names, row, strict=True)))
    if smiles.exists():
        with gzip.open(smiles, "rt", newline="") as file:
            for line in csv.DictReader(file):
                labels.setdefault(int(line["gdb_index"]), {})["smiles"] = line["smiles"]
    for row, index in enumerate(gdb.tolist()):
        atoms = slice(ends[row - 1] if row else 0, ends[row])
        try:
            yield (
                index,
                Molecule(numbers[atoms], positions[atoms], properties=labels.get(index, {})),
            )
        except ValueError as error:
            yield index, Invalid(f"gdb {index}", str(error))


# any other file


def _plain(path: Path, seed: int) -> Source:
    files = (path,) if path.is_file() else tuple(sorted(p for p in path.iterdir() if p.is_file()))
    if any(p.suffix in (".pickle", ".pkl", ".msgpack") for p in files):
        raise ValueError(
            f"{path}: pickles and msgpack files of GEOM are not read, because unpickling runs "
            "what they contain. Write their conformers to an SDF file first"
        )
    streams = [read(p) for p in files]  # refuses what is no molecule file before anything is made
    if not streams:
        raise ValueError(f"{path} holds no molecule files")
    return Source("files", files, lambda: _plain_records(files, seed))


def _plain_records(files: tuple[Path, ...], seed: int) -> Iterator[Record]:
    index = 0
    for path in files:
        for item in read(path):
            index += 1
            if isinstance(item, Molecule) and item.positions is None:
                item = _embedded(item, f"{path.name}#{index}", seed)
            yield index, item


def _embedded(molecule: Molecule, record: str, seed: int) -> Molecule | Invalid:
    try:
        return embed(molecule, seed)
    except ValueError as error:
        return Invalid(record, str(error))


def embed(molecule: Molecule, seed: int = 0) -> Molecule:
    """Hydrogens and a conformer by ETKDGv3 (Riniker and Landrum 2015), relaxed by MMFF94 where it
    has parameters. Stereo marks of a property ``smiles`` are obeyed.

    Raises:
        ValueError: no conformer is found within half a minute.
    """
    text = molecule.properties.get("smiles")
    with rdBase.BlockLogs():
        given = Chem.MolFromSmiles(text) if isinstance(text, str) else None
        mol = Chem.AddHs(given if given is not None else molecule.to_rdkit())
        settings: Any = rdDistGeom.ETKDGv3()
        settings.randomSeed = seed
        settings.timeout = 30
        if rdDistGeom.EmbedMolecule(mol, settings) != 0:
            raise ValueError("ETKDG finds no conformer")
        if rdForceFieldHelpers.MMFFHasAllMoleculeParams(mol):
            rdForceFieldHelpers.MMFFOptimizeMolecule(mol, maxIters=1000)
    return Molecule.from_rdkit(mol).replace(properties=molecule.properties, name=molecule.name)
