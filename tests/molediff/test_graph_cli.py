"""Graphs from the command line: train, sample, convert, evaluate, guide."""

from __future__ import annotations

import json

import networkx as nx
import numpy as np
import pytest
import torch
from test_graph_convert import zinc

from molediff.cli import PROGRAM
from molediff.files import read
from molediff.graphs.data import read_graphs, write_graphs
from shared import cli
from shared.models import load

TINY = (
    "trainer.max_steps=3", "trainer.batch_size=4", "trainer.progress=false",
    "trainer.accelerator=cpu", "seed=0",
)  # fmt: skip
NETWORK = ("model.node_depth=2", "model.edge_depth=2", "model.hidden=8", "model.attention=8")
SMILES = ("CCO", "C1CC1", "CC(=O)C", "CN", "C#N", "CCF", "OCCO", "CCC", "CNC", "c1ccccc1")


@pytest.fixture
def command(capsys):
    def run(*words) -> tuple[int, str, str]:
        status = cli.main(PROGRAM, [str(word) for word in words])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "molecules.csv"
    path.write_text("smiles\n" + "\n".join(SMILES * 3) + "\n")
    return path


def test_graphs_from_training_to_metrics(command, tmp_path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    words = ("train", "experiment=gdss_community_small", "domain.n=20", f"out={run}")
    status, _, err = command(*words, *TINY, *NETWORK)
    assert status == 0, err
    model = load(run)
    assert model.denoiser.process.fields["edges"].prior_std != 1.0  # corrected for new models
    status, said, err = command("sample", f"run={run}", "n=5", "steps=4", "seed=1", f"out={out}")
    assert status == 0, err
    assert "4 denoiser calls" in said
    settings = json.loads((out / "settings.json").read_text())
    assert settings["solver"]["_target_"] == "shared.solvers.SymmetricSplitting"
    assert settings["grid"]["t_end"] == 0.01
    reference = tmp_path / "reference.g6"
    write_graphs(reference, [nx.path_graph(n) for n in (4, 5, 6)])
    status, said, err = command("evaluate", out, f"reference={reference}")
    assert status == 0, err
    assert {"degree", "clustering", "orbit", "spectrum"} <= {
        x.partition(":")[0] for x in said.splitlines()
    }
    dense = tmp_path / "dense"
    words = ("sample", f"run={run}", "n=5", "steps=6", "seed=1", "solver=dpmpp_2m")
    status, _, err = command(
        *words, "guidance=graph_density", "guidance.target=0.9", f"out={dense}"
    )
    assert status == 0, err


def test_molecules_and_a_property(command, table, tmp_path) -> None:
    run, qed, out = tmp_path / "run", tmp_path / "qed", tmp_path / "out"
    words = (f"domain.data={table}", *TINY)
    status, _, err = command("train", "experiment=gdss_qm9", f"out={run}", *words, *NETWORK)
    assert status == 0, err
    status, _, err = command("train", "experiment=gdss_qm9_qed", f"out={qed}", *words)
    assert status == 0, err
    words = ("sample", f"run={run}", "n=4", "steps=4", "seed=0", f"out={out}")
    guide = ("guidance=graph_property", f"guidance.run={qed}")
    status, _, err = command(*words, *guide, "guidance.target=0.9")
    assert status == 0, err
    assert command("evaluate", out)[0] == 0
    status, _, err = command(*words[:-1], *guide, "guidance.property=logp")
    assert (status, "guidance.property=logp" in err) == (2, True)
    status, _, err = command(*words[:-1], "guidance=graph_property", f"guidance.run={run}")
    assert (status, "model=gdss_property" in err) == (2, True)


def test_a_converted_model_samples_as_published(command, tmp_path) -> None:
    file, run, out = tmp_path / "mine.pth", tmp_path / "run", tmp_path / "out"
    content = zinc()
    for key in ("x_state_dict", "adj_state_dict"):
        content[key] = {name: 0.05 * value for name, value in content[key].items()}
    torch.save(content, file)
    status, said, _ = command("convert", file, f"out={run}")
    assert status == 0
    assert "sizes=DATA" in said
    words = ("sample", f"run={run}", "n=2", "seed=0")
    status, _, err = command(*words, f"out={out}", "steps=6")
    assert status == 0, err
    settings = json.loads((out / "settings.json").read_text())
    assert settings["solver"]["corrector"] == {
        "_target_": "shared.solvers.Langevin", "snr": 0.2, "steps": 1, "noise_scale": 0.8,
        "rule": "batch",
    }  # fmt: skip
    assert settings["grid"] == {"_target_": "shared.solvers.ScoreSDETimes", "eps": 1e-4}
    assert load(run).checkpoint.config["steps"] == 2000
    for solver in ("dpmpp_2m", "s4", "unipc"):
        status, _, err = command(*words, f"solver={solver}", "steps=4", f"out={tmp_path / solver}")
        assert status == 0, err
    table = tmp_path / "table.smi"
    table.write_text("CCO\nCCCO\n")
    status, said, _ = command("convert", file, f"out={tmp_path / 'sized'}", f"sizes={table}")
    assert status == 0
    assert load(tmp_path / "sized").domain.sizes == {3: 1, 4: 1}


def test_export_leaves_out_what_the_format_cannot_hold(command, tmp_path) -> None:
    (tmp_path / "one.xyz").write_text("2\n\nH 0 0 0\nH 0 0 0.74\n")
    target = tmp_path / "made.smi"
    status, _, err = command("export", tmp_path / "one.xyz", f"to={target}", "domain=molecules")
    assert (status, "nothing to export" in err, "bonds" in err) == (2, True, True)
    assert not target.exists()
    (tmp_path / "two.smi").write_text("CCO\nnonsense\n")
    words = ("export", tmp_path / "two.smi", f"to={tmp_path / 'made.csv'}", "domain=molecules")
    status, said, _ = command(*words)
    assert (status, said.splitlines()[0]) == (0, f"1 items: {tmp_path / 'made.csv'}")
    assert "1 left out: not read: 'nonsense'" in said
    assert [f.name for f in tmp_path.glob("*made*")] == ["made.csv"]


def test_exports_with_coordinates(command, tmp_path) -> None:
    samples = tmp_path / "made.csv"
    samples.write_text("smiles\nCCO\nc1ccccc1O\n")
    for dimensions, atoms in ((2, 3), (3, 9)):
        target = tmp_path / f"made{dimensions}.sdf"
        status, said, err = command(
            "export", samples, f"to={target}", f"dimensions={dimensions}",
            "domain=molecular_graphs",
        )  # fmt: skip
        assert (status, said) == (0, f"2 items: {target}\n"), err
        first = next(iter(read(target)))
        assert len(first.atomic_numbers) == atoms
        flat = bool((first.positions[:, 2] == 0.0).all())
        assert flat == (dimensions == 2)
        assert np.ptp(first.positions) > 1.0
    write_graphs(tmp_path / "graphs.g6", [nx.path_graph(4), nx.cycle_graph(5)])
    words = ("export", tmp_path / "graphs.g6", f"to={tmp_path / 'graphs.graphml'}")
    assert command(*words, "domain=graphs")[0] == 0
    assert [len(g) for g in read_graphs(tmp_path / "graphs.graphml")] == [4, 5]
    status, _, err = command(*words, "domain=graphs")
    assert (status, "exists already" in err) == (2, True)
    status, _, err = command(*words[:2], "to=x.graphml", "domain=graphs", "dimensions=3")
    assert (status, "dimensions=3" in err) == (2, True)
