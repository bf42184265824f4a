import numpy as np
import pytest
import torch

import pointdiff
from pointdiff import load
from pointdiff.cli import PROGRAM
from pointdiff.completion import Completer
from pointdiff.files import read_one, write_one
from pointdiff.ops import knn
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
    with torch.inference_mode():
        inside = completer.complete(scan, 1, steps=3, seed=1)[0]
    np.testing.assert_allclose(inside, first, rtol=1e-5)
    unit = (scan - 100) / 5
    given = completer.complete(unit, steps=3, seed=1, frame="given")[0]
    assert np.abs(given).mean() < 5


def test_a_model_of_both_frames_takes_the_one_that_fits(made):
    data = f"domain.data={made / 'shapes.npz'}"
    words = ("train", "experiment=completion_small", data, "domain.frame=both", *TINY)
    assert run(*words, f"out={made / 'both'}") == 0
    completer = load(made / "both")
    scan = np.load(made / "shapes.npz")["points"][0]
    scan = scan[scan[:, 0] > -0.1]

    def complete(x, frame):
        return completer.complete(x, steps=2, seed=0, keep=False, frame=frame)[0]

    with pytest.raises(ValueError, match="frame=given: the scan reaches 7 from the origin"):
        complete(7 * scan, "given")
    given, own, auto = (complete(scan, frame) for frame in ("given", "own", "auto"))
    assert completer.frame(scan) == "given"
    np.testing.assert_array_equal(auto, given)
    assert not np.allclose(own, given, atol=1e-3)
    moved = complete(7 * scan + 2, "auto")
    np.testing.assert_allclose(moved, 7 * own + 2, atol=1e-2)


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
    with pytest.raises(ValueError, match="choose auto, own, given"):
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
    assert "150 points, seed 0, frame own" in said
    assert "chamfer_l2" in said
    assert "emd_64" in said  # thinned to the smaller cloud
    assert "total mutual difference of the completions: " in said
    text = page.read_text()
    assert all(title in text for title in ("completion 1", "truth", "scatter3d"))
    assert run(*words, f"out={made / 'one.ply'}") == 0
    one, first = read_one(made / "one.ply"), read_one(made / "full_000.ply")
    np.testing.assert_allclose(one, first, rtol=1e-5)
    assert run("complete", made / "none.ply", f"run={made / 'run'}") == 2
    assert "no such file" in capsys.readouterr().err


REFINER = [word for word in TINY if not word.startswith(("model.time", "domain.points"))]


def test_refinement_trains_on_completions_of_training_scans_and_multiplies_points(made, capsys):
    data = f"domain.data={made / 'shapes.npz'}"
    coarse = made / "coarse"
    words = ("request.split=train", "n=7", "steps=2", "seed=0")
    sample = ("sample", f"run={made / 'run'}", *words)
    assert run(*sample, "request.keep=false", f"out={coarse}") == 0
    assert run(*sample, f"out={made / 'kept'}") == 0
    words = (f"domain.coarse={coarse}", "domain.factor=4", f"out={made / 'refiner'}")
    settings = [data, "domain.points=64", *words, *REFINER]
    assert run("train", "experiment=completion_refine", *settings) == 0
    scan = read_one(made / "scan.ply")
    completer = load(made / "run", refine=made / "refiner")
    cloud = completer.complete(scan, points=250, steps=2, seed=0)[0]
    assert cloud.shape == (250, 3)
    assert np.abs(cloud - 100).max() < 40
    free = completer.complete(scan, points=250, steps=2, seed=0, keep=False)[0]
    hits = [int(np.isin(c, scan).all(1).sum()) for c in (cloud, free)]
    assert hits[0] > hits[1] == 0  # the points of the scan are put in place after refining
    domain = completer.refiner.domain
    pair, first = domain.datasets()[0][0]
    assert pair.complete.shape == (256, 3)
    np.testing.assert_allclose(
        pair.frame.leave(first), read(made / "coarse/samples.npy")[0], atol=1e-5
    )
    with pytest.raises(ValueError, match="not of refinement"):
        load(made / "run", refine=made / "run")
    assert run("train", "experiment=completion_refine", data, f"domain.coarse={made}") == 2
    assert "no samples with request.split=train" in capsys.readouterr().err
    assert (
        run("train", "experiment=completion_refine", data, f"domain.coarse={made / 'kept'}") == 2
    )
    assert "draw samples with request.keep=false" in capsys.readouterr().err
    assert run("train", "experiment=completion_refine", data, f"out={made / 'none'}") == 2
    assert "domain.coarse is not set" in capsys.readouterr().err


def test_samples_of_a_shared_model_with_data_of_ones_own(made, capsys):
    assert run("share", f"run={made / 'run'}", f"out={made / 'shared'}") == 0
    words = ("sample", f"run={made / 'shared'}", "n=2", "steps=2", "seed=0")
    assert run(*words, f"out={made / 'no-data'}") == 2
    assert "domain.data is not set" in capsys.readouterr().err
    out = made / "with-data"
    assert run(*words, f"data={made / 'shapes.npz'}", f"out={out}") == 0
    capsys.readouterr()
    assert run("evaluate", out) == 0
    assert "chamfer_l2" in capsys.readouterr().out


def read(path):
    return list(pointdiff.read(path))


def test_without_scans_a_model_may_generate(made, capsys):
    words = ("sample", f"run={made / 'run'}", "n=2", "steps=2", "seed=0", "request.scan=none")
    assert run(*words, f"out={made / 'none'}") == 2
    assert "trained without domain.drop" in capsys.readouterr().err
    data = f"domain.data={made / 'shapes.npz'}"
    train = ("train", "experiment=completion_small", data, "domain.drop=0.5")
    assert run(*train, f"out={made / 'free'}", *TINY) == 0
    words = ("sample", f"run={made / 'free'}", "n=2", "steps=2", "seed=0", "request.points=50")
    assert run(*words, "request.scan=none", f"out={made / 'clouds'}") == 0
    assert [cloud.shape for cloud in read(made / "clouds/samples.npy")] == [(50, 3)] * 2
    guided = ("guidance=classifier_free", f"out={made / 'guided'}")
    assert run(*words, *guided) == 0


def test_guidance_by_the_scan_from_the_command_line(made):
    words = (
        "complete",
        made / "scan.ply",
        f"run={made / 'run'}",
        "steps=4",
        "seed=0",
        "keep=false",
    )
    assert run(*words, f"out={made / 'plain.ply'}") == 0
    assert run(*words, "guidance=scan", f"out={made / 'drawn.ply'}") == 0
    scan = torch.from_numpy(read_one(made / "scan.ply"))[None]

    def gap(name):
        return float(knn(scan, torch.from_numpy(read_one(made / name))[None])[0].mean())

    assert gap("drawn.ply") < 0.5 * gap("plain.ply")
