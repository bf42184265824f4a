"""Reading pickled files of other programs without running anything that is in them.

Every class or function that a file names becomes a placeholder that only keeps what it is given:
mappings stay mappings, objects become objects with attributes, calls are recorded, not made. Only
the functions that put containers and tensors together are known.
"""

from __future__ import annotations

import collections
import io
import pickle
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.checkpoints import read_pickled_tensors


class Placeholder(dict[Any, Any]):
    """Stands for any foreign object. Items of a mapping are its items; ``given`` are the
    arguments it was made with, ``state`` its attributes."""

    given: tuple[Any, ...]
    state: dict[Any, Any]

    def __new__(cls, *given: Any, **_: Any) -> Placeholder:
        made = super().__new__(cls)
        made.given, made.state = given, {}
        return made

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.state.update(part)

    def append(self, item: Any) -> None:
        """Items of a foreign list are kept under their number."""
        self[len(self)] = item

    def extend(self, items: Iterable[Any]) -> None:
        """See :meth:`append`."""
        for item in items:
            self.append(item)


def _storage(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    typed = getattr(storage, "_untyped_storage", storage)
    flat = torch.empty(0, dtype=storage.dtype).set_(typed)
    # refuses a size or stride that leaves the storage
    return torch.as_strided(flat, tuple(size), tuple(stride), offset)


_KNOWN = {
    ("builtins", "dict"): dict,
    ("builtins", "set"): set,
    ("builtins", "list"): list,
    ("__builtin__", "dict"): dict,
    ("__builtin__", "set"): set,
    ("collections", "OrderedDict"): dict,
    ("collections", "defaultdict"): lambda *_: {},
    ("collections", "deque"): collections.deque,
    ("copyreg", "_reconstructor"): lambda cls, *_: cls(),
    ("copy_reg", "_reconstructor"): lambda cls, *_: cls(),
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("torch.storage", "_load_from_bytes"): _storage,
}
"""The only callables that a file can reach besides placeholders; none has side effects."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = _KNOWN.get((module, name))
        return type(name, (Placeholder,), {"__module__": module}) if known is None else known


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
        raise FileNotFoundError(f"no file {path}.") from None
    except Exception as error:  # a damaged pickle can fail in any way
        raise ValueError(f"{path} is truncated or no pickle ({type(error).__name__}).") from None


def read_torch(path: Path) -> Any:
    """The content of a file of ``torch.save``: tensors, numbers, text and containers; an object
    of a foreign class becomes a dictionary of its items.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: truncated, no file of ``torch.save`` in its zip format, or with calls in it.
    """
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # not a zip file: the reader below says so
        names = []
    foreign: list[Any] = [(collections.OrderedDict, name) for name in names]
    with torch.serialization.safe_globals(foreign):
        return read_pickled_tensors(path)


# -- pickled modules --------------------------------------------------------------------------


def read_modules(path: Path) -> dict[str, dict[str, Tensor]]:
    """Pickled modules of a file (NVlabs-EDM) by the names that it gives them ('ema'), each with
    its parameters and buffers by name.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: truncated, no pickle, or without modules in it.
    """
    content = read_pickle(path)
    found = {}
    for name, value in content.items() if isinstance(content, Mapping) else ():
        tensors = dict(_tensors(value, ""))
        if tensors:
            found[str(name)] = tensors
    if not found:
        raise ValueError(f"{path}: no pickled module in it.")
    return found


def _tensors(module: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    state = _state(module)
    for kind in ("_parameters", "_buffers"):
        for name, value in state.get(kind, {}).items():
            if isinstance(value, Tensor):
                yield prefix + name, value
    for name, child in state.get("_modules", {}).items():
        yield from _tensors(child, f"{prefix}{name}.")


def _state(module: Any) -> Mapping[str, Any]:
    """The attributes of a module: its own, or those in what it is to be rebuilt from."""
    if not isinstance(module, Placeholder):
        return {}
    for source in (module.state, *module.given):
        if isinstance(source, Mapping):
            inner = source.get("state", source)
            if isinstance(inner, Mapping) and "_modules" in inner:
                return inner
    return {}


def is_module_pickle(path: Path) -> bool:
    """Whether a file is a plain pickle, no file of ``torch.save``."""
    with path.open("rb") as file:
        start = file.read(2)
    return path.suffix == ".pkl" and start[:1] == b"\x80"
