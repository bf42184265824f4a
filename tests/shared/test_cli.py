"""The command lines, from training to a report."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from molediff.cli import PROGRAM as MOLEDIFF
from pointdiff.cli import PROGRAM as POINTDIFF
from shared import cli
from shared.checkpoints import GAMMA
from shared.cli import VERBS, Converter, Outcome, Verb
from shared.images.cli import PROGRAM as IMAGEDIFF
from shared.models import load
from shared.runs import Run, writing
from shared.variance import load_gamma

FAST = ["trainer.progress=false", "trainer.validate_every=null", "trainer.log_every=5", "seed=1"]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs ``imagediff`` -> (status, standard output, standard error)."""

    def run(*words: str, program=IMAGEDIFF) -> tuple[int, str, str]:
        status = cli.main(program, [str(word) for word in words])
        out = capsys.readouterr()
        return status, out.out, out.err

    return run


def trained(folder: Path, experiment: str, steps: int, *more: str) -> Path:
    words = [f"experiment={experiment}", f"out={folder}", f"trainer.max_steps={steps}"]
    assert cli.main(IMAGEDIFF, ["train", *words, *FAST, *more]) == 0
    return folder


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "toys, 1 = a's"  # any character will do
    return trained(folder, "toys", 20, "model.width=16", "trainer.batch_size=32")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "digits"
    return trained(
        folder,
        "digits",
        20,
        "model.widths=[8,8]",
        "trainer.batch_size=16",
        "trainer.ema=null",
        "trainer.optimizer.lr=0.02",
    )


def settings(folder: Path) -> dict:
    return json.loads((folder / "settings.json").read_text())


# -- flows ------------------------------------------------------------------------------------


def test_train_sample_evaluate_report(command, toys, tmp_path):
    samples = tmp_path / "samples"
    status, out, err = command(
        "sample", f"run={toys}", "n=30", "steps=5", "seed=0", f"out={samples}"
    )
    assert (status, err) == (0, "")
    assert out == f"30 samples in {samples}/samples.csv (seed 0, 5 denoiser calls)\n"
    assert len((samples / "samples.csv").read_text().splitlines()) == 31
    assert settings(samples)["result"]["nfe"] == 5

    status, out, _ = command("evaluate", samples)
    assert status == 0
    assert out.endswith(f"report: {samples}/report.html\n")
    metrics = json.loads((samples / "metrics.json").read_text())["metrics"]
    assert metrics["valid"] == {
        "value": 1.0,
        "n": 30,
        "low": pytest.approx(0.886, abs=1e-3),
        "high": 1.0,
    }
    assert metrics["energy_distance"]["low"] < metrics["energy_distance"]["value"]

    assert command("sample", f"run={toys}", "n=2", "steps=3", "seed=7")[0] == 0
    assert len(list((toys / "samples").glob("seed-7-*/samples.csv"))) == 1
    for path in (samples, toys):
        status, out, _ = command("report", path, f"out={tmp_path / 'report'}")
        assert (status, out) == (0, f"report: {tmp_path}/report/report.html\n")
    page = (tmp_path / "report" / "report.html").read_text()
    assert "loss" in page
    assert "seed-7-" in page


def test_samples_are_written_by_one_process_at_a_time(command, toys, tmp_path):
    words = ("sample", f"run={toys}", "n=3", "steps=2", "seed=0", f"out={tmp_path / 'samples'}")
    with writing(tmp_path / "samples"):
        status, _, said = command(*words)
    assert (status, said.count("\n")) == (2, 1)
    assert f"{tmp_path / 'samples'} is being written by another process" in said
    assert command(*words)[0] == 0


