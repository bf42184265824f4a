"""Optional packages, imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any


def need(module: str, purpose: str, extra: str) -> Any:
    """The module, which the extra of that name installs.

    Raises:
        ModuleNotFoundError: it is not installed; says what wants it and how to get it.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ModuleNotFoundError(
            f"{purpose} needs the package {module.split('.')[0]}: pip install 'molediff[{extra}]'"
        ) from None
