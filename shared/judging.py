"""The verbs that judge: ``evaluate`` and ``report``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from shared import checkpoints, reports
from shared.checkpoints import write_atomically
from shared.cli import Outcome, Program, Progress
from shared.configuration import ConfigurationError, build, option
from shared.domains import Domain, Invalid
from shared.metrics import Estimate
from shared.reports import Section
from shared.runs import Run
from shared.sample_folders import STEMS, read_manifest


def evaluate(config: DictConfig, program: Program, progress: Progress | None = None) -> Outcome:
    """Judge the items of a file or of a sample folder; writes metrics.json and report.html."""
    path = Path(config.path)
    settings = settings_of(path)
    domain = domain_of(config, settings, program)
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
    file = _report_file(config, path, settings)
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "path": str(path.resolve()),
        "reference": config.reference,
        "metrics": {name: estimate.as_json() for name, estimate in metrics.items()},
    }
    write_atomically(file.parent / "metrics.json", (json.dumps(content, indent=1) + "\n").encode())
    shown = domain.compare(items, reference)
    _report_of_items(file, domain, items, metrics, settings, path, shown)
    lines = [f"{name}: {estimate}" for name, estimate in metrics.items()]
    lost = Counter(item.reason for item in items if isinstance(item, Invalid))
    lines += [f"{count} of {len(items)}: {reason}" for reason, count in lost.most_common(3)]
    return Outcome([*lines, f"report: {file}"], file, lost.total() < len(items))


def _report_file(config: Any, path: Path, settings: Mapping[str, Any]) -> Path:
    """In ``config.out``, or beside what is judged, where a design has a report of its own."""
    folder = Path(config.out or (path if path.is_dir() else path.parent))
    own = config.out is None and "wish" in settings
    return folder / ("evaluation.html" if own else "report.html")


def settings_of(path: Path) -> dict[str, Any]:
    """What a sample folder says about itself; nothing for other paths."""
    file = path / "settings.json" if path.is_dir() else path.parent / "settings.json"
    inside = path.is_dir() or path.name.partition(".")[0] in STEMS
    if not inside or not file.exists():
        return {}
    content = json.loads(file.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}


def domain_of(config: Any, settings: Mapping[str, Any], program: Program) -> Domain[Any]:
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
    """The items of a file, or of a sample folder by their numbers with an Invalid for each sample
    that has none.

    Raises:
        FileNotFoundError, ValueError: nothing there, or no format of the domain.
    """
    records = read_manifest(path) if path.is_dir() else []
    if not records:
        return list(domain.read(path))
    last = {record.index: record for record in records}.values()
    files = [path / f"{stem}{domain.suffix}" for stem in STEMS]
    items = [item for file in files if file.exists() for item in domain.read(file)]
    made = [record.index for record in records if record.status == "ok"]
    if len(made) > len(items):
        raise ValueError(f"{path} holds {len(items)} items, its manifest says {len(made)}.")
    # items of a chunk whose records are not yet written, or never were, come last
    found = dict(zip(made, items, strict=False))
    found |= {r.index: Invalid(str(r.index), r.reason) for r in last if r.status != "ok"}
    return [found[index] for index in sorted(found)]


def report(config: DictConfig, program: Program, progress: Progress | None = None) -> Outcome:
    """A report of a run folder (loss curves, its samples) or of a sample folder."""
    path = Path(config.path)
    if (path / "settings.json").exists():
        settings = settings_of(path)
        domain = domain_of(config, settings, program)
        items = read_items(domain, path)
        metrics = domain.metrics(items) if items else {}
        file = _report_file(config, path, settings)
        return _reported(_report_of_items(file, domain, items, metrics, settings, path))
    run = Run.open(path)
    curves: dict[str, list[tuple[float, float]]] = {}
    for step, name, value in run.metrics():
        curves.setdefault(name, []).append((step, value))
    sections = [Section(name, reports.curve(points, name)) for name, points in curves.items()]
    last = [(name, points[-1][1]) for name, points in curves.items()]
    sections += [
        Section("Last values", reports.table(("name", "value"), last)),
        Section("Samples", reports.table(SAMPLED, _sampled(run))),
        Section("Configuration", reports.code(OmegaConf.to_yaml(OmegaConf.create(run.config)))),
    ]
    facts = {"seed": run.seed, "steps": max((s for s, _, _ in run.metrics()), default=0)}
    folder = Path(config.out) if config.out else run.folder
    return _reported(
        reports.write(folder / "report.html", f"Training {path.name}", facts, sections)
    )


SAMPLED = ("folder", "n", "seed", "denoiser calls", "ok", "invalid", "failed")


def _sampled(run: Run) -> list[list[Any]]:
    """One row per folder of samples inside the run."""
    rows = []
    for file in sorted(run.samples.glob("*/settings.json")):
        settings = settings_of(file.parent)
        result = settings.get("result", {})
        counts = [result.get(key, "?") for key in ("nfe", "ok", "invalid", "failed")]
        rows.append([file.parent.name, settings.get("n"), settings.get("seed"), *counts])
    return rows


def _reported(file: Path) -> Outcome:
    return Outcome((f"report: {file}",), file)


def _report_of_items(
    file: Path,
    domain: Domain[Any],
    items: Sequence[Any],
    metrics: Mapping[str, Estimate],
    settings: Mapping[str, Any],
    path: Path,
    pictures: str | None = None,
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
        Section("Samples", domain.view(good) if pictures is None else pictures),
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
