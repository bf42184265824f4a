"""Point-cloud files: PLY, PCD, XYZ, NPY, NPZ, H5, and meshes (OBJ, OFF, STL, PLY) as samples.

A cloud that cannot be used becomes an ``Invalid`` with its place and the reason.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pointdiff import pcd, ply
from pointdiff.clouds import MOST, Cloud, check
from shared.domains import Invalid
from shared.extras import need
from shared.randomness import stream

MESHES = (".obj", ".off", ".stl")
KEYS = ("points", "xyz", "data", "complete_pcds", "incomplete_pcds", "pcds")
"""Names of arrays in .npz and .h5 files that are understood without being named."""
SURFACE = 16_384
"""Points drawn on a mesh unless asked otherwise."""
MAX_LINE = 1 << 16


def read(
    path: str | Path, *, surface: int = SURFACE, key: str | None = None, most: int = MOST
) -> Iterator[Cloud | Invalid]:
    """Stream the clouds of a file, or of all files of a folder and the folders in it in the order
    of their names.

    ``.ply .pcd .xyz .txt .pts`` hold one cloud each; ``.npy`` (one array after the other),
    ``.npz`` and ``.h5`` one [n, 3] or many [clouds, n, 3]. Further columns (normals, colours) are
    left out.

    Args:
        surface: points drawn uniformly on a mesh; key: array of an .npz or .h5 file, by default
            the first of :data:`KEYS` that is there; most: points that a cloud may have.

    Raises:
        FileNotFoundError: nothing there, or a folder without such files.
        ValueError: an unknown suffix.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder.")
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not found:
            raise FileNotFoundError(f"{path}: no files {' '.join(SUFFIXES)} in this folder.")
        return (cloud for p in found for cloud in _stream(p, surface, key, most))
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path}: clouds are read from {' '.join(SUFFIXES)} files.")
    return _stream(path, surface, key, most)


