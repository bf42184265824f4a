"""From arrays to graphs and molecules."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest
import torch
from rdkit import Chem

from molediff.graphs.decode import (
    Decoded,
    atom_types,
    bond_orders,
    construct,
    correct,
    decode_graph,
    decode_molecule,
    with_coordinates,
)
from shared.domains import Invalid

CNOF = (6, 7, 8, 9)


def arrays(numbers: str, bonds: list[tuple[int, int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    nodes = torch.zeros(len(numbers), 4)
    for i, symbol in enumerate(numbers):
        if symbol in "CNOF":
            nodes[i, "CNOF".index(symbol)] = 1.0
    edges = torch.zeros(len(numbers), len(numbers))
    for i, j, order in bonds:
        edges[i, j] = edges[j, i] = order
    return nodes, edges


@pytest.mark.golden
def test_published_decoding(golden) -> None:
    tensors, about = golden("11_gdss_decode_qm9")
    assert torch.equal(bond_orders(tensors["adj_raw"]), tensors["adj_int"].long())
    assert torch.equal(atom_types(tensors["x_raw"]), tensors["atom_onehot"].argmax(-1))
    for i, smiles in enumerate(about["smiles"]):
        found = decode_molecule(tensors["x_raw"][i], tensors["adj_raw"][i], CNOF)
        assert Chem.MolToSmiles(found.molecule.to_rdkit()) == smiles, i
        assert found.valid_without_correction == bool(tensors["valid_wo_correction"][i]), i


def test_rounding() -> None:
    raw = torch.tensor([-3.0, 0.49, 0.5, 1.49, 1.5, 2.49, 2.5, 9.0])
    assert bond_orders(raw).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    rows = torch.tensor([[0.4, 0.1], [0.6, 0.2], [0.7, 0.9], [0.2, 0.51]])
    assert atom_types(rows).tolist() == [2, 0, 0, 1]


def test_valences() -> None:
    ammonium = construct([7, 6, 6, 6, 6], [[0] * 5, *[[1] + [0] * 4] * 4])
    assert ammonium.GetAtomWithIdx(0).GetFormalCharge() == 1
    five = construct([6] * 6, [[0] * 6, *[[1] + [0] * 5] * 5])
    assert correct(five)
    assert five.GetAtomWithIdx(0).GetDegree() == 4


def test_validity_before_and_after_correction() -> None:
    good = decode_molecule(*arrays("CCO", [(0, 1, 1), (1, 2, 1)]), CNOF)
    assert isinstance(good, Decoded)
    assert good.valid_without_correction
    assert good.molecule.smiles() == "CCO"
    bad = decode_molecule(*arrays("FFC", [(0, 1, 2), (1, 2, 1)]), CNOF)
    assert isinstance(bad, Decoded)
    assert not bad.valid_without_correction
    assert bad.molecule.smiles() in ("CF", "FF")


def test_largest_fragment_and_missing_atoms() -> None:
    parts = decode_molecule(*arrays("CCOFC", [(0, 1, 1), (1, 2, 1), (3, 4, 1)]), CNOF)
    assert parts.molecule.smiles() == "CCO"
    hole = decode_molecule(*arrays("C?C", [(0, 1, 1), (1, 2, 1), (0, 2, 2)]), CNOF)
    assert hole.molecule.smiles() == "C=C"
    nothing = decode_molecule(*arrays("??", []), CNOF, "7")
    assert nothing == Invalid("7", "no atoms")


def test_graphs() -> None:
    noisy = torch.tensor([[0.9, 0.6, 0.1, 0.0], [0.6, 0, 0.49, 0], [0.1, 0.49, 0, 0], [0.0] * 4])
    graph = decode_graph(noisy)
    assert nx.utils.graphs_equal(graph, nx.path_graph(2))
    assert len(decode_graph(torch.zeros(3, 3))) == 1
    masked = decode_graph(torch.ones(4, 4), torch.tensor([True, True, True, False]))
    assert nx.utils.graphs_equal(masked, nx.complete_graph(3))


def test_coordinates() -> None:
    molecule = decode_molecule(*arrays("CCO", [(0, 1, 1), (1, 2, 1)]), CNOF).molecule
    flat = with_coordinates(molecule.replace(properties={"a": 1}))
    assert flat.positions.shape == (3, 3)
    assert np.abs(flat.positions[:, 2]).max() == 0.0
    assert flat.properties["a"] == 1
    solid = with_coordinates(molecule, 3, seed=1)
    assert len(solid) == 9
    assert np.abs(solid.positions[:, 2]).max() > 0.1
    assert np.array_equal(solid.positions, with_coordinates(molecule, 3, seed=1).positions)
    with pytest.raises(ValueError, match="2 or 3"):
        with_coordinates(molecule, 4)
