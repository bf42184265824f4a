from __future__ import annotations

import numpy as np
import pytest
import torch
from rdkit import Chem
from rdkit.Chem import AllChem

import molediff
from molediff import Invalid, Molecule
from molediff.geometric.domain import Molecules
from molediff.geometric.models import egnn, gdm, tensor_products, transformer
from molediff.geometric.prepare import prepare
from molediff.geometric.records import Record
from shared.configuration import build, option
from shared.models import settled
from shared.schedules import Polynomial
from shared.solvers import Heun, LogSNRTimes, PowerTimes

SMILES = ["CCO", "CC(=O)N", "C1CCCC1", "c1ccccc1", "CC#N", "O", "NCC(=O)O", "CCN", "CO", "C=O"]


def embedded(smiles: str) -> Molecule:
    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    AllChem.EmbedMolecule(mol, randomSeed=7)
    AllChem.MMFFOptimizeMolecule(mol)
    return Molecule.from_rdkit(mol)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("molecules")
    molecules = [embedded(s).replace(properties={"score": float(len(s))}) for s in SMILES]
    molediff.write(base / "mine.sdf", molecules)
    prepare(base / "mine.sdf", base / "data", fractions=(0.8, 0.2, 0.0))
    return base / "data"


@pytest.fixture(scope="module")
def domain(folder):
    return Molecules(str(folder))


def test_records_become_batches_and_molecules_again(domain):
    training, _ = domain.datasets()
    records = [training[i] for i in range(len(training))]
    batch = domain.collate(records)
    real = batch.mask.sum(1)
    assert real.tolist() == [len(r.elements) for r in records]
    x, types = batch.state["positions"], batch.state["types"]
    assert float(x.sum(1).abs().max()) < 1e-4
    assert torch.equal(types.sum(-1), domain.scale * batch.mask.float())
    for record, item in zip(records, domain.decode(batch.state, batch.mask), strict=True):
        numbers = np.asarray(domain.elements)[record.elements]
        assert item.atomic_numbers.tolist() == numbers.tolist()
        np.testing.assert_allclose(
            item.positions, record.positions - record.positions.mean(0), atol=1e-5
        )
        assert item.smiles()


def test_constants_travel_without_the_data(domain):
    restored = Molecules()
    restored.restore(domain.statistics())
    assert restored.elements == domain.elements == (1, 6, 7, 8)
    assert restored.statistics() == domain.statistics()
    seen = restored.template(3, range(200))
    sizes = {int(n) for n in domain.statistics()["sizes"]}
    assert set(seen.mask.sum(1).tolist()) <= sizes
    assert len(set(seen.mask.sum(1).tolist())) > 3
    with pytest.raises(ValueError, match="domain digits"):
        restored.restore({"domain": "digits"})


def test_the_size_of_a_sample_does_not_depend_on_its_batch(domain):
    together = domain.template(5, range(20)).mask.sum(1)
    for i in range(20):
        alone = domain.template(5, [i])
        assert alone.state["types"].shape[1] == int(together[i])
    asked = domain.template(5, [0, 1], atoms=7)
    assert asked.state["positions"].shape == (2, 7, 3)
    assert asked.mask is None
    assert domain.template(5, [0], atoms=np.int64(7)).state["positions"].shape == (1, 7, 3)


@pytest.mark.parametrize("request_", [{"atoms": 0}, {"atoms": "many"}, {"atom": 5}])
def test_impossible_requests_are_refused(domain, request_):
    with pytest.raises(ValueError, match="atom"):
        domain.template(0, [0], **request_)


def test_data_with_other_elements_do_not_suit_a_model(domain, folder):
    other = Molecules(str(folder))
    other.restore(domain.statistics() | {"elements": ["H", "C", "O"]})
    with pytest.raises(ValueError, match="holds N; the model knows H, C, O"):
        other.datasets()


def test_a_property_that_never_differs_is_refused(tmp_path):
    molecules = [embedded(s).replace(properties={"one": 1.0}) for s in SMILES[:4]]
    some = [embedded("CO").replace(properties={"rare": 2.0}), *molecules]
    molediff.write(tmp_path / "mine.sdf", some)
    prepare(tmp_path / "mine.sdf", tmp_path / "data", fractions=(0.8, 0.2, 0.0))
    for name in ("one", "rare"):
        with pytest.raises(ValueError, match=f"{name} has no two different values"):
            Molecules(str(tmp_path / "data"), properties=[name]).datasets()


def test_single_atoms_have_a_scale(tmp_path):
    atoms = [Molecule(np.array([z]), np.zeros((1, 3))) for z in (2, 10, 18, 36, 54)]
    molediff.write(tmp_path / "noble.xyz", atoms)
    prepare(tmp_path / "noble.xyz", tmp_path / "data")
    assert Molecules(str(tmp_path / "data")).position_std == 1.0


def test_a_model_without_data_says_what_to_do():
    with pytest.raises(ValueError, match="molediff data prepare"):
        Molecules().datasets()
    with pytest.raises(ValueError, match="charges='both'"):
        Molecules(charges="both")


