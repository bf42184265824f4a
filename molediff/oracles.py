"""Oracles: methods that judge molecules and never steer them, each with its own held-out error.

:class:`XTBOracle` is GFN2-xTB with a line per property onto the labels of QM9, because a minimal
basis gives frontier orbitals on a scale of its own. It predicts homo, lumo, gap, mu and alpha, and
no heat capacity: a single point has none.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from molediff import xtb
from molediff.geometric.data import MoleculeData
from molediff.molecules import Molecule
from shared.checkpoints import versions, write_atomically
from shared.cli import Outcome, Program, Progress
from shared.configuration import ConfigurationError
from shared.domains import Invalid
from shared.metrics import Estimate, mean
from shared.randomness import stream

REFERENCE = "B3LYP/6-31G(2df,p) labels of QM9"
PROPERTIES = ("homo", "lumo", "gap", "mu", "alpha")
SHIPPED = Path(__file__).parent / "pretrained" / "xtb_qm9"
BENT = ("lumo", "gap")
"""Where the lowest empty orbital is an antibonding one, xTB follows the labels one to one; above,
they stay near the edge of the continuum, which a minimal basis has not: a line for each."""
THROUGH_ZERO = ("mu",)  # a moment that symmetry forbids is zero in every method
FITTED = ("unit", "slope", "intercept", "bend", "knot", "n")
ENOUGH = 30  # molecules to see a bend at all
PROGRAMS = ("tblite", "dftd4", "ase")


@dataclass(frozen=True)
class Accuracy:
    """How far an oracle may be trusted: mean absolute error ``mae`` in ``unit``, with its 95 %
    interval, to ``reference`` over molecules that the oracle has not seen."""

    unit: str
    mae: Estimate
    reference: str = REFERENCE

    def __str__(self) -> str:
        return f"{self.mae} {self.unit} to {self.reference}"


class Oracle(Protocol):
    """Judges molecules."""

    @property
    def name(self) -> str:
        """What reports call it."""

    @property
    def accuracy(self) -> Mapping[str, Accuracy]:
        """Every property that it predicts, with its error."""

    def __call__(self, molecules: Sequence[Molecule | Invalid]) -> dict[str, np.ndarray]:
        """Property -> float64 [n] in the unit of ``accuracy``, NaN where it failed."""


# -- calibration ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """label = ``slope`` x + ``intercept`` + ``bend`` max(x - ``knot``, 0) of the xTB value x, by
    least squares over ``n`` training molecules. ``raw`` and ``calibrated``: mean absolute errors
    over held-out molecules without and with it."""

    unit: str
    slope: float
    intercept: float
    bend: float
    knot: float
    n: int
    raw: Estimate
    calibrated: Estimate

    def __call__(self, values: Any) -> np.ndarray:
        x = np.asarray(values, dtype=np.float64)
        return self.slope * x + self.intercept + self.bend * np.maximum(x - self.knot, 0.0)


@dataclass(frozen=True)
class Calibration:
    """Property -> line, and what they hold for: geometries relaxed or as they came, and how the
    lines were made."""

    lines: Mapping[str, Line]
    relax: bool = False
    seed: int = 0
    reference: str = REFERENCE
    source: str = ""
    failed: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        lines = {
            name: {
                **{key: getattr(line, key) for key in FITTED},
                "raw_mae": line.raw.as_json(),
                "calibrated_mae": line.calibrated.as_json(),
            }
            for name, line in self.lines.items()
        }
        rest = {k: v for k, v in vars(self).items() if k != "lines"}
        path.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps({**rest, "properties": lines}, indent=1) + "\n"
        write_atomically(path, content.encode())

    @staticmethod
    def load(path: Path) -> Calibration:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: no file. ValueError: one of another kind.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            lines = {
                name: Line(
                    **{key: row[key] for key in FITTED},
                    raw=Estimate(**row["raw_mae"]),
                    calibrated=Estimate(**row["calibrated_mae"]),
                )
                for name, row in content.pop("properties").items()
            }
            return Calibration(lines, **content)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{path} is no calibration: make one with `molediff oracle calibrate`"
            ) from error


@lru_cache(maxsize=2)
def shipped(relax: bool = False) -> Calibration:
    """The calibration inside the package, for geometries as they come or relaxed."""
    return Calibration.load(SHIPPED / ("relaxed.json" if relax else "calibration.json"))


def calibrate(
    data: MoleculeData,
    n: int = 1000,
    held_out: int = 500,
    *,
    seed: int = 0,
    relax: bool = False,
    bent: Sequence[str] = BENT,
    processes: int = 0,
    progress: Progress | None = None,
) -> Calibration:
    """Fit the lines on ``n`` training molecules of ``data`` and measure them on ``held_out``
    molecules of its validation part; both are drawn by ``seed`` among those with labels. The
    lines of the properties ``bent`` may bend once, where there are ``ENOUGH`` molecules.

    Raises:
        ValueError: no labels, or fewer than three molecules that can be computed.
    """
    known = [name for name in PROPERTIES if name in data.property_names]
    if not known:
        raise ValueError(f"{data.path} has none of the labels {', '.join(PROPERTIES)}")
    parts = [labelled(data.subset("train"), known, n, seed)]
    parts.append(labelled(data.subset("valid"), known, held_out, seed))
    items = [molecule for part in parts for molecule in part]
    found: list[xtb.Electronic | Invalid] = []
    for result in xtb.stream(items, relax=relax, processes=processes):
        found.append(result)
        if progress is not None:
            progress(len(found), len(items))
    good = np.array([not isinstance(result, Invalid) for result in found])
    fit = good & (np.arange(len(items)) < len(parts[0]))
    if fit.sum() < 3 or not (good & ~fit).any():
        raise ValueError(f"{data.path}: too few molecules with labels that xTB can compute")
    made = table(found)
    labels = {name: np.array([m.properties[name] for m in items]) for name in known}
    lines = {
        name: _line(name, made[name], labels[name], fit, good & ~fit, name in bent)
        for name in known
    }
    source = f"{data.info['source'].get('kind', '')} {data.info['fingerprint'][:12]}".strip()
    return Calibration(
        lines, relax, seed, source=source, failed=int((~good).sum()), versions=program_versions()
    )


def labelled(data: MoleculeData, names: Sequence[str], n: int, seed: int) -> MoleculeData:
    """``n`` of the molecules (all where there are fewer) whose properties ``names`` are known,
    drawn by ``seed``."""
    known = np.flatnonzero(np.isfinite([data.column(name) for name in names]).all(0))
    return data.take(np.sort(stream(seed, 0, "oracle", 0).permutation(known)[:n]))


def table(found: Iterable[xtb.Electronic | Invalid]) -> dict[str, np.ndarray]:
    """Raw xTB values, property -> [n], NaN where there are none."""
    rows = [{} if isinstance(result, Invalid) else result.properties() for result in found]
    return {
        name: np.array([row.get(name, np.nan) for row in rows], dtype=np.float64)
        for name in PROPERTIES
    }


def _line(
    name: str, x: np.ndarray, y: np.ndarray, fit: np.ndarray, judge: np.ndarray, bent: bool
) -> Line:
    n, unknown = int(fit.sum()), Estimate(np.nan, 0, np.nan, np.nan)
    slope, intercept, bend, knot = _least_squares(
        x[fit], y[fit], bent and n >= ENOUGH, name in THROUGH_ZERO
    )
    line = Line(xtb.UNITS[name], slope, intercept, bend, knot, n, unknown, unknown)
    raw, calibrated = (mean(np.abs(z - y)[judge]) for z in (x, line(x)))
    return replace(line, raw=raw, calibrated=calibrated)


def _least_squares(
    x: np.ndarray, y: np.ndarray, bent: bool = False, through_zero: bool = False
) -> tuple[float, float, float, float]:
    """Slope, intercept, bend and knot; the knot is the best of the percentiles of ``x``."""
    best, fitted = np.inf, (0.0, 0.0, 0.0, 0.0)
    ones = np.full_like(x, 0.0 if through_zero else 1.0)
    for knot in np.percentile(x, np.arange(5, 96)).tolist() if bent else [0.0]:
        columns = np.stack([x, ones, bent * np.maximum(x - knot, 0.0)], axis=1)
        slope, intercept, bend = np.linalg.lstsq(columns, y)[0].tolist()
        error = float(np.square(columns @ (slope, intercept, bend) - y).sum())
        if error < best:
            best, fitted = error, (slope, intercept, bend, knot)
    return fitted


def program_versions() -> dict[str, str]:
    """Versions of Python and of all packages that the values depend on."""
    found = dict(versions())
    for package in PROGRAMS:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


# -- the oracle -------------------------------------------------------------------------------


@dataclass(frozen=True)
class XTBOracle:
    """GFN2-xTB and D4, calibrated.

    Args:
        calibration: the lines, and whether geometries are relaxed first; by default those shipped
            for geometries as they come, ``shipped(relax=True)`` are for relaxed ones.
        processes: see ``molediff.xtb.stream``.
    """

    calibration: Calibration = field(default_factory=shipped)
    processes: int = 0

    @property
    def name(self) -> str:
        return "GFN2-xTB, relaxed" if self.calibration.relax else "GFN2-xTB"

    @property
    def accuracy(self) -> dict[str, Accuracy]:
        return {
            name: Accuracy(line.unit, line.calibrated, self.calibration.reference)
            for name, line in self.calibration.lines.items()
        }

    def __call__(self, molecules: Sequence[Molecule | Invalid]) -> dict[str, np.ndarray]:
        rows = [{} if isinstance(row, Invalid) else row for row in self.stream(molecules)]
        return {
            name: np.array([row.get(name, np.nan) for row in rows], dtype=np.float64)
            for name in self.calibration.lines
        }

    def stream(
        self, molecules: Iterable[Molecule | Invalid]
    ) -> Iterator[dict[str, float] | Invalid]:
        """The values of each molecule as soon as it is done, in order, or why there are none."""
        lines = self.calibration.lines
        for found in xtb.stream(molecules, relax=self.calibration.relax, processes=self.processes):
            if isinstance(found, Invalid):
                yield found
            else:
                raw = found.properties()
                yield {name: float(line(raw[name])) for name, line in lines.items()}


def check_properties(oracle: Oracle, names: Iterable[str]) -> None:
    """Refuse properties that an oracle does not predict.

    Raises:
        ValueError: names the property and what there is.
    """
    for name in names:
        if name not in oracle.accuracy:
            raise ValueError(
                f"the oracle {oracle.name} does not predict '{name}'; "
                f"it has {', '.join(oracle.accuracy)}"
            )


# -- the verb ---------------------------------------------------------------------------------


def calibrate_verb(config: Any, program: Program, progress: Progress | None = None) -> Outcome:
    """``molediff oracle calibrate``: labelled data -> calibration.json."""
    if config.out is None:
        raise ConfigurationError("oracle calibrate: 'out' is missing; give out=FOLDER.")
    made = calibrate(
        MoleculeData(config.path),
        config.n,
        config.held_out,
        seed=config.seed,
        relax=config.relax,
        bent=list(config.bent),
        processes=config.processes,
        progress=progress,
    )
    file = Path(config.out) / ("relaxed.json" if made.relax else "calibration.json")
    made.save(file)
    lines = [
        f"{name}: mean absolute error {line.calibrated} {line.unit} (uncalibrated "
        f"{line.raw.value:.4g}); slope {line.slope:.3g}"
        + f", {line.slope + line.bend:.3g} above xTB's {line.knot:.3g}"
        * bool(line.bend)
        for name, line in made.lines.items()
    ]
    return Outcome([*lines, f"written: {file}"], file)
