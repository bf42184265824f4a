"""PLY files (Turk 1994): ascii and binary of both byte orders; the vertices are read.

Everything in a header is checked against the size of the file before memory is taken for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pointdiff.clouds import Cloud

TYPES = {
    "char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1", "short": "i2", "int16": "i2",
    "ushort": "u2", "uint16": "u2", "int": "i4", "int32": "i4", "uint": "u4", "uint32": "u4",
    "float": "f4", "float32": "f4", "double": "f8", "float64": "f8",
}  # fmt: skip
ORDERS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}
MAX_HEADER = 1 << 16
COUNT_WIDTH = 12
"""Digits kept free in the header of a file whose number of points is not known yet."""


@dataclass
class Element:
    """One element of the header: its rows, and properties name -> type, or (count type, type)
    for a list."""

    name: str
    count: int
    properties: dict[str, str | tuple[str, str]] = field(default_factory=dict)

    @property
    def fixed(self) -> bool:
        """Whether all rows have the same length."""
        return all(isinstance(kind, str) for kind in self.properties.values())

    def layout(self, order: str) -> np.dtype:
        """The record type of a binary row."""
        columns = [(name, order + str(kind)) for name, kind in self.properties.items()]
        return np.dtype(columns)


@dataclass(frozen=True)
class Header:
    """``order``: '' for ascii, else '<' or '>'. ``start``: where the data begin, in bytes."""

    order: str
    elements: list[Element]
    start: int

    @property
    def has_faces(self) -> bool:
        """Whether the file is a mesh."""
        return any(e.name == "face" and e.count for e in self.elements)


def read_header(file: BinaryIO) -> Header:
    """Parse a header from the start of ``file``.

    Raises:
        ValueError: says what is wrong with it.
    """
    if file.readline(8).rstrip(b"\r\n ") != b"ply":
        raise ValueError("no PLY file: the first line is not 'ply'")
    order, elements = None, []
    while file.tell() < MAX_HEADER:
        line = file.readline(MAX_HEADER)
        if not line:
            break
        match line.decode("ascii", errors="replace").split():
            case ["end_header"]:
                if order is None:
                    raise ValueError("its header has no format line")
                return Header(order, elements, file.tell())
            case ["format", kind, _] if kind in ORDERS:
                order = ORDERS[kind]
            case ["element", name, count] if count.isdecimal() and len(count) <= 15:
                elements.append(Element(name, int(count)))
            case ["property", *rest] if elements:
                _add_property(elements[-1], rest)
            case [] | ["comment" | "obj_info", *_]:
                continue
            case words:
                raise ValueError(f"a header line it cannot have: {' '.join(words)[:60]!r}")
    raise ValueError("its header does not end")


def _add_property(element: Element, words: list[str]) -> None:
    match words:
        case [kind, name] if kind in TYPES:
            found: str | tuple[str, str] = TYPES[kind]
        case ["list", length, kind, name] if kind in TYPES and TYPES.get(length, "f")[0] in "iu":
            found = (TYPES[length], TYPES[kind])
        case _:
            raise ValueError(f"a property it cannot have: {' '.join(words)[:60]!r}")
    if name in element.properties:
        raise ValueError(f"property {name[:20]!r} is there twice")
    element.properties[name] = found


def read_vertices(path: Path, most: int) -> Cloud:
    """The vertices' coordinates, float64 [n, 3].

    Raises:
        ValueError: a header that lies or is damaged, fewer data than announced, more than
            ``most`` vertices.
    """
    with path.open("rb") as file:
        header = read_header(file)
        place = [e.name for e in header.elements].index("vertex") if _has_vertex(header) else -1
        if place < 0:
            raise ValueError("it has no vertices")
        vertex = header.elements[place]
        if not vertex.fixed or not {"x", "y", "z"} <= vertex.properties.keys():
            raise ValueError("its vertices have no plain coordinates x, y, z")
        if vertex.count > most:
            raise ValueError(f"{vertex.count:,} points, at most {most:,} are taken")
        rest = path.stat().st_size - header.start
        shortest = sum(_least_bytes(e, header.order) for e in header.elements[: place + 1])
        if rest < shortest:
            raise ValueError(
                f"its header announces {vertex.count:,} points, but only {rest:,} bytes follow"
            )
        for element in header.elements[:place]:
            _skip(file, element, header.order)
        return _rows(file, vertex, header.order)


def _has_vertex(header: Header) -> bool:
    return any(e.name == "vertex" for e in header.elements)


def _least_bytes(element: Element, order: str) -> int:
    """The fewest bytes that its rows can have (an ascii value has at least one, and a blank)."""
    if not order:
        return max(0, element.count * 2 * max(1, len(element.properties)) - 1)
    widths = (np.dtype(k if isinstance(k, str) else k[0]).itemsize for k in _kinds(element))
    return element.count * sum(widths)


def _kinds(element: Element) -> list[str | tuple[str, str]]:
    return list(element.properties.values())


def _skip(file: BinaryIO, element: Element, order: str) -> None:
    if not order:
        for _ in range(element.count):
            file.readline(MAX_HEADER)
        return
    if element.fixed:
        file.seek(element.count * element.layout(order).itemsize, 1)
        return
    for _ in range(element.count if element.properties else 0):
        for kind in _kinds(element):
            length, kind = (None, kind) if isinstance(kind, str) else kind
            count = 1
            if length is not None:
                head = file.read(np.dtype(length).itemsize)
                if len(head) < np.dtype(length).itemsize:
                    raise ValueError("its data end too early")
                count = int(np.frombuffer(head, order + length)[0])
            file.seek(max(count, 0) * np.dtype(kind).itemsize, 1)


def _rows(file: BinaryIO, vertex: Element, order: str) -> Cloud:
    names = list(vertex.properties)
    if order:
        kind = vertex.layout(order)
        data = file.read(vertex.count * kind.itemsize)
        if len(data) < vertex.count * kind.itemsize:
            raise ValueError(f"its data end before the {vertex.count:,} points it announces")
        rows = np.frombuffer(data, kind)
        with np.errstate(invalid="ignore"):  # a signalling NaN is caught by the cloud's check
            return np.stack([rows[axis].astype(np.float64) for axis in "xyz"], axis=1)
    columns = [names.index(axis) for axis in "xyz"]
    out = np.empty((vertex.count, 3))
    for i in range(vertex.count):
        words = file.readline(MAX_HEADER).split()
        if len(words) != len(names):
            raise ValueError(f"point {i} has {len(words)} values instead of {len(names)}")
        out[i] = [float(words[c]) for c in columns]
    return out


def write_vertices(path: Path, blocks: Iterable[Cloud], form: str = "binary_little_endian") -> int:
    """Write points block by block, so that they need not fit into memory; returns how many."""
    order, count = ORDERS[form], 0
    before = f"ply\nformat {form} 1.0\nelement vertex ".encode()
    after = b"\nproperty float x\nproperty float y\nproperty float z\nend_header\n"
    with path.open("wb") as file:
        file.write(before + b"0" * COUNT_WIDTH + after)
        for block in blocks:
            points = np.asarray(block, order + "f4" if order else "f4")
            if order:
                file.write(points.tobytes())
            else:
                np.savetxt(file, points, fmt="%.9g")
            count += len(points)
        file.seek(len(before))
        file.write(str(count).rjust(COUNT_WIDTH, "0").encode())
    return count
