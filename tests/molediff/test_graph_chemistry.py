"""Metrics of molecules known as graphs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rdkit import Chem

from molediff.graphs.chemistry import labelled, molecule_metrics
from molediff.graphs.metrics import nspdk_mmd
from molediff.molecules import Molecule
from shared.domains import Invalid

NSPDK = Path(__file__).resolve().parents[2].parent / "shared" / "golden" / "11_gdss_nspdk.json"


def molecules(*smiles: str) -> list[Molecule]:
    return [Molecule.from_rdkit(Chem.MolFromSmiles(s)) for s in smiles]


@pytest.mark.golden
@pytest.mark.skipif(not NSPDK.exists(), reason="published outputs are not on this machine")
def test_published_nspdk_within_the_scatter_of_its_hashes() -> None:
    about = json.loads(NSPDK.read_text())
    for name, sets in about["sets"].items():
        goal, made = (
            [labelled(m, kekulise=True) for m in molecules(*sets[key])] for key in ("ref", "pred")
        )
        published = [values[name] for values in about["values"].values()]
        found = float(nspdk_mmd(goal, made))
        assert abs(found - np.mean(published)) < 0.02 * np.mean(published)


def test_labels() -> None:
    benzene, kekule = (labelled(*molecules("c1ccccc1"), kekulise=k) for k in (False, True))
    orders = [sorted(d for _, _, d in g.edges(data="label")) for g in (benzene, kekule)]
    assert orders == [[1] * 6, [1, 1, 1, 2, 2, 2]]
    chloride = labelled(*molecules("CCl"))
    assert sorted(d for _, d in chloride.nodes(data="label")) == ["C", "Cl"]


def test_shares() -> None:
    made = [
        m.replace(properties={"valid_without_correction": flag})
        for m, flag in zip(molecules("CCO", "OCC", "c1ccccc1", "CN"), (1, 1, 0, 1), strict=True)
    ]
    found = molecule_metrics(
        [*made, Invalid("4", "no atoms")], None, molecules("CCO", "CCC"), frechet=False
    )
    values = {key: float(value) for key, value in found.items()}
    assert values == pytest.approx(
        {"valid": 0.8, "valid_without_correction": 0.6, "unique": 0.75, "novel": 2 / 3}
    )
    assert found["valid"].n == 5
    nothing = molecule_metrics([Invalid("0", "no atoms")], molecules("C"))
    assert float(nothing["valid"]) == 0.0
    assert np.isnan(float(nothing["unique"]))


def test_distance_to_a_reference() -> None:
    reference = molecules("CCO", "CCN", "CCC", "OCCO")
    same = molecule_metrics(reference, reference, frechet=False)
    other = molecule_metrics(molecules("C#N", "FC(F)F"), reference, frechet=False)
    assert float(same["nspdk"]) == pytest.approx(0.0, abs=1e-12)
    assert float(other["nspdk"]) > 0.1
