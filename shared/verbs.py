"""What the verbs of the command lines do, as functions that Python programs can call too.

Each takes a composed configuration (see ``shared.configuration.compose``) and returns a
``shared.cli.Outcome``; none of them prints. Those that judge are in ``shared.judging``.
"""

from __future__ import annotations

import inspect
import json
import secrets
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from shared import checkpoints
from shared.batches import Batches
from shared.checkpoints import GAMMA, write_atomically
from shared.cli import Converter, Outcome, Program, Progress, find
from shared.configuration import ConfigurationError, build, option, plain
from shared.denoisers import Denoiser
from shared.domains import Batch, Domain
from shared.heads import new_head, save_head, train_head
from shared.judging import evaluate, report
from shared.models import Model, beside, find_choice, find_device, guided, load, settled
from shared.runs import Run, writing
from shared.sample_folders import Folder
from shared.sampling import Memory
from shared.sampling import sample as run_sampling
from shared.variance import estimate_gamma, save_gamma

__all__ = ["convert", "evaluate", "report", "sample", "share", "state_keys", "train", "variance"]


SHARED = ("domain", "model", "schedule", "trainer", "solver", "grid", "steps")
"""The parts of a configuration that go with shared weights."""


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
        if config.start is not None:
            begin_from(denoiser, config.start)
        score = _score(domain, config.score, run.seed)
        training.fit(denoiser, domain, run, build(config.trainer), run.seed, score)
    return Outcome((f"trained: {folder} (seed {run.seed})",), folder)


def begin_from(denoiser: Denoiser, start: str) -> list[str]:
    """Give ``denoiser`` the weights of another run, or pretrained model, as far as names and
    shapes agree; returns the names of its tensors that keep their own start.

    Raises:
        ConfigurationError: not one tensor agrees.
    """
    stored = checkpoints.load(Run.open(start).checkpoint())
    theirs, ours = {**stored.weights, **(stored.ema or {})}, denoiser.state_dict()
    fitting = {k: v for k, v in theirs.items() if k in ours and ours[k].shape == v.shape}
    if not fitting:
        raise ConfigurationError(f"start={start}: none of its weights fits this model.")
    denoiser.load_state_dict({k: v.to(ours[k].dtype) for k, v in fitting.items()}, strict=False)
    return sorted(ours.keys() - fitting.keys())


def _score(
    domain: Domain[Any], config: Any, seed: int
) -> Callable[[Denoiser, int], dict[str, float]]:
    """Draws ``config.n`` samples and measures them with the domain's metrics."""
    named = {group: option(group, config[group]) for group in ("solver", "grid")}
    chosen = settled({**named, "steps": config.steps}, domain)
    solver, grid = (build(chosen[group], domain=domain) for group in named)

    def score(denoiser: Denoiser, step: int) -> dict[str, float]:
        sink, process = Memory(), denoiser.process
        device = next(denoiser.parameters()).device
        run_sampling(
            *(denoiser, process, domain, config.n, solver, chosen["steps"], grid, seed),
            device=device,
            sink=sink,
        )
        metrics = domain.metrics([sink.items[i] for i in range(config.n)])
        return {f"sample_{name}": float(estimate) for name, estimate in metrics.items()}

    return score


# -- sample -----------------------------------------------------------------------------------


