"""Metrics of generated molecules known as graphs: validity, uniqueness, novelty, NSPDK, FCD."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cache, cached_property
from importlib.util import find_spec
from typing import Any

import networkx as nx
import numpy as np

from molediff.graphs.metrics import nspdk_mean, nspdk_mmd
from molediff.graphs.nspdk import Features
from molediff.molecules import Molecule
from shared.domains import Invalid
from shared.metrics import Estimate, proportion


def labelled(molecule: Molecule, kekulise: bool = False) -> nx.Graph:
    """Heavy atoms and bonds with attributes 'label': the element, and the bond order as a whole
    number. Aromatic bonds count 1, as the published evaluation truncates 1.5, unless
    ``kekulise``."""
    molecule = molecule.kekulised() if kekulise else molecule
    graph = nx.Graph()
    symbols = molecule.symbols
    for i, number in enumerate(molecule.atomic_numbers.tolist()):
        if number > 1:
            graph.add_node(i, label=symbols[i])
    if molecule.bonds is not None and molecule.orders is not None:
        for (i, j), order in zip(molecule.bonds.tolist(), molecule.orders.tolist(), strict=True):
            if i in graph and j in graph:
                graph.add_edge(i, j, label=order if order <= 3 else 1)
    return graph


def canonical(molecules: Iterable[Molecule]) -> list[str | None]:
    """Canonical SMILES; None for a molecule that RDKit cannot sanitise."""
    out: list[str | None] = []
    for molecule in molecules:
        try:
            out.append(molecule.smiles())
        except ValueError:
            out.append(None)
    return out


class Reference:
    """Molecules to compare with; what a metric needs of them is computed once."""

    def __init__(self, molecules: Iterable[Molecule]) -> None:
        self.molecules = list(molecules)

    @cached_property
    def nspdk(self) -> Features:
        """Mean feature vector of the neighbourhood subgraph pairwise distance kernel."""
        return nspdk_mean(labelled(molecule.aromatised()) for molecule in self.molecules)

    @cached_property
    def smiles(self) -> list[str]:
        return [s for s in canonical(self.molecules) if s]

    @cached_property
    def activations(self) -> Any:
        """Mean and covariance of ChemNet's activations."""
        return _chemnet().precalc(self.smiles)


def molecule_metrics(
    items: Sequence[Molecule | Invalid],
    reference: Sequence[Molecule] | Reference | None = None,
    training: Sequence[Molecule] | Reference | None = None,
    frechet: bool = True,
) -> dict[str, Estimate]:
    """Metrics of the published tables.

    valid: RDKit reads the molecule (after correction). valid_without_correction: by the property
    of that name, of all items. unique: distinct among the valid. novel: distinct valid ones that
    are not in ``training``, of all distinct ones. nspdk, fcd: distances to ``reference``; fcd
    needs the package fcd_torch and is left out where it is absent.
    """
    molecules = [item for item in items if not isinstance(item, Invalid)]
    smiles = canonical(molecules)
    good = [(m, s) for m, s in zip(molecules, smiles, strict=True) if s]
    known = {s for _, s in good}
    out = {"valid": proportion(len(good), len(items))}
    flags = [m.properties.get("valid_without_correction") for m in molecules]
    if flags and None not in flags:
        out["valid_without_correction"] = proportion(
            sum(int(flag or 0) for flag in flags), len(items)
        )
    out["unique"] = proportion(len(known), len(good))
    if training is not None:
        out["novel"] = proportion(len(known - set(_reference(training).smiles)), len(known))
    if reference is not None and good:
        goal = _reference(reference)
        out["nspdk"] = nspdk_mmd(goal.nspdk, [labelled(m.aromatised()) for m, _ in good])
        if frechet:
            out.update(_fcd([s for _, s in good], goal))
    return out


def _reference(molecules: Sequence[Molecule] | Reference) -> Reference:
    return molecules if isinstance(molecules, Reference) else Reference(molecules)


@cache
def _chemnet() -> Any:
    from fcd_torch import FCD

    return FCD(device="cpu", n_jobs=1)


def _fcd(made: Sequence[str], reference: Reference) -> dict[str, Estimate]:
    """Frechet ChemNet distance (Preuer et al. 2018), where fcd_torch is installed. Its bias
    falls with the number of molecules: compare equal numbers only."""
    if find_spec("fcd_torch") is None or min(len(made), len(reference.smiles)) < 2:
        return {}
    value = float(_chemnet()(gen=list(made), pref=reference.activations))
    if not np.isfinite(value):
        value = math.nan
    return {"fcd": Estimate(value, len(made), math.nan, math.nan)}
