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
from torch.quasirandom import SobolEngine

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


class _Streams:
    """The streams of one draw for many samples: one generator that is put at the beginning of
    each in turn, which takes a tenth of the time of a new one."""

    def __init__(self, seed: int, name: str, number: int) -> None:
        self._generator = stream(seed, 0, name, number)
        self._bits = self._generator.bit_generator
        self._start: Any = self._bits.state

    def of(self, index: int) -> np.random.Generator:
        """The stream of sample ``index``, until another is asked for."""
        self._start["state"]["key"][1] = index
        self._bits.state = self._start
        return self._generator


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
        extents = {n: self._extent(white.shape[1:], geometry, n) for n in set(sizes)}
        streams = _Streams(self.seed, name, number)
        for row, index, size in zip(white, self.indices, sizes, strict=True):
            shape, place = extents[size]
            row[place] = streams.of(index).standard_normal(shape, np.float32)
        out = torch.from_numpy(white).to(like)
        return out if geometry is None else geometry.noise(out, mask)

    @staticmethod
    def _extent(
        shape: tuple[int, ...], geometry: Geometry | None, nodes: int | None
    ) -> tuple[tuple[int, ...], tuple[slice, ...]]:
        """Shape and place of the real entries of a sample with so many nodes."""
        real = shape if geometry is None else geometry.extent(shape, nodes)
        return real, tuple(slice(n) for n in real)

    def uniform(self, name: str, number: int) -> Tensor:
        """One uniform number on [0, 1) per sample, float64 [batch]."""
        return torch.tensor(
            [stream(self.seed, i, name, number).random() for i in self.indices],
            dtype=torch.float64,
        )


def even_normal(n: int, dims: int, generator: np.random.Generator) -> Tensor:
    """``n`` standard normal points in ``dims`` dimensions, float32 [n, dims] in random order, that
    cover the distribution more evenly than independent ones: a scrambled Sobol sequence (Owen
    1998) through the inverse of the distribution function. Their mean and covariance are nearly
    exact, so a cloud that starts from them owes its place and size to the network, not to
    chance."""
    seed = int(generator.integers(2**31))
    engine = SobolEngine(dims, scramble=True, seed=seed)  # type: ignore[no-untyped-call]
    uniform = engine.draw(n, dtype=torch.float64)
    normal = torch.special.ndtri(uniform.clamp(1e-9, 1 - 1e-9))
    return normal[torch.from_numpy(generator.permutation(n))].float()