def test_digits_with_classes_and_guidance(command, digits, tmp_path):
    plain, guided, half = (tmp_path / name for name in ("plain", "guided", "half"))
    words = ("sample", f"run={digits}", "n=6", "steps=3", "seed=0", "request.label=3")
    assert command(*words, f"out={plain}")[0] == 0
    guide = ("guidance=classifier_free", "guidance.scale=3")
    assert command(*words, *guide, f"out={guided}")[0] == 0
    assert command(*words, *guide, f"out={half}", "batch=2", "n=4")[0] == 0
    images = {p: np.load(p / "samples.npy") for p in (plain, guided)}
    assert images[plain].shape == (6, 8, 8)
    assert not np.array_equal(images[plain], images[guided])
    assert settings(guided)["guidance"]["scale"] == 3
    assert settings(guided)["request"] == {"label": 3}
    assert settings(half)["result"]["ok"] == 4
    status, out, _ = command("evaluate", guided, f"out={tmp_path / 'judged'}")
    assert status == 0
    assert "frechet_pca32: " in out
    assert "data:image/png" in (tmp_path / "judged" / "report.html").read_text()


def test_the_optimal_variance_is_estimated_once_and_found_again(command, tmp_path):
    run = trained(tmp_path / "run", "toys", 20, "model.width=16", "trainer.batch_size=32")
    asked = [f"run={run}", "steps=5", "n=8", "seed=3"]
    optimal = ["solver=analytic_ddpm", "grid=least_cost"]
    status, _, error = command("sample", *asked, *optimal, f"out={tmp_path / 'early'}")
    assert (status, error.count("\n"), "variance run=" in error) == (2, 1, True)
    assert command("variance", f"run={run}", "n=300", "batch=200", "steps=30")[0] == 0
    tables = load_gamma(Run.open(run).checkpoint() / GAMMA)
    values = tables["x"].values
    assert len(values) == 31
    assert values[0] < 0.1 < 0.5 < values[-1]  # little noise is hard to tell from the data
    assert command("sample", *asked, *optimal, f"out={tmp_path / 'own'}")[0] == 0
    assert command("sample", *asked, "solver=analytic_ddim", f"out={tmp_path / 'ddim'}")[0] == 0
    drawn = [p.tolist() for p in load(run).sample(8, solver="analytic_ddpm", steps=5, seed=3)]
    plain = [p.tolist() for p in load(run).sample(8, solver="ddpm", steps=5, seed=3)]
    assert drawn != plain
    more = ["model.width=16", "trainer.batch_size=32"]
    trained(run, "toys", 25, *more)  # other weights, another variance
    assert not (Run.open(run).checkpoint("last") / GAMMA).exists()


def test_files_of_any_origin_are_judged(command, tmp_path):
    points = np.random.default_rng(0).standard_normal((50, 2))
    np.savez(tmp_path / "mine.npz", points=points)
    np.savez(tmp_path / "theirs.npz", points=points)
    words = ("evaluate", tmp_path / "mine.npz", "domain=toys")
    status, out, _ = command(
        *words, f"reference={tmp_path / 'theirs.npz'}", f"out={tmp_path / 'o'}"
    )
    assert status == 0
    assert "sliced_wasserstein: 0 [" in out
    (tmp_path / "broken.csv").write_text("1,2\nhello\n")
    status, out, _ = command("evaluate", tmp_path / "broken.csv", "domain=toys")
    assert (status, out.startswith("valid: 0.5 ")) == (0, True)
    assert "not numbers" in (tmp_path / "report.html").read_text()
    assert "1 of 2: " in out
    (tmp_path / "broken.csv").write_text("hello\n")
    assert command("evaluate", tmp_path / "broken.csv", "domain=toys")[0] == 1
    twice = ("evaluate", tmp_path / "mine.npz", tmp_path / "theirs.npz", "domain=toys")
    status, _, err = command(*twice)
    assert (status, "takes one path" in err) == (2, True)
    (tmp_path / "empty.csv").touch()
    status, _, err = command("evaluate", tmp_path / "empty.csv", "domain=toys")
    assert (status, "nothing to evaluate" in err) == (2, True)


