"""Molecules with their fingerprints: what the fingerprint network of EEGSDE is trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from molediff.fingerprints import BITS, default_kind, fingerprint
from molediff.geometric.data import MoleculeData
from molediff.geometric.domain import Molecules
from molediff.geometric.records import Record, Records
from shared.domains import Batch


class FingerprintMolecules(Molecules):
    """:class:`Molecules` whose context is a fingerprint instead of properties, for a property
    model of 1024 logits (``model.loss=bits``). The kind travels with the weights.

    Args:
        kind: of :func:`molediff.fingerprints.fingerprint`; None: FP2 where Open Babel is
            installed, else paths. options: as for :class:`Molecules`.
    """

    names: ClassVar[tuple[str, ...]] = tuple(f"bit {i}" for i in range(BITS))

    def __init__(self, data: str | None = None, kind: str | None = None, **options: Any) -> None:
        super().__init__(data, **options)
        self.kind = kind or default_kind()
        self.properties = self.names

    def statistics(self) -> dict[str, Any]:
        return super().statistics() | {"context": [], "fingerprint": self.kind}

    def restore(self, statistics: Mapping[str, Any]) -> None:
        if "fingerprint" not in statistics:
            raise ValueError("the checkpoint is of a model that predicts no fingerprints.")
        super().restore(statistics)
        self.kind, self.properties = str(statistics["fingerprint"]), self.names

    def keepsakes(self) -> dict[str, bytes]:
        return {}

    def _known(self, training: MoleculeData, most: int = 0) -> list[list[float | None]]:
        return []

    def _records(self, split: str) -> Records:
        """The molecules of a split whose source tells their SMILES, with bits made on reading."""
        data = self._loaded.subset(split)
        smiles = data.smiles()
        rows = [i for i, text in enumerate(smiles) if text]
        if not rows:
            raise ValueError(
                f"domain.data={self.data}: no {split} molecule has a SMILES: prepare the data "
                "from a source with bonds."
            )
        return _Records(data.take(rows), self.elements, [smiles[i] for i in rows], self.kind)

    def collate(self, records: Sequence[Record]) -> Batch:
        batch = super().collate(records)
        bits = np.stack([record.context for record in records]).astype(np.float32)
        return Batch(batch.state, batch.mask, {"context": torch.from_numpy(bits)})


class _Records(Records):
    def __init__(
        self, data: MoleculeData, elements: Sequence[int], smiles: list[str], kind: str
    ) -> None:
        super().__init__(data, elements)
        self.smiles, self.kind = smiles, kind

    def __getitem__(self, index: int) -> Record:
        bits = fingerprint(self.smiles[index], self.kind)
        return super().__getitem__(index)._replace(context=bits)
