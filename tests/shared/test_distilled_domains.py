"""Distillation of molecules, graphs and point clouds: the same functions, on their geometries."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rdkit import Chem
from rdkit.Chem import AllChem

import molediff
from molediff import Molecule
from molediff.cli import PROGRAM
from molediff.geometric.domain import Molecules
from molediff.geometric.models import egnn
from molediff.geometric.prepare import prepare
from molediff.graphs.domain import GraphDomain
from molediff.graphs.models import graph_denoiser
from pointdiff.domain import Completion
from pointdiff.models import latents
from pointdiff.scanning import Scanner
from shared import cli
from shared.batches import Batches
from shared.distillation import distilled, progressive_loss
from shared.sampling import Memory, sample
from shared.schedules import Polynomial, VPCosine, VPLinear
from shared.solvers import DDIM, Consistency, PowerTimes


def molecules(folder):
    found = []
    for smiles in ("CCO", "O", "CC#N", "CO"):
        mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
        AllChem.EmbedMolecule(mol, randomSeed=7)
        labels = dict.fromkeys(("mu", "alpha", "homo", "lumo", "gap", "cv"), float(len(smiles)))
        found.append(Molecule.from_rdkit(mol).replace(properties=labels))
    molediff.write(folder / "mine.sdf", found)
    prepare(folder / "mine.sdf", folder / "data", fractions=(0.8, 0.2, 0.0))
    domain = Molecules(str(folder / "data"))
    return domain, egnn(domain, Polynomial(), width=16, layers=1)


def graphs(folder):
    domain = GraphDomain("community_small", n=20)
    return domain, graph_denoiser(domain, VPLinear())


def points(folder):
    x = np.random.default_rng(0).normal(size=(8, 200, 3)).clip(-2, 2) * 4000
    split = np.array([0] * 6 + [1] * 2, np.int8)
    content = {"scale": np.float32(1e-4), "split": split, "duplicate_group": np.arange(8)}
    np.savez(folder / "shapes.npz", points=np.rint(x).astype(np.int16), **content)
    scanner = Scanner(points=16)
    domain = Completion(str(folder / "shapes.npz"), points=24, scan=scanner, validation=0.2)
    options = {"points": 8, "width": 16, "heads": 2, "latents": 4, "blocks": 1}
    return domain, latents(domain, VPCosine(), tokens=8, scan_layers=1, **options)


@pytest.fixture(scope="module", params=[molecules, graphs, points])
def case(request, tmp_path_factory):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        domain, denoiser = request.param(tmp_path_factory.mktemp("data"))
        for parameter in denoiser.parameters():  # a new network may give nothing but zeros
            torch.nn.init.normal_(parameter, std=0.05)
    return domain, denoiser, Batches(domain, denoiser.process, domain.datasets()[0], 4, 0)


def test_a_student_of_half_the_steps_comes_closer_to_its_teacher(case):
    domain, denoiser, batches = case
    grid = PowerTimes()
    # graphs predict the noise, of which the estimate at the first times is a steep function
    lr = 1e-4 if isinstance(domain, GraphDomain) else 3e-3
    student = distilled(denoiser, batches, grid, 2, 4, 12, lr)
    times = grid(denoiser.process.lead, 4)

    def loss(model):
        found = progressive_loss(denoiser, model, times)
        with torch.no_grad():
            return float(torch.stack([found(batches[k], k).mean() for k in range(12)]).mean())

    assert loss(student) < 0.99 * loss(denoiser)
    assert made(domain, student, DDIM(), 2) == 2


@pytest.mark.parametrize("method", ["consistency", "consistency_training"])
def test_a_consistency_model_trains_and_samples(case, method):
    domain, denoiser, batches = case
    student = distilled(denoiser, batches, PowerTimes(), 1, 4, 2, 1e-4, method)
    old = dict(denoiser.named_parameters())
    moved = [n for n, p in student.named_parameters() if not torch.equal(p, old[n])]
    assert moved
    assert all(torch.isfinite(p).all() for p in student.parameters())
    assert made(domain, student, Consistency(), 1) == 2


def made(domain, student, solver, steps):
    """How many of two samples come out, decoded or refused by the domain."""
    sink, process = Memory(), student.process
    summary = sample(student, process, domain, 2, solver, steps, PowerTimes(), 0, sink=sink)
    return len(sink.items) - summary.failed


def test_a_shipped_model_is_distilled_on_the_data_of_the_user(tmp_path, capsys):
    molecules(tmp_path)
    words = ["distill", "run=qm9", "steps=2", "first=4", "updates=1", "batch=2"]
    words.append(f"out={tmp_path / 'few'}")
    assert cli.main(PROGRAM, words) == 2
    assert "data" in capsys.readouterr().err
    assert not (tmp_path / "few").exists()
    assert cli.main(PROGRAM, [*words, f"data={tmp_path / 'data'}"]) == 0
    model = molediff.load(tmp_path / "few")
    assert model.generate(2, seed=0).summary.nfe == 2