def test_sampling_again_adds_what_is_missing(command, toys, tmp_path):
    words = ("sample", f"run={toys}", "steps=4", f"out={tmp_path / 'mine'}")
    assert command(*words, "n=3")[0] == 0
    seed = settings(tmp_path / "mine")["seed"]  # drawn, saved, taken up again
    before = (tmp_path / "mine" / "samples.csv").read_text()
    assert command(*words, "n=5", "batch=1")[0] == 0
    after = (tmp_path / "mine" / "samples.csv").read_text()
    assert after.startswith(before)
    assert len(after.splitlines()) == 6
    assert settings(tmp_path / "mine")["seed"] == seed
    status, _, err = command("sample", f"run={toys}", "steps=7", "n=5", f"out={tmp_path / 'mine'}")
    assert (status, "steps=4, now asked for 7" in err) == (2, True)


def test_training_again_goes_on_and_a_python_program_can_load_it(command, tmp_path):
    folder = trained(tmp_path / "run", "toys", 4, "model.width=8", "trainer.batch_size=8")
    first = load(folder).checkpoint
    trained(folder, "toys", 6, "model.width=8", "trainer.batch_size=8")
    model = load(folder)
    assert (first.step, model.checkpoint.step) == (4, 6)
    whole = trained(tmp_path / "whole", "toys", 6, "model.width=8", "trainer.batch_size=8")
    for name, tensor in load(whole).denoiser.state_dict().items():
        assert torch.equal(tensor, model.denoiser.state_dict()[name])
    assert Run.open(folder).config["seed"] == 1
    status, _, err = command("train", "experiment=toys", f"out={folder}", "model.width=9")
    assert (status, "other settings" in err) == (2, True)


def test_sweeps_run_every_combination(command, toys, tmp_path):
    run = tmp_path / "link"
    run.symlink_to(toys)  # a sweep reads commas in paths as alternatives
    words = ("sample", "-m", f"run={run}", "n=2", "seed=0", f"out={tmp_path / 'sweep'}")
    status, out, _ = command(*words, "steps=3,4", "solver=ddim,dpmpp_2m")
    assert status == 0
    assert out.endswith(f"4 of 4 jobs succeeded: {tmp_path / 'sweep'}\n")
    nfe = [settings(tmp_path / "sweep" / str(i))["result"]["nfe"] for i in range(4)]
    assert nfe == [3, 3, 4, 4]
    status, out, err = command(*words[:-1], f"out={tmp_path / 'mixed'}", "steps=0,3")
    assert status == 2
    assert "1 of 2 jobs succeeded" in out
    assert "steps=0" in err
    status, _, err = command(*words, "solver=ddim,dpmp_2m")
    assert (status, "did you mean 'dpmpp_2m'" in err) == (2, True)


# -- mistakes and failures --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["smaple"], "did you mean 'sample'?"),
        (["sample", "rnu=x"], "unknown key 'rnu'; did you mean 'run'?"),
        (["sample", "run=x", "solver=dmpp_2m"], "did you mean 'dpmpp_2m'?"),
        (["sample", "run=x", "--steps"], "no option '--steps'"),
        (["sample", "run=x", "steps"], "'steps' is not key=value"),
        (["sample", "run=absent"], "neither a run folder nor a pretrained model"),
        (["sample"], "'run' is missing"),
        (["sample", "run=x", "n=0"], "n=0: give a whole number"),
        (["sample", "run=x", "seed=-3"], "seed=-3"),
        (["distill", "run=x", "updates=0"], "updates=0: give a whole number of at least 1"),
        (["train", "experiment=digit"], "did you mean 'digits'?"),
        (["train", "experiment=toys", "trainer.max_step=3"], "did you mean 'trainer.max_steps'?"),
        (["evaluate", "absent.npz"], "absent.npz"),
        (["doctor", "now"], "'now' is not key=value"),
    ],
)
def test_mistakes_are_one_line_and_status_2(command, words, message):
    status, out, err = command(*words)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert err.startswith("imagediff: ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["request.lable=3"], "did you mean 'label'?"),
        (["request.label=12"], "label=12 is not a class"),
        (["device=gpu"], "give auto, cpu or cuda"),
        (["steps=0"], "steps=0"),
        (["checkpoint=step-5"], "there: last"),
        (["grid.t_start=7"], "do not fit: time grid"),
    ],
)
def test_sampling_mistakes(command, digits, tmp_path, change, message):
    status, _, err = command("sample", f"run={digits}", f"out={tmp_path}", *change)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("verb", ["distill", "variance"])
