"""PLY files (Turk 1994): ascii and binary of both byte orders; vertices and faces are read.

Everything in a header is checked against the size of the file before memory is taken for it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
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
        vertex = _vertices(header)
        if vertex.count > most:
            raise ValueError(f"{vertex.count:,} points, at most {most:,} are taken")
        place = header.elements.index(vertex)
        _check_size(path, header, place)
        for element in header.elements[:place]:
            _skip(file, element, header.order)
        return _rows(file, vertex, header.order)


def read_triangles(path: Path) -> np.ndarray:
    """The corners of the faces, float64 [triangles, 3, 3]; polygons are cut into fans.

    Raises:
        ValueError: a header that lies or is damaged, or faces without vertices.
    """
    with path.open("rb") as file:
        header = read_header(file)
        vertex = _vertices(header)
        face = next(e for e in header.elements if e.name == "face")
        last = max(header.elements.index(vertex), header.elements.index(face))
        _check_size(path, header, last)
        for element in header.elements[: last + 1]:
            if element is vertex:
                corners = _rows(file, vertex, header.order)
            elif element is face:
                fans = _fans(_polygons(file, face, header.order))
            else:
                _skip(file, element, header.order)
    if len(fans) and not 0 <= fans.min() <= fans.max() < len(corners):
        raise ValueError(f"its faces have corners beyond its {len(corners):,} vertices")
    return np.asarray(corners[fans])


def _vertices(header: Header) -> Element:
    vertex = next((e for e in header.elements if e.name == "vertex"), None)
    if vertex is None:
        raise ValueError("it has no vertices")
    if not vertex.fixed or not {"x", "y", "z"} <= vertex.properties.keys():
        raise ValueError("its vertices have no plain coordinates x, y, z")
    return vertex


def _check_size(path: Path, header: Header, last: int) -> None:
    """Refuse a file too short for its elements up to number ``last``."""
    rest = path.stat().st_size - header.start
    elements = header.elements[: last + 1]
    if rest < sum(_least_bytes(e, header.order) for e in elements):
        names = {"vertex": "points", "face": "faces"}
        counts = [f"{e.count:,} {names[e.name]}" for e in elements if e.name in names]
        announced = " and ".join(counts)
        raise ValueError(f"its header announces {announced}, but only {rest:,} bytes follow")


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


def _polygons(file: BinaryIO, face: Element, order: str) -> Iterator[np.ndarray]:
    """The corners of every face, int64 [any]; as blocks [faces, 3] where all are triangles."""
    kinds = face.properties
    name = "vertex_indices" if "vertex_indices" in kinds else "vertex_index"
    found = kinds.get(name, "")
    if isinstance(found, str) or found[1][0] == "f":
        raise ValueError("its faces have no list vertex_indices")
    if not order:
        yield from _polygons_in_text(file, face, name)
        return
    start, data = file.tell(), file.read()
    if len(kinds) == 1:
        (head, kind), n = found, face.count
        row = np.dtype([("n", head), ("corners", order + kind, (3,))])
        rows = np.frombuffer(data, row, n) if len(data) >= n * row.itemsize else np.zeros(0, row)
        if np.dtype(head).itemsize == 1 and len(rows) and (rows["n"] == 3).all():
            yield rows["corners"].astype(np.int64)
            file.seek(start + n * row.itemsize)
            return
    length = yield from _polygons_in_bytes(data, face, order, name)
    file.seek(start + length)


def _polygons_in_text(file: BinaryIO, face: Element, name: str) -> Iterator[np.ndarray]:
    for i in range(face.count):
        words, place = file.readline(MAX_HEADER).split(), 0
        for key, kind in face.properties.items():
            count = 0 if isinstance(kind, str) else int((words[place:] or [b"0"])[0])
            length = 1 + max(0, count)
            if key == name:
                found = words[place + 1 : place + length]
            place += length
        if len(words) < place or not words:
            raise ValueError(f"its data end or break off at face {i:,} of {face.count:,}")
        yield np.array([int(word) for word in found], np.int64)


def _polygons_in_bytes(
    data: bytes, face: Element, order: str, name: str
) -> Generator[np.ndarray, None, int]:
    """The corners of every face; returns the length of them all."""
    columns = [
        (key, None if isinstance(kind, str) else np.dtype(order + kind[0]),
         np.dtype(order + (kind if isinstance(kind, str) else kind[1])))
        for key, kind in face.properties.items()
    ]  # fmt: skip
    place = 0
    for i in range(face.count):
        for key, head, kind in columns:
            count = 1
            if head is not None:
                start, place = place, place + head.itemsize
                count = int.from_bytes(data[start:place], "big" if order == ">" else "little")
            start, place = place, place + count * kind.itemsize
            if place > len(data):
                raise ValueError(f"its data end at face {i:,} of {face.count:,}")
            if key == name:
                yield np.frombuffer(data, kind, count, start).astype(np.int64)
    return place


def _fans(polygons: Iterable[np.ndarray]) -> np.ndarray:
    """Triangles [n, 3] of polygons with any number of corners."""
    equal: dict[int, list[np.ndarray]] = {}
    for polygon in polygons:
        equal.setdefault(polygon.shape[-1], []).append(np.atleast_2d(polygon))
    parts = [np.zeros((0, 3), np.int64)]
    for n, found in equal.items():
        second = np.arange(1, n - 1)
        cut = np.stack([np.zeros_like(second), second, second + 1], 1)
        parts.append(np.concatenate(found)[:, cut].reshape(-1, 3))
    return np.concatenate(parts)


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
