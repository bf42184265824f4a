"""The tensors of pickled modules, without running anything that the file names.

NVlabs-EDM pickles whole networks together with their source code. Here every class is replaced by
an empty one, and only the functions that put tensors together are known.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Inert(dict[Any, Any]):
    """Stands for any foreign class, function and object: keeps what it is given, does nothing."""

    given: tuple[Any, ...] = ()
    state: Any = None

    def __new__(cls, *given: Any, **_: Any) -> Inert:
        made = super().__new__(cls)
        made.given = given
        return made

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, item: Any) -> None:
        """Items of foreign lists are not needed."""

    def extend(self, items: Any) -> None:
        """See :meth:`append`."""


def _storage(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    typed = getattr(storage, "_untyped_storage", storage)
    flat = torch.empty(0, dtype=storage.dtype).set_(typed)
    # refuses a size or stride that leaves the storage
    return torch.as_strided(flat, tuple(size), tuple(stride), offset)


_KNOWN = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("collections", "OrderedDict"): dict,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = _KNOWN.get((module, name))
        return type(name, (Inert,), {"__module__": module}) if known is None else known


def read_modules(path: Path) -> dict[str, dict[str, Tensor]]:
    """Pickled modules of a file by the names that it gives them (EDM: 'ema'), each with its
    parameters and buffers by name.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: truncated, no pickle, or without modules in it.
    """
    try:
        with path.open("rb") as file:
            content = _Unpickler(file).load()
    except FileNotFoundError:
        raise FileNotFoundError(f"no file {path}.") from None
    except Exception as error:  # a damaged pickle can fail in any way
        raise ValueError(f"{path} is truncated or no pickle ({type(error).__name__}).") from None
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
    if not isinstance(module, Inert):
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