def test_unreadable_samples_are_reported_or_kept_without_bonds(domain):
    batch = domain.template(0, [0, 1], atoms=3)
    state = {name: torch.zeros_like(value) for name, value in batch.state.items()}
    state["types"][..., 1] = domain.scale
    state["positions"][0, :, 0] = torch.tensor([0.0, 50.0, 100.0])
    state["positions"][1] = torch.nan
    far, broken = domain.decode(state, None)
    assert isinstance(far, Molecule)
    assert isinstance(broken, Invalid)
    assert "finite" in broken.reason


def test_charges_make_the_round_trip(folder):
    ammonium = embedded("[NH4+]")
    place = {1: 0, 6: 1, 7: 2, 8: 3}
    elements = np.array([place[z] for z in ammonium.atomic_numbers.tolist()])
    record = Record(elements, np.array(ammonium.positions), np.asarray(ammonium.charges))
    formal = Molecules(str(folder), charges="formal")
    batch = formal.collate([record])
    (back,) = formal.decode(batch.state, batch.mask)
    assert back.charges.tolist() == ammonium.charges.tolist()
    assert "+" in back.smiles()
    batch.state["charges"][..., 0] = 0.9  # of a model that has learnt little
    (back,) = formal.decode(batch.state, batch.mask)
    assert back.charges.tolist() == [7, 1, 1, 1, 1]
    nuclear = Molecules(str(folder), charges="nuclear")
    numbers = nuclear.collate([record]).state["charges"][0, :, 0] / nuclear.charge_scale
    np.testing.assert_allclose(numbers.numpy(), ammonium.atomic_numbers, rtol=1e-6)


MODELS = [
    (transformer, {"width": 16, "layers": 1, "heads": 2, "vectors": 4, "pairs": 8}),
    (egnn, {"width": 16, "layers": 1}),
    (gdm, {"width": 16, "layers": 1}),
    (tensor_products, {"scalars": 8, "vectors": 4, "tensors": 2, "layers": 1}),
]


@pytest.mark.parametrize(("build", "options"), MODELS)
def test_every_model_is_told_the_properties(folder, build, options):
    domain = Molecules(str(folder), properties=["score"])
    assert build(domain, Polynomial(), **options).backbone.context


@pytest.mark.parametrize(("build", "options"), MODELS)
@pytest.mark.parametrize("charges", [None, "formal"])
def test_every_model_trains_on_the_domain(folder, build, options, charges):
    domain = Molecules(str(folder), charges=charges)
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        denoiser = build(domain, Polynomial(), **options)
    training, _ = domain.datasets()
    batch = domain.collate([training[i] for i in range(4)])
    process = denoiser.process
    generator = torch.Generator().manual_seed(0)
    white = {k: torch.randn(v.shape, generator=generator) for k, v in batch.state.items()}
    t = denoiser.times(process.lead, 4, generator)
    loss = denoiser.loss(batch.state, process.noise(white, batch.mask), t, batch.mask)
    assert loss.shape == (4,)
    loss.mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in denoiser.parameters() if p.grad is not None)
    assert any(p.grad.abs().sum() > 0 for p in denoiser.parameters() if p.grad is not None)


def test_files_metrics_and_views(domain, tmp_path):
    molecules = [embedded(s) for s in SMILES[:4]]
    domain.write(tmp_path / f"out{domain.suffix}", molecules)
    back = list(domain.read(tmp_path / "out.sdf"))
    assert [m.smiles() for m in back] == [m.smiles() for m in molecules]
    scores = domain.metrics([*back, Invalid("4", "broken")])
    assert scores["read"].value == pytest.approx(4 / 5)
    assert scores["molecule_stability"].n == 5
    page = domain.view(back)
    assert page.count("scatter3d") >= 4
    assert "<svg" in page
    assert 'src="http' not in page
    assert "No molecules" in domain.view([])


@pytest.mark.parametrize(
    ("solver", "grid"),
    [("auto", PowerTimes), ("dpmpp_3m_sde", PowerTimes), ("heun", LogSNRTimes),
     ("edm_stochastic", LogSNRTimes), ("dpm_solver_fast", LogSNRTimes), (Heun(), LogSNRTimes)],
)  # fmt: skip
def test_the_grid_suits_the_solver(solver, grid):
    model = molediff.load("qm9")
    assert isinstance(model.chosen(solver, "auto", 20)[1], grid)
    assert isinstance(model.chosen(solver, "time_quadratic", 20)[1], PowerTimes)


@pytest.mark.parametrize(("solver", "grid"), [("auto", PowerTimes), ("heun", LogSNRTimes)])
def test_the_grid_of_samples_scored_in_training_suits_the_solver(solver, grid):
    words = {name: option(name, word) for name, word in (("solver", solver), ("grid", "auto"))}
    chosen = settled({**words, "steps": 50}, Molecules())
    assert isinstance(build(chosen["grid"]), grid)
