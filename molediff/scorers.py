"""Scorers: numbers that rank molecules and steer sampling without gradients.

A :class:`Scorer` is a value of a molecule (a descriptor, a pattern, an xTB property, a function of
the user's) and what is wanted of it. :func:`reward` makes scorers what ``shared.guidance.Steered``
takes. Whoever steers by xTB cannot have xTB as the judge as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rdkit import Chem, RDConfig, rdBase
from rdkit.Chem import Descriptors
from torch import Tensor

from molediff.fingerprints import fingerprint, read_structure, tanimoto
from molediff.molecules import Molecule
from molediff.oracles import PROPERTIES, XTBOracle, check_properties
from molediff.own import load_function, run_file
from molediff.targets import Extreme, Target
from molediff.xtb import UNITS
from shared.configuration import nearest
from shared.domains import Domain, Invalid
from shared.process import State

WORST = -1000.0
"""The score of what cannot be judged, where a value has no worst of its own."""

DESCRIPTORS = {
    "qed": "qed",
    "logp": "MolLogP",
    "tpsa": "TPSA",
    "weight": "MolWt",
    "heavy_atoms": "HeavyAtomCount",
    "rings": "RingCount",
    "aromatic_rings": "NumAromaticRings",
    "rotatable_bonds": "NumRotatableBonds",
    "donors": "NumHDonors",
    "acceptors": "NumHAcceptors",
    "fsp3": "FractionCSP3",
}
"""Short names of some of RDKit's descriptors; all others go by RDKit's own names."""

_FUNCTIONS: dict[str, Callable[[Chem.Mol], float]] = dict(Descriptors.descList)
_BOUNDS = {"qed": (0.0, 1.0), "FractionCSP3": (0.0, 1.0)}


@dataclass(frozen=True)
class Scorer:
    """Scores molecules; higher is better.

    Args:
        name: what reports call it.
        value: molecule -> a number, NaN where it cannot be judged.
        unit: of the value.
        bounds: between which it lies.
        target: what is wanted; None: as much as possible.
        weight: by which the score is multiplied.
    """

    name: str
    value: Callable[[Molecule], float]
    unit: str = ""
    bounds: tuple[float, float] = (-math.inf, math.inf)
    target: Target | None = None
    weight: float = 1.0

    def aimed(self, target: Target) -> Scorer:
        """The same value with another wish: the score is minus the distance to ``target``, or
        plus or minus the value where it is to be large or small."""
        return replace(self, target=target)

    def weighted(self, weight: float) -> Scorer:
        """With another weight."""
        return replace(self, weight=weight)

    @property
    def worst(self) -> float:
        """The score of an ``Invalid`` and of what cannot be judged: that of the worse bound, where
        both are finite, else ``WORST`` times the weight."""
        if not all(map(math.isfinite, self.bounds)):
            return abs(self.weight) * WORST
        return float(self._wish(np.array(self.bounds)).min())

    def values(self, molecules: Iterable[Molecule | Invalid]) -> np.ndarray:
        """The bare values, float64 [n], NaN where there is none."""
        return np.array(
            [math.nan if isinstance(m, Invalid) else self.value(m) for m in molecules], np.float64
        )

    def scores(self, values: np.ndarray) -> np.ndarray:
        """Scores of bare values [n], never NaN."""
        judged = np.isfinite(values)
        scores = self._wish(np.where(judged, values, 0.0))
        return np.where(judged, scores, self.worst)

    def __call__(self, molecules: Iterable[Molecule | Invalid]) -> np.ndarray:
        """Scores, float64 [n]."""
        return self.scores(self.values(molecules))

    def _wish(self, values: np.ndarray) -> np.ndarray:
        if self.target is None:
            return self.weight * values
        if isinstance(self.target, Extreme):
            return self.weight * (values if self.target.maximise else -values)
        return -self.weight * self.target.error(values)


# -- values -----------------------------------------------------------------------------------


def descriptor(name: str) -> Scorer:
    """A descriptor of RDKit of the molecule without its hydrogens, by its own name in any case or
    one of ``DESCRIPTORS``. Molecules without sensible bonds or in pieces cannot be judged.

    Raises:
        ValueError: no such descriptor.
    """
    official = DESCRIPTORS.get(name.lower(), name).lower()
    found = {key.lower(): key for key in _FUNCTIONS}.get(official)
    if found is None:
        known = [*DESCRIPTORS, *_FUNCTIONS]
        raise ValueError(f"no descriptor '{name}'{nearest(name, known)}")
    function = _FUNCTIONS[found]
    return Scorer(name, lambda m: _of_graph(m, function), bounds=_BOUNDS.get(found, _OPEN))


def synthetic_accessibility() -> Scorer:
    """The score of Ertl & Schuffenhauer (2009) from RDKit's contributions, 1 (easy) to 10.

    Raises:
        ModuleNotFoundError: this RDKit came without them.
    """
    score = _contribution("SA_Score", "sascorer").calculateScore
    return Scorer("sa", lambda m: _of_graph(m, score), bounds=(1.0, 10.0))


def has(smarts: str) -> Scorer:
    """1 where the pattern occurs in the molecule without its hydrogens, else 0.

    Raises:
        ValueError: not a SMARTS pattern.
    """
    pattern = _pattern(smarts)
    return Scorer(f"has:{smarts}", lambda m: _match(m, pattern), bounds=(0.0, 1.0))


def lacks(smarts: str) -> Scorer:
    """1 where the pattern does not occur, else 0; also 0 where the molecule cannot be judged.

    Raises:
        ValueError: not a SMARTS pattern.
    """
    pattern = _pattern(smarts)
    return Scorer(f"lacks:{smarts}", lambda m: 1.0 - _match(m, pattern), bounds=(0.0, 1.0))


def similar(structure: str) -> Scorer:
    """Tanimoto similarity of Morgan fingerprints (radius 2, 1024 bits) to a molecule given as
    SMILES or as a file that tells bonds.

    Raises:
        ConfigurationError: neither.
    """
    goal = fingerprint(Chem.MolToSmiles(_heavy(read_structure(structure))), "morgan")

    def value(mol: Chem.Mol) -> float:
        return float(tanimoto(fingerprint(Chem.MolToSmiles(mol), "morgan"), goal))

    return Scorer(f"similar:{structure}", lambda m: _of_graph(m, value), bounds=(0.0, 1.0))


def xtb_property(name: str, oracle: XTBOracle | None = None) -> Scorer:
    """A property by GFN2-xTB, calibrated as ``oracle`` is (by default the shipped lines). It wants
    a geometry, no bonds.

    Raises:
        ValueError: xTB does not predict it.
    """
    judge = oracle or XTBOracle()
    check_properties(judge, [name])

    def value(molecule: Molecule) -> float:
        found = next(judge.stream([molecule]))
        return math.nan if isinstance(found, Invalid) else found[name]

    return Scorer(f"xtb_{name}", value, UNITS[name])


def function(reference: str) -> Scorer:
    """The function of a Python file, given as 'path.py:function': Molecule -> number, NaN for
    what it cannot judge.

    Raises:
        ValueError: no such file, one that cannot be run, no such function in it; (when scoring)
            whatever the function raises and results that are no number. Each names the file, the
            function and the molecule.
    """
    called = load_function(reference, "scorer")

    def value(molecule: Molecule) -> float:
        try:
            return float(called(molecule))
        except Exception as error:
            raise ValueError(
                f"scorer '{reference}' fails on {_title(molecule)}: {type(error).__name__}: "
                f"{error}"
            ) from error

    return Scorer(reference, value)


_OPEN = (-math.inf, math.inf)
NAMED: Mapping[str, Callable[[], Scorer]] = {
    **{name: partial(descriptor, name) for name in DESCRIPTORS},
    "sa": synthetic_accessibility,
    **{f"xtb_{name}": partial(xtb_property, name) for name in PROPERTIES},
}
"""Scorers without arguments."""
WITH_ARGUMENT = {"has": has, "lacks": lacks, "similar": similar}


def scorer(name: str) -> Scorer:
    """A scorer by its name: one of ``NAMED``, 'has:SMARTS', 'lacks:SMARTS', 'similar:SMILES',
    'path.py:function' or a descriptor of RDKit.

    Raises:
        ValueError: no such scorer; lists those there are.
    """
    head, colon, rest = name.partition(":")
    if colon and head.lower() in WITH_ARGUMENT:
        return WITH_ARGUMENT[head.lower()](rest)
    if colon:
        return function(name)
    if name.lower() in NAMED:
        return NAMED[name.lower()]()
    if name.lower() in {key.lower() for key in _FUNCTIONS}:
        return descriptor(name)
    raise ValueError(
        f"no scorer '{name}'{nearest(name, [*NAMED, *_FUNCTIONS])} Known: {', '.join(NAMED)}, "
        f"has:SMARTS, lacks:SMARTS, similar:SMILES, path.py:function, and the "
        f"{len(_FUNCTIONS)} descriptors of RDKit by name."
    )


# -- steering ---------------------------------------------------------------------------------


def reward(domain: Domain[Any], *scorers: Scorer) -> Callable[[State], Tensor]:
    """The sum of the scores of what ``domain`` decodes from estimates of the data: the reward of
    ``shared.guidance.Steered`` and its ``best_of``. Every sample is judged by itself, so that its
    reward is the same in every batch.

    Raises:
        ValueError: no scorer.
    """
    if not scorers:
        raise ValueError("reward: give at least one scorer.")

    def rewards(state: State) -> Tensor:
        items = domain.decode({k: v.detach().cpu() for k, v in state.items()}, mask_of(state))
        return torch.from_numpy(sum_of(scorers, items))

    return rewards


def sum_of(scorers: Sequence[Scorer], items: Sequence[Molecule | Invalid]) -> np.ndarray:
    """Summed scores, float64 [n]."""
    total: np.ndarray = np.sum([judge(items) for judge in scorers], axis=0)
    return total


def mask_of(state: State) -> Tensor | None:
    """Which rows of the nodes are real, [b, n] or None where all are, told by their values:
    padding is exactly zero, and of centred positions only a lone atom is."""
    field = state["positions"] if "positions" in state else state["nodes"]
    mask = (field.detach().cpu() != 0.0).any(-1)
    mask[:, 0] = True
    return None if bool(mask.all()) else mask


# -- helpers ----------------------------------------------------------------------------------


def _of_graph(molecule: Molecule, function: Callable[[Chem.Mol], float]) -> float:
    mol = _heavy(molecule)
    if mol is None or len(Chem.GetMolFrags(mol)) > 1:
        return math.nan
    with rdBase.BlockLogs():
        return float(function(mol))


def _match(molecule: Molecule, pattern: Chem.Mol) -> float:
    mol = _heavy(molecule)
    return math.nan if mol is None else float(mol.HasSubstructMatch(pattern))


def _heavy(molecule: Molecule) -> Chem.Mol | None:
    """Without hydrogens, as descriptors and patterns expect; None where bonds make no sense."""
    if molecule.bonds is None:
        return None
    try:
        with rdBase.BlockLogs():
            return Chem.RemoveHs(molecule.to_rdkit())
    except ValueError:
        return None


def _pattern(smarts: str) -> Chem.Mol:
    with rdBase.BlockLogs():
        pattern = Chem.MolFromSmarts(smarts) if smarts else None
    if pattern is None:
        raise ValueError(f"'{smarts}' is not a SMARTS pattern")
    return pattern


def _title(molecule: Molecule) -> str:
    try:
        text = molecule.smiles()
    except ValueError:
        text = "".join(molecule.symbols)
    return f"molecule {molecule.name} ({text})" if molecule.name else f"molecule {text}"


@cache
def _contribution(folder: str, name: str) -> Any:
    path = Path(RDConfig.RDContribDir) / folder / f"{name}.py"
    if not path.exists():
        raise ModuleNotFoundError(f"this RDKit came without {folder}: install rdkit from PyPI")
    return run_file(path)
