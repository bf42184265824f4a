"""Scores of generated 3D molecules, each with its sample size and 95 % interval.

Every score names its rule. Plain names follow EDM's protocol, so that they compare with published
tables; names ending in ``_valence`` follow the corrected rule (see ``stability``), which counts
charges and aromatic bonds properly and wants one fragment.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from rdkit import Chem, rdBase

from molediff.geometric.shapes import shape_distances
from molediff.geometric.stability import Verdicts, edm_verdicts, valence_verdicts
from molediff.molecules import Molecule
from shared.domains import Invalid
from shared.metrics import Estimate, mean, proportion

EXTRAS = ("fcd", "posebusters", "strain", "shape")


def evaluate(
    molecules: Iterable[Molecule | Invalid],
    reference: Iterable[Molecule | Invalid | str] | None = None,
    *,
    extras: Sequence[str] = (),
    perception: str = "rdkit",
    single_bonds: bool = False,
) -> dict[str, Estimate]:
    """Score molecules, and compare them with a reference set where one is given.

    ======================  =====================================================================
    ``read``                records that are molecules at all; ``Invalid`` ones count as failures
                            in every rate over molecules
    ``atom_stability``      EDM: atoms whose bond orders add up to their valence
    ``molecule_stability``  EDM: molecules with all atoms stable
    ``validity``            EDM: molecules whose graph RDKit sanitises
    ``connected``           EDM: molecules of one fragment
    ``uniqueness``          EDM: different SMILES among the valid ones
    ``valid_and_unique``    EDM: different SMILES among all molecules
    ``novelty``             EDM: SMILES absent from the reference among the different ones
    ``..._valence``         the same under the corrected rule
    ======================  =====================================================================

    EDM's scores need positions and are left out when molecules were read and none has any. The
    interval of ``atom_stability`` is over molecules, because the atoms of one molecule are not
    independent.

    Args:
        molecules: what was generated, failures included.
        reference: training or test molecules, for ``novelty`` and the extras. Molecules are read
            by the same rule as the generated ones, as EDM does; SMILES, and molecules that are
            known as graphs only, are faster and differ where the rule misreads a geometry.
        extras: of ``fcd`` (Frechet ChemNet distance by fcd_torch, needs a reference),
            ``posebusters`` (all intramolecular checks passed), ``strain`` (GFN2-xTB energy
            released by relaxation, kcal/mol) and ``shape`` (distances between the distributions
            of bond lengths and angles and those of the reference molecules). All are slow.
        perception: how the corrected rule reads bonds where a molecule has none.
        single_bonds: EDM's SMILES for GEOM-Drugs, where every bond counts as single.

    Raises:
        TypeError: something else among the molecules.
        ValueError: an unknown extra, or one that lacks its reference.
        ModuleNotFoundError: an extra whose package is not installed.
    """
    items, known = list(molecules), list(reference or [])
    _check_items(items, reference)
    good = [m for m in items if isinstance(m, Molecule)]
    data = [m for m in known if isinstance(m, Molecule)]
    texts = [s for s in known if isinstance(s, str)]
    compared = bool(data or texts)
    _check_extras(extras, compared, bool(data))
    scores = {"read": proportion(len(good), len(items))}
    solid = [m for m in good if m.positions is not None]
    data_smiles = valence_verdicts(data, perception).smiles
    if solid or not good:
        verdicts = edm_verdicts(solid, single_bonds)
        before = _edm_keys(data, data_smiles, texts, single_bonds) if compared else None
        scores |= _scores(verdicts, len(items), before, "")
    verdicts = valence_verdicts(good, perception)
    keys = {*data_smiles, *(_canonical(s) for s in texts)} if compared else None
    scores |= _scores(verdicts, len(items), keys, "_valence")
    if extras:
        own = [s for s in verdicts.smiles if s]
        theirs = [*texts, *(s for s in data_smiles if s)]
        scores |= _extra_scores(extras, (good, own), (data, theirs), perception)
    return scores


def _edm_keys(
    data: Sequence[Molecule], smiles: Sequence[str | None], texts: Sequence[str], single: bool
) -> set[str | None]:
    """What counts as known under EDM's rule, ``smiles`` being those of ``data`` under the
    corrected one, for molecules that are graphs only."""
    seen = edm_verdicts([m for m in data if m.positions is not None], single).smiles
    graphs = [s for m, s in zip(data, smiles, strict=True) if s and m.positions is None]
    return {*seen, *(_canonical(s, hydrogens=True) for s in [*texts, *graphs])}


def _canonical(smiles: str, hydrogens: bool = False) -> str | None:
    """The key of a SMILES under the corrected rule, or under EDM's, which lists hydrogens."""
    with rdBase.BlockLogs():
        mol = Chem.MolFromSmiles(smiles)
    if mol is None:
        return None
    return Chem.MolToSmiles(Chem.AddHs(mol) if hydrogens else mol, isomericSmiles=False)


