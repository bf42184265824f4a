"""Checkpoints: safetensors and JSON in a folder, replaced atomically, checked before use.

``checkpoint.json`` names the other files with their SHA-256. Their own names carry a part of it,
so a newer checkpoint never overwrites a file that the older one still needs: the rename of
``checkpoint.json`` alone turns the old checkpoint into the new one, and a process killed at any
moment leaves a readable folder.

| file | content |
|---|---|
| checkpoint.json | format, step, config, statistics of the domain, versions, files |
| weights-HASH.safetensors | ``state_dict`` of the denoiser |
| ema-HASH.safetensors | moving averages of its parameters, if there are any |
| training-HASH.pt | state of the optimiser and of the callbacks, read without running code |
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor, nn

FORMAT = 1
MANIFEST = "checkpoint.json"
PART = ".part-"
"""How the name of a file begins that is not yet whole."""
SUFFIXES = {"weights": ".safetensors", "ema": ".safetensors", "training": ".pt"}
GAMMA = "gamma.json"  # the optimal reverse variance of these weights (shared.variance)
HEAD = "head.safetensors"  # the same per element (shared.heads)
PACKAGES = ("molediff", "torch", "lightning", "numpy", "safetensors", "rdkit", "torch-geometric")
PICKLED = ("pt", "pth", "ckpt", "pkl", "pickle", "bin", "npy", "t7")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, and what to do about it."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory. ``weights`` and ``ema``: parameter name -> tensor on the CPU;
    ``statistics``: the constants of the domain; ``training_path``: optimiser state, if kept."""

    path: Path
    config: Mapping[str, Any]
    statistics: Mapping[str, Any]
    step: int
    weights: Mapping[str, Tensor]
    ema: Mapping[str, Tensor] | None = None
    training_path: Path | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    def training(self) -> dict[str, Any]:
        """The state needed to go on training.

        Raises:
            CheckpointError: the checkpoint was saved without it.
        """
        if self.training_path is None:
            raise CheckpointError(
                f"{self.path} holds weights only; training cannot go on from it exactly."
            )
        return dict(read_pickled_tensors(self.training_path))


@cache
def versions() -> Mapping[str, str]:
    """Versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


# -- writing ----------------------------------------------------------------------------------


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file to write to in place of ``path``, with the same suffixes, moved there in the end; an
    error leaves ``path`` as it was."""
    part = path.with_name(f"{PART}{os.getpid()}-{path.name}")
    part.unlink(missing_ok=True)
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace the file ``path``: after a crash it holds the old or the new content, whole."""
    with whole(path) as part, part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save(
    path: Path,
    denoiser: nn.Module,
    *,
    config: Mapping[str, Any],
    domain: Mapping[str, Any],
    ema: Mapping[str, Tensor] | None = None,
    training: Mapping[str, Any] | None = None,
    step: int,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a checkpoint into the folder ``path``; one that is there stays until this is whole.

    Args:
        domain: the constants of the domain, JSON-able.
        ema: moving averages of parameters, by the names of ``denoiser.state_dict()``.
        training: what it takes to go on: numbers, strings, tensors and containers of these.
        dtype: store float32 tensors in this type (float16 or bfloat16 for shipped weights).

    Raises:
        OSError: the disk is full or the folder cannot be written; the old checkpoint stays.
    """
    path.mkdir(parents=True, exist_ok=True)
    contents = {"weights": safetensors.save(_stored(denoiser.state_dict(), dtype))}
    if ema is not None:
        contents["ema"] = safetensors.save(_stored(ema, dtype))
    if training is not None:
        buffer = io.BytesIO()
        torch.save(dict(training), buffer)
        contents["training"] = buffer.getvalue()
    files: dict[str, dict[str, Any]] = {}
    for kind, data in contents.items():
        digest = hashlib.sha256(data).hexdigest()
        name = f"{kind}-{digest[:12]}{SUFFIXES[kind]}"
        write_atomically(path / name, data)
        files[kind] = {"name": name, "bytes": len(data), "sha256": digest}
    manifest = {
        "format": FORMAT,
        "step": step,
        "config": dict(config),
        "statistics": dict(domain),
        "versions": dict(versions()),
        "files": files,
    }
    text = json.dumps(manifest, indent=1, allow_nan=False)
    write_atomically(path / MANIFEST, text.encode())
    _sweep(path, {entry["name"] for entry in files.values()})