def test_missing_data_are_named_as_the_verb_takes_them(command, tmp_path, verb):
    status, _, err = command(verb, "run=qm9", f"out={tmp_path / 'out'}", program=MOLEDIFF)
    assert status == 2
    assert err.startswith("molediff: data is not set: give a folder")


def test_inequalities_may_be_requested():
    words = ["request.gap=>7", "request.mu=2<mu<3", "request.label=1,2", "request.x='<3'"]
    assert cli.overrides("sample", words) == [
        "++request.gap='>7'", "++request.mu='2<mu<3'", "++request.label=1,2", "++request.x='<3'"
    ]  # fmt: skip


def test_a_mistake_does_not_occupy_the_folder(command, toys, tmp_path):
    asked = ["sample", f"run={toys}", "n=2", "steps=4", f"out={tmp_path / 'out'}"]
    assert command(*asked, "solver=ddim", "solver.eta=3")[0] == 2
    assert command(*asked, "grid.t_start=7")[0] == 2
    assert command(*asked)[0] == 0
    assert command(*asked, "solver=ddim")[0] == 2  # now it holds samples


def test_a_file_in_the_way_of_out_is_named(command, toys, tmp_path):
    (tmp_path / "taken").write_text("mine")
    for out in ("taken", "taken/inside"):
        status, _, err = command("sample", f"run={toys}", f"out={tmp_path / out}")
        assert (status, "taken is a file; give a folder" in err) == (2, True)
    assert (tmp_path / "taken").read_text() == "mine"


def test_guidance_needs_a_condition_to_compare_with(command, toys, tmp_path):
    words = ("sample", f"run={toys}", f"out={tmp_path}", "guidance=classifier_free")
    status, _, err = command(*words)
    assert status == 2
    assert "no condition that can be left out" in err


def test_failures_are_status_1_and_tracebacks_are_asked_for(command, monkeypatch, toys, tmp_path):
    def broken(*_, **__):
        raise KeyError("inside")

    monkeypatch.setattr("shared.verbs.run_sampling", broken)
    words = ("sample", f"run={toys}", f"out={tmp_path}")
    assert command(*words) == (1, "", "imagediff: KeyError: 'inside'\n")
    monkeypatch.setenv("MOLEDIFF_TRACEBACK", "1")
    status, _, err = command(*words)
    assert (status, "Traceback" in err) == (1, True)


def test_failed_samples_make_the_status_1(command, monkeypatch, toys, tmp_path):
    from shared.sampling import Summary

    monkeypatch.setattr(
        "shared.verbs.run_sampling", lambda *_, **__: Summary(ok=3, failed=1, nfe=2)
    )
    status, out, _ = command("sample", f"run={toys}", f"out={tmp_path}")
    assert (status, "1 of 4 failed" in out) == (1, True)
    monkeypatch.setattr(
        "shared.verbs.run_sampling", lambda *_, **__: Summary(ok=3, invalid=1, nfe=2)
    )
    status, out, _ = command("sample", f"run={toys}", f"out={tmp_path}")
    assert (status, "1 of 4 could not be decoded" in out) == (0, True)


