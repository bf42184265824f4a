"""The layouts SDF, XYZ (plain and extended) and PDB: cutting into records, reading, writing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from rdkit import Chem, rdBase

from molediff.molecules import Molecule, atomic_number

MAX_RECORD = 1 << 20
"""Longest record kept in memory, in lines."""


@dataclass(frozen=True)
class Format:
    """``split`` cuts lines into records, ``parse`` makes a molecule of one, ``encode`` makes text
    of a molecule, ``end`` is what a whole file ends with."""

    split: Callable[[Iterator[str]], Iterator[Any]]
    parse: Callable[[Any], Molecule]
    encode: Callable[[Molecule], str]
    end: str = "\n"


def number(text: str) -> float:
    """A float; also QM9's ``1.2*^-5``.

    Raises:
        ValueError: not a number.
    """
    try:
        return float(text)
    except ValueError:
        if "*^" not in text:
            raise ValueError(f"{text[:20]!r} is not a number") from None
        return number(text.replace("*^", "e", 1))


def value(text: str) -> int | float | str:
    """The number a text stands for, or the text. Codes such as 007 stay text."""
    text = text.strip()
    if re.fullmatch(r"[+-]?(0|[1-9]\d{0,17})", text):
        return int(text)
    try:
        return text if re.match(r"[+-]?0\d", text) or "_" in text else float(text)
    except ValueError:
        return text


# SDF


def _split_sdf(lines: Iterator[str]) -> Iterator[list[str]]:
    block: list[str] = []
    for line in lines:
        if line.startswith("$$$$"):
            yield block
            block = []
        elif len(block) <= MAX_RECORD:
            block.append(line)
    if any(line.strip() for line in block):
        yield block


def _parse_sdf(block: list[str]) -> Molecule:
    if len(block) > MAX_RECORD:
        raise ValueError(f"a record of more than {MAX_RECORD} lines")
    end = next((i for i, line in enumerate(block) if line.startswith("M  END")), None)
    if end is None:
        raise ValueError("no 'M  END' line: the record is not complete")
    _check_counts(block[: end + 1])
    with rdBase.BlockLogs():
        mol = Chem.MolFromMolBlock("\n".join(block[: end + 1]), sanitize=False, removeHs=False)
    if mol is None:
        raise ValueError("not a V2000 or V3000 mol block that RDKit can read")
    molecule = Molecule.from_rdkit(mol)
    hydrogens = molecule.hydrogens
    if not _hydrogens_implied(mol):
        hydrogens = np.array([a.GetNumExplicitHs() for a in mol.GetAtoms()])
    positions, bonds, orders = molecule.positions, molecule.bonds, molecule.orders
    tagged = block[1][20:22].upper() == "2D"
    flat = positions is None or (tagged and not positions[:, 2].any())
    if flat or (len(molecule) > 1 and not np.any(positions)):
        positions = None
    elif len(molecule) > 1 and not mol.GetNumBonds():
        bonds = orders = None
        hydrogens = np.zeros(len(molecule))
    return molecule.replace(
        positions=positions,
        bonds=bonds,
        orders=orders,
        hydrogens=hydrogens,
        properties=_sdf_properties(block[end + 1 :]),
        name=block[0].strip(),
    )


def _check_counts(block: list[str]) -> None:
    """RDKit reserves memory for as many atoms as a V3000 file announces."""
    for line in block:
        if counts := re.match(r"M  V30 COUNTS +(\d+) +(\d+)", line):
            if max(len(c) for c in counts.groups()) > 7 or int(counts[1]) > len(block):
                raise ValueError(f"announces {counts[1][:12]} atoms, has {len(block)} lines")


def _hydrogens_implied(mol: Chem.Mol) -> bool:
    """Hydrogens left out of a file are implied by valence; where a file lists them, an open
    valence is an open valence. Files with polar hydrogens only count as leaving them out."""
    carriers = {n.GetAtomicNum() for a in mol.GetAtoms() if a.GetAtomicNum() == 1
                for n in a.GetNeighbors()}  # fmt: skip
    elements = {a.GetAtomicNum() for a in mol.GetAtoms()}
    return 1 not in elements or (6 in elements and bool(carriers) and 6 not in carriers)


def _sdf_properties(lines: list[str]) -> dict[str, Any]:
    found: dict[str, list[str]] = {}
    current: list[str] | None = None
    for line in lines:
        name = re.search(r"<([^<]*)>", line)
        if line.startswith(">") and (name or current is None):  # else a value such as >5
            current = found.setdefault(name[1] if name else line[1:].strip(), [])
        elif not line.strip():
            current = None
        elif current is not None:
            current.append(line)
    return {key: value("\n".join(text)) for key, text in found.items()}


def _encode_sdf(molecule: Molecule) -> str:
    try:
        molecule = molecule.kekulised()
    except ValueError:
        pass
    mol = molecule.to_rdkit(sanitize=False)
    mol.SetProp("_Name", one_line(molecule.name).replace("$$$$", "$ $ $ $"))
    far = molecule.positions is not None and bool(np.abs(molecule.positions).max() >= 9999)
    with rdBase.BlockLogs():
        mol.UpdatePropertyCache(strict=False)
        block = Chem.MolToMolBlock(mol, kekulize=False, forceV3000=mol.GetNumAtoms() > 999 or far)
    tags = (
        f">  <{one_line(key).replace('>', ')').replace('<', '(')}>\n{one_line(str(v))}\n\n"
        for key, v in molecule.properties.items()
    )
    return block + "".join(tags) + "$$$$\n"


def one_line(text: str) -> str:
    return " ".join(text.split())


# XYZ

_PAIR = re.compile(r"""(?<!\S)(\w[\w.:/-]*)=("[^"]*"|'[^']*'|\{[^}]*\}|\S*)""")


