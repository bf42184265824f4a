"""Run folders: made, reopened, refused, locked, found by name."""

from __future__ import annotations

import math
import multiprocessing

import pytest
import torch

from shared import checkpoints
from shared.runs import Run, RunConflict, flat, pretrained, register_pretrained


def config(**changes):
    base = {
        "model": {"width": 64, "heads": [1, 2], "act": None},
        "trainer": {"max_steps": 100, "save_every": 10, "optimizer": {"lr": 1e-3}},
        "seed": 5,
    }
    return {**base, **changes}


def trainer(**changes):
    return {**config()["trainer"], **changes}


def test_a_new_run_has_its_files_and_reopens(tmp_path):
    with Run.create(tmp_path / "r", config()) as run:
        assert run.writes
        assert run.seed == 5
        assert run.checkpoints.is_dir()
        assert run.samples.is_dir()
    assert not run.writes
    with Run.create(tmp_path / "r", config()) as again:
        assert again.config == config()
    read = Run.open(tmp_path / "r")
    assert read.config == config()
    assert not read.writes
    lines = (tmp_path / "r" / "log.txt").read_text().splitlines()
    assert [line.split()[1].rstrip(",") for line in lines] == ["started", "reopened"]
    assert "torch" in (tmp_path / "r" / "versions.json").read_text()


def test_a_seed_that_was_not_given_is_drawn_once_and_kept(tmp_path):
    seeds = []
    for name in ("a", "a", "b"):
        with Run.create(tmp_path / name, config(seed=None)) as run:
            seeds.append(run.seed)
    assert seeds[0] == seeds[1] != seeds[2]
    assert Run.open(tmp_path / "a").seed == seeds[0]


def started(folder):
    with Run.create(folder, config()) as run:
        (run.checkpoints / "last").mkdir()
        (run.checkpoints / "last" / checkpoints.MANIFEST).write_text("{}")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"model": {"width": 32, "heads": [1, 2], "act": None}},
            "model.width is 64 there, now 32",
        ),
        ({"model": {"width": 64, "heads": [2], "act": None}}, r"model.heads is \[1, 2\] there"),
        ({"model": {"wdith": 64, "heads": [1, 2], "act": None}}, "model.wdith is not set there"),
        ({"seed": 6}, "seed is 5 there, now 6"),
        ({"trainer": trainer(max_steps=50)}, "trainer.max_steps is 100 there, now 50"),
        ({"trainer": trainer(optimizer={"lr": 1e-4})}, "trainer.optimizer.lr is 0.001 there"),
        ({"domain": "qm9"}, "domain is not set there, now 'qm9'"),
    ],
)
def test_settings_that_matter_are_named_when_they_differ(tmp_path, changed, message):
    started(tmp_path / "r")
    before = (tmp_path / "r" / "config.yaml").read_text()
    with pytest.raises(RunConflict, match=message) as caught:
        Run.create(tmp_path / "r", config(**changed))
    assert "choose another folder" in str(caught.value)
    assert (tmp_path / "r" / "config.yaml").read_text() == before
    Run.create(tmp_path / "r", config()).close()  # a refusal leaves no lock


@pytest.mark.parametrize(
    "changed",
    [
        {"trainer": trainer(max_steps=200)},
        {"trainer": trainer(save_every=7)},
        {"trainer": trainer(workers=4, devices=2)},
        {"out": "elsewhere"},
    ],
)
def test_settings_that_do_not_change_the_result_may_change(tmp_path, changed):
    started(tmp_path / "r")
    Run.create(tmp_path / "r", config(**changed)).close()
    assert Run.open(tmp_path / "r").config == config(**changed)


def test_a_mistake_before_the_first_checkpoint_can_be_mended(tmp_path):
    Run.create(tmp_path / "r", config(model={"width": 1})).close()
    Run.create(tmp_path / "r", config()).close()
    assert Run.open(tmp_path / "r").config == config()


def test_a_file_is_no_run(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"PK")
    with pytest.raises(ValueError, match="is a file, not a run folder; the `convert`"):
        Run.open(tmp_path / "model.pt")


def _try(folder, answers):
    try:
        Run.create(folder, config()).close()
        answers.put("open")
    except RunConflict as error:
        answers.put(str(error))


def test_two_processes_cannot_write_one_run(tmp_path):
    context = multiprocessing.get_context("fork")
    answers = context.Queue()

    def ask():
        process = context.Process(target=_try, args=(tmp_path / "r", answers))
        process.start()
        process.join()
        return answers.get()

    with Run.create(tmp_path / "r", config()):
        assert "another process" in ask()
        assert Run.open(tmp_path / "r").config == config()  # reading is free
    assert ask() == "open"


def test_only_rank_zero_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    run = Run.create(tmp_path / "r", config())
    assert not run.writes
    assert not run.folder.exists()


def test_metrics_are_appended_read_and_rewound(tmp_path):
    with Run.create(tmp_path / "r", config()) as run:
        for step in (1, 2, 3):
            run.write_metrics(step, {"loss": step / 3, "x, y": math.nan})
        with (run.folder / "metrics.csv").open("a") as file:
            file.write("4,lo")  # a process was killed here
        rows = run.metrics()
        assert [r[0] for r in rows] == [1, 1, 2, 2, 3, 3]
        assert rows[2] == (2, "loss", 2 / 3)
        run.rewind(2)
        run.write_metrics(3, {"loss": 0.5})
        assert [(s, n) for s, n, _ in run.metrics()][-3:] == [
            (2, "loss"),
            (2, "x, y"),
            (3, "loss"),
        ]


def test_a_run_finds_its_checkpoints(tmp_path):
    with Run.create(tmp_path / "r", config()) as run:
        with pytest.raises(FileNotFoundError, match="no checkpoint; there: none"):
            run.checkpoint()
        for name in ("last", "step-00000010"):
            _save(run.checkpoints / name)
        assert run.checkpoint().name == "last"
        _save(run.checkpoints / "best")
        assert run.checkpoint().name == "best"
        assert run.checkpoint("step-00000010").name == "step-00000010"
        with pytest.raises(FileNotFoundError, match="no checkpoint lost; there: best, last, step"):
            run.checkpoint("lost")


def _save(path):
    module = torch.nn.Linear(1, 1)
    checkpoints.save(path, module, config={"model": "m"}, domain={}, step=1)


def test_a_pretrained_model_is_found_by_name(tmp_path):
    _save(tmp_path / "pretrained" / "small_model")
    register_pretrained(tmp_path / "pretrained")
    assert pretrained()["small_model"] == tmp_path / "pretrained" / "small_model"
    run = Run.open("small_model")
    assert run.config == {"model": "m"}
    assert checkpoints.load(run.checkpoint()).step == 1
    with pytest.raises(FileNotFoundError, match="small_modle.*pretrained: .*small_model"):
        Run.open("small_modle")


def test_flat_keys():
    assert flat({"a": {"b": 1, "c": {}}, "d": (1, 2)}) == {"a.b": 1, "a.c": {}, "d": [1, 2]}


def test_a_folder_that_is_no_run_does_not_hide_a_pretrained_model(tmp_path, monkeypatch):
    stored = tmp_path / "package" / "mine"
    stored.mkdir(parents=True)
    (stored / "checkpoint.json").write_text('{"config": {"a": 1}}')
    monkeypatch.setattr("shared.runs._pretrained", [tmp_path / "package"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert Run.open("mine").folder == stored
