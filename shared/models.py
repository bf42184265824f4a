"""Trained models in Python: load one by name or folder, and generate with it."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic

import torch
from omegaconf import DictConfig, OmegaConf

from shared import checkpoints
from shared.configuration import ConfigurationError, build, choose, option
from shared.denoisers import Denoiser
from shared.domains import Domain, Invalid, Item
from shared.heads import with_head
from shared.predictions import Denoise
from shared.runs import Run, pretrained
from shared.sampling import Memory, Summary
from shared.sampling import sample as run_sampling
from shared.solvers.base import Solver
from shared.solvers.grids import Grid
from shared.variance import VarianceHead

STEPS = 50
"""Denoiser calls per sample where nothing else is said."""


@dataclass(frozen=True)
class Generated(Generic[Item]):
    """What one call made: items in the order of their indices, the seed, and what it cost."""

    items: list[Item | Invalid]
    seed: int
    summary: Summary


@dataclass(frozen=True)
class Model(Generic[Item]):
    """A trained model with the domain that it was trained for."""

    denoiser: Denoiser
    domain: Domain[Item]
    run: Run
    checkpoint: checkpoints.Checkpoint

    def sample(self, n: int, **settings: Any) -> list[Item | Invalid]:
        """``n`` new items; see :meth:`generate` for the settings."""
        return self.generate(n, **settings).items

    def generate(
        self,
        n: int,
        *,
        solver: str | Solver = "auto",
        steps: int | None = None,
        grid: str | Grid = "auto",
        seed: int | None = None,
        denoise: Denoise | None = None,
        batch: int = 64,
        device: str = "auto",
        **request: Any,
    ) -> Generated[Item]:
        """Generate the samples 0..n-1 of ``seed``.

        Args:
            solver: a name of the configuration group ``solver``, or a solver; 'auto' is the one
                that suits the model, see :func:`settled`.
            steps: denoiser calls per sample; None: as many as suit it.
            grid: likewise of group ``grid``.
            seed: None draws one, which the result tells.
            denoise: a guided form of ``denoiser``.
            batch: samples at a time; halved when memory runs out.
            device: 'auto', 'cpu' or 'cuda'.
            request: what to generate, in the domain's own keys.

        Raises:
            ValueError: unknown names or impossible settings.
        """
        place = find_device(device)
        seed = secrets.randbelow(2**31) if seed is None else seed
        memory = Memory()
        method, times, calls = self.chosen(solver, grid, steps)
        summary = run_sampling(
            denoise or self.prepared(method, place),
            self.denoiser.process,
            self.domain,
            n,
            method,
            calls,
            times,
            seed,
            request=request,
            batch=batch,
            device=place,
            sink=memory,
        )
        return Generated([memory.items[i] for i in range(n)], seed, summary)

    def chosen(
        self, solver: str | Solver, grid: str | Grid, steps: int | None
    ) -> tuple[Solver, Grid, int]:
        """Solver, grid and number of steps for names, 'auto' and None; see :func:`settled`."""
        named = {"solver": _named("solver", solver), "grid": _named("grid", grid), "steps": steps}
        found = settled(named, self.domain, self.checkpoint)
        method, times = (
            find_choice(found[group], self.domain, self.checkpoint) for group in ("solver", "grid")
        )
        return method, times, found["steps"]

    def records(self) -> Any:
        """Its training records.

        Raises:
            ValueError, FileNotFoundError: there are none; names the key ``data`` of the verbs that
                load a model with other data.
        """
        try:
            return self.domain.datasets()[0]
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(str(error).replace("domain.data", "data")) from error

    def prepared(
        self, solver: Solver, device: torch.device | str = "cpu"
    ) -> Denoiser | VarianceHead:
        """The denoiser on ``device``, with its variance head where ``solver`` needs one."""
        return with_head(solver, self.checkpoint.path, self.denoiser.to(device), self.domain)


def _named(group: str, choice: Any) -> Any:
    return option(group, choice) if isinstance(choice, str) else choice


def suited(group: str, domain: Domain[Any], **options: Any) -> Any:
    """The option of ``group`` ('solver' or 'grid') that suits a domain, with its own options
    where others are given."""
    given = {name: value for name, value in options.items() if value is not None}
    return choose(group, getattr(domain, group), **given)


def load(
    run: str | Path, checkpoint: str | None = None, data: str | Path | None = None
) -> Model[Any]:
    """A trained model by its run folder or pretrained name, with averaged weights if it has any.

    Args:
        checkpoint: 'best', 'last' or 'step-NNN'; None: the best there is.
        data: training data, where they are not (any more) where the run found them.

    Raises:
        FileNotFoundError: no such run or checkpoint. ValueError: one that cannot be used.
    """
    opened = Run.open(run)
    stored = checkpoints.load(opened.checkpoint(checkpoint))
    if data is not None:
        own = {**stored.config["domain"], "data": str(data)}
        stored = replace(stored, config={**stored.config, "domain": own})
    config = OmegaConf.create(dict(stored.config))
    domain = build(config.domain)
    domain.restore(stored.statistics)
    denoiser = build(config.model, domain=domain, schedule=build(config.schedule))
    checkpoints.apply(stored, denoiser)
    return Model(denoiser.eval(), domain, opened, stored)


def find_choice(config: Any, domain: Domain[Any], checkpoint: checkpoints.Checkpoint) -> Any:
    """What an option of the groups ``solver`` and ``grid`` describes, anything else as it is; a
    table of Gamma without a path is the one beside the weights of ``checkpoint``."""
    if not isinstance(config, DictConfig):
        return config
    config = config.copy()
    for node in (config, *(value for value in config.values() if isinstance(value, DictConfig))):
        if node.get("_target_") == "shared.variance.load_gamma" and node.get("path") is None:
            node.path = str(checkpoint.path / checkpoints.GAMMA)
    return build(config, domain=domain)


def settled(
    config: Mapping[str, Any],
    domain: Domain[Any],
    checkpoint: checkpoints.Checkpoint | None = None,
) -> dict[str, Any]:
    """``solver``, ``grid`` and ``steps`` of ``config`` with 'auto' and None replaced: by what the
    checkpoint was published with, if its configuration says so, else by what suits the domain, and
    a grid the solver.
    The published grid and steps go with the published solver only."""
    published = {} if checkpoint is None else checkpoint.config
    own = published if _is_auto(config["solver"]) and "solver" in published else {}
    solver = _settle("solver", config["solver"], own, domain.solver)
    grid = _settle("grid", config["grid"], own, domain.grids.get(_class(solver), domain.grid))
    out = {"solver": solver, "grid": grid}
    out["steps"] = own.get("steps", STEPS) if config["steps"] is None else config["steps"]
    return out


def _is_auto(config: Any) -> bool:
    return isinstance(config, DictConfig) and config.get("_target_") == "shared.models.suited"


def _class(solver: Any) -> str:
    """The name of the class of a solver or of what describes one."""
    if isinstance(solver, DictConfig):
        return str(solver.get("_target_")).rpartition(".")[2]
    return type(solver).__name__


def _settle(group: str, config: Any, own: Mapping[str, Any], suited: str) -> Any:
    if not _is_auto(config):
        return config
    options = {k: v for k, v in config.items() if k not in ("_target_", "group") and v is not None}
    if group in own and not options:
        return OmegaConf.create(dict(own[group]))
    return option(group, suited, **options)


def beside(model: Model[Any], out: str | Path | None) -> Path:
    """Where what is found of a model goes: ``out``, else the folder of its weights.

    Raises:
        ConfigurationError: that of a shipped model, which every run of this machine shares.
    """
    if out is None and model.checkpoint.path in pretrained().values():
        name = model.run.folder.name
        raise ConfigurationError(f"run={name} is a shipped model: give out=FOLDER.")
    return Path(out or model.checkpoint.path)


def find_device(name: str) -> torch.device:
    """'auto' takes a CUDA device where there is one.

    Raises:
        ConfigurationError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigurationError(f"device={name}: no CUDA device here; give device=cpu.")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ConfigurationError(f"device={name}: give auto, cpu or cuda.") from error


def guided(
    config: Mapping[str, Any], denoiser: Denoiser | VarianceHead, domain: Domain[Any]
) -> Denoise:
    """The denoiser under the guidance that an option of group ``guidance`` describes.

    Raises:
        ConfigurationError: guidance by a condition that the domain does not have.
    """
    null = domain.null_condition()
    found = build(config, denoise=denoiser, process=denoiser.process, domain=domain, null=null)
    if hasattr(found, "null") and not found.null:
        raise ConfigurationError(
            f"guidance: domain {domain.name} has no condition that can be left out; choose "
            "another guidance."
        )
    return denoiser if found is None else found
