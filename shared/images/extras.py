"""Packages that only some image data and files need, imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any


def need(module: str, purpose: str, extra: str = "images") -> Any:
    """The module.

    Raises:
        ModuleNotFoundError: it is not installed; says what wants it and how to get it.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ModuleNotFoundError(
            f"{purpose} needs the package {module.split('.')[0]}: pip install 'molediff[{extra}]'"
        ) from None
