"""Image data sets in files: arrays, JPEG archives, the original CIFAR-10, folders of pictures; and
by :func:`open_pictures` those of :mod:`shared.images.layouts`."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shared.images import layouts
from shared.images.pictures import SUFFIXES, Files, Frame, Pictures, is_colour, picture

Arrays = tuple[np.ndarray, np.ndarray | None]
"""uint8 images [n, height, width] or [n, height, width, 3], and labels int64 [n] if there are."""

PREPARED = ("images.npy", "labels.npy", "held.npy")
"""What ``imagediff prepare`` writes; the last two where there are such."""


def open_pictures(data: str, size: int | None = None, label: str | None = None) -> Pictures:
    """The pictures that ``data`` names.

    Args:
        data: the digits of scikit-learn ('digits'), a path that :func:`load` takes, a folder of
            ``imagediff prepare``, or what :func:`shared.images.layouts.find` knows.
        size: bring photographs to squares of so many pixels (see :class:`Frame`); a folder of
            pictures is then read picture by picture.
        label: which labels, where there are several.

    Raises:
        FileNotFoundError, ValueError: nothing there, damaged, or something else.
        ModuleNotFoundError: a package that these data need is not installed.
    """
    known = layouts.find(data)
    if known is not None:
        return known(data, size, label)
    layouts.no_label(label, data)
    path = Path(data)
    if size is not None and path.is_dir() and not (path / PREPARED[0]).exists():
        return _photographs(path, size)
    if size is not None:
        raise ValueError(f"domain.size={size}: {data} is of one size already; leave it null.")
    if data == "digits":
        return _digits()
    if (path / PREPARED[0]).exists():
        return prepared(path)
    return Pictures.of(*load(path))


def _digits() -> Pictures:
    from sklearn.datasets import load_digits  # slow to import

    images, labels = load_digits(return_X_y=True)
    grey = np.rint(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    return Pictures.of(grey, labels.astype(np.int64))


def prepared(path: Path) -> Pictures:
    """A folder of ``imagediff prepare``, mapped into memory.

    Raises:
        ValueError: damaged files, or such that do not belong together.
    """
    try:
        images = np.load(path / PREPARED[0], mmap_mode="r", allow_pickle=False)
        labels, held = (
            np.load(path / name, allow_pickle=False) if (path / name).exists() else None
            for name in PREPARED[1:]
        )
    except Exception as error:  # the reader raises a dozen types on damaged files
        raise ValueError(f"{path} holds damaged files: {error}") from error
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise ValueError(f"{path / PREPARED[0]}: {images.dtype} {list(images.shape)}: no images.")
    for name, more in zip(PREPARED[1:], (labels, held), strict=True):
        if more is not None and more.shape != (len(images),):
            raise ValueError(f"{path / name}: {more.shape} for {len(images)} images.")
    return Pictures(images.__getitem__, len(images), labels, held)


def load(path: Path) -> Arrays:
    """The images and labels at ``path``, one of

    - an .npz with ``images`` uint8 [n, height, width(, 3)], or with JPEG files one after the other
      in ``jpeg`` and their ``offsets`` [n + 1]; ``labels`` [n] if there are classes;
    - the folder of CIFAR-10's original batches (data_batch_1 ... 5, Python or binary version);
    - a folder of pictures of one size; its subfolders, if it has some, are the classes.

    Raises:
        FileNotFoundError, ValueError: nothing there, damaged, or something else.
    """
    if not path.exists():
        raise FileNotFoundError(f"images, data: no file or folder {path}.")
    if path.is_file():
        return _npz(path)
    batches = sorted(f for f in path.glob("data_batch_*") if f.suffix in ("", ".bin"))
    return _cifar(batches) if batches else _folder(path)


def _npz(path: Path) -> Arrays:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            content = {name: arrays[name] for name in arrays}
    except Exception as error:  # the reader raises a dozen types on damaged files
        raise ValueError(f"{path} is damaged or no .npz: {error}") from error
    labels = content.get("labels")
    images = content.get("images")
    if images is None and {"jpeg", "offsets"} <= content.keys():
        images = _unpacked(path, content["jpeg"], content["offsets"])
    if images is None or images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise ValueError(f"{path}: needs an array 'images', uint8 [n, height, width] or [..., 3].")
    return _checked(path, images, labels)


def _unpacked(path: Path, data: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    ends = offsets.tolist()
    files = [data[a:b].tobytes() for a, b in zip(ends, ends[1:], strict=False)]
    names = [f"{path}, image {i}" for i in range(len(files))]
    return _stacked([picture(f, name) for f, name in zip(files, names, strict=True)], names)


def _stacked(pictures: Sequence[np.ndarray], names: Sequence[str]) -> np.ndarray:
    for found, name in zip(pictures, names, strict=True):
        if found.shape != pictures[0].shape:
            raise ValueError(
                f"{name} is {list(found.shape)}, {names[0]} is {list(pictures[0].shape)}: "
                "bring all pictures to one size and colour mode; domain.size=N does."
            )
    return np.stack(pictures)


def _checked(path: Path, images: np.ndarray, labels: np.ndarray | None) -> Arrays:
    if labels is not None and labels.shape != (len(images),):
        raise ValueError(f"{path}: {len(images)} images, but labels of shape {labels.shape}.")
    return images, None if labels is None else labels.astype(np.int64)


def _folder(path: Path) -> Arrays:
    names, labels = _listed(path)
    return _stacked([picture(Path(n).read_bytes(), n) for n in names], names), labels


def _photographs(path: Path, size: int) -> Pictures:
    """A folder of pictures of any size, read one by one; the first tells whether of colour."""
    names, labels = _listed(path)
    frame = Frame(size, colour=is_colour(Path(names[0])))
    return Pictures(Files(names, frame), len(names), labels)


def _listed(path: Path) -> tuple[list[str], np.ndarray | None]:
    """The picture files of a folder or, class by class, of its subfolders."""
    classes = sorted(p for p in path.iterdir() if p.is_dir())
    found = [
        (str(file), label)
        for label, folder in enumerate(classes or [path])
        for file in sorted(folder.iterdir())
        if file.suffix.lower() in SUFFIXES
    ]
    if not found:
        raise ValueError(f"{path}: no {', '.join(SUFFIXES)} files in it or its subfolders.")
    labels = np.array([label for _, label in found], dtype=np.int64) if classes else None
    return [name for name, _ in found], labels


# -- CIFAR-10 ---------------------------------------------------------------------------------


def _cifar(batches: Sequence[Path]) -> Arrays:
    parts = [_binary(b) if b.suffix == ".bin" else _pickled(b) for b in batches]
    pixels = np.concatenate([p for p, _ in parts]).reshape(-1, 3, 32, 32)
    return pixels.transpose(0, 2, 3, 1).copy(), np.concatenate([v for _, v in parts])


def _binary(path: Path) -> tuple[np.ndarray, np.ndarray]:
    data = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    if len(data) % 3073 or not len(data):
        raise ValueError(f"{path} is truncated: {len(data)} bytes are no whole number of images.")
    rows = data.reshape(-1, 3073)
    return rows[:, 1:], rows[:, 0].astype(np.int64)


class _Unpickler(pickle.Unpickler):
    """Numbers, text, containers and arrays; anything else is refused."""

    def find_class(self, module: str, name: str) -> Any:
        known = {"_reconstruct", "ndarray", "dtype", "_frombuffer"}
        array = module.split(".")[0] == "numpy" and name in known
        if array or (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} in the file")


def _pickled(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with path.open("rb") as file:
            content = _Unpickler(file, encoding="bytes").load()
        pixels, labels = np.asarray(content[b"data"]), np.array(content[b"labels"])
    except Exception as error:  # a damaged pickle can fail in any way
        raise ValueError(f"{path} is damaged or no batch of CIFAR-10 ({error}).") from error
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), 3072):
        raise ValueError(f"{path}: {pixels.dtype} {list(pixels.shape)} is no batch of CIFAR-10.")
    return pixels, labels.astype(np.int64)