def _stored(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Own, contiguous copies on the CPU: the format refuses tensors that share memory."""
    out = {}
    for name, tensor in tensors.items():
        narrow = dtype is not None and tensor.dtype == torch.float32
        kept = tensor.detach().to("cpu", dtype if narrow else tensor.dtype)
        out[name] = kept.clone(memory_format=torch.contiguous_format)
    return out


def _sweep(folder: Path, keep: set[str]) -> None:
    """Remove what older or interrupted saves left, and what was derived from older weights."""
    for file in folder.iterdir():
        ours = file.name.startswith((*(f"{kind}-" for kind in SUFFIXES), GAMMA, HEAD))
        if (ours and file.name not in keep) or file.name.startswith(PART):
            file.unlink(missing_ok=True)


# -- reading ----------------------------------------------------------------------------------


def load(path: Path) -> Checkpoint:
    """Read and verify a checkpoint; nothing in it is executed.

    Raises:
        FileNotFoundError: nothing there.
        CheckpointError: truncated, altered, pickled, or of a newer format.
    """
    folder = _folder(path)
    manifest = _manifest(folder)
    while True:  # a running training may replace the checkpoint between two reads
        try:
            contents = {
                kind: _content(folder, entry)
                for kind, entry in manifest["files"].items()
                if kind != "training"
            }
            break
        except FileNotFoundError as error:
            newer = _manifest(folder)
            if newer == manifest:
                raise CheckpointError(
                    f"checkpoint {folder} is incomplete: {Path(error.filename).name} is missing; "
                    "copy the whole folder."
                ) from None
            manifest = newer
    training = manifest["files"].get("training")
    ema = contents.get("ema")
    return Checkpoint(
        path=folder,
        config=manifest["config"],
        statistics=manifest["statistics"],
        step=manifest["step"],
        weights=_tensors(folder, contents["weights"]),
        ema=None if ema is None else _tensors(folder, ema),
        training_path=None if training is None else folder / training["name"],
        versions=manifest["versions"],
    )


def _folder(path: Path) -> Path:
    if path.name == MANIFEST:
        return path.parent
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}.")
    if path.is_dir():
        if not (path / MANIFEST).exists():
            raise FileNotFoundError(f"no checkpoint at {path}: it has no {MANIFEST}.")
        return path
    with path.open("rb") as file:
        start = file.read(2)
    if start in (b"PK", b"\x80\x02") or path.suffix[1:].lower() in PICKLED:
        raise CheckpointError(
            f"{path} is a pickled file, which can run code when it is read; "
            "turn it into a checkpoint with the `convert` command."
        )
    raise CheckpointError(f"{path} is a file; a checkpoint is a folder with {MANIFEST} in it.")


def _manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    try:
        manifest = json.loads(file.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"no checkpoint at {folder}: it has no {MANIFEST}.") from None
    except ValueError:
        raise CheckpointError(f"{file} is truncated or is not JSON; copy it again.") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("format"), int):
        raise CheckpointError(f"{file} is JSON but does not describe a checkpoint.")
    if manifest["format"] > FORMAT:
        raise CheckpointError(
            f"checkpoint {folder} has format {manifest['format']}, this version reads up to "
            f"{FORMAT}; upgrade the package."
        )
    wanted = ("step", "config", "statistics", "versions", "files")
    absent = [key for key in wanted if key not in manifest]
    if absent or "weights" not in manifest["files"]:
        raise CheckpointError(f"{file} lacks {', '.join(absent) or 'weights'}; copy it again.")
    return manifest


def _content(folder: Path, entry: Mapping[str, Any]) -> bytes:
    name, size = str(entry["name"]), int(entry["bytes"])
    if Path(name).name != name:
        raise CheckpointError(f"checkpoint {folder} names a file outside its folder: {name}.")
    data = (folder / name).read_bytes()
    if len(data) < size:
        raise CheckpointError(
            f"{folder / name} is truncated: {len(data)} of {size} bytes; copy it again."
        )
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise CheckpointError(
            f"{folder / name} does not have the SHA-256 in {MANIFEST}: it was altered or damaged; "
            "copy it again."
        )
    return data


def _tensors(folder: Path, data: bytes) -> dict[str, Tensor]:
    try:
        return dict(safetensors.load(data))
    except SafetensorError as error:
        raise CheckpointError(f"checkpoint {folder}: not a safetensors file ({error}).") from None


def apply(checkpoint: Checkpoint, denoiser: nn.Module, ema: bool = True) -> None:
    """Put the weights into ``denoiser``, the moving averages where there are any and ``ema``.
    Names and shapes are all checked before anything is changed; the model's dtypes stay.

    Raises:
        CheckpointError: the checkpoint belongs to another model; names a few of the tensors.
    """
    stored = dict(checkpoint.weights)
    if ema and checkpoint.ema is not None:
        stored.update(checkpoint.ema)
    own = denoiser.state_dict()
    wrong = [n for n in own.keys() & stored.keys() if not _fits(stored[n], own[n])]
    problems = [
        f"{len(names)} {what} ({_few(names)})"
        for what, names in (
            ("missing", own.keys() - stored.keys()),
            ("unexpected", stored.keys() - own.keys()),
            ("of another shape", [f"{n} {_shape(stored[n])} for {_shape(own[n])}" for n in wrong]),
        )
        if names
    ]
    if problems:
        raise CheckpointError(
            f"checkpoint {checkpoint.path} belongs to another model: tensors "
            f"{'; '.join(problems)}. Build the model from the checkpoint's config."
        )
    denoiser.load_state_dict(stored)


def fingerprint(module: nn.Module) -> str:
    """Sixteen hexadecimal digits that tell weights from others, the same on every device."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().float().numpy().tobytes())
    return digest.hexdigest()[:16]


def _fits(stored: Tensor, own: Tensor) -> bool:
    return stored.shape == own.shape and stored.is_floating_point() == own.is_floating_point()


def _shape(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _few(names: Iterable[str], most: int = 3) -> str:
    names = sorted(names)
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def read_pickled_tensors(path: Path) -> Any:
    """Tensors, numbers, strings and containers of these out of a file of ``torch.save``, without
    running code: anything else in the file is refused.

    Raises:
        FileNotFoundError: nothing there.
        CheckpointError: truncated, no file of ``torch.save``, or with other objects in it.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"no file {path}.") from None
    except Exception as error:  # the reader raises a dozen types on damaged files
        reason = str(error)
        if "GLOBAL " in reason:
            found = reason.split("GLOBAL ", 1)[-1].split(" ", 1)[0]
            raise CheckpointError(
                f"{path} holds Python objects ({found}) and would run code when read: refused. "
                "Save its state_dict alone where it was made."
            ) from None
        raise CheckpointError(f"{path} is truncated or is no file of torch.save.") from None
