"""Image items in files: uint8 arrays in .npy and .npz, and grids of tiles in .png."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from shared.domains import Invalid

Picture = np.ndarray
"""uint8, [height, width] or [height, width, 3]."""

SUFFIXES = (".npy", ".npz", ".png")


def read(path: Path, shape: tuple[int, int]) -> Iterator[Picture | Invalid]:
    """Stream the images of a file, or of all files of a folder in the order of their names.
    A .png larger than ``shape`` (height, width) is a grid of tiles.

    Raises:
        FileNotFoundError, ValueError: nothing there, or no image file.
    """
    if not path.exists():
        raise FileNotFoundError(f"no file or folder {path}.")
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
        if not files:
            raise ValueError(f"{path}: no {', '.join(SUFFIXES)} files in it.")
        for file in files:
            yield from read(file, shape)
        return
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: images are read from {', '.join(SUFFIXES)} files.")
    number = 0
    for block in _blocks(path, shape):
        for picture in block:
            yield _checked(picture, shape, f"{path.name}, image {number}")
            number += 1


def _blocks(path: Path, shape: tuple[int, int]) -> Iterator[np.ndarray]:
    """Arrays [n, ...] of images."""
    reader = {".npy": _npy, ".npz": _npz, ".png": _png}[path.suffix]
    try:
        yield from reader(path, shape)
    except Exception as error:  # the readers raise a dozen types on damaged files
        raise ValueError(f"{path} is damaged or holds something else: {error}") from error


def _checked(picture: Picture, shape: tuple[int, int], record: str) -> Picture | Invalid:
    if picture.dtype != np.uint8:
        return Invalid(record, f"type {picture.dtype} instead of uint8")
    if picture.shape[:2] != shape:
        return Invalid(record, f"size {picture.shape[:2]} instead of {shape}")
    return picture


def _npy(path: Path, shape: tuple[int, int]) -> Iterator[np.ndarray]:
    """Arrays [n, ...] written one after the other."""
    size = path.stat().st_size
    with path.open("rb") as file:
        while file.tell() < size:
            yield np.lib.format.read_array(file, allow_pickle=False)


def _npz(path: Path, shape: tuple[int, int]) -> Iterator[np.ndarray]:
    with np.load(path, allow_pickle=False) as arrays:
        if "images" not in arrays:
            raise ValueError(f"no array 'images' in it, but {', '.join(arrays) or 'nothing'}")
        yield arrays["images"]


def _png(path: Path, shape: tuple[int, int]) -> Iterator[np.ndarray]:
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("L" if image.mode in ("1", "L", "I") else "RGB"))
        count = image.info.get("images")
    (height, width), (rows, columns) = pixels.shape[:2], shape
    if height % rows or width % columns:
        yield pixels[None]  # of a wrong size; the caller says so
        return
    tiles = pixels.reshape(height // rows, rows, width // columns, columns, *pixels.shape[2:])
    tiles = tiles.swapaxes(1, 2).reshape(-1, rows, columns, *pixels.shape[2:])
    yield tiles[: int(count)] if count and count.isdigit() else tiles


def write(path: Path, pictures: Sequence[Picture], shape: tuple[int, int]) -> None:
    """Append images. A .npy file grows by one array; .npz and .png are written anew.

    Raises:
        ValueError: an unknown suffix.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: images are written to {', '.join(SUFFIXES)} files.")
    if not pictures:
        return
    if path.suffix == ".npy":
        with path.open("ab") as file:
            np.lib.format.write_array(file, np.stack(pictures), allow_pickle=False)
        return
    old = [p for p in read(path, shape) if not isinstance(p, Invalid)] if path.exists() else []
    together = np.stack([*old, *pictures])
    if path.suffix == ".npz":
        np.savez_compressed(path, images=together)
    else:
        path.write_bytes(png(together))


def png(pictures: np.ndarray, columns: int | None = None, zoom: int = 1) -> bytes:
    """A grid of tiles [n, height, width(, 3)] as PNG; the number of tiles is noted inside."""
    n, height, width, *rest = pictures.shape
    columns = columns or min(n, max(1, math.ceil(math.sqrt(n))))
    rows = math.ceil(n / columns)
    sheet = np.zeros((rows * columns, height, width, *rest), dtype=np.uint8)
    sheet[:n] = pictures
    sheet = sheet.reshape(rows, columns, height, width, *rest).swapaxes(1, 2)
    sheet = sheet.reshape(rows * height, columns * width, *rest)
    sheet = sheet.repeat(zoom, axis=0).repeat(zoom, axis=1)
    note = PngImagePlugin.PngInfo()
    note.add_text("images", str(n))
    buffer = BytesIO()
    Image.fromarray(sheet).save(buffer, "PNG", pnginfo=note)
    return buffer.getvalue()
