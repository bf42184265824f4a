from __future__ import annotations

import numpy as np
import pytest
import torch
from rdkit import Chem, DataStructs
from rdkit.Chem import AllChem

import molediff
from molediff import Molecule
from molediff.fingerprints import BITS, default_kind, fingerprint, read_structure, tanimoto
from molediff.geometric.fingerprints import FingerprintMolecules
from molediff.geometric.models import property_transformer
from molediff.geometric.prepare import prepare
from shared.configuration import ConfigurationError
from shared.randomness import Draws
from shared.schedules import Polynomial

SMILES = ["CCO", "CC(=O)N", "C1CCCC1", "c1ccccc1", "CC#N", "CCN"]


def embedded(smiles: str) -> Molecule:
    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    AllChem.EmbedMolecule(mol, randomSeed=7)
    return Molecule.from_rdkit(mol)


@pytest.mark.parametrize("kind", ["paths", "morgan"])
def test_a_fingerprint_is_of_the_structure(kind):
    bits = fingerprint("CC(=O)N", kind)
    assert bits.shape == (BITS,)
    assert set(bits.tolist()) == {0, 1}
    for other in ("NC(C)=O", embedded("CC(=O)N")):
        np.testing.assert_array_equal(fingerprint(other, kind), bits)
    assert (fingerprint("CCO", kind) != bits).any()


def test_paths_are_those_of_rdkit():
    want = Chem.RDKFingerprint(Chem.MolFromSmiles("CC(=O)N"), fpSize=BITS, maxPath=7)
    array = np.zeros(BITS, np.uint8)
    DataStructs.ConvertToNumpyArray(want, array)
    assert fingerprint("CC(=O)N").sum() == array.sum()
    assert float(tanimoto(fingerprint("CC(=O)N"), array)) == 1.0


def test_fp2_needs_open_babel():
    if default_kind() == "fp2":
        assert 0 < fingerprint("CC(=O)N", "fp2").sum() < 100
    else:
        with pytest.raises(ModuleNotFoundError, match="pip install openbabel-wheel"):
            fingerprint("CCO", "fp2")
    with pytest.raises(ValueError, match="choose one of fp2, paths, morgan"):
        fingerprint("CCO", "maccs")


def test_tanimoto():
    a = np.array([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]])
    b = np.array([[1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(tanimoto(a, b), [1 / 3, 1.0, 0.0])


def test_structures_from_words_and_files(tmp_path):
    assert read_structure("CCO").smiles() == "CCO"
    molediff.write(tmp_path / "one.sdf", [embedded("CCN")])
    assert read_structure(str(tmp_path / "one.sdf")).smiles() == "CCN"
    molediff.write(tmp_path / "one.xyz", [embedded("CCN")])
    with pytest.raises(ConfigurationError, match=r"bonds are unknown.*; give SMILES or a file"):
        read_structure(str(tmp_path / "one.xyz"))
    with pytest.raises(ConfigurationError, match="similar to 'C1CC': 'C1CC' is not a SMILES"):
        read_structure("C1CC")


@pytest.fixture(scope="module")
def domain(tmp_path_factory):
    base = tmp_path_factory.mktemp("fingerprints")
    molediff.write(base / "mine.sdf", [embedded(s) for s in SMILES])
    prepare(base / "mine.sdf", base / "data", fractions=(0.8, 0.2, 0.0))
    return FingerprintMolecules(str(base / "data"), "paths")


def test_training_on_fingerprints(domain):
    """The network learns a few molecules by heart."""
    records, _ = domain.datasets()
    batch = domain.collate([records[i] for i in range(len(records))])
    want = np.stack([fingerprint(s) for s in records.data.smiles()])
    np.testing.assert_array_equal(batch.cond["context"].numpy(), want)
    options = {"width": 32, "layers": 2, "heads": 2, "vectors": 4, "pairs": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = property_transformer(domain, Polynomial(), loss="bits", **options)
    draws, process = Draws(0, range(len(batch))), model.process
    noise = {
        n: draws.normal(n, 0, v, process.fields[n].geometry, batch.mask)
        for n, v in batch.state.items()
    }
    t = torch.full((len(batch),), 0.05, dtype=torch.float64)
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-2)
    losses = []
    for _ in range(60):
        loss = model.loss(batch.state, noise, t, batch.mask, batch.cond).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(np.log(2.0), rel=0.2)
    assert losses[-1] < 0.03
    with torch.no_grad():
        logits = model.predict(process.perturb(batch.state, t, noise), 0.05, batch.mask)
    assert logits.shape == (len(batch), BITS)
    similar = tanimoto(logits[:, None].numpy() > 0.0, want[None])
    assert similar.argmax(1).tolist() == list(range(len(batch)))


def test_the_kind_travels_with_the_weights(domain):
    statistics = domain.statistics()
    assert statistics["context"] == []
    other = FingerprintMolecules(kind="morgan")
    other.restore(statistics)
    assert other.kind == "paths"
    assert len(other.properties) == BITS
    with pytest.raises(ValueError, match="predicts no fingerprints"):
        other.restore({k: v for k, v in statistics.items() if k != "fingerprint"})
