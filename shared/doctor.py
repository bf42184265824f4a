"""What an installation can do: versions, devices, optional packages, configurations."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import torch

from shared import configuration
from shared.checkpoints import versions
from shared.cli import Outcome, Program, Progress
from shared.runs import pretrained


@dataclass(frozen=True)
class Optional:
    """A package that adds something. ``module`` is imported, ``package`` installed, ``extra`` the
    extra of this project that brings it."""

    module: str
    package: str
    unlocks: str
    extra: str | None = None


OPTIONAL = (
    Optional("torch_geometric", "torch-geometric", "graph data sets and networks", "graphs"),
    Optional("e3nn", "e3nn", "equivariant networks", "equivariant"),
    Optional("tblite", "tblite", "energies, gaps and dipoles by GFN2-xTB", "chemistry"),
    Optional("dftd4", "dftd4", "polarizabilities", "chemistry"),
    Optional("ase", "ase", "geometry optimisation", "chemistry"),
    Optional("posebusters", "posebusters", "plausibility checks of molecules", "chemistry"),
    Optional("fcd_torch", "fcd_torch", "Frechet ChemNet distance", "chemistry"),
    Optional("h5py", "h5py", "point clouds in .h5 files", "points"),
    Optional("trimesh", "trimesh", "meshes", "points"),
    Optional("pytorch3d", "pytorch3d", "faster point cloud operations on a GPU"),
    Optional(
        "hydra_plugins.hydra_submitit_launcher",
        "hydra-submitit-launcher",
        "sweeps on Slurm and in local processes",
        "slurm",
    ),
    Optional("tensorboard", "tensorboard", "logger=tensorboard"),
    Optional("wandb", "wandb", "logger=wandb"),
    Optional(
        "diffusers", "diffusers", "its autoencoders; comparisons with its schedulers", "peers"
    ),
    Optional("lmdb", "lmdb", "LSUN databases", "images"),
    Optional("datasets", "datasets", "image data sets of Hugging Face", "images"),
    Optional("torch_fidelity", "torch-fidelity", "weights of Inception for FID", "images"),
)


def doctor(config: Any, program: Program, progress: Progress | None = None) -> Outcome:
    """The verb."""
    return Outcome((describe(),))


def describe() -> str:
    """Everything, as text for a terminal."""
    return "\n\n".join(
        f"{title}\n" + "\n".join(f"  {line}" for line in lines)
        for title, lines in (
            ("versions", [f"{name:<18} {value}" for name, value in versions().items()]),
            ("devices", devices()),
            ("optional packages", [_line(package) for package in OPTIONAL]),
            ("configurations", configurations()),
            ("pretrained models", sorted(pretrained()) or ["none"]),
        )
    )


def devices() -> list[str]:
    """The processor and every accelerator that torch sees."""
    lines = [
        f"cpu    {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} used"
    ]
    for i in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(i)
        lines.append(f"cuda:{i} {card.name}, {card.total_memory / 2**30:.0f} GiB")
    if torch.backends.mps.is_available():
        lines.append("mps    Apple GPU")
    return lines


def installed(package: Optional) -> str | None:
    """Its version; '?' if it can be imported but has none; None if it is not there."""
    try:
        if find_spec(package.module) is None:
            return None
        return metadata.version(package.package)
    except metadata.PackageNotFoundError:
        return "?"
    except (ImportError, ValueError):
        return None


def _line(package: Optional) -> str:
    version = installed(package)
    if version is not None:
        return f"+ {package.package:<24} {version:<10} {package.unlocks}"
    name = f"'molediff[{package.extra}]'" if package.extra else package.package
    return f"- {package.package:<24} {'':<10} {package.unlocks}: pip install {name}"


def configurations() -> list[str]:
    """Where the configurations are, and how many options every group has."""
    try:
        where = configuration.folder()
    except FileNotFoundError as error:
        return [f"missing: {error}"]
    counts = {group: len(configuration.options(group)) for group in configuration.groups()}
    return [str(where), ", ".join(f"{n} {group}" for group, n in counts.items())]
