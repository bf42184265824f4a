import numpy as np
import pytest
import torch

from pointdiff import load
from pointdiff.cli import PROGRAM
from pointdiff.completion import Completer
from pointdiff.files import read_one, write_one
from shared import cli

TINY = """
model.noisy={points:[16,8],radii:[0.5,1.0],widths:[8,8,16],decoder:[8,8,16],neighbours:4,k:4}
model.partial={points:[16,8],radii:[0.5,1.0],widths:[8,8,16],decoder:[8,8,16],neighbours:4,k:4}
model.transfer={encoder:[8,8],decoder:[8,8,8],encoder_radii:[0.5,1],decoder_radii:[0.5,1,2],neighbours:4}
model.whole=[[4,8,8],[8,16]]
model.time=8
domain.points=64
domain.scan.points=32
trainer.max_steps=2
trainer.batch_size=2
trainer.validation_batches=1
trainer.progress=false
seed=0
""".split()


def run(*words):
    return cli.main(PROGRAM, [str(word) for word in words])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with shapes, a scan and a model that was trained for two steps."""
    folder = tmp_path_factory.mktemp("completion")
    x = np.random.default_rng(0).normal(size=(8, 300, 3)).astype(np.float32)
    x /= np.linalg.norm(x, axis=2, keepdims=True)
    np.savez(folder / "shapes.npz", points=x, split=np.array([0] * 6 + [1] * 2))
    write_one(folder / "scan.ply", 5 * x[0, :150] + 100)
    data = f"domain.data={folder / 'shapes.npz'}"
    assert run("train", "experiment=completion_small", data, f"out={folder / 'run'}", *TINY) == 0
    return folder


def test_completions_are_in_the_coordinates_of_the_scan(made):
    scan = read_one(made / "scan.ply")
    completer = load(made / "run")
    first, second = completer.complete(scan, 2, steps=3, seed=1)
    assert first.shape == second.shape == (64, 3)
    assert first.dtype == np.float32
    assert not np.array_equal(first, second)
    again = completer.complete(scan * 2 - 30, 1, steps=3, seed=1)[0]
    np.testing.assert_allclose(again, first * 2 - 30, rtol=1e-3)
    assert completer.complete(scan, points=40, steps=2, seed=1)[0].shape == (40, 3)
    unit = (scan - 100) / 5
    given = completer.complete(unit, steps=3, seed=1, frame="given")[0]
    assert np.abs(given).mean() < 5


def test_scans_that_cannot_be_used(made):
    completer = load(made / "run")
    scan = read_one(made / "scan.ply")
    for bad, message in (
        (scan[:0], "no points"),
        (scan[:3], "3 points, at least 16"),
        (scan * 0, "are equal"),
        (scan * np.nan, "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            completer.complete(bad)
    with pytest.raises(ValueError, match="choose own or given"):
        completer.complete(scan, frame="other")


def test_divergence_is_not_passed_on(made, monkeypatch):
    completer = load(made / "run")
    with torch.no_grad():
        next(completer.model.denoiser.backbone.network.head.parameters()).fill_(torch.nan)
    with pytest.raises((FloatingPointError, RuntimeError, ValueError)):
        completer.complete(read_one(made / "scan.ply"), steps=2, seed=0)
    assert isinstance(completer, Completer)


def test_the_command_writes_clouds_and_a_report(made, capsys):
    words = ("complete", made / "scan.ply", f"run={made / 'run'}", "steps=2", "seed=0")
    page = made / "full.html"
    assert run(*words, f"out={made / 'full.ply'}", f"truth={made / 'scan.ply'}",
               f"report={page}", "samples=2") == 0  # fmt: skip
    assert read_one(made / "full_001.ply").shape == (64, 3)
    said = capsys.readouterr().out
    assert "150 points, seed 0" in said
    assert "chamfer_l2" in said
    text = page.read_text()
    assert all(title in text for title in ("completion 1", "truth", "scatter3d"))
    assert run(*words, f"out={made / 'one.ply'}") == 0
    one, first = read_one(made / "one.ply"), read_one(made / "full_000.ply")
    np.testing.assert_allclose(one, first, rtol=1e-5)
    assert run("complete", made / "none.ply", f"run={made / 'run'}") == 2
    assert "no such file" in capsys.readouterr().err
