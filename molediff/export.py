"""``molediff export``: samples, or any file that a domain reads, in another format."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from molediff.files import refusal
from molediff.molecules import Molecule
from shared.checkpoints import whole
from shared.cli import Outcome, Program, Progress
from shared.configuration import ConfigurationError
from shared.domains import Invalid
from shared.judging import domain_of, read_items, settings_of


def export(config: DictConfig, program: Program, progress: Progress | None = None) -> Outcome:
    """Write the items of ``config.path`` to the file ``config.to``, whose suffix is the format."""
    path, target = Path(config.path), Path(config.to)
    if target.exists():
        raise ConfigurationError(f"to={target} exists already; choose another file.")
    domain = domain_of(config, settings_of(path), program)
    if config.dimensions is not None:
        if not hasattr(domain, "dimensions") or config.dimensions not in (2, 3):
            raise ConfigurationError(
                f"dimensions={config.dimensions}: molecular graphs take 2 or 3, other things none."
            )
        domain.dimensions = config.dimensions
    items = read_items(domain, path)
    reasons = [_reason(item, target) for item in items]
    good = [item for item, reason in zip(items, reasons, strict=True) if reason is None]
    lost = Counter(reason for reason in reasons if reason is not None)
    if not good:
        why = "".join(f": {reason}" for reason, _ in lost.most_common(1))
        raise ConfigurationError(f"{path} holds nothing to export{why or '.'}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole(target) as file:
        domain.write(file, good)
    lines = [f"{count} left out: {reason}" for reason, count in lost.most_common(5)]
    return Outcome([f"{len(good)} items: {target}", *lines], target)


def _reason(item: Any, target: Path) -> str | None:
    """Why an item cannot be written."""
    if isinstance(item, Invalid):
        return f"not read: {item.reason}"
    return refusal(target, item) if isinstance(item, Molecule) else None
