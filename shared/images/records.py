"""Records of pictures for training: pixels or latents, class and augmentation."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from shared.images.augment import Augmentation


def scaled(images: np.ndarray) -> Tensor:
    """uint8 [n, height, width(, 3)] -> float32 [n, channels, height, width] in [-1, 1]."""
    pixels = torch.from_numpy(images.astype(np.float32)) / 127.5 - 1.0
    return pixels[:, None] if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2).contiguous()


class Records(Dataset[dict[str, Tensor]]):
    """'x' and, where there are such, 'label' and 'augment'. Random choices come from torch's
    generator, which training sets for every record.

    Args:
        read: number of a picture -> x in model units. rows: the numbers of the records.
        labels: of all pictures; each is replaced by ``null`` with probability ``drop``.
    """

    def __init__(
        self,
        read: Callable[[int], Tensor],
        rows: np.ndarray,
        labels: np.ndarray | None,
        drop: float = 0.0,
        null: int = 0,
        augmentation: Augmentation | None = None,
    ) -> None:
        self.read, self.rows, self.labels = read, rows, labels
        self.drop, self.null, self.augmentation = drop, null, augmentation

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row, record = int(self.rows[index]), {}
        if self.labels is not None:
            dropped = self.drop > 0 and float(torch.rand(())) < self.drop
            record["label"] = torch.tensor(self.null if dropped else int(self.labels[row]))
        record["x"] = self.read(row)
        if self.augmentation is not None:
            record["x"], record["augment"] = self.augmentation(record["x"])
        return record
