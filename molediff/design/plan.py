"""From a wish to a guided sampler: which domain, which energies, which solver."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from rdkit import Chem
from torch import Tensor

from molediff.design.tries import fittest
from molediff.design.wishes import Wish
from molediff.fingerprints import fingerprint, read_structure
from molediff.geometric.domain import Molecules
from molediff.geometric.energies import (
    Composition,
    UserEnergy,
    fingerprint_energy,
    property_energy,
)
from molediff.geometric.fingerprints import FingerprintMolecules
from molediff.geometric.fragments import Fragment
from molediff.geometric.predicting import Predictor
from molediff.geometric.scaffolds import Scaffolded
from molediff.scorers import reward
from molediff.targets import Target
from shared.configuration import ConfigurationError
from shared.guidance import ClassifierFree, Energy, Guided, Steered, Term
from shared.models import Model
from shared.predictions import Denoise
from shared.process import State
from shared.runs import pretrained
from shared.solvers.base import PlanSolver, Solver

SCORES = 4.0
"""The weight of scores, beside which that of an energy is 1."""


@dataclass(frozen=True)
class Steering:
    """How hard to steer.

    Args:
        energies: property model on noisy molecules; 'auto': that named after the generator;
            None: none. fingerprints: the same for fingerprints.
        strength: weight of the gradients of the property energies (the published l); None: 0 for
            properties that the generator is told of where there are several tries, among which the
            energies choose, else 1: with few calls for each try, gradients cost more than they
            give.
        condition: scale of classifier-free guidance.
        pull: weight of composition, own energies and similarity; the last, too, only pulls where
            there is one try.
        particles: tries that compete for each molecule, by validity and then the energies and
            scores; None: 4, with a scaffold 1. Scores resample them on the way, too, where the
            solver draws noise.
    """

    energies: str | None = "auto"
    fingerprints: str | None = "auto"
    strength: float | None = None
    condition: float = 2.0
    pull: float = 1.0
    particles: int | None = None

    def __post_init__(self) -> None:
        for name in ("strength", "condition", "pull"):
            given = getattr(self, name)
            if given is not None and not (
                isinstance(given, int | float) and math.isfinite(given) and given >= 0
            ):
                raise ConfigurationError(f"{name}={given}: give a number of at least 0.")
        if self.particles is not None and not (
            isinstance(self.particles, int) and self.particles >= 1
        ):
            raise ConfigurationError(f"particles={self.particles}: give a whole number from 1 on.")


@dataclass(frozen=True)
class Plan:
    """A wish made concrete for one generator. Attributes are made when they are asked for, so a
    mistake in one is told before any sampling by :meth:`check`."""

    model: Model[Any]
    wish: Wish
    steering: Steering = field(default_factory=Steering)

    # -- what is asked ------------------------------------------------------------------------

    @cached_property
    def domain(self) -> Molecules:
        """The generator's domain, with room for the scaffold."""
        domain = self.model.domain
        if not isinstance(domain, Molecules):
            raise ConfigurationError(
                f"run={self.model.run.folder} makes {domain.name}; design needs a model of "
                "molecules in 3D."
            )
        if self.wish.scaffold is None:
            if self.wish.new is not None:
                raise ConfigurationError("new: there is no scaffold to add atoms to.")
            return domain
        return Scaffolded(domain, Fragment.read(self.wish.scaffold), self.wish.new)

    @cached_property
    def properties(self) -> dict[str, Mapping[str, Any]]:
        """What can be asked for: the properties of the condition and of the energies."""
        known = dict(self.domain.statistics()["properties"])
        names = [n for n in self.domain.properties if n in known]
        found = {name: known[name] for name in names}
        if self.predictor is not None:
            found |= {n: self.predictor.statistics[n] for n in self.predictor.names}
        return found

    @cached_property
    def targets(self) -> list[Target]:
        """The wishes for properties.

        Raises:
            ConfigurationError: one that cannot be read, or two for one property.
        """
        targets = self.wish.parsed(self.properties)
        names = [target.name for target in targets]
        for name in names:
            if names.count(name) > 1:
                raise ConfigurationError(
                    f"{name} has two targets: write one range, such as {name}=2..3."
                )
        return targets

    @property
    def warnings(self) -> list[str]:
        """Targets that the training data hold nothing like."""
        found = (target.outlying(self.properties) for target in self.targets)
        return [text for text in found if text is not None]

    @property
    def request(self) -> dict[str, Any]:
        """For the domain's template: what the generator is told."""
        names = {name.lower(): name for name in self.domain.properties}
        told = {names[k.lower()]: v for k, v in self.wish.targets.items() if k.lower() in names}
        atoms = self.wish.atoms if self.wish.atoms is not None else self._resembled_atoms
        return told if atoms is None else {**told, "atoms": atoms}

    @property
    def _resembled_atoms(self) -> int | None:
        """As many as the molecule to be resembled has, where the generator knows such sizes."""
        if self.wish.similar is None or self.wish.scaffold is not None:
            return None
        count = Chem.AddHs(read_structure(self.wish.similar).to_rdkit()).GetNumAtoms()
        return count if str(count) in self.domain.statistics()["sizes"] else None

    # -- how it is reached --------------------------------------------------------------------

    @cached_property
    def predictor(self) -> Predictor | None:
        """The property model that guides."""
        name = companion(self.steering.energies, self.model, "energy")
        return None if name is None else _fitting(Predictor.load(name), self.model)

    @cached_property
    def composition(self) -> Composition | None:
        """The limits on elements."""
        if not self.wish.limits:
            return None
        return Composition.parse(self.wish.limits, self.domain.elements, self.domain.scale)

    @cached_property
    def energies(self) -> dict[str, Energy]:
        """The energies of the targets that the property model predicts."""
        if self.predictor is None:
            return {}
        names, predict = self.predictor.names, self.predictor.network.predict
        return {
            t.name: property_energy(predict, self.properties, names.index(t.name), t)
            for t in self.targets
            if t.name in names
        }

    @cached_property
    def terms(self) -> list[Term]:
        """The energies whose gradients guide."""
        strengths = {name: self._strength(name) for name in self.energies}
        found = [Term(self.energies[k], weight) for k, weight in strengths.items() if weight > 0]
        found += self._limits
        if self.tries == 1:
            found += self._resemblance
        if isinstance(self.domain, Scaffolded):
            found += self.domain.terms(self.model.denoiser.process)
        return found

    @property
    def choosing(self) -> list[Term]:
        """The energies by which tries compete: all that is asked for."""
        return [*map(Term, self.energies.values()), *self._limits, *self._resemblance]

    @cached_property
    def _limits(self) -> list[Term]:
        terms, pull = [], self.steering.pull
        if self.composition is not None:
            terms.append(Term(self.composition, pull, at="estimate"))
        if self.wish.energy is not None:
            own = UserEnergy.load(self.wish.energy, self.domain.elements, self.domain.scale)
            terms.append(Term(own, pull, at="estimate"))
        return terms

    @cached_property
    def _resemblance(self) -> list[Term]:
        return [] if self.wish.similar is None else [self._similarity()]

    def _strength(self, name: str) -> float:
        """The weight of the gradient of a target's energy."""
        if self.steering.strength is not None:
            return self.steering.strength
        return 0.0 if self.tries > 1 and self._told(name) else 1.0

    def _told(self, name: str) -> bool:
        return name in self.domain.properties and self.steering.condition > 0

    @cached_property
    def _fingerprints(self) -> Predictor:
        """The model of fingerprints that guides."""
        name = companion(self.steering.fingerprints, self.model, "fingerprint")
        if name is None:
            raise ConfigurationError(
                "similar: give fingerprints=RUN, a property model trained with "
                "experiment=qm9_fingerprint, or steer without one: score='similar:SMILES'."
            )
        predictor = _fitting(Predictor.load(name), self.model)
        if not isinstance(predictor.domain, FingerprintMolecules):
            raise ConfigurationError(f"fingerprints={name} predicts properties, not fingerprints.")
        return predictor

    def _similarity(self) -> Term:
        domain = self._fingerprints.domain
        assert isinstance(domain, FingerprintMolecules)
        bits = fingerprint(read_structure(str(self.wish.similar)), domain.kind)
        energy = fingerprint_energy(self._fingerprints.network.predict, bits)
        return Term(energy, self.steering.pull)

    def denoise(self, device: torch.device | str) -> Denoise:
        """The generator under its condition and energies."""
        model, null = self.model.denoiser.to(device), self.domain.null_condition()
        found: Denoise = model
        told = any(name in self.request for name in self.domain.properties)
        if told and self.steering.condition != 1.0 and null:
            null = {name: value.to(device) for name, value in null.items()}
            found = ClassifierFree(model, model.process, null, self.steering.condition)
        similar = None if self.wish.similar is None else self._fingerprints
        for predictor in (self.predictor, similar):
            if predictor is not None:
                predictor.network.to(device)
        return Guided(found, model.process, self.terms) if self.terms else found

    @property
    def tries(self) -> int:
        """How many compete for each molecule."""
        return self.steering.particles or (4 if self.wish.scaffold is None else 1)

    def solver(self, solver: Solver) -> Solver:
        """``solver`` with the scaffold kept, steered by the scorers, or with several tries of
        which the fittest stays."""
        if isinstance(self.domain, Scaffolded):
            solver = self.domain.keeping(solver)
        if self.tries == 1:
            return solver
        fit = fittest(self.domain, self.choosing, self.model.denoiser.process.lead.t_min)
        if not self.wish.scorers:
            return Steered.best_of(solver, fit, self.tries)
        score = reward(self.domain, *self.wish.scorers)

        def choice(state: State) -> Tensor:
            return fit(state) + SCORES * score(state)

        if not (isinstance(solver, PlanSolver) and solver.stochastic):
            return Steered.best_of(solver, choice, self.tries)
        return Steered(
            solver, score, self.tries, SCORES, every=5, ess=0.5, pick="best", choice=choice
        )

    def check(self, force: bool = False) -> list[str]:
        """Try everything that can go wrong before sampling.

        Returns:
            warnings, for a run that goes on.

        Raises:
            ConfigurationError: the first mistake; without ``force`` also targets that the
                training data hold nothing like.
        """
        _ = self.domain, self.targets, self.terms, self.choosing, self.wish.scorers
        if self.wish.scorers and self.tries == 1:
            raise ConfigurationError("score: it chooses among tries; give particles=4.")
        warnings = self.warnings
        if warnings and not force:
            raise ConfigurationError(" ".join(warnings) + " Give force=true to go on anyway.")
        unreachable = [t.name for t in self.targets if not self._steers(t.name)]
        if unreachable:
            raise ConfigurationError(
                f"{', '.join(unreachable)}: nothing steers it with condition="
                f"{self.steering.condition:g}, strength={self.steering.strength}."
            )
        self.domain.template(0, [0], **self.request)
        return warnings

    def _steers(self, name: str) -> bool:
        guided = name in self.energies and self._strength(name) > 0
        return self._told(name) or guided


def companion(name: str | None, model: Model[Any], kind: str) -> str | None:
    """A model that goes with a generator: the one named, or for 'auto' the pretrained one whose
    name is that of the generator and ``kind``, if there is one."""
    if name != "auto":
        return name
    guess = f"{model.run.folder.name}_{kind}"
    return guess if guess in pretrained() else None


def _fitting(predictor: Predictor, model: Model[Any]) -> Predictor:
    """Refuse a property model of other elements or noise than the generator's."""
    ours, theirs = model.domain.statistics(), predictor.domain.statistics()
    names: Sequence[str] = ("elements", "scale", "charges", "charge_scale")
    differing = [n for n in names if ours.get(n) != theirs.get(n)]
    schedules = [m.checkpoint.config["schedule"] for m in (model, predictor.model)]
    differing += ["schedule"] * (schedules[0] != schedules[1])
    if differing:
        raise ConfigurationError(
            f"{predictor.model.run.folder} does not fit the generator: other "
            f"{', '.join(differing)}. Train it on the same data with the same schedule."
        )
    return predictor
