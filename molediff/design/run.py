"""A design run, from Python and from the command line."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from molediff.design import report
from molediff.design.judging import (
    Design,
    Judge,
    Judged,
    Known,
    ranked,
    summary,
    write_rows,
)
from molediff.design.plan import Plan, Steering, companion
from molediff.design.wishes import TEXTS, Wish
from molediff.files import write
from molediff.geometric.predicting import NetworkOracle
from molediff.molecules import Molecule
from molediff.oracles import Oracle, XTBOracle, shipped
from molediff.scorers import Scorer, similar
from shared.checkpoints import whole
from shared.cli import Outcome, Program, Progress
from shared.configuration import ConfigurationError, plain
from shared.domains import Invalid
from shared.metrics import Estimate
from shared.models import STEPS, Model, find_choice, find_device, load, settled
from shared.runs import writing
from shared.sample_folders import Folder
from shared.sampling import Memory, Sink, Summary
from shared.sampling import sample as run_sampling
from shared.solvers.base import Solver
from shared.solvers.grids import Grid

Seen = Callable[[Design], None]


@dataclass(frozen=True)
class Sampling:
    """How to sample; a batch is written as soon as it is done."""

    n: int
    seed: int
    solver: Solver
    grid: Grid
    steps: int
    batch: int = 16
    device: torch.device | str = "cpu"


@dataclass(frozen=True)
class Designs:
    """What came out: ``molecules`` best first, those that are no valid molecule last; ``failures``
    that could not be decoded at all; ``metrics``, rates and errors with intervals."""

    designs: list[Design]
    failures: list[Invalid]
    judge: Judge
    seed: int
    n: int
    warnings: tuple[str, ...] = ()

    @property
    def molecules(self) -> list[Molecule]:
        """All molecules, best first, with the values of the oracles as their properties."""
        return [design.molecule for design in self.designs]

    @property
    def metrics(self) -> dict[str, Estimate]:
        return summary(self.judge, self.designs, self.n)

    def write(self, folder: str | Path) -> Path:
        """molecules.sdf, molecules.csv and report.html, best first, in place of earlier ones.

        Raises:
            ValueError: the folder is that of ``molediff design``, which goes on in it.
        """
        folder = Path(folder)
        if (folder / "manifest.jsonl").exists():
            raise ValueError(f"{folder} is of a `molediff design`; choose another folder.")
        folder.mkdir(parents=True, exist_ok=True)
        with whole(folder / "molecules.sdf") as file:
            write(file, self.molecules)
        write_rows(folder / "molecules.csv", self.designs)
        facts = {"n": self.n, "seed": self.seed, **_best_facts(self.designs)}
        return report.write(
            folder / "report.html",
            self.judge,
            self.designs,
            self.failures,
            n=self.n,
            facts=facts,
            warnings=self.warnings,
        )


def oracles(
    model: Model[Any],
    oracle: str | None = "auto",
    xtb: bool | str = "auto",
    scorers: Sequence[Scorer] = (),
    device: torch.device | str = "cpu",
) -> dict[str, Oracle]:
    """Short name -> what judges the molecules of a generator, a network on ``device``; xTB does
    not where one of the ``scorers`` steers by it.

    Raises:
        ConfigurationError: xTB is asked for but not installed, or an unknown choice.
    """
    found: dict[str, Oracle] = {}
    name = companion(oracle, model, "oracle")
    if name is not None:
        found["network"] = NetworkOracle.load(name, device)
    installed = find_spec("tblite") is not None and find_spec("dftd4") is not None
    if xtb not in ("auto", "relax", True, False):
        raise ConfigurationError(f"xtb={xtb}: choose auto, true, false or relax.")
    if xtb in (True, "relax") and not installed:
        raise ConfigurationError(
            f"xtb={xtb}: needs tblite and dftd4; install molediff[chemistry]."
        )
    steers = any(scorer.name.startswith("xtb_") for scorer in scorers)
    if xtb is not False and installed and not steers:
        found["xtb"] = XTBOracle(shipped(relax=xtb == "relax"))
    return found


def sampled(plan: Plan, how: Sampling, sink: Sink, progress: Progress | None = None) -> Summary:
    """Sample what ``plan`` says into ``sink``."""
    return run_sampling(
        plan.denoise(how.device),
        plan.model.denoiser.process,
        plan.domain,
        how.n,
        plan.solver(how.solver),
        how.steps,
        how.grid,
        how.seed,
        request=plan.request,
        batch=how.batch,
        device=how.device,
        sink=sink,
        progress=progress,
    )


def finished(model: Model[Any], judged: Judged) -> list[Design]:
    """All designs, best first, with novelty where the training data are known."""
    designs = ranked(list(judged.designs.values()))
    known = Known.of(model)
    return designs if known is None else known.judged(designs)


# -- Python -----------------------------------------------------------------------------------


def design(
    model: Model[Any],
    *,
    n: int = 64,
    seed: int | None = None,
    solver: str | Solver = "auto",
    grid: str | Grid = "auto",
    steps: int | None = None,
    batch: int = 16,
    device: str = "auto",
    force: bool = False,
    oracle: str | None = "auto",
    xtb: bool | str = "auto",
    seen: Seen | None = None,
    **wishes: Any,
) -> Designs:
    """Design molecules with a generator: ``design(load("qm9"), gap=5.0, n=64, seed=0)``.

    Args:
        steps: denoiser calls per molecule, of all its tries together; None: 25 for each of
            several tries, 50 for a single one, with a scaffold 200 for each.
        force: go on although a target lies outside the training data.
        oracle, xtb: what judges; see ``molediff design --help``.
        seen: called with every design as soon as it is there.
        wishes: targets by the names of properties (``gap=5.0``, ``mu="2..3"``, ``homo="max"``),
            other fields of :class:`Wish`, and fields of :class:`Steering`.

    Raises:
        ConfigurationError: a wish that cannot be read or met.
    """
    fields = {k: v for k, v in wishes.items() if k in Wish.__dataclass_fields__}
    steer = {k: v for k, v in wishes.items() if k in Steering.__dataclass_fields__}
    targets = {k: v for k, v in wishes.items() if k not in fields and k not in steer}
    targets |= dict(fields.pop("targets", {}))
    plan = Plan(model, Wish(targets, **fields), Steering(**steer))
    warnings = plan.check(force)
    place = find_device(device)
    judge = _judge(plan, oracle, xtb, place)
    warnings += judge.warnings
    seed = secrets.randbelow(2**31) if seed is None else seed
    how = Sampling(n, seed, *model.chosen(solver, grid, _steps(steps, plan)), batch, place)
    memory = Memory()
    judged = Judged(memory, judge, seen or (lambda design: None))
    sampled(plan, how, judged)
    failures = [item for item in memory.items.values() if isinstance(item, Invalid)]
    return Designs(finished(model, judged), failures, judge, seed, n, tuple(warnings))


def _judge(plan: Plan, oracle: str | None, xtb: bool | str, device: torch.device | str) -> Judge:
    """Everything that was wished for, under the eyes of the oracles.

    Raises:
        ConfigurationError: a network that steers is to judge as well.
    """
    scorers = list(plan.wish.scorers)
    found = oracles(plan.model, oracle, xtb, scorers, device)
    network = found.get("network")
    if plan.targets and plan.predictor is not None and isinstance(network, NetworkOracle):
        steering, judging = (p.model.run.folder for p in (plan.predictor, network.predictor))
        if steering.resolve() == judging.resolve():
            raise ConfigurationError(
                f"energies={plan.steering.energies}: it would judge what it steers; name another "
                "oracle, or oracle=null."
            )
    if plan.wish.similar is not None:
        scorers.append(similar(plan.wish.similar))
    return Judge(plan.targets, plan.properties, found, plan.composition, scorers)


def _steps(given: int | None, plan: Plan) -> int:
    """Tries share the calls; resampling around a scaffold passes every time several times."""
    if given is not None:
        return given
    if plan.wish.scaffold is not None:
        return 4 * STEPS * plan.tries
    return max(STEPS, plan.tries * STEPS // 2)


def _best_facts(designs: list[Design]) -> dict[str, Any]:
    valid = sum(design.valid for design in designs)
    return {"valid": valid, "best": designs[0].smiles if valid else "none"}


# -- the verb ---------------------------------------------------------------------------------


def design_verb(config: DictConfig, program: Program, progress: Progress | None = None) -> Outcome:
    """``molediff design``: molecules.sdf, molecules.csv, manifest.jsonl and report.html."""
    from molediff.design.table import Table

    model = load(config.run)
    options = plain(config)
    wish = Wish(options.get("targets") or {}, **_chosen(options, ("atoms", "new", *TEXTS)))
    steering = Steering(**_chosen(options, tuple(Steering.__dataclass_fields__)))
    plan = Plan(model, wish, steering)
    warnings = plan.check(bool(config.force))
    device = find_device(config.device)
    judge = _judge(plan, config.oracle, config.xtb, device)
    warnings += judge.warnings
    out, seed = _folder(config, wish)
    config.steps = _steps(config.steps, plan)
    chosen = settled(config, plan.domain, model.checkpoint)
    how = Sampling(
        config.n,
        seed,
        find_choice(chosen["solver"], plan.domain, model.checkpoint),
        find_choice(chosen["grid"], plan.domain, model.checkpoint),
        chosen["steps"],
        config.batch,
        device,
    )
    settings = _settings(plan, chosen) | {"seed": seed, **_chosen(options, ("n", "oracle", "xtb"))}
    with writing(out):
        sink = Folder(out, plan.domain, settings, "molecules")
        unguided = _unguided(model, judge, how, config.baseline, out / "baseline", settings)
        with Table(judge, config.n) as table:
            judged = Judged(sink, judge, table, out / "molecules.csv")
            made = sampled(plan, how, judged)
        sink.finish(made)
        designs = finished(model, judged)
        write_rows(out / "molecules.csv", designs)
    file = report.write(
        out / "report.html",
        judge,
        designs,
        [Invalid(str(r.index), r.reason) for r in sink.records.values() if r.status != "ok"],
        n=config.n,
        facts=_facts(settings, made, designs),
        known=model.domain.statistics().get("known", ()),
        columns=model.domain.statistics().get("context", ()),
        baseline=unguided,
        unguided=config.baseline,
        warnings=warnings,
    )
    lines = [*map("warning: {}".format, warnings), *_told(judge, designs, unguided, config)]
    lost = {"could not be decoded": made.invalid, "failed": made.failed}
    lines += [f"{k} of {config.n} {what}: reasons in {file}" for what, k in lost.items() if k]
    valid = sum(d.valid for d in designs)
    where = f" in {sink.file}, best first in {out / 'molecules.csv'}" if made.ok else ""
    lines += [f"{valid} valid molecules of {config.n}{where} (seed {seed})", f"report: {file}"]
    return Outcome(lines, file, made.failed == 0 and valid > 0)


def _settings(plan: Plan, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """What made the molecules, for settings.json."""
    stored = plan.model.checkpoint
    return {
        "run": str(plan.model.run.folder.resolve()),
        "step": stored.step,
        "domain": stored.config["domain"],
        "statistics": stored.statistics,
        "wish": plan.wish.plain(),
        "steering": vars(plan.steering),
        **{key: plain(chosen[key]) for key in ("solver", "grid")},
        "steps": chosen["steps"],
        "tries": plan.tries,
    }


def _chosen(options: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: options[name] for name in names}


def _folder(config: DictConfig, wish: Wish) -> tuple[Path, int]:
    """Where the run goes, and its seed: the one given, that of the run there, or a new one."""
    from shared.verbs import seed_of

    words = "_".join(f"{name}_{value}" for name, value in wish.targets.items()) or "molecules"
    safe = "".join(c if c.isalnum() or c in "._-" else "-" for c in words)
    out = Path(config.out or f"designs/{safe}")
    return out, seed_of(out, config.seed)


def _unguided(
    model: Model[Any],
    judge: Judge,
    how: Sampling,
    count: int,
    out: Path,
    settings: Mapping[str, Any],
) -> list[Design]:
    """Molecules of the same model without any guidance."""
    if not count:
        return []
    free = Plan(model, Wish(), Steering(energies=None, particles=1))
    plain_settings = {**settings, "n": count, "wish": Wish().plain(), "steering": {}}
    plain_settings["tries"] = free.tries
    sink = Folder(out, free.domain, plain_settings, "molecules")
    judged = Judged(sink, judge)
    made = sampled(free, Sampling(**{**vars(how), "n": count}), judged)
    sink.finish(made)
    return list(judged.designs.values())


def _told(
    judge: Judge, designs: list[Design], unguided: list[Design], config: DictConfig
) -> list[str]:
    lines = report.estimates(summary(judge, designs, config.n))
    if unguided:
        theirs = summary(judge, unguided, config.baseline)
        lines += [f"unguided {line}" for line in report.estimates(theirs)]
    return lines


def _facts(settings: Mapping[str, Any], made: Summary, designs: list[Design]) -> dict[str, Any]:
    return {
        "n": settings["n"],
        **_best_facts(designs),
        "seed": settings["seed"],
        "solver": str(settings["solver"].get("_target_", "")).rpartition(".")[2],
        "denoiser calls": made.nfe or settings["steps"],
        "tries each": settings["tries"],
        "seconds": round(made.seconds, 1),
    }


__all__ = ["Designs", "Sampling", "design", "design_verb", "oracles"]