def _split_xyz(lines: Iterator[str]) -> Iterator[list[str]]:
    """Cut at atom counts. After a damaged record reading resumes at the next bare number."""
    block: list[str] = []
    wanted = 0
    for line in lines:
        counts = re.fullmatch(r"\s*\d{1,7}\s*", line) is not None
        if counts and (not block or len(block) >= 2 or wanted == 0):
            if block:
                yield block
            block, wanted = [line], int(line) + 2
        elif block and len(block) <= MAX_RECORD and wanted:
            block.append(line)
            if len(block) == wanted:
                yield block
                block, wanted = [], 0
        elif not block and line.strip():
            block, wanted = [line], 0
    if block:
        yield block


def _parse_xyz(block: list[str]) -> Molecule:
    if not re.fullmatch(r"\s*\d+\s*", block[0]):
        raise ValueError(f"expected a number of atoms, found {block[0][:40]!r}")
    n, comment = int(block[0]), block[1] if len(block) > 1 else ""
    if len(block) != n + 2:
        raise ValueError(f"announces {n} atoms, has {max(0, len(block) - 2)}")
    pairs = {key: text.strip("\"'{}") for key, text in _PAIR.findall(comment)}
    columns = _xyz_columns(pairs.pop("Properties", ""))
    species, start = columns["species"], columns["pos"]
    rows = [line.split() for line in block[2:]]
    charge = columns.get("formal_charge")
    width = max(species, start + 2, charge or 0)
    short = next((i for i, row in enumerate(rows) if len(row) <= width), None)
    if short is not None:
        raise ValueError(f"atom {short + 1}: {block[short + 2][:40]!r} lacks a column")
    charges = [number(row[charge]) for row in rows] if charge is not None else np.zeros(n)
    name = pairs.pop("name", "") if _PAIR.search(comment) else comment.strip()
    ignored = ("lattice", "pbc", "origin")
    return Molecule(
        np.array([atomic_number(row[species]) for row in rows], dtype=np.int64),
        np.array([[number(t) for t in row[start : start + 3]] for row in rows]).reshape(n, 3),
        np.asarray(charges),
        properties={k: value(v) for k, v in pairs.items() if k.lower() not in ignored},
        name=name,
    )


