"""Training batches as a pure function of their number.

Batch ``number`` of a seed holds the same records, times and noise on any machine, whatever the
number of processes or of loader workers, and whether or not training was interrupted before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from shared.domains import Batch, Domain
from shared.process import Process, State
from shared.randomness import Draws, stream


@dataclass(frozen=True)
class NoisyBatch:
    """A batch with what is needed to perturb it. ``noise``: standard normals on the geometries;
    ``u``: stratified numbers on [0, 1) that become the times, float64 [batch]."""

    batch: Batch
    noise: State
    u: Tensor

    def __len__(self) -> int:
        return len(self.u)

    def to(self, device: Any) -> NoisyBatch:
        noise = {name: z.to(device) for name, z in self.noise.items()}
        return NoisyBatch(self.batch.to(device), noise, self.u.to(device))


@dataclass(frozen=True)
class Share:
    """Which part of every batch a process takes."""

    rank: int = 0
    world: int = 1

    def slice(self, size: int) -> range:
        """Its rows of a batch of ``size``.

        Raises:
            ValueError: the batch does not divide evenly among the processes.
        """
        if size % self.world:
            raise ValueError(
                f"trainer.batch_size: {size} samples do not divide among {self.world} processes; "
                f"give a multiple of {self.world}."
            )
        part = size // self.world
        return range(self.rank * part, (self.rank + 1) * part)


class Batches(Dataset[NoisyBatch]):
    """Item ``number`` is this process's share of that batch.

    The records come in a new random order in every pass; a batch may straddle two passes. A data
    set that has ``lengths`` (the size of every record) is batched by equal size, with next to no
    padding; then a pass leaves out the few records that do not fill a batch, others each time.
    Every record is read with torch's generator set to its own seed, so random augmentation
    repeats too.

    Args:
        records: a data set of the domain. size: samples per batch over all processes.
        name: keeps the randomness of training and validation apart.
        shuffle: False keeps the order of the records.
    """

    def __init__(
        self,
        domain: Domain[Any],
        process: Process,
        records: Dataset[Any],
        size: int,
        seed: int,
        name: str = "train",
        shuffle: bool = True,
        share: Share | None = None,
    ) -> None:
        self.domain, self.records, self.size, self.seed = domain, records, size, seed
        self.name, self.shuffle, self.share = name, shuffle, share or Share()
        self.geometries = {n: field.geometry for n, field in process.fields.items()}
        self.count = len(records)  # type: ignore[arg-type]
        if self.count == 0:
            remedy = " Set trainer.validate_every=null to do without." * (name == "validation")
            raise ValueError(f"domain {domain.name}: the {name} set is empty.{remedy}")
        self.share.slice(size)
        lengths = getattr(records, "lengths", None) if shuffle else None
        grouped = lengths is not None and self.count >= size
        self._lengths = np.asarray(lengths) if grouped else None
        self._turn = self.count // size * size if grouped else self.count
        self._order = (-1, np.empty(0, dtype=np.int64))  # the last pass asked for

    def __getitem__(self, number: int) -> NoisyBatch:
        rows = self.share.slice(self.size)
        samples = [number * self.size + row for row in rows]
        batch = self.domain.collate(self._read(number, rows))
        draws = Draws(self.seed, samples)
        noise = {
            n: draws.normal(f"{self.name}/{n}", 0, batch.state[n], geometry, batch.mask)
            for n, geometry in self.geometries.items()
        }
        return NoisyBatch(batch, noise, self._strata(number)[rows.start : rows.stop])

    def _read(self, number: int, rows: range) -> list[Any]:
        seeds = stream(self.seed, number, f"{self.name}/records", 0).integers(
            2**62, size=self.size
        )
        records = []
        with torch.random.fork_rng(devices=[]):
            for row in rows:
                torch.default_generator.manual_seed(int(seeds[row]))
                records.append(self.records[self._index(number * self.size + row)])
        return records

    def _index(self, sample: int) -> int:
        if not self.shuffle:
            return sample % self.count
        turn, place = divmod(sample, self._turn)
        if self._order[0] != turn:
            own = stream(self.seed, turn, "train/order", 0)
            self._order = turn, self._arrange(own)
        return int(self._order[1][place])

    def _arrange(self, own: np.random.Generator) -> np.ndarray:
        """The order of one pass. With lengths, the records of a batch have equal length, but for
        the batches where one length ends and the next begins."""
        order = own.permutation(self.count)
        if self._lengths is None:
            return order
        order = order[np.argsort(self._lengths[order], kind="stable")]
        first = own.integers(self.count - self._turn + 1)  # which records are left out
        batches = order[first : first + self._turn].reshape(-1, self.size)
        return own.permutation(batches).reshape(-1)

    def _strata(self, number: int) -> Tensor:
        """(i + v) / size in random order with one v (Kingma et al. 2021, Appendix I.1)."""
        own = stream(self.seed, number, f"{self.name}/times", 0)
        v = own.random()
        return torch.from_numpy((own.permutation(self.size) + v) / self.size)

    def loader(self, numbers: range, workers: int = 0) -> DataLoader[NoisyBatch]:
        """The batches ``numbers`` in order, made by ``workers`` processes."""
        return DataLoader(
            self,
            batch_size=None,
            sampler=numbers,
            num_workers=workers,
            collate_fn=_same,
            persistent_workers=False,
        )


def _same(batch: Any) -> Any:
    return batch