def _scores(
    verdicts: Verdicts, n: int, seen: set[str | None] | None, suffix: str
) -> dict[str, Estimate]:
    valid = [s for s in verdicts.smiles if s is not None]
    unique = set(valid)
    scores = {
        "atom_stability": ratio(verdicts.stable_atoms, verdicts.atoms),
        "molecule_stability": proportion(int(verdicts.stable.sum()), n),
        "validity": proportion(len(valid), n),
        "connected": proportion(int((verdicts.fragments == 1).sum()), n),
        "uniqueness": proportion(len(unique), len(valid)),
        "valid_and_unique": proportion(len(unique), n),
    }
    if seen is not None:
        scores["novelty"] = proportion(len(unique - seen), len(unique))
    return {name + suffix: estimate for name, estimate in scores.items()}


def ratio(parts: np.ndarray, totals: np.ndarray) -> Estimate:
    """Sum of parts over sum of totals, both [molecules]; n counts the totals. The interval is the
    linearised one of a ratio over molecules; where all molecules agree exactly, Wilson's for as
    many molecules.

    Raises:
        ValueError: a part that is not between 0 and its total (NaN included).
    """
    if not ((parts >= 0) & (parts <= totals)).all():
        raise ValueError("ratio: every part must lie between 0 and its total")
    n, m = int(totals.sum()), len(totals)
    if n == 0:
        return proportion(0, 0)
    value = float(parts.sum() / n)
    residuals = (parts - value * totals) * m / n
    if m > 1 and np.abs(residuals).max() > 1e-12:
        spread = mean(residuals)
        return Estimate(value, n, max(0.0, value + spread.low), min(1.0, value + spread.high))
    wilson = proportion(round(value * m), m)
    return Estimate(value, n, min(wilson.low, value), max(wilson.high, value))


def _check_items(items: Sequence[object], reference: object) -> None:
    if isinstance(reference, str):
        raise TypeError("evaluate: reference is a text: read files with molediff.read")
    odd = [item for item in items if not isinstance(item, (Molecule, Invalid))]
    if odd:
        raise TypeError(f"evaluate: {odd[0]!r:.40} is no Molecule: read files with molediff.read")


def _check_extras(extras: Sequence[str], has_reference: bool, has_molecules: bool) -> None:
    for name in extras:
        if name not in EXTRAS:
            raise ValueError(f"extras: {name!r} is none of {', '.join(EXTRAS)}")
        if (name == "fcd" and not has_reference) or (name == "shape" and not has_molecules):
            raise ValueError(f"extras: {name!r} compares with data: give reference molecules")


def _extra_scores(
    extras: Sequence[str],
    generated: tuple[list[Molecule], list[str]],
    reference: tuple[list[Molecule], list[str]],
    perception: str,
) -> dict[str, Estimate]:
    from molediff.geometric import optional  # its packages are slow to import

    scores: dict[str, Estimate] = {}
    if "fcd" in extras:
        scores["fcd"] = optional.fcd(generated[1], reference[1])
    if "posebusters" in extras:
        scores["posebusters"] = optional.posebusters(generated[0], perception)
    if "strain" in extras:
        scores |= optional.strain(generated[0])
    if "shape" in extras:
        scores |= shape_distances(generated[0], reference[0], perception)
    return scores
