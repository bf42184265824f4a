"""Well-known data sets of photographs in their published layouts, read picture by picture.

Which layout a folder has is told by what lies in it; see :func:`find`.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shared.configuration import nearest
from shared.extras import need
from shared.images.pictures import SUFFIXES, Files, Frame, Pictures, picture

PREFIX = "hf:"
SIDES = {"celeba": 64, "imagenet": 64, "lsun": 256}
"""Sides of the pictures where ``domain.size`` does not say."""


def find(data: str) -> Callable[[str, int | None, str | None], Pictures] | None:
    """The reader of what ``data`` names, (data, size, label) -> pictures; None where it is none of

    - ``hf:NAME[:SPLIT]`` or a folder that ``datasets`` saved: Hugging Face;
    - a folder with img_align_celeba: CelebA;
    - a folder with train/n01440764 and the like: ImageNet;
    - a folder with train_data_batch_1.npz: ImageNet in 8 x 8 to 64 x 64 pixels;
    - a folder with data.mdb: LSUN.
    """
    if data.startswith(PREFIX):
        return hugging_face
    path = Path(data)
    if (path / "img_align_celeba").is_dir():
        return celeba
    if any((path / "train").glob("n0*")):
        return imagenet
    if (path / "train_data_batch_1.npz").exists():
        return small_imagenet
    if (path / "data.mdb").exists():
        return lsun
    if any((path / name).exists() for name in ("dataset_dict.json", "dataset_info.json")):
        return hugging_face
    return None


def no_label(label: str | None, what: str) -> None:
    """Refuse the choice of a label.

    Raises:
        ValueError: one is given.
    """
    if label is not None:
        raise ValueError(f"domain.label={label}: {what} has no labels to choose from.")


def listed(folder: Path) -> list[str]:
    """The picture files of a folder, sorted.

    Raises:
        ValueError: there are none.
    """
    with os.scandir(folder) as entries:
        found = sorted(e.path for e in entries if e.name.lower().endswith(SUFFIXES))
    if not found:
        raise ValueError(f"{folder}: no {', '.join(SUFFIXES)} files in it.")
    return found


# -- CelebA -----------------------------------------------------------------------------------


def celeba(data: str, size: int | None, label: str | None) -> Pictures:
    """CelebA's aligned faces, the training and validation parts of list_eval_partition.txt: a
    centred square of 140 pixels, 64 x 64 unless ``size`` says otherwise, as in Song et al. 2021
    (others cut out 128 pixels, and their FIDs differ). ``label``: a name of list_attr_celeba.txt,
    whose presence is class 1.

    Raises:
        FileNotFoundError, ValueError: a list or picture is missing, or no such name.
    """
    root = Path(data)
    parts = dict(_rows(root / "list_eval_partition.txt", 2))
    names = [name for name, part in parts.items() if part in ("0", "1")]
    if not names:
        raise ValueError(f"{root / 'list_eval_partition.txt'}: no picture of part 0 or 1 in it.")
    files = [str(root / "img_align_celeba" / name) for name in names]
    if not Path(files[0]).exists():
        raise FileNotFoundError(f"domain.data: {files[0]} is in the list, but not there.")
    labels = None
    if label is not None:
        marks = _attribute(root / "list_attr_celeba.txt", label)
        if missing := [name for name in names if name not in marks]:
            raise ValueError(f"{root / 'list_attr_celeba.txt'}: nothing about {missing[0]}.")
        labels = np.array([marks[name] for name in names], dtype=np.int64)
    held = np.array([parts[name] == "1" for name in names])
    return Pictures(Files(files, Frame(size or SIDES["celeba"], 140)), len(files), labels, held)


def _rows(path: Path, columns: int) -> list[list[str]]:
    """Lines of a text file as words.

    Raises:
        FileNotFoundError, ValueError: missing, or a line of another length.
    """
    if not path.exists():
        raise FileNotFoundError(f"domain.data: {path} is missing; it comes with the data set.")
    rows = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line]
    for number, row in enumerate(rows, start=1):
        if len(row) != columns:
            raise ValueError(f"{path}, line {number}: {len(row)} words instead of {columns}.")
    return rows


def _attribute(path: Path, label: str) -> dict[str, int]:
    if not path.exists():
        raise FileNotFoundError(f"domain.label={label}: {path} is missing.")
    _, header, *lines = path.read_text(encoding="utf-8").splitlines()
    names = header.split()
    if label not in names:
        raise ValueError(f"domain.label={label} is not in {path.name}{nearest(label, names)}.")
    column = 1 + names.index(label)
    rows = (line.split() for line in lines if line)
    return {row[0]: int(row[column] == "1") for row in rows}


# -- ImageNet ---------------------------------------------------------------------------------


def imagenet(data: str, size: int | None, label: str | None) -> Pictures:
    """ImageNet: train/WNID/*.JPEG, whose sorted folders are the classes, and for validation
    val/WNID/*.JPEG, or val/*.JPEG with a list: LOC_val_solution.csv, or val.txt with a name and
    its WNID, or number of the class, in every line. The shorter side is brought to ``size`` (64)
    and the middle taken.

    Raises:
        FileNotFoundError, ValueError: no list, or one that does not fit.
    """
    no_label(label, "ImageNet")
    root = Path(data)
    classes = sorted(f.name for f in (root / "train").iterdir() if f.is_dir())
    files, labels = _by_class(root / "train", classes)
    training = len(files)
    if (root / "val").is_dir():
        inside = any(f.is_dir() for f in (root / "val").iterdir())
        more = _by_class if inside else _flat
        found, kinds = more(root / "val", classes)
        files, labels = files + found, labels + kinds
    held = np.arange(len(files)) >= training if len(files) > training else None
    frame = Frame(size or SIDES["imagenet"])
    return Pictures(Files(files, frame), len(files), np.array(labels), held)


def _by_class(folder: Path, classes: Sequence[str]) -> tuple[list[str], list[int]]:
    files: list[str] = []
    labels: list[int] = []
    for number, name in enumerate(classes):
        if not (folder / name).is_dir():
            raise FileNotFoundError(f"domain.data: no folder {folder / name}.")
        found = listed(folder / name)
        files += found
        labels += [number] * len(found)
    return files, labels


def _flat(folder: Path, classes: Sequence[str]) -> tuple[list[str], list[int]]:
    files = listed(folder)
    known, lists = _validation_labels(folder)
    numbers = {name: number for number, name in enumerate(classes)}
    labels = []
    for file in files:
        kind = known.get(Path(file).stem)
        number = numbers.get(kind or "", int(kind) if kind and kind.isdigit() else -1)
        if not 0 <= number < len(classes):
            what = "nothing about" if kind is None else f"an unknown class '{kind}' of"
            raise ValueError(f"{lists}: {what} {Path(file).name}.")
        labels.append(number)
    return files, labels


def _validation_labels(folder: Path) -> tuple[dict[str, str], Path]:
    """Stem of a file -> class, and where it says so."""
    for place in (folder, folder.parent):
        table, text = place / "LOC_val_solution.csv", place / "val.txt"
        if table.exists():
            with table.open(newline="", encoding="utf-8") as file:
                rows = list(csv.reader(file))[1:]
            return {row[0]: row[1].split()[0] for row in rows if len(row) > 1 and row[1]}, table
        if text.exists():
            return {Path(name).stem: kind for name, kind in _rows(text, 2)}, text
    raise FileNotFoundError(
        f"domain.data: {folder} has no folders of classes; put LOC_val_solution.csv or val.txt "
        "(name and class in every line) beside it."
    )


# -- ImageNet in few pixels -------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Archives:
    """Rows of arrays that lie in files, mapped into memory."""

    arrays: Sequence[np.ndarray]
    ends: np.ndarray

    def __call__(self, row: int) -> np.ndarray:
        part = int(np.searchsorted(self.ends, row, side="right"))
        flat = self.arrays[part][row - (self.ends[part - 1] if part else 0)]
        side = round((len(flat) / 3) ** 0.5)
        return np.asarray(flat).reshape(3, side, side).transpose(1, 2, 0)


def small_imagenet(data: str, size: int | None, label: str | None) -> Pictures:
    """ImageNet reduced to 8, 16, 32 or 64 pixels a side (Chrabaszcz et al. 2017): 'data' uint8
    [n, 3 * side^2] and 'labels' from 1 on in train_data_batch_*.npz and val_data.npz. Archives
    are mapped into memory where they are not compressed, and read into it where they are.

    Raises:
        ValueError: a damaged file, or another layout.
    """
    no_label(label, "ImageNet")
    if size is not None:
        raise ValueError("domain.size: these pictures are of one size already; leave it null.")
    root = Path(data)
    names = sorted(
        root.glob("train_data_batch_*.npz"), key=lambda p: int("0" + p.stem.rpartition("_")[2])
    )
    names += [file for file in (root / "val_data.npz",) if file.exists()]
    arrays, labels = zip(*(_batch(file) for file in names), strict=True)
    if len({array.shape[1] for array in arrays}) > 1:
        raise ValueError(f"{root}: its files hold pictures of several sizes.")
    sizes = np.array([len(array) for array in arrays])
    held = np.repeat([file.name == "val_data.npz" for file in names], sizes)
    ends = sizes.cumsum()
    return Pictures(
        Archives(arrays, ends), int(ends[-1]), np.concatenate(labels), held if held.any() else None
    )


def _batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        pixels = mapped(path, "data")
        with np.load(path, allow_pickle=False) as arrays:
            labels = np.asarray(arrays["labels"]).astype(np.int64).reshape(-1) - 1
            pixels = arrays["data"] if pixels is None else pixels
    except Exception as error:  # the reader raises a dozen types on damaged files
        raise ValueError(f"{path} is damaged or no batch of ImageNet ({error}).") from error
    side = round((pixels.shape[-1] / 3) ** 0.5)
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), 3 * side * side):
        raise ValueError(f"{path}: {pixels.dtype} {list(pixels.shape)} is no batch of ImageNet.")
    return pixels, labels


def mapped(path: Path, name: str) -> np.ndarray | None:
    """An array of an .npz mapped into memory; None if it is compressed."""
    from zipfile import ZIP_STORED, ZipFile

    with ZipFile(path) as archive:
        entry = archive.getinfo(f"{name}.npy")
        if entry.compress_type != ZIP_STORED:
            return None
        with archive.open(entry) as member:
            version = np.lib.format.read_magic(member)
            read = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, fortran, dtype = read(member)
            header = member.tell()
    with path.open("rb") as file:
        file.seek(entry.header_offset + 26)  # lengths of name and extra field, as stored there
        lengths = int.from_bytes(file.read(2), "little") + int.from_bytes(file.read(2), "little")
    start = entry.header_offset + 30 + lengths + header
    mapped: np.ndarray = np.memmap(
        path, dtype=dtype, mode="r", offset=start, shape=shape, order="F" if fortran else "C"
    )
    return mapped


# -- LSUN -------------------------------------------------------------------------------------


class Database:
    """Pictures in a database of LSUN, opened anew in every process."""

    def __init__(self, path: Path, frame: Frame) -> None:
        self.path, self.frame = path, frame
        self._opened: tuple[int, Any] = (-1, None)
        with self._environment().begin() as access:
            self.keys = list(access.cursor().iternext(keys=True, values=False))
        if not self.keys:
            raise ValueError(f"{path}: the database is empty.")

    def _environment(self) -> Any:
        if self._opened[0] != os.getpid():
            lmdb = need("lmdb", f"domain.data={self.path}: an LSUN database", "images")
            options = {"readonly": True, "lock": False, "readahead": False}
            try:
                environment = lmdb.open(str(self.path), **options)
            except lmdb.Error as error:
                raise ValueError(f"{self.path}: damaged or no database ({error}).") from error
            self._opened = (os.getpid(), environment)
        return self._opened[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": (-1, None)}

    def __call__(self, row: int) -> np.ndarray:
        with self._environment().begin() as access:
            data = access.get(self.keys[row])
        return picture(data, f"{self.path}, picture {self.keys[row].decode()}", self.frame)


def lsun(data: str, size: int | None, label: str | None) -> Pictures:
    """One category of LSUN as a database (data.mdb): the shorter side brought to ``size`` (256)
    and the middle taken. Exported to a folder it is read as any folder, with domain.size=256.

    Raises:
        ModuleNotFoundError: the package lmdb is not installed. ValueError: a damaged database.
    """
    no_label(label, "LSUN")
    source = Database(Path(data), Frame(size or SIDES["lsun"]))
    return Pictures(source, len(source.keys))


# -- Hugging Face -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Column:
    """The pictures in a column of a data set of Hugging Face; without a frame as they are."""

    dataset: Any
    name: str
    column: str
    frame: Frame | None

    def __call__(self, row: int) -> np.ndarray:
        try:
            image = self.dataset[row][self.column]
            if self.frame is not None:
                return self.frame(image)
            return np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))
        except Exception as error:  # whatever reads the picture raises
            raise ValueError(f"{self.name}, picture {row} cannot be read ({error}).") from error


def hugging_face(data: str, size: int | None, label: str | None) -> Pictures:
    """``hf:NAME[:SPLIT]`` of the Hub, or a folder that ``save_to_disk`` of the package datasets
    made (FOLDER or hf:FOLDER[:SPLIT]); the split 'train' unless given. Pictures are the column of
    that type, classes the column ``label``, or the only one of the type ClassLabel.

    Raises:
        ModuleNotFoundError: the package datasets is not installed. ValueError: no pictures there.
    """
    datasets = need("datasets", f"domain.data={data}", "images")
    name, _, split = data.removeprefix(PREFIX).partition(":")
    split = split or "train"
    try:
        if Path(name).is_dir():
            loaded = datasets.load_from_disk(name)
            loaded = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            loaded = datasets.load_dataset(name, split=split)
    except Exception as error:  # the reader raises a dozen types
        raise ValueError(f"domain.data={data} cannot be opened ({error}).") from error
    kinds = {key: type(value).__name__ for key, value in loaded.features.items()}
    images = [key for key, kind in kinds.items() if kind == "Image"]
    if not images or not len(loaded):
        raise ValueError(f"domain.data={data}: no pictures in its columns {', '.join(kinds)}.")
    classes = [k for k, kind in kinds.items() if kind == "ClassLabel"]
    if label is not None and label not in classes:
        raise ValueError(f"domain.label={label}: classes are {', '.join(classes) or 'none'}.")
    chosen = label or (classes[0] if len(classes) == 1 else None)
    labels = None if chosen is None else np.asarray(loaded[chosen], dtype=np.int64)
    if labels is not None and labels.min() < 0:
        raise ValueError(f"domain.data={data}: {chosen} is unknown (-1) in this split.")
    first = Column(loaded, data, images[0], None)(0)
    frame = None if size is None else Frame(size, colour=first.ndim == 3)
    return Pictures(Column(loaded, data, images[0], frame), len(loaded), labels)
