"""Numbered random draws that belong to samples, not to batches.

Sample ``index`` of ``seed`` sees the same numbers whatever the batch size, the order, the padding,
the device or the number of processes: every draw is a fresh counter-based Philox stream keyed by
(seed, index, name, draw number). Numbers are made on the CPU in float32.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.random.bit_generator import ISeedSequence
from torch import Tensor

from shared.geometry import Geometry


class _Key(ISeedSequence):
    """A Philox key as NumPy asks for it: with ``key=`` it would first read the system's entropy,
    which takes eight times as long."""

    def __init__(self, seed: int, index: int) -> None:
        self.words = np.array([seed, index], dtype=np.uint64)

    def generate_state(self, n_words: int, dtype: Any = np.uint64) -> np.ndarray:
        return self.words


def stream(seed: int, index: int, name: str, number: int) -> np.random.Generator:
    """The random stream of one draw of one sample."""
    counter = np.array([0, 0, zlib.crc32(name.encode()), number], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(_Key(seed, index), counter=counter))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Draws:
    """The draws of one batch: row ``i`` belongs to sample ``indices[i]`` of ``seed``.

    Raises:
        ValueError: a negative seed or index.
    """

    seed: int
    indices: Sequence[int]

    def __post_init__(self) -> None:
        if self.seed < 0 or any(i < 0 for i in self.indices):
            raise ValueError(f"Draws: seed ({self.seed}) and sample indices must be at least 0.")

    def normal(
        self,
        name: str,
        number: int,
        like: Tensor,
        geometry: Geometry | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Standard normals of ``like``'s shape [batch, ...], device and dtype; on a geometry when
        one is given. A padded sample draws its real nodes only, so padding changes nothing."""
        white = np.zeros(tuple(like.shape), dtype=np.float32)
        sizes = [None] * len(white) if mask is None else mask.sum(1).tolist()
        for row, index in enumerate(self.indices):
            shape = white.shape[1:]
            if geometry is not None:
                shape = geometry.extent(shape, sizes[row])
            values = stream(self.seed, index, name, number).standard_normal(shape, np.float32)
            white[row][tuple(slice(n) for n in shape)] = values
        out = torch.from_numpy(white).to(like)
        return out if geometry is None else geometry.noise(out, mask)

    def uniform(self, name: str, number: int) -> Tensor:
        """One uniform number on [0, 1) per sample, float64 [batch]."""
        return torch.tensor(
            [stream(self.seed, i, name, number).random() for i in self.indices],
            dtype=torch.float64,
        )
