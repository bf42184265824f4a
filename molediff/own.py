"""Functions from a user's own Python files."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from shared.configuration import ConfigurationError


def load_function(text: str, what: str) -> Callable[..., Any]:
    """The function that ``path.py:function`` names, by running the file; ``what`` says in errors
    what it is for.

    Raises:
        ConfigurationError: no such file or function, or a file that cannot be run; one line.
    """
    path, _, name = text.rpartition(":")
    if not path.endswith(".py") or not name.isidentifier():
        raise ConfigurationError(f"{what} '{text}': write FILE.py:FUNCTION.")
    try:
        module = run_file(Path(path))
    except FileNotFoundError:
        raise ConfigurationError(f"{what} '{text}': there is no file {path}.") from None
    except Exception as error:
        raise ConfigurationError(
            f"{what} '{text}': {path} cannot be run: {type(error).__name__}: {error}."
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise ConfigurationError(
            f"{what} '{text}': {path} has no function '{name}'; it has "
            f"{', '.join(known) or 'none'}."
        )
    found: Callable[..., Any] = function
    return found


def run_file(path: Path) -> ModuleType:
    """A Python file as a module, outside the packages that imports find.

    Raises:
        FileNotFoundError: no such file. Whatever the file raises.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    name = f"molediff_own_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses in the file look themselves up there
    spec.loader.exec_module(module)
    return module
