"""Which parts of a network run in half precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """Matrix products of a backbone in ``dtype``; parameters, sums, losses and the state stay as
    they are.

    Fields named in ``keep`` enter the backbone as they are, so that differences of coordinates do
    not cancel; the others enter in ``dtype``. Every output returns to the dtype of the state.

    Raises:
        ValueError: an unknown dtype.
    """

    dtype: str = "float32"
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"Precision: dtype '{self.dtype}' is not one of {', '.join(DTYPES)}.")

    @property
    def full(self) -> bool:
        return self.dtype == "float32"

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context that the backbone runs in."""
        dtype = None if self.full else DTYPES[self.dtype]
        return torch.autocast(device.type, dtype, enabled=not self.full)

    def enter(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inputs as the backbone gets them."""
        if self.full:
            return dict(inputs)
        return {
            name: x if name in self.keep else x.to(DTYPES[self.dtype])
            for name, x in inputs.items()
        }