def test_an_interruption_is_status_130(command, monkeypatch, toys, tmp_path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("shared.verbs.run_sampling", interrupted)
    status, _, err = command("sample", f"run={toys}", f"out={tmp_path}")
    assert (status, err.count("\n")) == (130, 1)


def test_domains_belong_to_programs(command):
    status, _, err = command("train", "experiment=toys", program=POINTDIFF)
    assert (status, "belongs to another command" in err) == (2, True)
    assert set(IMAGEDIFF.domains) >= {"digits", "images", "toys"}
    assert not {"digits", "images", "toys"} & set(MOLEDIFF.domains)


# -- conversion -------------------------------------------------------------------------------


def test_converters_are_found_by_the_names_of_tensors(command, tmp_path):
    torch.save({"model": {"dynamics.egnn.weight": torch.ones(2)}, "epoch": 3}, tmp_path / "a.pt")
    seen = []

    def convert(content, path, out):
        seen.append((content["epoch"], path.name))
        out.mkdir()

    program = replace(
        IMAGEDIFF,
        converters=(
            Converter("other", lambda keys: "nothing" in keys, convert),
            Converter("egnn", lambda keys: "model.dynamics.egnn.weight" in keys, convert),
        ),
    )
    out = tmp_path / "converted"
    status, text, _ = command("convert", tmp_path / "a.pt", f"out={out}", program=program)
    assert (status, text) == (0, f"converted (egnn): {out}\n")
    assert seen == [(3, "a.pt")]
    (out / "file").touch()
    status, _, err = command("convert", tmp_path / "a.pt", f"out={out}", program=program)
    assert (status, "exists already" in err) == (2, True)
    status, _, err = command("convert", tmp_path / "a.pt", f"out={tmp_path / 'b'}")
    assert status == 2
    assert "no converter of imagediff recognises its 1 tensors" in err


def test_pickles_that_run_code_are_refused(command, tmp_path):
    torch.save({"path": Path("x")}, tmp_path / "evil.pt")
    status, _, err = command("convert", tmp_path / "evil.pt")
    assert (status, "refused" in err) == (2, True)


# -- documentation ----------------------------------------------------------------------------

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()


def test_the_python_example_runs(toys):
    codes = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (code,) = [code for code in codes if "runs/toys" in code]
    names: dict = {}
    exec(code.replace("runs/toys", str(toys)), names)
    points = [p for p in names["points"] if isinstance(p, np.ndarray)]
    assert len(points) > 200
    free = names["model"].sample(256, solver="unipc", steps=12, seed=0)
    assert np.mean(points, 0)[0] > np.mean([p for p in free if isinstance(p, np.ndarray)], 0)[0]


def test_samples_are_scored_while_training(tmp_path):
    more = ("trainer.score_every=2", "score.n=5", "score.steps=2", "model.width=8")
    run = Run.open(trained(tmp_path / "run", "toys", 4, *more))
    scored = [step for step, name, _ in run.metrics() if name == "sample_energy_distance"]
    assert scored == [2, 4]


# -- help -------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", [IMAGEDIFF, MOLEDIFF, POINTDIFF], ids=lambda p: p.name)
def test_help_and_version(command, program):
    status, out, _ = command("--help", program=program)
    assert status == 0
    assert all(verb in out for verb in VERBS)
    status, out, _ = command("--version", program=program)
    assert (status, out.split()[0]) == (0, program.name)
    assert command(program=program)[0] == 2


@pytest.mark.parametrize("verb", VERBS)
def test_help_on_every_verb(command, verb):
    status, out, _ = command(verb, "--help")
    assert (status, VERBS[verb].help in out, f"imagediff {verb}" in out) == (0, True, True)
    if verb == "sample":
        assert "steps=50" in out
        assert "denoiser calls per sample" in out
        assert "dpmpp_2m" in out


def count(config, program, progress):
    progress(1, 2)
    progress(2, 2)
    return Outcome((f"{config.path} by {program.name}",), ok=False)


def test_programs_add_verbs(command):
    verb = Verb("counts", f"{__name__}:count", bare=True, examples=("things",))
    program = replace(IMAGEDIFF, more={"report": verb})
    assert "counts" in command("--help", program=program)[1]
    assert "imagediff report things" in command("report", "--help", program=program)[1]
    assert command("report", "x y.csv", program=program)[:2] == (1, "x y.csv by imagediff\n")


def test_the_doctor_is_a_verb(command):
    status, out, _ = command("doctor")
    assert (status, "torch" in out) == (0, True)


def test_a_run_without_any_sample_fails_and_names_no_file(command, toys, tmp_path, monkeypatch):
    monkeypatch.setattr("shared.toys.FARTHEST", 0.0)
    words = (f"run={toys}", "n=4", "steps=2", "seed=0", f"out={tmp_path / 'out'}")
    status, out, _ = command("sample", *words)
    assert status == 1
    assert out.startswith("0 samples (seed 0")
    assert "4 of 4 could not be decoded" in out
