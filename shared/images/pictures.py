"""Data sets of pictures that are read one by one, and how photographs are brought to one size."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True, eq=False)
class Pictures:
    """Pictures of one size and colour mode. Indexing reads them: a number gives uint8 [height,
    width(, 3)]; a slice, numbers or a mask give [n, height, width(, 3)].

    Args:
        read: the picture of a number; picklable, so that loader processes can have it.
        count: how many there are.
        labels: their classes, int64 [count].
        held: True where the source itself keeps a picture for validation, [count].
    """

    read: Callable[[int], np.ndarray]
    count: int
    labels: np.ndarray | None = None
    held: np.ndarray | None = None

    @staticmethod
    def of(images: np.ndarray, labels: np.ndarray | None = None) -> Pictures:
        """Pictures in memory, [n, height, width(, 3)]."""
        return Pictures(images.__getitem__, len(images), labels)

    def __len__(self) -> int:
        return self.count

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """(n, height, width) or (n, height, width, 3), as the first picture says."""
        return (self.count, *self.read(0).shape)

    @property
    def ndim(self) -> int:
        """3 for grey pictures, 4 for colour."""
        return len(self.shape)

    def __getitem__(self, rows: Any) -> np.ndarray:
        if isinstance(rows, (int, np.integer)):
            return self._one(int(rows))
        chosen = np.arange(self.count)[rows]
        out = np.empty((len(chosen), *self.shape[1:]), dtype=np.uint8)
        for place, row in zip(out, chosen.tolist(), strict=True):
            place[:] = self._one(row)
        return out

    def _one(self, row: int) -> np.ndarray:
        picture = self.read(row)
        if picture.shape != self.shape[1:]:
            raise ValueError(
                f"picture {row} is {list(picture.shape)}, the first is {list(self.shape[1:])}: "
                "bring all pictures to one size and colour mode; domain.size=N does."
            )
        return picture

    def at(self, rows: np.ndarray) -> Pictures:
        """The pictures of some numbers or of a mask, without reading them."""
        rows = np.arange(self.count)[rows]
        labels = None if self.labels is None else self.labels[rows]
        held = None if self.held is None else self.held[rows]
        return replace(
            self, read=partial(_row, self, rows), count=len(rows), labels=labels, held=held
        )


def _row(pictures: Pictures, rows: np.ndarray, number: int) -> np.ndarray:
    return pictures[int(rows[number])]


# -- photographs ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frame:
    """How a photograph becomes a square of ``size`` pixels: a centred square of ``crop`` pixels is
    cut out first if given, then the shorter side is brought to ``size`` and the middle taken.

    Large pictures are halved by means of 2 x 2 pixels until less than twice as large and resized
    bicubically then, as guided-diffusion does (Dhariwal & Nichol 2021).
    """

    size: int
    crop: int | None = None
    colour: bool = True

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"domain.size={self.size} must be at least 1.")

    def __call__(self, image: Image.Image) -> np.ndarray:
        """uint8 [size, size, 3], or [size, size] without colour.

        Raises:
            ValueError: a picture smaller than the crop.
        """
        image = image.convert("RGB" if self.colour else "L")
        if self.crop is not None:
            if min(image.size) < self.crop:
                raise ValueError(
                    f"a picture of {image.size[0]} x {image.size[1]} is smaller than the square "
                    f"of {self.crop} to be cut out"
                )
            image = _middle(image, self.crop)
        while min(image.size) >= 2 * self.size:
            half = (image.width // 2, image.height // 2)
            image = image.resize(half, Image.Resampling.BOX)
        scale = self.size / min(image.size)
        width, height = (max(self.size, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        return np.asarray(_middle(image, self.size))


def _middle(image: Image.Image, size: int) -> Image.Image:
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def picture(data: bytes, name: str, frame: Frame | None = None) -> np.ndarray:
    """The picture in the bytes of a file, as it is (grey or RGB) or in a ``frame``.

    Raises:
        ValueError: damaged, or no picture; says which.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if frame is not None:
                return frame(image)
            return np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))
    except Exception as error:  # the reader raises a dozen types on damaged files
        raise ValueError(f"{name} is damaged or no picture ({error}).") from error


@dataclass(frozen=True, eq=False)
class Files:
    """Reads the pictures of files in a ``frame``."""

    paths: Sequence[str]
    frame: Frame

    def __call__(self, row: int) -> np.ndarray:
        path = self.paths[row]
        return picture(Path(path).read_bytes(), path, self.frame)


def is_colour(path: Path) -> bool:
    """Whether the picture in a file has colours.

    Raises:
        ValueError: damaged, or no picture.
    """
    return picture(path.read_bytes(), str(path)).ndim == 3
