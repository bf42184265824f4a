"""Molecule files: SDF, XYZ (plain and extended), PDB, SMILES and CSV, streamed, gzipped or not.

A record that cannot be read becomes an ``Invalid`` with its number and the reason; nothing is
dropped and nothing a file contains makes a reader fail half-way.
"""

from __future__ import annotations

import csv
import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from rdkit import Chem, rdBase

from molediff.formats import PDB, SDF, XYZ, Format, one_line, value
from molediff.molecules import Molecule
from shared.domains import Invalid

MAX_LINE = 1 << 20
"""Longest line kept in memory, in bytes."""


def read(path: str | Path) -> Iterator[Molecule | Invalid]:
    """Stream the molecules of a file; the suffix says the format, ``.gz`` after it is understood.

    ``.sdf .sd .mol`` (V2000, V3000), ``.xyz .extxyz`` (the lattice is ignored, key=value pairs
    become properties), ``.pdb`` (atoms only), ``.smi .smiles`` (SMILES, then a name), ``.csv
    .tsv`` (a column ``smiles``; the others become properties). Coordinates are in Angstrom.
    Molecules from SMILES have no positions, and keep the text as property ``smiles``.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a folder, an unknown suffix, or a file without any record.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name one of the files in it")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    form = _format(path)
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    return _stream(path, form)


def write(path: str | Path, molecules: Iterable[Molecule]) -> int:
    """Append molecules to a file, made where absent; returns how many. Every record goes out in
    one system call, and an unfinished last record that a killed process left is cut off first, so
    a file always reads as whole records. A gzipped file grows by one member per record.

    SMILES and CSV carry no stereo marks. Aromatic bonds are written kekulised where possible. A
    new CSV has a column for every property of a sequence of molecules, or of the first one of an
    iterator.

    Raises:
        ValueError: an unknown suffix, a molecule the format cannot hold, a property that is not a
            column of an existing CSV file, or a file that does not end with a whole record.
    """
    path = Path(path)
    form = _format(path)
    pack: Callable[[bytes], bytes] = gzip.compress if _gzipped(path) else bytes
    _mend(path, form.end)
    encode = _row_encoder(path, molecules) if form.split is _split_csv else form.encode
    count = 0
    with open(path, "ab", buffering=0) as out:
        for molecule in molecules:
            out.write(pack(encode(molecule).encode()))
            count += 1
    return count


def refusal(path: str | Path, molecule: Molecule) -> str | None:
    """Why a file of the format of ``path`` cannot hold a molecule; None if it can."""
    try:
        _format(Path(path)).encode(molecule)
    except ValueError as error:
        return str(error)
    return None


def _format(path: Path) -> Format:
    suffixes = [s.lower() for s in path.suffixes]
    suffix = suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else path.suffix
    form = FORMATS.get(suffix.lower())
    if form is None:
        raise ValueError(f"{path}: no molecule format {suffix!r}; known: {', '.join(FORMATS)}")
    return form


def _open(path: Path) -> io.BufferedIOBase:
    return gzip.open(path) if _gzipped(path) else open(path, "rb")


def _gzipped(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def _lines(path: Path) -> Iterator[str]:
    with _open(path) as handle:
        while line := handle.readline(MAX_LINE):
            text = line.decode("utf-8", errors="replace").removeprefix("\ufeff")
            yield text.rstrip("\r\n").replace("\0", "\ufffd")


def _stream(path: Path, form: Format) -> Iterator[Molecule | Invalid]:
    index = 0
    blocks = form.split(_lines(path))
    while True:
        try:
            block = next(blocks)
        except StopIteration:
            break
        except (OSError, EOFError, zlib.error) as error:
            yield Invalid(f"{path.name}#{index + 1}", f"damaged from here on: {error}")
            return
        index += 1
        try:
            yield form.parse(block)
        except (ValueError, OverflowError) as error:
            yield Invalid(f"{path.name}#{index}", str(error))
    if index == 0:
        raise ValueError(f"{path} holds no molecules")


def _mend(path: Path, end: str) -> None:
    """Cut an unfinished last record off a plain file; one that lacks only the end of its last line
    is whole where a mark stands on it."""
    if not path.exists() or path.stat().st_size == 0 or _gzipped(path):
        return
    mark, step, tail = end.encode(), 1 << 16, b""
    with open(path, "rb+") as file:
        position = file.seek(0, os.SEEK_END)
        if last := mark.rstrip():
            file.seek(max(0, position - len(last)))
            if file.read() == last:
                file.write(mark[len(last) :])
                return
        while position > 0 and (cut := tail.rfind(mark)) < 0:
            position = max(0, position - step)
            file.seek(position)
            tail = file.read(step) + tail[: len(mark)] if tail else file.read(step)
        if (cut := tail.rfind(mark)) < 0:
            raise ValueError(f"{path} holds no whole record to append to: remove it")
        file.truncate(position + cut + len(mark))


def _split_smiles(lines: Iterator[str]) -> Iterator[dict[str, str]]:
    for line in lines:
        if line.strip() and not line.startswith("#"):
            text, _, name = (
                line.strip().partition(" ") if "\t" not in line else line.partition("\t")
            )
            yield {"smiles": text.strip(), "name": name.strip()}


def _split_csv(lines: Iterator[str]) -> Iterator[Mapping[str, str] | str]:
    """Rows as a mapping with the keys ``smiles`` and ``name``; text is a row's defect."""
    header = next((line for line in lines if line.strip()), "")
    separator = "\t" if "\t" in header else ";" if ";" in header and "," not in header else ","
    try:
        names = next(csv.reader([header], delimiter=separator), [])
    except csv.Error as error:
        yield str(error)
        return
    columns = [_column(name) for name in names]
    rows = csv.reader((line + "\n" for line in lines), delimiter=separator)
    if "smiles" not in columns:
        yield f"no column 'smiles' among {', '.join(names)[:200]!r}"
        return
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield str(error)
            continue
        if len(row) == len(columns):
            yield dict(zip(columns, row, strict=True))
        elif row:
            yield f"{len(row)} fields where the header names {len(columns)}"


