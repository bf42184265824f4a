"""What the verbs of the command lines do, as functions that Python programs can call too.

Each takes a composed configuration (see ``shared.configuration.compose``) and returns an
:class:`Outcome`; none of them prints.
"""

from __future__ import annotations

import json
import secrets
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from shared import checkpoints, reports
from shared.checkpoints import write_atomically
from shared.cli import Program
from shared.configuration import ConfigurationError, build, choose, option, plain
from shared.denoisers import Denoise, Denoiser
from shared.domains import Domain, Invalid
from shared.metrics import Estimate
from shared.reports import Section
from shared.runs import Run
from shared.sample_folders import Folder, read_manifest
from shared.sampling import Memory
from shared.sampling import sample as run_sampling

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Outcome:
    """What a verb says at its end: lines for the user, the main file or folder it wrote, and
    whether everything that was asked for succeeded."""

    lines: Sequence[str] = ()
    path: Path | None = None
    ok: bool = True


@dataclass(frozen=True)
class Model:
    """A trained model with the domain that it was trained for."""

    denoiser: Denoiser
    domain: Domain[Any]
    run: Run
    checkpoint: checkpoints.Checkpoint


def load(run: str | Path, checkpoint: str | None = None) -> Model:
    """A trained model by its run folder or pretrained name, with averaged weights if it has any.

    Args:
        checkpoint: 'best', 'last' or 'step-NNN'; None: the best there is.

    Raises:
        FileNotFoundError: no such run or checkpoint. ValueError: one that cannot be used.
    """
    opened = Run.open(run)
    stored = checkpoints.load(opened.checkpoint(checkpoint))
    config = OmegaConf.create(dict(stored.config))
    domain = build(config.domain)
    domain.restore(stored.statistics)
    denoiser = build(config.model, domain=domain, schedule=build(config.schedule))
    checkpoints.apply(stored, denoiser)
    return Model(denoiser.eval(), domain, opened, stored)


def _now() -> str:
    return datetime.now().strftime("%Y-%m-%d_%H-%M-%S")


# -- train ------------------------------------------------------------------------------------


def train(config: DictConfig, program: Program, progress: Progress | None = None) -> Outcome:
    """Train ``config.model`` on ``config.domain`` in the folder ``config.out``; again there: go
    on."""
    from shared import training  # Lightning takes seconds to import; only this verb needs it
    from shared.loggers import LoggedRun

    program.check_domain(config.domain)
    folder = Path(config.out or f"runs/{_now()}")
    with LoggedRun.create(folder, plain(config)) as run:
        assert isinstance(run, LoggedRun)
        run.logger = build(config.logger, folder=folder) if run.writes else None
        domain = build(config.domain)
        with torch.random.fork_rng():
            torch.default_generator.manual_seed(run.seed)
            denoiser = build(config.model, domain=domain, schedule=build(config.schedule))
        score = _score(domain, config.score, run.seed)
        training.fit(denoiser, domain, run, build(config.trainer), run.seed, score)
    return Outcome((f"trained: {folder} (seed {run.seed})",), folder)


def _score(
    domain: Domain[Any], config: Any, seed: int
) -> Callable[[Denoiser, int], dict[str, float]]:
    """Draws ``config.n`` samples and measures them with the domain's metrics."""
    solver, grid = choose("solver", config.solver), choose("grid", config.grid)

    def score(denoiser: Denoiser, step: int) -> dict[str, float]:
        sink, process = Memory(), denoiser.process
        device = next(denoiser.parameters()).device
        run_sampling(
            *(denoiser, process, domain, config.n, solver, config.steps, grid, seed),
            device=device,
            sink=sink,
        )
        metrics = domain.metrics([sink.items[i] for i in range(config.n)])
        return {f"sample_{name}": float(estimate) for name, estimate in metrics.items()}

    return score


# -- sample -----------------------------------------------------------------------------------