def _xyz_columns(layout: str) -> dict[str, int]:
    """First column of each per-atom array of ``species:S:1:pos:R:3:...``."""
    columns, at, fields = {}, 0, layout.split(":") if layout else []
    if len(fields) % 3:
        raise ValueError(f"Properties={layout[:40]!r} is not name:type:columns")
    for name, _, width in zip(fields[::3], fields[1::3], fields[2::3], strict=True):
        columns["pos" if name == "positions" else name] = at
        if not re.fullmatch(r"[1-9]\d?", width):
            raise ValueError(f"Properties: {width[:12]!r} columns for {name[:20]!r}")
        at += int(width)
    if columns and not {"species", "pos"} <= columns.keys():
        raise ValueError("Properties names no species and pos")
    return columns or {"species": 0, "pos": 1}


def _encode_xyz(molecule: Molecule) -> str:
    positions = _need_positions(molecule)
    layout = "species:S:1:pos:R:3"
    extra: list[str] = [""] * len(molecule)
    if molecule.charges.any():
        layout += ":formal_charge:I:1"
        extra = [f" {q}" for q in molecule.charges]
    comment = one_line(molecule.name)
    if molecule.properties or molecule.charges.any() or "=" in comment:
        pairs = {"name": comment, **molecule.properties} if comment else molecule.properties
        texts = [f"{re.sub(r'[^A-Za-z0-9_.:/-]', '_', k)}={_quoted(v)}" for k, v in pairs.items()]
        comment = " ".join([f"Properties={layout}", *texts])
    atoms = (
        f"{symbol:<2} {x:.8f} {y:.8f} {z:.8f}{tail}\n"
        for symbol, (x, y, z), tail in zip(
            molecule.symbols, positions.tolist(), extra, strict=True
        )
    )
    return f"{len(molecule)}\n{comment}\n" + "".join(atoms)


def _quoted(item: Any) -> str:
    text = one_line(str(item)).replace('"', "'")
    return text if re.fullmatch(r"[^\s'{}=]+", text) else f'"{text}"'


def _need_positions(molecule: Molecule) -> np.ndarray:
    if molecule.positions is None:
        raise ValueError(f"molecule {molecule.name!r} has no positions to write: use .sdf or .smi")
    return molecule.positions


# PDB


def _split_pdb(lines: Iterator[str]) -> Iterator[list[str]]:
    block: list[str] = []
    atoms = False
    for line in lines:
        atoms |= line.startswith(("ATOM", "HETATM"))
        if line.startswith("END"):
            if atoms:
                yield block
            block, atoms = [], False
        elif line.startswith(("ATOM", "HETATM", "COMPND")) and len(block) <= MAX_RECORD:
            block.append(line)
    if atoms:
        yield block


def _parse_pdb(block: list[str]) -> Molecule:
    atoms = [x for x in block if x.startswith(("ATOM", "HETATM")) and x[16:17] in " A1"]
    titles = [x[10:].strip() for x in block if x.startswith("COMPND")]
    charges = [re.fullmatch(r"(\d)([+-])", x[78:80]) for x in atoms]
    return Molecule(
        np.array([_pdb_element(x) for x in atoms], dtype=np.int64),
        np.array([[number(x[k : k + 8]) for k in (30, 38, 46)] for x in atoms]).reshape(-1, 3),
        np.array([int(c[2] + c[1]) if c else 0 for c in charges]),
        name=titles[0] if titles else "",
    )


def _pdb_element(line: str) -> int:
    """Columns 77-78, where old files count lines, or the atom name: its first two columns hold the
    element, but hydrogens with names of four characters (HG11) begin there, too."""
    element, name = line[76:78].strip(), line[12:16].strip()
    if not element or element.isdigit():
        hydrogen = len(name) == 4 and name.lstrip("0123456789").startswith("H")
        element = "H" if hydrogen else line[12:14].strip(" 0123456789")
    return atomic_number(element)


def _encode_pdb(molecule: Molecule) -> str:
    if np.abs(_need_positions(molecule)).max() >= 999:
        raise ValueError("a PDB file holds coordinates below 999 Angstrom: use .sdf or .xyz")
    mol = molecule.to_rdkit(sanitize=False)
    mol.SetProp("_Name", one_line(molecule.name))
    return Chem.MolToPDBBlock(mol, flavor=4 | 8)


SDF = Format(_split_sdf, _parse_sdf, _encode_sdf, "$$$$\n")
XYZ = Format(_split_xyz, _parse_xyz, _encode_xyz)
PDB = Format(_split_pdb, _parse_pdb, _encode_pdb, "END\n")