def sample(config: DictConfig, program: Program, progress: Progress | None = None) -> Outcome:
    """Generate ``config.n`` samples with the run ``config.run``."""
    model = load(config.run, config.checkpoint, config.data)
    program.check_domain(model.checkpoint.config["domain"])
    folder, seed = _sample_folder(config, model.run)
    chosen = settled(config, model.domain, model.checkpoint)
    settings = {
        "run": str(model.run.folder.resolve()),
        "step": model.checkpoint.step,
        "domain": model.checkpoint.config["domain"],
        "statistics": model.checkpoint.statistics,
        "seed": seed,
        **plain(OmegaConf.masked_copy(config, ["n", "request"])),
        **{key: plain(chosen[key]) for key in ("solver", "grid")},
        "steps": chosen["steps"],
        "guidance": plain(config.guidance or {}),
    }
    device = find_device(config.device)
    process = model.denoiser.process
    solver = find_choice(chosen["solver"], model.domain, model.checkpoint)
    denoise = guided(config.guidance, model.prepared(solver, device), model.domain)
    with writing(folder):
        sink = Folder(folder, model.domain, settings)
        summary = run_sampling(
            denoise,
            process,
            model.domain,
            config.n,
            solver,
            chosen["steps"],
            find_choice(chosen["grid"], model.domain, model.checkpoint),
            seed,
            request=plain(config.request),
            batch=config.batch,
            device=device,
            sink=sink,
            progress=progress,
        )
        sink.finish(summary)
    where = f" in {sink.file}" if summary.ok else ""
    lines = [f"{summary.ok} samples{where} (seed {seed}, {summary.nfe} denoiser calls)"]
    lines += [f"{summary.invalid} of {summary.n} could not be decoded"] * bool(summary.invalid)
    lines += [f"{summary.failed} of {summary.n} failed"] * bool(summary.failed)
    return Outcome(lines, folder, summary.failed == 0 and summary.ok > 0)


def _sample_folder(config: DictConfig, run: Run) -> tuple[Path, int]:
    """Where samples go, and their seed."""
    if config.out is not None:
        return Path(config.out), seed_of(Path(config.out), config.seed)
    seed = secrets.randbelow(2**31) if config.seed is None else config.seed
    own = (run.folder / "config.yaml").exists()  # a run folder, not a shipped model
    folder = run.samples if own else Path("samples") / run.folder.name
    return folder / f"seed-{seed}-{_now()}", seed


def seed_of(folder: Path, seed: int | None) -> int:
    """``seed``, else that of the samples in ``folder``, else a new one."""
    settings = folder / "settings.json"
    if seed is None and settings.exists():
        seed = json.loads(settings.read_text(encoding="utf-8")).get("seed")
    return secrets.randbelow(2**31) if seed is None else seed


# -- variance ---------------------------------------------------------------------------------


