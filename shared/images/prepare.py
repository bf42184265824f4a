"""The verb ``imagediff prepare``: any data set of pictures as arrays that training maps into
memory, and its latents."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from shared.cli import Outcome, Program, Progress
from shared.configuration import ConfigurationError
from shared.images.data import PREPARED, open_pictures
from shared.images.latents import BLOCK, Latents
from shared.images.pictures import Pictures

Report = Callable[[int], None]


def write_pictures(folder: Path, pictures: Pictures, report: Report | None = None) -> None:
    """Write uint8 images [n, height, width(, 3)], labels and held-out marks, some at a time.

    Raises:
        ValueError: a picture that is damaged, or of another size than the first.
    """
    rows = (pictures[k : k + BLOCK] for k in range(0, len(pictures), BLOCK))
    _write(folder / PREPARED[0], rows, len(pictures), np.dtype(np.uint8), report)
    for name, array in zip(PREPARED[1:], (pictures.labels, pictures.held), strict=True):
        if array is not None:
            np.save(folder / name, array)


def write_latents(
    folder: Path, pictures: Pictures, autoencoder: str, report: Report | None = None
) -> Path:
    """Write mean and standard deviation of the latents, float16 [n, 2, k, h, w]."""
    latents = Latents(autoencoder)
    file = folder / f"moments-{latents.weights}.npy"
    _write(file, latents.blocks(pictures), len(pictures), np.dtype(np.float16), report)
    return file


def _write(
    file: Path, blocks: Iterator[np.ndarray], count: int, dtype: np.dtype, report: Report | None
) -> None:
    """An .npy of ``blocks``, under its name only when it is whole."""
    part, place = file.with_suffix(".part"), 0
    array = None
    for block in blocks:
        if array is None:
            shape = (count, *block.shape[1:])
            array = np.lib.format.open_memmap(part, "w+", dtype, shape)
        array[place : place + len(block)] = block
        place += len(block)
        if report is not None:
            report(place)
    if array is not None:
        array.flush()
    os.replace(part, file)


def prepare(config: DictConfig, program: Program, progress: Progress | None = None) -> Outcome:
    """``imagediff prepare``."""
    known = (Path(config.path) / PREPARED[0]).exists()
    if config.out is None and not known:
        raise ConfigurationError("prepare: 'out' is missing; give out=FOLDER.")
    folder = Path(config.out or config.path)
    same = known and folder.resolve() == Path(config.path).resolve()
    if same and config.autoencoder is None:
        raise ConfigurationError(f"{folder} is prepared; give out=FOLDER or autoencoder=RUN.")
    if not same and (folder / PREPARED[0]).exists():
        raise ConfigurationError(f"out={folder} is prepared already; choose another folder.")
    pictures = open_pictures(str(config.path), config.size, config.label)

    def report(done: int) -> None:
        if progress is not None:
            progress(done, len(pictures))

    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    if not same:
        write_pictures(folder, pictures, report)
        kind = " x ".join(str(n) for n in pictures.shape[1:3])
        lines.append(f"{len(pictures)} pictures of {kind}: {folder}; domain.data={folder}")
    if config.autoencoder is not None:
        file = write_latents(folder, pictures, config.autoencoder, report)
        lines.append(f"latents: {file}")
    return Outcome(lines, folder)
