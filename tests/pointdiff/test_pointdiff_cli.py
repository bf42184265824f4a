import re

import numpy as np
import pytest

from pointdiff.cli import PROGRAM
from pointdiff.data import load_shapes
from pointdiff.files import read_one, write_one
from pointdiff.scanning import cameras
from shared import cli


@pytest.fixture
def sphere(tmp_path):
    x = np.random.default_rng(0).normal(size=(2000, 3))
    write_one(tmp_path / "sphere.ply", x / np.linalg.norm(x, axis=1, keepdims=True))
    return tmp_path / "sphere.ply"


def run(*words):
    return cli.main(PROGRAM, [str(word) for word in words])


def test_one_scan_of_a_chosen_view(sphere, capsys):
    out = sphere.with_name("scan.ply")
    assert run("scan", sphere, f"out={out}", "view=3", "scanner.points=200") == 0
    scan = read_one(out)
    assert scan.shape == (200, 3)
    assert (scan @ cameras()[3]).min() > 0
    assert "2,000 points" in capsys.readouterr().out


def test_all_views_several_times(sphere):
    out = sphere.with_name("many.xyz")
    more = ("view=all", "scanner.views=3", "n=2", "scanner.points=50")
    assert run("scan", sphere, f"out={out}", *more) == 0
    scans = [read_one(path) for path in sorted(sphere.parent.glob("many_*.xyz"))]
    assert len(scans) == 6
    for i, scan in enumerate(scans):
        assert (scan @ cameras(3)[i // 2]).min() > 0
    assert not np.array_equal(scans[0], scans[1])


def test_a_file_that_is_there_is_replaced_and_a_folder_takes_the_file(sphere, monkeypatch):
    monkeypatch.chdir(sphere.parent)
    out = sphere.with_name("scan.ply")
    for size in (50, 60):
        assert run("scan", sphere, "-o", out, f"scanner.points={size}") == 0
    assert len(read_one(out)) == 60
    (sphere.parent / "scans").mkdir()
    assert run("scan", sphere, "-o", sphere.parent / "scans") == 0
    assert len(read_one(sphere.parent / "scans" / "sphere_scan.ply")) == 2048
    assert run("scan", sphere, "view=1,2", "-m") == 0
    made = sorted(sphere.parent.glob("multirun/scan/*/sphere_scan.ply"))
    assert len(made) == 2
    for view, path in enumerate(made, 1):
        assert (read_one(path) @ cameras()[view]).min() > 0


def test_completions_replace_their_file_and_the_folder_of_the_report_is_made(sphere):
    out, page = sphere.with_name("full.ply"), sphere.parent / "new (1)" / "page.html"
    for seed in (0, 1):
        words = (f"seed={seed}", "steps=2", "points=64", f"report={page}")
        assert run("complete", sphere, "-o", out, *words) == 0
    assert read_one(out).shape == (64, 3)
    assert "completion 0" in page.read_text()
    words = ("run=shapes", "n=2", "steps=2", "seed=0", "request.points=64", "request.scan=none")
    assert run("sample", *words, f"out={sphere.parent / 'samples'}") == 0
    assert run("report", sphere.parent / "samples") == 0  # the model comes without data


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("out=full.stl",), "full.stl: clouds are written to"),
        (("points=many",), "points='many': give a whole number"),
        (("samples=1.5",), "samples=1.5: give a whole number"),
        (("samples=0",), "samples=0: give a whole number"),
    ],
)
def test_mistakes_in_completing_cost_no_time(sphere, words, message, capsys, monkeypatch):
    def sample(*_, **__):
        raise AssertionError("too late")

    monkeypatch.setattr("shared.models.Model.sample", sample)
    assert run("complete", sphere, *words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("view=true",), "give the number of a camera"),
        (("scanner.points=few",), "give whole numbers"),
        (("scanner.noise=loud",), "noise >= 0"),
        (("scanner.distance=inf",), "finite distance > 1"),
        (("scanner.crop=half",), "shares from 0"),
        (("view=99",), "there are views 0 to 25"),
        (("view=front",), "give the number of a camera"),
        (("scanner.method=sonar",), "choose hull or depth"),
        (("n=0",), "n=0"),
        (("out=scan.pdf",), "clouds are written to"),
    ],
)
def test_mistakes_are_one_line(sphere, words, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert run("scan", sphere, *words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_what_is_read_is_not_written_over(sphere, capsys):
    before = sphere.read_bytes()
    for words in (("scan", sphere, "-o", sphere), ("complete", sphere, f"report={sphere}")):
        assert run(*words) == 2
        assert "would be written over" in capsys.readouterr().err
    assert sphere.read_bytes() == before
    assert run("complete", sphere, f"report={sphere}/page.html") == 2
    assert "is a file" in capsys.readouterr().err


def test_a_drawn_seed_is_told_and_repeats_the_scan(sphere, capsys):
    first, again = sphere.with_name("first.npy"), sphere.with_name("again.npy")
    assert run("scan", sphere, "-o", first, "seed=null") == 0
    seed = re.search(r"seed (\d+)", capsys.readouterr().out)[1]
    assert run("scan", sphere, "-o", again, f"seed={seed}") == 0
    np.testing.assert_array_equal(np.load(again), np.load(first))


def test_views_are_where_they_are_said_to_be(sphere, capsys):
    out = sphere.with_name("views.dat")
    assert run("views", sphere, "-o", out, "scanner.views=2") == 0
    assert out.exists()
    assert f"domain.views={out}" in capsys.readouterr().out


def test_nothing_is_written_beside_the_weights_that_come_along(capsys):
    assert run("variance", "run=shapes") == 2
    assert "run=shapes is a shipped model: give out=FOLDER" in capsys.readouterr().err


def test_shapes_that_cannot_be_used_are_told(tmp_path):
    for name in ("a", "b"):
        write_one(tmp_path / f"{name}.ply", np.random.default_rng(0).random((40, 3)))
    (tmp_path / "c.ply").write_bytes(b"no ply")
    with pytest.warns(UserWarning, match="1 of 3 left out; the first: .*c.ply"):
        assert len(load_shapes(tmp_path)) == 2


def test_scans_of_nothing_are_refused(tmp_path, capsys):
    write_one(tmp_path / "three.ply", np.eye(3))
    (tmp_path / "lies.ply").write_bytes(
        b"ply\nformat binary_little_endian 1.0\nelement vertex 9000\nproperty float x\n"
        b"property float y\nproperty float z\nend_header\n"
    )
    for name, message in (
        ("three.ply", "3 points, at least 16"),
        ("lies.ply", "announces 9,000 points, but only 0 bytes follow"),
        (".", "is a folder"),
        ("none.ply", "no such file"),
    ):
        assert run("scan", tmp_path / name) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