def variance(config: DictConfig, program: Program, progress: Progress | None = None) -> Outcome:
    """Estimate Gamma (Analytic-DPM) over training data at the times of a grid, or train a variance
    head, and write it beside the weights, where ``solver=analytic_ddpm``, ``grid=least_cost`` and
    ``solver=ddpm_head`` look for it."""
    model = load(config.run, config.checkpoint, config.data)
    program.check_domain(model.checkpoint.config["domain"])
    process, device = model.denoiser.process, find_device(config.device)
    folder = beside(model, config.out)
    if config.kind != "gamma":
        return _head(config, model, folder, device, progress)
    grid = find_choice(config.grid, model.domain, model.checkpoint)
    times = [t for t in grid(process.lead, config.steps) if float(process.lead.sigma(t)) > 0.0]
    records = model.records()
    size = min(config.batch, config.n)
    batches = Batches(model.domain, process, records, size, config.seed)

    def chunks() -> Iterator[Batch]:
        count = -(-config.n // size)
        for number in range(count):
            yield batches[number].batch.to(device)
            if progress is not None:
                progress(number + 1, count)

    gammas = estimate_gamma(model.denoiser.to(device), process, chunks(), times, config.seed)
    folder.mkdir(parents=True, exist_ok=True)
    save_gamma(file := folder / GAMMA, gammas)
    return Outcome((f"Gamma at {len(times)} times: {file}",), file)


def _head(
    config: DictConfig,
    model: Model[Any],
    folder: Path,
    device: torch.device,
    progress: Progress | None,
) -> Outcome:
    """Train a variance head."""
    head = new_head(model.denoiser.to(device), model.domain, config.kind, config.seed)
    records = model.records()
    batches = Batches(model.domain, head.process, records, config.batch, config.seed)
    losses = train_head(head, batches, config.updates, config.lr, progress)
    folder.mkdir(parents=True, exist_ok=True)
    last = losses[-max(1, len(losses) // 10) :]
    file = save_head(folder, head)
    return Outcome((f"head ({config.kind}, loss {sum(last) / len(last):.4g}): {file}",), file)


# -- share ------------------------------------------------------------------------------------


def share(config: DictConfig, program: Program, progress: Progress | None = None) -> Outcome:
    """Write the weights of a run without what only training needs, small, to be shared: averaged
    weights, constants of the domain, and what stands beside them (Gamma, errors of an oracle)."""
    if config.out is None:
        raise ConfigurationError("share: 'out' is missing; give out=FOLDER.")
    dtypes = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
    if config.dtype not in dtypes:
        raise ConfigurationError(f"dtype={config.dtype}: choose one of {', '.join(dtypes)}.")
    out, model = Path(config.out), load(config.run, config.checkpoint)
    program.check_domain(model.checkpoint.config["domain"])
    if out.exists() and any(out.iterdir()):
        raise ConfigurationError(f"out={out} exists already; choose another folder.")
    stored = model.checkpoint
    domain = build(OmegaConf.create(dict(stored.config["domain"])))
    settings = plain(OmegaConf.create(dict(stored.config)))
    for key, value in settings["domain"].items():
        if key == "data" or (isinstance(value, str) and _names_file(value)):
            settings["domain"][key] = None  # what only this machine has
    checkpoints.save(
        out,
        model.denoiser,
        config={k: settings[k] for k in SHARED if k in settings},
        domain=stored.statistics,
        step=stored.step,
        dtype=dtypes[config.dtype],
    )
    for name, content in domain.keepsakes().items():
        write_atomically(out / name, content)
    for file in stored.path.glob("*"):
        if not file.name.startswith(("weights-", "ema-", "training-", checkpoints.MANIFEST)):
            write_atomically(out / file.name, file.read_bytes())
    size = sum(file.stat().st_size for file in out.iterdir())
    return Outcome((f"written: {out} ({size / 1e6:.1f} MB)",), out)


def _names_file(value: str) -> bool:
    """Whether a setting is the path of something here, and not a word that is also a file's."""
    path = Path(value)
    return (len(path.parts) > 1 or bool(path.suffix)) and path.exists()


# -- convert ----------------------------------------------------------------------------------


def convert(config: DictConfig, program: Program, progress: Progress | None = None) -> Outcome:
    """Turn a checkpoint of another program into a folder that ``sample`` takes as ``run``."""
    path = Path(config.path)
    content = find(program.reader)(path)
    keys = frozenset(state_keys(content))
    for converter in program.converters:
        if converter.recognises(keys):
            out = Path(config.out or path.with_suffix(""))
            if out.exists() and (not out.is_dir() or any(out.iterdir())):
                raise ConfigurationError(f"out={out} exists already; choose another folder.")
            note = converter.convert(content, path, out, **_extras(config, converter))
            return Outcome((f"converted ({converter.name}): {out}", *filter(None, (note,))), out)
    known = ", ".join(converter.name for converter in program.converters) or "none"
    raise ConfigurationError(
        f"{path}: no converter of {program.name} recognises its {len(keys)} tensors "
        f"(for example '{next(iter(sorted(keys)), '')}'); converters: {known}."
    )


def _extras(config: Any, converter: Converter) -> dict[str, Any]:
    """What the user tells of a checkpoint, as far as its converter takes it."""
    given = {key: config[key] for key in ("sizes", "properties", "autoencoder") if config[key]}
    taken = inspect.signature(converter.convert).parameters
    for key, value in given.items():
        if key not in taken:
            raise ConfigurationError(
                f"{key}={value}: a checkpoint of {converter.name} takes none."
            )
    return given


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
