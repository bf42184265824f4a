"""Semi-empirical quantum chemistry: GFN2-xTB (Bannwarth, Ehlert & Grimme 2019) by tblite, the
polarizability of the D4 model (Caldeweyher et al. 2019) by dftd4, relaxation by ase.

Nothing that a geometry can be makes these functions raise: what cannot be computed comes back as
an ``Invalid`` with the reason. They print nothing and use one thread.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
from rdkit import Chem
from scipy.spatial.distance import pdist, squareform
from threadpoolctl import ThreadpoolController

from molediff.molecules import Molecule
from molediff.workers import ordered
from shared.domains import Invalid
from shared.extras import need

UNITS = {"energy": "eV", "homo": "eV", "lumo": "eV", "gap": "eV", "mu": "D", "alpha": "bohr^3"}
"""Property -> unit."""

HARTREE = 27.211386245988  # eV (CODATA 2018)
BOHR = 0.529177210903  # Angstrom
DEBYE = 2.541746473  # of one e bohr
CLOSEST = 0.5
"""Atoms closer than this (Angstrom) are refused: the shortest bond there is, H-H, has 0.74, and
the tight-binding integrals mean nothing so far inside of it."""
ITERATIONS = 100
"""Of the self-consistent cycle; molecules near a minimum need 10 to 20."""
FORCE = 0.05
"""A geometry counts as relaxed below this largest force (eV/Angstrom)."""
STEPS = 250
"""Relaxations longer than this have failed."""
ERRORS = (RuntimeError, ValueError, ArithmeticError)  # what tblite, dftd4 and ase raise

_OUTER = tuple(Chem.GetPeriodicTable().GetNOuterElecs(z) for z in range(119))


@dataclass(frozen=True, eq=False)
class Electronic:
    """What GFN2-xTB and D4 say of one geometry.

    Attributes:
        molecule: with the geometry that was computed.
        energy: total energy, eV. homo, lumo: frontier orbitals, eV.
        mu: norm of the dipole moment, Debye. alpha: isotropic polarizability, bohr^3.
        released: energy that the relaxation set free, eV; 0 without.
    """

    molecule: Molecule
    energy: float
    homo: float
    lumo: float
    mu: float
    alpha: float
    released: float = 0.0

    @property
    def gap(self) -> float:
        """lumo - homo, eV."""
        return self.lumo - self.homo

    def properties(self) -> dict[str, float]:
        """The values by the names of ``UNITS``."""
        return {name: getattr(self, name) for name in UNITS}


def compute(
    molecule: Molecule, *, relax: bool = False, steps: int = STEPS
) -> Electronic | Invalid:
    """One closed-shell calculation, of the geometry as it is or relaxed within ``steps`` steps.

    Raises:
        ModuleNotFoundError: tblite, dftd4 or (to relax) ase is not installed.
    """
    _packages(relax)
    try:
        check(molecule)
        with _threads().limit(limits=1):
            released = 0.0
            if relax:
                molecule, released = _relax(molecule, steps)
            return Electronic(molecule, *_orbitals(molecule), _alpha(molecule), released)
    except ERRORS as error:
        return Invalid(molecule.name, " ".join(str(error).split()) or type(error).__name__)


def stream(
    molecules: Iterable[Molecule | Invalid],
    *,
    relax: bool = False,
    steps: int = STEPS,
    processes: int = 0,
) -> Iterator[Electronic | Invalid]:
    """:func:`compute` of every molecule, in order, each as soon as it and those before it are
    done; an ``Invalid`` goes through as it is.

    Args:
        processes: 0: this one; else at least 2 others, which a crash of the Fortran libraries
            does not reach.

    Raises:
        ModuleNotFoundError: as :func:`compute`. ValueError: one process.
    """
    _packages(relax)
    done = ordered(partial(_compute, relax=relax, steps=steps), molecules, processes)
    return (Invalid("", "the process of the calculation died") if d is None else d for d in done)


def _compute(item: Molecule | Invalid, relax: bool, steps: int) -> Electronic | Invalid:
    return item if isinstance(item, Invalid) else compute(item, relax=relax, steps=steps)


def relaxed(molecule: Molecule, steps: int = STEPS) -> tuple[Molecule, float]:
    """The molecule at the minimum of GFN2-xTB next to its geometry, bonds and all else as they
    were, and the energy set free on the way, eV.

    Raises:
        ValueError, RuntimeError: it cannot be computed or does not get there; says why.
        ModuleNotFoundError: tblite or ase is not installed.
    """
    for module in ("tblite.ase", "ase.optimize"):
        need(module, "a relaxation with GFN2-xTB", "chemistry")
    check(molecule)
    with _threads().limit(limits=1):
        return _relax(molecule, steps)


def check(molecule: Molecule) -> None:
    """Refuse what GFN2-xTB has no sensible answer for.

    Raises:
        ValueError: no positions, hydrogens that are not atoms, two atoms in one place, an odd
            number of electrons or none.
    """
    if molecule.positions is None:
        raise ValueError("no positions")
    if molecule.hydrogens.any():
        raise ValueError("hydrogens that are not listed as atoms: use with_hydrogens()")
    if len(molecule) > 1:
        distances = squareform(pdist(molecule.positions.astype(np.float64)))
        np.fill_diagonal(distances, np.inf)
        i, j = divmod(int(distances.argmin()), len(molecule))
        if distances[i, j] < CLOSEST:
            raise ValueError(f"atoms {i} and {j} are {distances[i, j]:.2g} Angstrom apart")
    if (int(molecule.atomic_numbers.sum(dtype=np.int64)) - molecule.charge) % 2:
        raise ValueError("an odd number of electrons: only closed shells are computed")
    # with fewer than none, tblite writes beyond its arrays and takes the process with it
    if sum(_OUTER[z] for z in molecule.atomic_numbers.tolist()) - molecule.charge < 2:
        raise ValueError(f"no valence electron is left at charge {molecule.charge:+d}")


def _packages(relax: bool) -> None:
    modules = ["tblite.interface", "dftd4.interface"]
    for module in [*modules, "tblite.ase", "ase.optimize"] if relax else modules:
        need(module, "GFN2-xTB", "chemistry")


@lru_cache(maxsize=1)
def _threads() -> ThreadpoolController:
    return ThreadpoolController()


def _orbitals(molecule: Molecule) -> tuple[float, float, float, float]:
    """Energy, HOMO and LUMO (eV) and the dipole moment (Debye)."""
    assert molecule.positions is not None
    calculator = need("tblite.interface", "GFN2-xTB", "chemistry").Calculator(
        "GFN2-xTB",
        molecule.atomic_numbers.astype(np.int64),
        molecule.positions.astype(np.float64) / BOHR,
        float(molecule.charge),
        0,
    )
    calculator.set("verbosity", 0)
    calculator.set("max-iter", ITERATIONS)
    result = calculator.singlepoint()
    levels = HARTREE * np.ravel(result.get("orbital-energies"))
    pairs = round(float(np.sum(result.get("orbital-occupations"))) / 2)
    if not 0 < pairs < len(levels):
        raise ValueError("no empty orbital in the minimal basis")
    energy, mu = float(result.get("energy")), float(np.linalg.norm(result.get("dipole")))
    values = (HARTREE * energy, float(levels[pairs - 1]), float(levels[pairs]), DEBYE * mu)
    if not all(map(math.isfinite, values)):
        raise ValueError("the self-consistent cycle gave no finite values")
    return values


def _alpha(molecule: Molecule) -> float:
    """Sum of the static atomic polarizabilities of D4, bohr^3."""
    assert molecule.positions is not None
    model = need("dftd4.interface", "a polarizability", "chemistry").DispersionModel(
        molecule.atomic_numbers.astype(np.int64),
        molecule.positions.astype(np.float64) / BOHR,
        float(molecule.charge),
    )
    alpha = float(np.sum(model.get_properties()["polarizabilities"]))
    if not math.isfinite(alpha):
        raise ValueError("the polarizability is not finite")
    return alpha


def _relax(molecule: Molecule, steps: int) -> tuple[Molecule, float]:
    ase: Any = need("ase", "a relaxation", "chemistry")
    optimize: Any = need("ase.optimize", "a relaxation", "chemistry")
    tblite: Any = need("tblite.ase", "a relaxation", "chemistry")
    assert molecule.positions is not None
    atoms = ase.Atoms(molecule.atomic_numbers.astype(int), molecule.positions.astype(np.float64))
    atoms.calc = tblite.TBLite(
        method="GFN2-xTB", charge=molecule.charge, verbosity=0, max_iterations=ITERATIONS
    )
    start = float(atoms.get_potential_energy())
    if not optimize.LBFGS(atoms, logfile=None).run(fmax=FORCE, steps=steps):
        raise ValueError(f"not relaxed within {steps} steps")
    released = start - float(atoms.get_potential_energy())
    if not math.isfinite(released):
        raise ValueError("the relaxation ran off to infinite energies")
    return molecule.replace(positions=atoms.get_positions()), released
