"""``molediff export``: samples, or any file that a domain reads, in another format."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

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
    good = [item for item in items if not isinstance(item, Invalid)]
    if not good:
        raise ConfigurationError(f"{path} holds nothing to export.")
    target.parent.mkdir(parents=True, exist_ok=True)
    domain.write(target, good)
    lines = [f"{len(good)} items: {target}"]
    lines += [f"{len(items) - len(good)} that could not be read are left out"] * (
        len(items) > len(good)
    )
    return Outcome(lines, target)
