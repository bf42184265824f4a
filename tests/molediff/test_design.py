"""Inverse design: words, plans, judges, files and resumption, on tiny untrained models."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import test_properties
import torch

import molediff
from molediff.cli import PROGRAM
from molediff.design import Wish
from molediff.design.judging import Judge, Known, ranked
from molediff.design.plan import SCORES, Plan, Steering
from molediff.design.tries import INVALID, fittest
from molediff.design.wishes import as_overrides
from molediff.files import write
from molediff.geometric.records import Record
from molediff.geometric.scaffolds import Keep
from molediff.oracles import Accuracy
from molediff.targets import Target
from shared import cli
from shared.configuration import ConfigurationError
from shared.guidance import ClassifierFree, SquaredError, Term
from shared.metrics import mean
from shared.randomness import Draws
from shared.sampling import time_grid
from shared.solvers.adaptive import RK45
from shared.solvers.ancestral import DDIM, DDPM

folder = test_properties.folder
SMALL = ["model.width=32", "model.layers=1", "model.vectors=8", "model.pairs=8"]


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
    """Generator, energies and oracle after one step."""
    base = tmp_path_factory.mktemp("runs")
    common = [f"domain.data={folder}", "domain.properties=[odd,mass]", *SMALL, "seed=0"]
    common += ["trainer.max_steps=1", "trainer.batch_size=4", "trainer.compile=false"]
    for name, experiment in (("gen", "qm9"), ("energy", "qm9_energy"), ("oracle", "qm9_oracle")):
        labels = [] if name == "gen" else ["domain.labels=all"]
        words = ["train", f"experiment={experiment}", *common, *labels, f"out={base / name}"]
        assert cli.main(PROGRAM, words) == 0
    assert cli.main(PROGRAM, ["oracle", "measure", folder, f"run={base / 'oracle'}"]) == 0
    return base


def words(runs, out, *more):
    own = [f"run={runs / 'gen'}", f"energies={runs / 'energy'}", f"oracle={runs / 'oracle'}"]
    return ["design", *own, "xtb=false", "seed=3", "steps=4", f"out={out}", *more]


# -- words ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "override"),
    [
        ("gap=5.0", "++targets.gap=5.0"),
        ("gap=4,5", "++targets.gap=4,5"),
        ("gap=5.0eV", "++targets.gap='5.0eV'"),
        ("gap>5", "++targets.gap='>5'"),
        ("gap >= 5 eV", "++targets.gap='>= 5 eV'"),
        ("2<mu<3", "++targets.mu='2<mu<3'"),
        ("mu=2.0..3.0", "++targets.mu='2.0..3.0'"),
        ("homo=max", "++targets.homo='max'"),
        ("n=64", "n=64"),
        ("scaffold=C1CC[C@@H]1*", "scaffold='C1CC[C@@H]1*'"),
        ("score=qed>0.6; has:C=O", "score='qed>0.6; has:C=O'"),
        ("composition=C=6 N<=1", "composition='C=6 N<=1'"),
    ],
)
def test_words_become_settings(word, override):
    assert as_overrides([word]) == [override]


def test_two_open_ends_make_a_range_and_other_pairs_are_refused():
    assert as_overrides(["gap>5 eV", "n=4", "gap<=7"]) == ["n=4", "++targets.gap='5 eV < gap < 7'"]
    for words in (["gap=5", "gap=6"], ["gap>5", "Gap>6"], ["gap>5", "gap=6"]):
        with pytest.raises(ConfigurationError, match="has 2 targets"):
            as_overrides(words)


def test_wishes_are_read_as_they_were_meant():
    known = {"gap": {"unit": "eV", "mean": 6.9, "mad": 1.0, "min": 1.0, "max": 14.0}}
    for value, text in (
        (5, "gap = 5 eV"),
        (">5", "gap >= 5 eV"),
        ("5 < gap", "gap >= 5 eV"),
        ("gap<5", "gap <= 5 eV"),
        ("2<gap<3", "2 <= gap <= 3 eV"),
    ):
        assert str(Wish({"gap": value}).parsed(known)[0]) == text
    assert Wish(composition="C = 6, N<=1;F=0").limits == ["C=6", "N<=1", "F=0"]
    scorers = Wish(score="qed>0.6; has:C=O").scorers
    assert [s.name for s in scorers] == ["qed", "has:C=O"]
    within = Wish(score="has:[$([#6;R])]; lacks:[N+](=O)[O-];qed").scorers
    assert [s.name for s in within] == ["has:[$([#6;R])]", "lacks:[N+](=O)[O-]", "qed"]
    assert scorers[0].target is not None
    for wrong in ("nonsense", "qed>much"):
        with pytest.raises(ConfigurationError, match="score"):
            _ = Wish(score=wrong).scorers


# -- plans ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        (["colour=3"], "colour"),
        (["mass=5eV"], "eV"),
        (["mass=3..2"], "range"),
        (["mass=1e4"], "outside the training data"),
        (["mass=9", "scaffold=no/such.sdf"], "no/such.sdf"),
        (["mass=9", "composition=Xx=1"], "Xx"),
        (["mass=9", "score=nonsense"], "nonsense"),
        (["mass=9", "energy=nowhere.py:f"], "nowhere.py"),
        (["mass=9", "similar=CCO"], "fingerprints"),
        (["mass=9", "strength=0", "condition=0"], "nothing steers"),
        (["mass=9", "atoms=200..300"], "atoms"),
        (["mass=9", "strength=-1"], "strength"),
        (["mass=9", "strength=much"], "strength=much: give a number"),
        (["mass=9", "baseline=-1"], "baseline=-1: give a whole number"),
        (["mass=9", "force=no"], "force=no: give true or false"),
        (["mass=9", "stpes=3"], "unknown property 'stpes'; did you mean 'steps'?"),
        (["mass=9", "score=qed>nan"], "'nan' is not a number"),
        (["mass=9", "score=qed=0.6..0.4"], "empty range"),
        (["mass>"], "mass"),
        (["mass=9", "energies=ORACLE"], "judge what it steers"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(runs, tmp_path, capsys, wishes, message):
    wishes = [word.replace("ORACLE", str(runs / "oracle")) for word in wishes]
    assert cli.main(PROGRAM, words(runs, tmp_path / "out", *wishes)) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert message in said[0]
    assert not (tmp_path / "out").exists()


def test_a_molecule_to_be_resembled(tmp_path):
    out = tmp_path / "alike"
    run = ["design", "similar=OCC1CC1", "n=3", "steps=6", "seed=0", "xtb=false", f"out={out}"]
    assert cli.main(PROGRAM, run) in (0, 1)
    with (out / "molecules.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert all(row["atoms"] == "13" for row in rows)  # those of cyclopropylmethanol
    assert "similar:OCC1CC1" in rows[0]
    settings = json.loads((out / "settings.json").read_text())
    assert settings["wish"]["similar"] == "OCC1CC1"
    model, wish = molediff.load("qm9"), Wish(similar="OCC1CC1")
    several, single = (Plan(model, wish, Steering(particles=k)) for k in (2, 1))
    assert (len(several.choosing), len(several.terms)) == (1, 0)
    assert len(single.terms) == 1


def test_a_far_target_is_tried_when_told_to(runs, tmp_path, capsys):
    cli.main(PROGRAM, words(runs, tmp_path, "mass=1e4", "n=2", "force=true"))
    assert "warning: mass = 10000" in capsys.readouterr().out
    assert (tmp_path / "report.html").exists()


def test_molecules_that_fail_are_told(runs, tmp_path, capsys):
    (tmp_path / "own.py").write_text("def none(x, elements, mask): return x.sum((1, 2)) / 0")
    wishes = ["mass=9", "n=1", f"energy={tmp_path / 'own.py'}:none", "steps=16"]
    assert cli.main(PROGRAM, words(runs, tmp_path / "out", *wishes)) == 1
    said = capsys.readouterr().out
    assert "1 of 1 failed: reasons in" in said
    assert "molecules.sdf" not in said


def test_energies_move_their_own_prediction_towards_the_target(runs):
    """Strong guidance against none, judged by the network that guides."""
    model = molediff.load(runs / "gen")
    distance = {}
    for strength in (0.0, 5.0):
        plan = Plan(model, Wish({"mass": 9}), Steering(str(runs / "energy"), strength=strength))
        assert len(plan.terms) == (strength > 0)
        predict = plan.predictor.network.predict
        x = plan.domain.template(0, range(8), atoms=6, mass=9)
        start = model.denoiser.process.prior(
            {k: normal(v.shape, i) for i, (k, v) in enumerate(x.state.items())}
        )
        solver, grid, steps = model.chosen("ddim", "time_uniform", 10)
        process = model.denoiser.process
        denoise = plan.denoise("cpu")
        end = solver.solve(
            process, partial(told, denoise, dict(x.cond)), start,
            time_grid(process, solver, grid, steps), lambda name, j: pytest.fail('no noise'),
        )  # fmt: skip
        wanted = plan.domain.standardise(np.array([np.nan, 9.0]))[1]
        distance[strength] = float((predict(end, 0.05)[:, 1] - wanted).abs().mean().detach())
    assert distance[5.0] < 0.8 * distance[0.0]


@pytest.mark.parametrize("solver", ["dpmpp_2m_sde", "ddim"])
def test_the_fittest_of_several_tries_stays(runs, solver):
    """The first try is that of a single one with the same calls, so none can be less fit."""
    model = molediff.load(runs / "gen")
    process, ends = model.denoiser.process, {}
    for particles in (1, 5):
        steering = Steering(str(runs / "energy"), strength=0.0, particles=particles)
        plan = Plan(model, Wish({"mass": 9}), steering)
        method, grid, steps = model.chosen(solver, "time_uniform", 4 * particles)
        method = plan.solver(method)
        draws = Draws(0, range(6))

        def draw(name, j, plan=plan, draws=draws):
            geometry = process.fields[name].geometry
            like = plan.domain.template(0, range(6), atoms=6, mass=9).state[name]
            return draws.normal(name, j, like, geometry, None)

        cond = dict(plan.domain.template(0, range(6), atoms=6, mass=9).cond)
        start = process.prior({name: draw(name, 0) for name in process.fields})
        denoise = partial(told, plan.denoise("cpu"), cond)
        times = time_grid(process, method, grid, steps)
        with torch.no_grad():
            ends[particles] = method.solve(
                process, denoise, start, times, lambda name, j, draw=draw: draw(name, j + 1)
            )
    fit = fittest(plan.domain, plan.choosing, process.lead.t_min)
    one, many = fit(ends[1]), fit(ends[5])
    assert (many >= one - 1e-4).all()
    assert (many > one + 1e-4).any()


def states_of(domain, molecules):
    """Molecules as a batch of finished states."""
    place = {z: k for k, z in enumerate(domain.elements)}
    free = np.full(2, np.nan, np.float32)
    return domain.collate(
        [
            Record(np.array([place[z] for z in m.atomic_numbers]), m.positions, m.charges, free)
            for m in molecules
        ]
    ).state


def test_a_valid_molecule_is_fitter_than_any_other(runs):
    domain = molediff.load(runs / "gen").domain
    state = states_of(domain, [test_properties.embedded(s) for s in ("CCO", "COC", "CCO")])
    state["positions"][2] *= 1.5  # in pieces

    def found(*values):
        energy = SquaredError(lambda x, *_: torch.tensor(values), 0.0)
        return fittest(domain, [Term(energy, 2.0)], 0.0)(state)

    expected = torch.tensor([-18.0, -2.0, INVALID]).double()
    torch.testing.assert_close(found(3.0, 1.0, 0.0), expected)
    assert found(100.0, 1.0, 0.0).argmin() == 2  # however large an energy
    broken = found(float("nan"), 1.0, 0.0)
    assert broken.isfinite().all()
    assert broken.argmin() == 0


@pytest.mark.parametrize("inner", [DDPM(), DDIM()])
def test_energies_and_scores_choose_together(runs, inner):
    model = molediff.load(runs / "gen")
    plan = Plan(model, Wish({"mass": 9}, score="has:CO"), Steering(str(runs / "energy")))
    steered = plan.solver(inner)
    choice = steered.choice or steered.reward
    state = states_of(model.domain, [test_properties.embedded(s) for s in ("CCO", "COC", "C1CC1")])
    energies = fittest(model.domain, plan.choosing, 0.0)(state)
    torch.testing.assert_close(
        choice(state) - energies, SCORES * torch.tensor([1.0, 1.0, 0.0]).double()
    )
    assert energies.unique().numel() == 3


def test_gradients_guide_where_the_energies_do_not_choose(runs):
    model, energies = molediff.load(runs / "gen"), str(runs / "energy")

    def terms(**steering):
        wish = Wish({"mass": 9}, composition="O=1", score="qed")
        plan = Plan(model, wish, Steering(energies, **steering))
        assert [t.scale for t in plan.choosing] == [1.0, 1.0]
        return [t.scale for t in plan.terms]

    assert terms() == [1.0]  # the composition
    assert terms(condition=0.0) == terms(particles=1) == [1.0, 1.0]
    assert terms(strength=0.3) == [0.3, 1.0]


def test_only_what_is_told_is_told_twice(runs):
    """A guided call costs two; without a property to tell it would be the same one twice."""
    model, none = molediff.load(runs / "gen"), Steering(energies=None, particles=1)
    assert isinstance(Plan(model, Wish({"mass": 9}), none).denoise("cpu"), ClassifierFree)
    assert Plan(model, Wish(), none).denoise("cpu") is model.denoiser
    model.domain._restored["free"] = False  # a network that must be told everything
    assert model.domain.null_condition() == {}
    assert Plan(model, Wish({"mass": 9}), none).denoise("cpu") is model.denoiser


def test_tries_surround_any_solver(runs, tmp_path):
    model, energies = molediff.load(runs / "gen"), str(runs / "energy")
    write(tmp_path / "frag.sdf", [test_properties.embedded("CO")])
    mass, keep = Wish({"mass": 9}), Wish({"mass": 9}, scaffold=str(tmp_path / "frag.sdf"))

    def solver(wish, particles, inner):
        return Plan(model, wish, Steering(energies, particles=particles)).solver(inner)

    assert solver(mass, None, DDIM()).particles == 4
    assert isinstance(solver(mass, 1, RK45()), RK45)
    assert isinstance(solver(mass, 2, RK45()).solver, RK45)
    assert isinstance(solver(keep, None, DDIM()), Keep)
    assert isinstance(solver(keep, 3, DDIM()).solver, Keep)
    scored = replace(keep, score="qed")
    assert not solver(scored, 3, DDPM()).every
    assert solver(replace(mass, score="qed"), 3, DDPM()).every
    with pytest.raises(ConfigurationError, match="score.*particles=4"):
        Plan(model, scored, Steering(energies)).check()
    with pytest.raises(ConfigurationError, match="particles=0"):
        Steering(particles=0)
    made = model.design(
        mass=9, scaffold=str(tmp_path / "frag.sdf"), new=2, particles=2, steps=16, n=2, seed=0,
        energies=energies, oracle=None, xtb=False,
    )  # fmt: skip
    assert [len(m) for m in made.molecules] == [4, 4]
    assert all({6, 8} <= set(m.atomic_numbers.tolist()) for m in made.molecules)


@pytest.mark.parametrize("solver", ["ddpm", "dpmpp_2m", "heun"])
def test_guided_samplers_turn_with_their_noise(runs, solver):
    """Rotated noise gives rotated molecules, under condition, energies and limits on elements."""
    model = molediff.load(runs / "gen")
    steering = Steering(str(runs / "energy"), strength=3.0, condition=2.0)
    plan = Plan(model, Wish({"mass": 9}, composition="C=2 O=1"), steering)
    process = model.denoiser.double().process
    plan.predictor.network.double()
    denoise = plan.denoise("cpu")
    cond = {
        k: v.double() for k, v in plan.domain.template(0, [0, 1], atoms=6, mass=9).cond.items()
    }
    q, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(9)).double())
    method, grid, steps = model.chosen(solver, "time_uniform", 6)
    ends = []
    for turn in (torch.eye(3).double(), q):

        def draw(name, j, turn=turn):
            x = normal((2, 6, 3 if name == "positions" else 4), 100 * j + len(name)).double()
            return x @ turn if name == "positions" else x

        start = process.prior({name: draw(name, 77) for name in process.fields})
        times = time_grid(process, method, grid, steps)
        with torch.no_grad():
            ends.append(method.solve(process, partial(told, denoise, cond), start, times, draw))
    straight, turned = ends
    torch.testing.assert_close(
        turned["positions"], straight["positions"] @ q, atol=1e-8, rtol=1e-8
    )
    torch.testing.assert_close(turned["types"], straight["types"], atol=1e-8, rtol=1e-8)


def told(denoise, cond, x, t):
    return denoise(x, t, None, cond)


def normal(shape, seed):
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=gen)
    return x - x.mean(1, keepdim=True) if shape[-1] == 3 else x


# -- judging ----------------------------------------------------------------------------------


class Counting:
    """An oracle that knows the mass as three times the number of atoms."""

    name = "counting"
    accuracy = {"mass": Accuracy("", mean([0.0, 1.0]))}

    def __call__(self, molecules):
        values = [3.0 * len(m) if isinstance(m, molediff.Molecule) else np.nan for m in molecules]
        return {"mass": np.array(values)}


def test_ranking_prefers_valid_molecules_near_the_target():
    known = {"mass": {"unit": "", "mean": 20.0, "mad": 5.0, "min": 3.0, "max": 40.0}}
    target = Target.parse("mass=27", known)
    judge = Judge([target], known, {"count": Counting()})
    assert judge.warnings == []
    assert "nothing judges mass: give oracle=RUN" in Judge([target], known, {}).warnings[0]
    good = [test_properties.embedded(s) for s in ("CCO", "CO", "C=O")]  # 9, 6 and 4 atoms
    lone = good[0].replace(positions=good[0].positions * 3.0, bonds=None, orders=None)
    judged = judge([*good, lone, molediff.Invalid("x", "broken")])
    assert judged[0].properties["mass_count"] == 27.0
    assert isinstance(judged[4], molediff.Invalid)
    order = ranked([judge.design(i, m) for i, m in enumerate(judged[:4])])
    assert [d.index for d in order] == [0, 1, 2, 3]
    assert [d.valid for d in order] == [True, True, True, False]
    assert order[1].score == pytest.approx(9.0 / 5.0)
    told = Known(("OCC", "CCCC", "not a smiles")).judged(order)
    assert [d.novel for d in told] == [False, True, True, None]
    assert told[0].similarity == 1.0


# -- files ------------------------------------------------------------------------------------


def test_a_run_writes_everything_and_again_adds_only_what_is_missing(runs, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    wish = ["mass=9", "batch=2", "baseline=2"]
    cli.main(PROGRAM, words(runs, whole, *wish, "n=5"))
    cli.main(PROGRAM, words(runs, parts, *wish, "n=2"))
    cli.main(PROGRAM, words(runs, parts, *wish, "n=5"))
    molecules = list(molediff.read(whole / "molecules.sdf"))
    assert [m.name for m in molecules] == [str(i) for i in range(5)]
    assert {"mass_network"} <= set(molecules[0].properties)
    for name in ("molecules.sdf", "molecules.csv", "manifest.jsonl"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name
    rows = list(csv.DictReader((whole / "molecules.csv").open()))
    assert sorted(int(row["index"]) for row in rows) == list(range(5))
    page = (whole / "report.html").read_text()
    assert "unguided" in page
    tries = [
        json.loads((p / "settings.json").read_text())["tries"] for p in (whole, whole / "baseline")
    ]
    assert tries == [4, 1]
    assert "mass = 9" in page
    assert cli.main(PROGRAM, words(runs, whole, "mass=12", "n=5")) == 2  # another wish


def test_a_killed_run_goes_on_where_it_stopped(runs, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    wish = ["mass=9", "n=6", "batch=1"]
    cli.main(PROGRAM, words(runs, whole, *wish))
    code = "import sys; from molediff.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, *words(runs, killed, *wish)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    manifest = killed / "manifest.jsonl"
    while not (manifest.exists() and manifest.stat().st_size) and process.poll() is None:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    cli.main(PROGRAM, words(runs, killed, *wish))
    for name in ("molecules.sdf", "molecules.csv"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), name
    records = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert [r["index"] for r in records] == list(range(6))


def test_python_gives_ranked_molecules_that_can_be_written(runs, tmp_path):
    model = molediff.load(runs / "gen")
    seen = []
    made = model.design(
        mass="6..12", n=3, seed=1, steps=4, batch=2, xtb=False, seen=seen.append,
        energies=str(runs / "energy"), oracle=str(runs / "oracle"),
    )  # fmt: skip
    assert len(made.molecules) + len(made.failures) == 3
    assert len(seen) == len(made.designs)
    assert made.metrics["valid"].n == 3
    made.write(tmp_path / "out")
    made.write(tmp_path / "out")
    assert len(list(molediff.read(tmp_path / "out" / "molecules.sdf"))) == len(made.molecules)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.jsonl").touch()
    with pytest.raises(ValueError, match="is of a `molediff design`"):
        made.write(tmp_path / "run")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "molecules.sdf", "molecules.csv", "report.html"
    }  # fmt: skip
    again = model.design(
        mass="6..12", n=3, seed=1, steps=4, batch=3, xtb=False,
        energies=str(runs / "energy"), oracle=str(runs / "oracle"),
    )  # fmt: skip
    for a, b in zip(made.designs, again.designs, strict=True):
        np.testing.assert_allclose(a.molecule.positions, b.molecule.positions, atol=1e-4)
    with pytest.raises(ConfigurationError, match="colour"):
        model.design(colour=3)
    with pytest.raises(ValueError, match="steps=0"):
        model.design(mass=9, steps=0)