def _column(name: str) -> str:
    name = name.strip()
    return name.lower() if name.lower() in ("smiles", "name") else name


def _parse_smiles(row: Mapping[str, str] | str) -> Molecule:
    if isinstance(row, str):
        raise ValueError(row)
    text = row["smiles"].strip()
    with rdBase.BlockLogs():
        mol = Chem.MolFromSmiles(text) if 0 < len(text) < 10_000 else None
    if mol is None:
        raise ValueError(f"{text[:60]!r} is not a SMILES that RDKit can read")
    rest = {k: value(v) for k, v in row.items() if k not in ("smiles", "name") and v.strip()}
    molecule = Molecule.from_rdkit(mol)
    return molecule.replace(properties={"smiles": text, **rest}, name=row.get("name", ""))


def _encode_smiles(molecule: Molecule) -> str:
    return f"{molecule.smiles()} {one_line(molecule.name)}".rstrip() + "\n"


def _row_encoder(path: Path, molecules: Iterable[Molecule]) -> Callable[[Molecule], str]:
    """Rows under the header of an existing file, or under the properties of the molecules."""
    separator = "\t" if ".tsv" in path.name.lower() else ","
    columns: list[str] = []
    if path.exists() and path.stat().st_size:
        header = next(_lines(path), "")
        columns += [_column(name) for name in next(csv.reader([header], delimiter=separator))]
    known = molecules if isinstance(molecules, Sequence) else ()
    names = dict.fromkeys(name for molecule in known for name in molecule.properties)

    def encode(molecule: Molecule) -> str:
        row = {**molecule.properties, "smiles": molecule.smiles(), "name": molecule.name}
        out = io.StringIO()
        writer = csv.writer(out, delimiter=separator, lineterminator="\n")
        if not columns:
            own = [k for k in {**names, **row} if k not in ("smiles", "name")]
            columns.extend(["smiles", "name", *own])
            writer.writerow(columns)
        unknown = row.keys() - {*columns, "name"}
        if unknown:
            raise ValueError(f"{path} has no column for property {sorted(unknown)[0]!r}")
        writer.writerow([one_line(str(row.get(name, ""))) for name in columns])
        return out.getvalue()

    return encode


_CSV = Format(_split_csv, _parse_smiles, _encode_smiles)
_SMILES = Format(_split_smiles, _parse_smiles, _encode_smiles)
FORMATS = {
    ".sdf": SDF,
    ".sd": SDF,
    ".mol": SDF,
    ".xyz": XYZ,
    ".extxyz": XYZ,
    ".pdb": PDB,
    ".smi": _SMILES,
    ".smiles": _SMILES,
    ".csv": _CSV,
    ".tsv": _CSV,
}
