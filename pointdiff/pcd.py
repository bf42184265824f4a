"""PCD files (Point Cloud Library, version 0.7): ascii, binary and compressed; the coordinates are
read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pointdiff.clouds import Cloud

KINDS = {
    **{f"F{n}": f"<f{n}" for n in (4, 8)},
    **{f"I{n}": f"<i{n}" for n in (1, 2, 4, 8)},
    **{f"U{n}": f"<u{n}" for n in (1, 2, 4, 8)},
}
MAX_LINE, COUNT_WIDTH = 1 << 16, 12
MOST_FOLD = 88  # LZF: 264 bytes out of three


def read_points(path: Path, most: int) -> Cloud:
    """Coordinates, float64 [n, 3]. Points that a scanner did not see are NaN rows in these files;
    they are left out.

    Raises:
        ValueError: a header that lies or is damaged, damaged data, more than ``most`` points.
    """
    with path.open("rb") as file:
        header = _header(file)
        layout, columns = _layout(header)
        count = _number(header, "POINTS")
        if count > most:
            raise ValueError(f"{count:,} points, at most {most:,} are taken")
        form = header["DATA"][0].lower()
        if form == "binary":
            return _seen(_binary(file, count, layout))
        if form == "binary_compressed":
            return _seen(_compressed(file, count, layout))
        if form == "ascii":
            return _seen(_ascii(file, count, columns))
    raise ValueError(f"DATA {form[:30]} is none of ascii, binary, binary_compressed")


def _header(file: BinaryIO) -> dict[str, list[str]]:
    header: dict[str, list[str]] = {}
    while line := file.readline(MAX_LINE):
        words = line.decode("ascii", errors="replace").split()
        if len(words) > 1 and not words[0].startswith("#"):
            header[words[0].upper()] = words[1:]
        if "DATA" in header:
            break
        if file.tell() > MAX_LINE:
            raise ValueError("its header does not end")
    missing = {"FIELDS", "SIZE", "TYPE", "POINTS", "DATA"} - header.keys()
    if missing:
        raise ValueError(f"its header has no {', '.join(sorted(missing))}")
    return header


def _number(header: dict[str, list[str]], key: str) -> int:
    if not header[key][0].isdecimal() or len(header[key][0]) > 15:
        raise ValueError(f"{key} {header[key][0][:30]!r} is no number")
    return int(header[key][0])


def _layout(header: dict[str, list[str]]) -> tuple[np.dtype, list[int]]:
    """The record type of a binary row, and the columns of x, y, z in a row of text."""
    names, n = header["FIELDS"], len(header["FIELDS"])
    repeats = header.get("COUNT", ["1"] * n)
    if not n == len(header["SIZE"]) == len(header["TYPE"]) == len(repeats):
        raise ValueError("FIELDS, SIZE, TYPE and COUNT differ in length")
    kinds, offsets, column = [], [], 0
    columns: dict[str, int] = {}
    offset = 0
    for name, size, kind, repeat in zip(
        names, header["SIZE"], header["TYPE"], repeats, strict=True
    ):
        code = KINDS.get(kind.upper() + size)
        most = 1 if name in ("x", "y", "z") else 9_999
        if code is None or not repeat.isdecimal() or not 0 < int(repeat[:6]) <= most:
            raise ValueError(f"a field it cannot have: {name[:20]} {kind} {size} {repeat[:20]}")
        kinds.append(code)
        offsets.append(offset)
        columns.setdefault(name, column)
        offset += int(size) * int(repeat)
        column += int(repeat)
    if not {"x", "y", "z"} <= columns.keys():
        raise ValueError("its fields have no x, y, z")
    chosen = [names.index(axis) for axis in "xyz"]
    record: Any = {
        "names": list("xyz"),
        "formats": [kinds[i] for i in chosen],
        "offsets": [offsets[i] for i in chosen],
        "itemsize": offset,
    }
    return np.dtype(record), [columns[axis] for axis in "xyz"]


def _binary(file: BinaryIO, count: int, layout: np.dtype) -> Cloud:
    data = file.read(count * layout.itemsize)
    if len(data) < count * layout.itemsize:
        raise ValueError(f"its header announces {count:,} points, but the data end before")
    rows = np.frombuffer(data, layout)
    return _joined([rows[axis] for axis in "xyz"])


def _compressed(file: BinaryIO, count: int, layout: np.dtype) -> Cloud:
    """Two sizes, then the values of one field after the other, compressed."""
    packed, size = (int.from_bytes(file.read(4), "little") for _ in range(2))
    data = file.read(packed)
    if len(data) < packed or size != count * layout.itemsize or size > MOST_FOLD * packed:
        raise ValueError(
            f"its header announces {count:,} points of {layout.itemsize} bytes, its data {size:,} "
            f"bytes in {len(data):,} of {packed:,}"
        )
    columns = unpacked(data, size)
    fields: Any = layout.fields
    return _joined(
        [
            np.frombuffer(columns, kind, count, offset * count)
            for kind, offset, *_ in (fields[axis] for axis in "xyz")
        ]
    )


def unpacked(data: bytes, size: int) -> bytes:
    """Decompress LZF (Lehmann's LibLZF): a control byte below 32 announces so many bytes and one
    more as they are; another the length and, with the next byte, the distance of a repetition.

    Raises:
        ValueError: data that do not give ``size`` bytes.
    """
    out, place = bytearray(), 0
    while place < len(data) and len(out) <= size:
        control = data[place]
        if control < 32:
            out += data[place + 1 : place + 2 + control]
            place += 2 + control
            continue
        long = control >= 224  # the rest of the length follows
        head = data[place + 1 : place + 2 + long] + bytes(2)
        length = 2 + (control >> 5) + (head[0] if long else 0)
        start = len(out) - 1 - ((control & 31) << 8) - head[long]
        if start < 0:
            break
        while length > 0:  # a repetition may run into itself
            piece = out[start : start + length]
            out += piece
            length -= len(piece)
        place += 2 + long
    if len(out) != size or place != len(data):
        raise ValueError("its compressed data are damaged")
    return bytes(out)


def _joined(columns: list[np.ndarray]) -> Cloud:
    with np.errstate(invalid="ignore"):  # a signalling NaN is caught by the cloud's check
        return np.stack([column.astype(np.float64) for column in columns], axis=1)


def _ascii(file: BinaryIO, count: int, columns: list[int]) -> Cloud:
    rows: list[list[float]] = []
    for i in range(count):
        words = file.readline(MAX_LINE).split()
        if len(words) <= max(columns):
            raise ValueError(f"point {i} of {count:,} has {len(words)} values")
        rows.append([float(words[c]) for c in columns])
    return np.array(rows).reshape(-1, 3)


def _seen(points: Cloud) -> Cloud:
    return np.asarray(points[~np.isnan(points).any(1)])


def write_points(path: Path, blocks: Iterable[Cloud], ascii: bool = False) -> int:
    """Write points block by block; returns how many."""
    zeros = "0" * COUNT_WIDTH
    form = "ascii" if ascii else "binary"
    with path.open("wb") as file:
        file.write(b"VERSION 0.7\nFIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nCOUNT 1 1 1\nWIDTH ")
        places = [file.tell()]
        file.write(f"{zeros}\nHEIGHT 1\nVIEWPOINT 0 0 0 1 0 0 0\nPOINTS ".encode())
        places.append(file.tell())
        file.write(f"{zeros}\nDATA {form}\n".encode())
        count = 0
        for block in blocks:
            points = np.asarray(block, "<f4")
            if ascii:
                np.savetxt(file, points, fmt="%.9g")
            else:
                file.write(points.tobytes())
            count += len(points)
        for place in places:
            file.seek(place)
            file.write(str(count).rjust(COUNT_WIDTH, "0").encode())
    return count