def read_one(path: str | Path, **options: Any) -> Cloud:
    """The only cloud of a file; ``options`` of :func:`read`.

    Raises:
        FileNotFoundError, ValueError: no file, a folder, more clouds than one, or none to use.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name one of the files in it.")
    clouds = read(path, **options)
    first = next(clouds, None)
    if first is None:
        raise ValueError(f"{path}: no cloud in it.")
    if isinstance(first, Invalid):
        raise ValueError(first.reason)
    if next(clouds, None) is not None:
        raise ValueError(f"{path} holds several clouds; give a file with one.")
    return first


def _stream(path: Path, surface: int, key: str | None, most: int) -> Iterator[Cloud | Invalid]:
    number = 0
    try:
        for points in _clouds(path, surface, key, most):
            what = f"{path}, cloud {number}" if number else str(path)
            number += 1
            try:
                yield check(points, what, least=1, most=most)
            except ValueError as error:
                yield Invalid(what, str(error))
        if not number:
            yield Invalid(str(path), f"{path}: no points.")
    except Exception as error:  # the readers of the formats raise a dozen types on damaged files
        text = " ".join(str(error).split())[:300] or type(error).__name__
        yield Invalid(str(path), f"{path}: {text.removeprefix(f'{path}: ')}")


def _clouds(path: Path, surface: int, key: str | None, most: int) -> Iterator[np.ndarray]:
    """The arrays of a file, not yet checked."""
    suffix = path.suffix.lower()
    if suffix in MESHES or (suffix == ".ply" and _is_mesh(path)):
        yield sample_surface(_triangles(path), surface)
    elif suffix == ".ply":
        yield ply.read_vertices(path, most)
    elif suffix == ".pcd":
        yield pcd.read_points(path, most)
    elif suffix in (".xyz", ".txt", ".pts"):
        yield _text(path, most)
    else:
        arrays: Callable[[Path, str | None], Iterator[Any]]
        arrays = {".npy": _npy, ".npz": _npz, ".h5": _h5, ".hdf5": _h5}[suffix]
        for array in arrays(path, key):
            if array.ndim not in (2, 3):
                raise ValueError(f"an array of shape {array.shape}, not [n, 3] or [clouds, n, 3]")
            if array.ndim == 2:
                yield np.asarray(array)[:, :3]
            else:
                yield from (np.asarray(array[i])[:, :3] for i in range(len(array)))


def _is_mesh(path: Path) -> bool:
    with path.open("rb") as file:
        return ply.read_header(file).has_faces


def _text(path: Path, most: int) -> np.ndarray:
    rows: list[list[float]] = []
    with path.open("rb") as file:
        while line := file.readline(MAX_LINE):
            words = line.replace(b",", b" ").split()
            if not words or words[0].startswith((b"#", b"//")) or (not rows and len(words) == 1):
                continue  # comments, and the count that .pts files begin with
            if len(words) < 3:
                raise ValueError(f"row {len(rows)} has {len(words)} values instead of 3 or more")
            rows.append([float(word) for word in words[:3]])
            if len(rows) > most:
                raise ValueError(f"more than {most:,} points; thin the cloud out first")
    return np.array(rows).reshape(-1, 3)


def _npy(path: Path, key: str | None) -> Iterator[np.ndarray]:
    size = path.stat().st_size
    with path.open("rb") as file:
        while file.tell() < size:
            yield np.lib.format.read_array(file, allow_pickle=False)


def load_arrays(path: str | Path) -> Any:
    """The open archive of an .npz file.

    Raises:
        FileNotFoundError, ValueError: no such file, or no such archive.
    """
    if Path(path).exists() and not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: no .npz archive; write it with numpy.savez.")
    return np.load(path, allow_pickle=False)


def _npz(path: Path, key: str | None) -> Iterator[np.ndarray]:
    with load_arrays(path) as arrays:
        array = arrays[_choose(key, list(arrays))]
        if array.dtype.kind in "iu" and "scale" in arrays:
            array = array * np.float32(arrays["scale"])
        yield array


def _h5(path: Path, key: str | None) -> Iterator[Any]:
    h5py = need("h5py", f"{path.name}: HDF5", "points")
    with h5py.File(path, "r") as file:
        found = _choose(key, list(file))
        if not isinstance(file[found], h5py.Dataset):
            raise ValueError(f"{found} is no array, but a group")
        yield file[found]


def _choose(key: str | None, there: list[str]) -> str:
    wanted = KEYS if key is None else (key,)
    found = next((name for name in wanted if name in there), None)
    if found is None:
        names = ", ".join(sorted(there)) or "nothing"
        raise ValueError(f"no array named {' or '.join(wanted)} in it, but {names}")
    return found


# -- meshes -----------------------------------------------------------------------------------


def _triangles(path: Path) -> np.ndarray:
    if path.suffix.lower() == ".ply":
        return ply.read_triangles(path)
    trimesh = need("trimesh", f"{path.name}: a mesh", "points")
    mesh = trimesh.load_mesh(path, process=False, skip_materials=True)
    return np.asarray(mesh.triangles, np.float64)


def sample_surface(triangles: np.ndarray, n: int, seed: int = 0) -> Cloud:
    """``n`` points uniform on the surface of ``triangles`` [faces, 3, 3]; same seed, same points.

    Raises:
        ValueError: no surface, corners that are not finite, or a number that is none.
    """
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"surface={n}: give a whole number of at least 1")
    if not len(triangles) or not np.isfinite(triangles).all():
        raise ValueError("a mesh without triangles, or with corners that are not finite")
    a, b, c = triangles[:, 0], triangles[:, 1], triangles[:, 2]
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    if not 0 < area.sum() < np.inf:
        raise ValueError("a mesh without a surface")
    generator = stream(seed, 0, "surface", 0)
    face = np.searchsorted(area.cumsum() / area.sum(), generator.random(n), side="right")
    face = face.clip(max=len(area) - 1)
    u, v = np.sqrt(generator.random((n, 1))), generator.random((n, 1))
    return np.asarray((1 - u) * a[face] + u * (1 - v) * b[face] + u * v * c[face])


# -- writing ----------------------------------------------------------------------------------


def write(path: str | Path, clouds: Iterable[Cloud]) -> None:
    """Append clouds to an ``.npy`` file (equal sizes may share an array), or write the only one to
    a file of :func:`write_one`.

    Raises:
        ValueError: an unknown suffix, or several clouds for a format that holds one.
    """
    path, items = Path(path), [np.asarray(cloud, np.float32) for cloud in clouds]
    if path.suffix.lower() != ".npy":
        if len(items) != 1:
            raise ValueError(f"{path}: holds one cloud, not {len(items)}; write to .npy instead.")
        write_one(path, items)
        return
    equal = len({len(item) for item in items}) == 1
    with path.open("ab") as file:
        for array in [np.stack(items)] if equal else items:
            np.lib.format.write_array(file, array, allow_pickle=False)


def write_one(path: str | Path, blocks: Cloud | Iterable[Cloud], ascii: bool = False) -> int:
    """Write one cloud, whole or block by block (never more than one in memory), to ``.ply``,
    ``.pcd`` or ``.xyz``, or whole to ``.npy``, ``.npz`` or ``.h5``; returns the number of points.

    Raises:
        ValueError: an unknown suffix.
    """
    path = Path(path)
    check_suffix(path)
    parts = [blocks] if isinstance(blocks, np.ndarray) else blocks
    match path.suffix.lower():
        case ".ply":
            form = "ascii" if ascii else "binary_little_endian"
            return ply.write_vertices(path, parts, form)
        case ".pcd":
            return pcd.write_points(path, parts, ascii)
        case ".xyz" | ".txt":
            return _write_text(path, parts)
    whole = np.concatenate([np.asarray(part, np.float32) for part in parts])
    _write_array(path, whole)
    return len(whole)


def check_suffix(path: Path) -> None:
    """Refuse a file that :func:`write_one` does not write.

    Raises:
        ValueError: says which suffixes it knows.
    """
    if path.suffix.lower() not in WRITTEN:
        raise ValueError(f"{path}: clouds are written to {' '.join(WRITTEN)} files.")


def _write_text(path: Path, blocks: Iterable[Cloud]) -> int:
    count = 0
    with path.open("wb") as file:
        for block in blocks:
            np.savetxt(file, np.asarray(block, np.float32), fmt="%.9g")
            count += len(block)
    return count


def _write_array(path: Path, points: Cloud) -> None:
    if path.suffix.lower() == ".npy":
        np.save(path, points)
    elif path.suffix.lower() == ".npz":
        np.savez_compressed(path, points=points)
    else:
        with need("h5py", f"{path.name}: HDF5", "points").File(path, "w") as file:
            file.create_dataset("points", data=points, compression="gzip")


WRITTEN = (".ply", ".pcd", ".xyz", ".txt", ".npy", ".npz", ".h5", ".hdf5")
SUFFIXES = (
    ".ply", ".pcd", ".xyz", ".txt", ".pts", ".npy", ".npz", ".h5", ".hdf5", *MESHES,
)  # fmt: skip
