"""Reading pickled files of other programs without running anything that is in them.

Every class or function that a file names becomes a placeholder that only keeps what it is given:
mappings stay mappings, objects become objects with attributes, calls are recorded, not made.
"""

from __future__ import annotations

import collections
import pickle
from pathlib import Path
from typing import Any

import torch


class Placeholder(dict[Any, Any]):
    """Stands for any foreign object. Items of a mapping are its items; ``given`` are the
    arguments it was made with, ``state`` its attributes."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Placeholder:
        made = super().__new__(cls)
        made.given, made.state = args, {}
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        parts = state if isinstance(state, tuple) else (state,)
        for part in parts:
            if isinstance(part, dict):
                self.state.update(part)

    def append(self, item: Any) -> None:
        """Items of a foreign list are kept under their number."""
        self[len(self)] = item

    given: tuple[Any, ...]
    state: dict[Any, Any]


_PLAIN = {
    ("collections", "OrderedDict"): dict,
    ("collections", "defaultdict"): lambda *_: {},
    ("builtins", "dict"): dict,
    ("builtins", "set"): set,
    ("builtins", "list"): list,
    ("__builtin__", "dict"): dict,
    ("__builtin__", "set"): set,
    ("collections", "deque"): collections.deque,
    ("copyreg", "_reconstructor"): lambda cls, *_: cls(),
    ("copy_reg", "_reconstructor"): lambda cls, *_: cls(),
}
"""The only callables a file can reach besides placeholders; none has side effects."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        plain = _PLAIN.get((module, name))
        return type(name, (Placeholder,), {"__module__": module}) if plain is None else plain


def read_pickle(path: Path) -> Any:
    """The content of a plain pickle.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: truncated, or no pickle.
    """
    try:
        with path.open("rb") as file:
            return _Unpickler(file, encoding="latin1").load()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except Exception as error:  # a damaged pickle can fail in any way
        raise ValueError(f"{path} is truncated or no pickle ({type(error).__name__})") from None


def read_torch(path: Path) -> Any:
    """The content of a file of ``torch.save``: tensors, numbers, text and containers; an object
    of a foreign class becomes a dictionary of its items.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: truncated, no file of ``torch.save`` in its zip format, or with calls in it.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
        inert: list[Any] = [(collections.OrderedDict, name) for name in foreign]
        with torch.serialization.safe_globals(inert):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # the reader raises a dozen types on damaged files
        raise ValueError(
            f"{path} is truncated, no file of torch.save, or would run code when read: refused"
        ) from None
