"""Where the numbers of a training go beside ``metrics.csv``."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from shared.runs import Run


class LoggedRun(Run):
    """A run whose metrics go to a Lightning logger too."""

    logger: Logger | None = None

    def write_metrics(self, step: int, values: Mapping[str, float]) -> None:
        super().write_metrics(step, values)
        if self.logger is not None:
            self.logger.log_metrics(dict(values), step)


def tensorboard(folder: Path) -> Logger:
    """TensorBoard events in ``folder``/tensorboard.

    Raises:
        ValueError: the package is missing.
    """
    if find_spec("tensorboard") is None and find_spec("tensorboardX") is None:
        raise ValueError("needs the package tensorboard: pip install tensorboard.")
    from lightning.pytorch.loggers import TensorBoardLogger

    return TensorBoardLogger(str(folder), name="", version="tensorboard")


def wandb(folder: Path, project: str = "molediff", **options: Any) -> Logger:
    """Weights & Biases, named after ``folder``.

    Raises:
        ValueError: the package is missing.
    """
    if find_spec("wandb") is None:
        raise ValueError("needs the package wandb: pip install wandb.")
    from lightning.pytorch.loggers import WandbLogger

    return WandbLogger(name=folder.name, save_dir=str(folder), project=project, **options)