def sample(config: DictConfig, program: Program, progress: Progress | None = None) -> Outcome:
    """Generate ``config.n`` samples with the run ``config.run``."""
    model = load(config.run, config.checkpoint)
    program.check_domain(model.checkpoint.config["domain"])
    folder, seed = _sample_folder(config, model.run)
    settings = {
        "run": str(model.run.folder.resolve()),
        "step": model.checkpoint.step,
        "domain": model.checkpoint.config["domain"],
        "statistics": model.checkpoint.statistics,
        "seed": seed,
        **plain(OmegaConf.masked_copy(config, ["n", "steps", "request"])),
        **{key: plain(config[key] or {}) for key in ("solver", "grid", "guidance")},
    }
    device = _device(config.device)
    process = model.denoiser.process
    denoise = _guided(config.guidance, model.denoiser.to(device), model.domain)
    sink = Folder(folder, model.domain, settings)
    summary = run_sampling(
        denoise,
        process,
        model.domain,
        config.n,
        build(config.solver),
        config.steps,
        build(config.grid),
        seed,
        request=plain(config.request),
        batch=config.batch,
        device=device,
        sink=sink,
        progress=progress,
    )
    sink.finish(summary)
    lines = [f"{summary.ok} samples in {sink.file} (seed {seed}, {summary.nfe} denoiser calls)"]
    lines += [f"{summary.invalid} of {summary.n} could not be decoded"] * bool(summary.invalid)
    lines += [f"{summary.failed} of {summary.n} failed"] * bool(summary.failed)
    return Outcome(lines, folder, summary.failed == 0)


def _sample_folder(config: DictConfig, run: Run) -> tuple[Path, int]:
    """Where samples go, and their seed: the one given, that of the samples there, or a new one."""
    seed = config.seed
    if config.out is not None:
        settings = Path(config.out) / "settings.json"
        if seed is None and settings.exists():
            seed = json.loads(settings.read_text(encoding="utf-8")).get("seed")
        return Path(config.out), secrets.randbelow(2**31) if seed is None else seed
    seed = secrets.randbelow(2**31) if seed is None else seed
    return run.samples / f"seed-{seed}-{_now()}", seed


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigurationError(f"device={name}: no CUDA device here; give device=cpu.")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ConfigurationError(f"device={name}: give auto, cpu or cuda.") from error


def _guided(config: Any, denoiser: Denoiser, domain: Domain[Any]) -> Denoise:
    null = domain.null_condition()
    guided = build(config, denoise=denoiser, process=denoiser.process, domain=domain, null=null)
    if hasattr(guided, "null") and not guided.null:
        raise ConfigurationError(
            f"guidance: domain {domain.name} has no condition that can be left out; choose "
            "another guidance."
        )
    return denoiser if guided is None else guided


# -- evaluate ---------------------------------------------------------------------------------


def evaluate(config: DictConfig, program: Program, progress: Progress | None = None) -> Outcome:
    """Judge the items of a file or of a sample folder; writes metrics.json and report.html."""
    path = Path(config.path)
    settings = _settings(path)
    domain = _domain(config, settings, program)
    items = read_items(domain, path)
    if not items:
        raise ConfigurationError(f"{path} holds nothing to evaluate.")
    reference = None
    if config.reference is not None:
        found = read_items(domain, Path(config.reference))
        reference = [item for item in found if not isinstance(item, Invalid)]
        if not reference:
            raise ConfigurationError(f"reference={config.reference} holds no usable item.")
    metrics = domain.metrics(items, reference)
    folder = Path(config.out or (path if path.is_dir() else path.parent))
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "path": str(path.resolve()),
        "reference": config.reference,
        "metrics": {name: estimate.as_json() for name, estimate in metrics.items()},
    }
    write_atomically(folder / "metrics.json", (json.dumps(content, indent=1) + "\n").encode())
    file = _report_of_items(folder / "report.html", domain, items, metrics, settings, path)
    lines = [f"{name}: {estimate}" for name, estimate in metrics.items()]
    return Outcome([*lines, f"report: {file}"], file)


def _settings(path: Path) -> dict[str, Any]:
    """What a sample folder says about itself; nothing for other paths."""
    file = path / "settings.json" if path.is_dir() else path.parent / "settings.json"
    inside = path.is_dir() or path.name.startswith("samples.")
    if not inside or not file.exists():
        return {}
    content = json.loads(file.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}


def _domain(config: Any, settings: Mapping[str, Any], program: Program) -> Domain[Any]:
    """The domain given, that of the sample folder, or the program's first."""
    if config.get("domain"):
        chosen = config.domain
    elif settings:
        chosen = OmegaConf.create(settings["domain"])
    elif program.default is not None:
        chosen = option("domain", program.default)
    else:
        raise ConfigurationError(f"give domain=..., one of {', '.join(program.domains)}.")
    program.check_domain(chosen)
    domain: Domain[Any] = build(chosen)
    if settings and not config.get("domain"):
        domain.restore(settings["statistics"])
    return domain


