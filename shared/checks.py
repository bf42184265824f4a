"""What is checked of a verb's settings before it begins."""

from __future__ import annotations

import os
from pathlib import Path

from omegaconf import DictConfig

from shared import configuration
from shared.configuration import ConfigurationError


def check_numbers(config: DictConfig) -> None:
    """Refuse values of the wrong kind in keys that count.

    Raises:
        ConfigurationError: names the key and the value.
    """
    counts = {"n": 1, "steps": 1, "batch": 1, "seed": 0, "baseline": 0, "first": 1, "updates": 1}
    for key, least in counts.items():
        value = config.get(key)
        if value is None and (key in ("seed", "steps") or key not in config):
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigurationError(f"{key}={value}: give a whole number of at least {least}.")


def check_switches(name: str, config: DictConfig) -> None:
    """Refuse what is neither true nor false in keys that are one of them in ``configs/NAME.yaml``;
    to Python the text 'no' is true.

    Raises:
        ConfigurationError: names the key and the value.
    """
    for key, usual in configuration.own_settings(name).items():
        if isinstance(usual, bool) and not isinstance(config[key], bool):
            raise ConfigurationError(f"{key}={config[key]}: give true or false.")


def check_place(key: str, value: str | None, file: bool = False) -> None:
    """Refuse a ``value`` of ``key`` that cannot be a folder, or whose folder cannot be one if it
    is a ``file``.

    Raises:
        ConfigurationError: names the file in the way, or the folder that cannot be written.
    """
    out = Path(value or ".").absolute()
    folder = out.parent if file and out.is_file() else out
    place = next(path for path in (folder, *folder.parents) if path.exists())
    if not place.is_dir():
        raise ConfigurationError(f"{key}={value}: {place} is a file; give a folder.")
    if value and not os.access(place, os.W_OK | os.X_OK):
        raise ConfigurationError(f"{key}={value}: {place} cannot be written; choose another.")
