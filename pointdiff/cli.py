"""The ``pointdiff`` command."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from pathlib import Path

from omegaconf import DictConfig

from shared import cli
from shared.checkpoints import whole
from shared.checks import check_place
from shared.cli import Outcome, Program, Progress, Verb
from shared.configuration import ConfigurationError, build


def scan(config: DictConfig, program: Program, progress: Progress | None = None) -> Outcome:
    """``pointdiff scan``: partial views of a complete cloud or mesh, one file each."""
    from pointdiff import files
    from pointdiff.clouds import check

    scanner, chosen = build(config.scanner), config.view
    if chosen not in (None, "all") and type(chosen) is not int:
        raise ConfigurationError(f"view={chosen}: give the number of a camera, all or null.")
    cloud = check(files.read_one(config.path, surface=config.surface), str(config.path))
    views = range(scanner.views) if chosen == "all" else [chosen]
    jobs = [(view, index) for view in views for index in range(config.n)]
    out = _place(config, "scan.ply")
    files.check_suffix(out)
    names = [out] if len(jobs) == 1 else _numbered(out, len(jobs))
    _spare((config.path,), names)
    seed = secrets.randbelow(2**31) if config.seed is None else config.seed
    out.parent.mkdir(parents=True, exist_ok=True)
    for done, (name, (view, index)) in enumerate(zip(names, jobs, strict=True), 1):
        with whole(name) as file:
            files.write_one(file, scanner(cloud, seed, index, view))
        if progress is not None:
            progress(done, len(jobs))
    last = f" to {names[-1]}" if len(names) > 1 else ""
    what = f"scanned {config.path} ({len(cloud):,} points, seed {seed})"
    return Outcome((f"{what}: {names[0]}{last}",), out)


def views(config: DictConfig, program: Program, progress: Progress | None = None) -> Outcome:
    """``pointdiff views``: find once what the cameras see of every shape of a data set."""
    from pointdiff.data import load_shapes, save_views

    shapes = load_shapes(config.path)
    out = _place(config, "views.npz")
    out.parent.mkdir(parents=True, exist_ok=True)
    save_views(out, shapes, build(config.scanner), progress)
    return Outcome((f"views of {len(shapes):,} shapes: {out}; give domain.views={out}",), out)


def complete(config: DictConfig, program: Program, progress: Progress | None = None) -> Outcome:
    """``pointdiff complete``: one scan -> complete clouds, and a page that shows them."""
    import numpy as np
    import torch

    from pointdiff import completion, files, views
    from pointdiff.clouds import natural
    from pointdiff.metrics import evaluate, total_mutual_difference
    from shared import reports
    from shared.models import find_choice, find_device, guided

    out = _place(config, "complete.ply")
    files.check_suffix(out)
    samples = natural("samples", config.samples)
    names = [out] if samples == 1 else _numbered(out, samples)
    _spare((config.path, config.truth), [*names, config.report])
    check_place("report", config.report, file=True)
    scan = files.read_one(config.path)
    truth = None if config.truth is None else files.read_one(config.truth)
    completer = completion.load(config.run, config.checkpoint, config.refine)
    model = completer.model
    seed = secrets.randbelow(2**31) if config.seed is None else config.seed
    denoiser = model.denoiser.to(find_device(config.device))
    clouds = completer.complete(
        scan,
        samples,
        points=config.points,
        frame=config.frame,
        keep=config.keep,
        steps=config.steps,
        seed=seed,
        solver=find_choice(config.solver, model.domain, model.checkpoint),
        grid=find_choice(config.grid, model.domain, model.checkpoint),
        denoise=guided(config.guidance, denoiser, model.domain),
        device=config.device,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    for name, cloud in zip(names, clouds, strict=True):
        with whole(name) as file:
            files.write_one(file, cloud)
    last = f" to {names[-1]}" if len(names) > 1 else ""
    frame = completer.frame(scan, config.frame)
    lines = [
        f"completed {config.path} ({len(scan):,} points, seed {seed}, frame {frame}): "
        f"{names[0]}{last}"
    ]
    if len(clouds) > 1:
        spread = total_mutual_difference(torch.from_numpy(np.stack(clouds)))
        lines.append(f"total mutual difference of the completions: {spread:.4g}")
    if truth is not None:
        found = evaluate(clouds, [truth] * len(clouds))
        lines += [f"{name}: {estimate}" for name, estimate in found.items()]
    if config.report is not None:
        shown = {"scan": scan, **{f"completion {i}": c for i, c in enumerate(clouds)}}
        shown |= {} if truth is None else {"truth": truth}
        body = [reports.Section("Clouds", views.gallery(shown))]
        title = f"Completion of {config.path}"
        reports.write(Path(config.report), title, {"seed": seed}, body)
        lines.append(f"report: {config.report}")
    return Outcome(lines, out)


def _spare(inputs: Iterable[str | None], outputs: Iterable[str | Path | None]) -> None:
    """Refuse to write over what is read.

    Raises:
        ConfigurationError: names the file.
    """
    read = {Path(path).resolve(): path for path in inputs if path is not None}
    for path in outputs:
        if path is not None and Path(path).resolve() in read:
            raise ConfigurationError(f"{path} would be written over; choose another out.")


def _place(config: DictConfig, ending: str) -> Path:
    """The file ``out``, or one named after the input: in the folder ``out``, or here."""
    out = Path(config.out or ".")
    return out / f"{Path(config.path).stem}_{ending}" if out.is_dir() else out


def _numbered(path: Path, n: int) -> list[Path]:
    """The names of ``n`` files beside ``path``."""
    return [path.with_name(f"{path.stem}_{i:03d}{path.suffix}") for i in range(n)]


PROGRAM = Program(
    name="pointdiff",
    title="Diffusion models of point clouds.",
    packages=("pointdiff.",),
    default="completion",
    examples=(
        "complete scan.ply out=full.ply",
        "complete scan.ply run=runs/mine out=full.ply samples=3 report=full.html",
        "scan chair.obj out=scan.ply view=3",
        "train experiment=completion_small domain.data=shapes.npz out=runs/mine",
        "sample run=runs/mine n=8 steps=20 request.scan=scan.ply out=full",
        "evaluate full.ply reference=chair.obj",
    ),
    more={
        "complete": Verb(
            "complete a partial scan", "pointdiff.cli:complete", bare=True, file=True
        ),
        "views": Verb(
            "find what cameras see of the shapes of a data set, to train faster",
            "pointdiff.cli:views",
            bare=True,
            file=True,
            examples=("shapes.npz out=views.npz",),
        ),
        "scan": Verb(
            "make partial views of a complete cloud or mesh",
            "pointdiff.cli:scan",
            bare=True,
            file=True,
            examples=("chair.obj out=scan.ply view=3", "chair.ply view=all scanner.noise=0.005"),
        ),
    },
)


def main() -> int:
    """Entry point."""
    return cli.main(PROGRAM)