def read_items(domain: Domain[Any], path: Path) -> list[Any]:
    """The items of a file, or of a sample folder with an Invalid for each sample that has none.

    Raises:
        FileNotFoundError, ValueError: nothing there, or no format of the domain.
    """
    records = read_manifest(path) if path.is_dir() else []
    if not records:
        return list(domain.read(path))
    last = {record.index: record for record in records}.values()
    file = path / f"samples{domain.suffix}"
    items = list(domain.read(file)) if file.exists() else []
    return items + [Invalid(str(r.index), r.reason) for r in last if r.status != "ok"]


# -- report -----------------------------------------------------------------------------------


def report(config: DictConfig, program: Program, progress: Progress | None = None) -> Outcome:
    """A report of a run folder (loss curves, its samples) or of a sample folder."""
    path = Path(config.path)
    if (path / "settings.json").exists():
        settings = _settings(path)
        domain = _domain(config, settings, program)
        items = read_items(domain, path)
        metrics = domain.metrics(items) if items else {}
        file = Path(config.out or path) / "report.html"
        return _reported(_report_of_items(file, domain, items, metrics, settings, path))
    run = Run.open(path)
    curves: dict[str, list[tuple[float, float]]] = {}
    for step, name, value in run.metrics():
        curves.setdefault(name, []).append((step, value))
    sections = [Section(name, reports.curve(points, name)) for name, points in curves.items()]
    sections += [
        Section(
            "Last values",
            reports.table(("name", "value"), [(k, v[-1][1]) for k, v in curves.items()]),
        ),
        Section("Configuration", reports.code(OmegaConf.to_yaml(OmegaConf.create(run.config)))),
    ]
    facts = {"seed": run.seed, "steps": max((s for s, _, _ in run.metrics()), default=0)}
    folder = Path(config.out) if config.out else run.folder
    return _reported(
        reports.write(folder / "report.html", f"Training {path.name}", facts, sections)
    )


def _reported(file: Path) -> Outcome:
    return Outcome((f"report: {file}",), file)


def _report_of_items(
    file: Path,
    domain: Domain[Any],
    items: Sequence[Any],
    metrics: Mapping[str, Estimate],
    settings: Mapping[str, Any],
    path: Path,
) -> Path:
    good = [item for item in items if not isinstance(item, Invalid)]
    reasons = Counter(item.reason for item in items if isinstance(item, Invalid))
    solver = str((settings.get("solver") or {}).get("_target_", "")).rpartition(".")[2]
    facts = {
        "n": len(items),
        "seed": settings.get("seed"),
        "solver": solver,
        "denoiser calls": settings.get("result", {}).get("nfe"),
        "training steps": settings.get("step"),
    }
    shown = {k: v for k, v in settings.items() if k not in ("statistics", "result")}
    sections = [
        Section("Metrics", reports.metrics(metrics)),
        Section("Samples", domain.view(good)),
        Section("Failures", reports.failures(reasons, len(items))),
        Section(
            "Settings", reports.code(OmegaConf.to_yaml(OmegaConf.create(shown))) if shown else ""
        ),
        Section(
            "Versions",
            reports.table(("package", "version"), list(checkpoints.versions().items())),
        ),
    ]
    known = {name: value for name, value in facts.items() if value not in (None, "")}
    return reports.write(file, f"{domain.name}: {path.name}", known, sections)


# -- convert ----------------------------------------------------------------------------------


def convert(config: DictConfig, program: Program, progress: Progress | None = None) -> Outcome:
    """Turn a checkpoint of another program into a folder that ``sample`` takes as ``run``."""
    path = Path(config.path)
    content = checkpoints.read_pickled_tensors(path)
    keys = frozenset(state_keys(content))
    for converter in program.converters:
        if converter.recognises(keys):
            out = Path(config.out or path.with_suffix(""))
            if out.exists() and (not out.is_dir() or any(out.iterdir())):
                raise ConfigurationError(f"out={out} exists already; choose another folder.")
            converter.convert(content, path, out)
            return Outcome((f"converted ({converter.name}): {out}",), out)
    known = ", ".join(converter.name for converter in program.converters) or "none"
    raise ConfigurationError(
        f"{path}: no converter of {program.name} recognises its {len(keys)} tensors "
        f"(for example '{next(iter(sorted(keys)), '')}'); converters: {known}."
    )


def state_keys(content: Any, prefix: str = "") -> list[str]:
    """Dotted names of all tensors in nested mappings, outer keys first."""
    if isinstance(content, Tensor):
        return [prefix]
    if not isinstance(content, Mapping):
        return []
    return [
        name
        for key, value in content.items()
        for name in state_keys(value, f"{prefix}.{key}" if prefix else str(key))
    ]
