"""The sampling loop and the folder it streams to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.analytic import AnalyticDenoiser, Mixture
from shared.domains import Invalid
from shared.guidance import Known, RePaint, Steered
from shared.judging import read_items
from shared.process import Process
from shared.sample_folders import Folder, read_manifest
from shared.sampling import DecodeError, Memory, Record, Summary, sample, time_grid
from shared.schedules import RectifiedFlow, VPCosine, VPLinear
from shared.solvers.ancestral import DDIM
from shared.solvers.dpm_solver import DPMSolverMultistep
from shared.solvers.grids import GivenTimes, LogSNRTimes
from shared.solvers.karras import Heun
from shared.toys import Toys

PROCESS = Process.single(VPCosine())
NOISY = DPMSolverMultistep(eta=1.0)


def exact(domain: Toys) -> AnalyticDenoiser:
    m = domain.mixture
    mixture = Mixture(m.weight.float(), m.mean.float(), m.var.float())
    return AnalyticDenoiser.single(PROCESS, mixture)


def draw(n=10, *, denoise=None, domain=None, solver=NOISY, steps=6, seed=3, **options) -> Summary:
    domain = domain or Toys()
    return sample(
        denoise or exact(domain), PROCESS, domain, n, solver, steps, LogSNRTimes(), seed, **options
    )


@pytest.fixture(scope="module")
def whole() -> dict[int, np.ndarray]:
    sink = Memory()
    draw(sink=sink)
    return sink.items


@pytest.mark.parametrize("batch", [1, 3, 10, 64])
def test_a_sample_is_the_same_in_every_batch(whole, batch):
    sink = Memory()
    summary = draw(batch=batch, sink=sink)
    assert (summary.ok, summary.n, summary.nfe) == (10, 10, 6)
    assert all(np.array_equal(sink.items[i], whole[i]) for i in range(10))


def test_a_sample_is_the_same_in_every_order(whole):
    sink = Memory()
    draw(indices=[7, 2, 9], batch=2, sink=sink)
    assert sorted(sink.items) == [2, 7, 9]
    assert all(np.array_equal(sink.items[i], whole[i]) for i in (2, 7, 9))


class Placed(Toys):
    """Brings its own noise to start from."""

    def template(self, seed, indices, **request):
        batch = super().template(seed, indices, **request)
        return replace(batch, noise={"x": torch.tensor(indices)[:, None] * torch.ones(2)})


def test_a_domain_may_choose_the_noise_that_sampling_starts_from():
    sink = Memory()
    draw(3, domain=Placed(), solver=DPMSolverMultistep(), steps=8, sink=sink)
    state = {"x": torch.arange(3.0)[:, None] * torch.ones(2)}
    times = time_grid(PROCESS, DPMSolverMultistep(), LogSNRTimes(), 8)
    wanted = DPMSolverMultistep().solve(
        PROCESS, exact(Toys()), PROCESS.prior(state), times, None, None
    )
    for i in range(3):
        np.testing.assert_allclose(sink.items[i], wanted["x"][i].numpy(), atol=1e-4)


def test_samples_and_seeds_differ(whole):
    sink = Memory()
    draw(seed=4, sink=sink)
    points = np.stack([*whole.values(), *sink.items.values()])
    assert len(np.unique(points, axis=0)) == 20


@dataclass
class Greedy:
    """A denoiser that has room for ``most`` samples."""

    most: int
    error: type[Exception] = RuntimeError
    largest: int = 0

    def __call__(self, x, t, mask=None, cond=None):
        size = len(x["x"])
        if size > self.most:
            raise self.error("[enforce fail] DefaultCPUAllocator: can't allocate memory: 1 TB")
        self.largest = max(self.largest, size)
        return exact(Toys())(x, t, mask, cond)


@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError, MemoryError])
def test_out_of_memory_halves_the_chunk_and_skips_nothing(whole, error):
    denoise, sink, seen = Greedy(3, error), Memory(), []
    summary = draw(
        denoise=denoise, batch=10, sink=sink, progress=lambda done, total: seen.append(done)
    )
    assert summary.ok == 10
    assert denoise.largest == 2  # 10, 5, 2
    assert seen == [2, 4, 6, 8, 10]
    assert all(np.array_equal(sink.items[i], whole[i]) for i in range(10))


def test_out_of_memory_for_one_sample_is_an_error():
    with pytest.raises(RuntimeError, match="single sample"):
        draw(denoise=Greedy(0))


def test_other_runtime_errors_are_not_taken_for_memory():
    def broken(x, t, mask=None, cond=None):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        draw(denoise=broken)


def test_a_nan_sample_fails_alone(whole):
    def nan_for_some(x, t, mask=None, cond=None):
        out = exact(Toys())(x, t, mask, cond)
        bad = (x["x"] - start).abs().sum(-1) < 1e-6  # sample 4 at its first step
        return {"x": out["x"].map(lambda v: torch.where(bad[:, None], torch.nan, v))}

    start = torch.zeros(2)
    first = []

    def remember(x, t, mask=None, cond=None):
        first.append(x["x"].clone())
        return exact(Toys())(x, t, mask, cond)

    draw(denoise=remember)
    start = first[0][4]
    sink = Memory()
    summary = draw(denoise=nan_for_some, sink=sink)
    assert (summary.ok, summary.failed, summary.invalid) == (9, 1, 0)
    assert sink.records[4].status == "failed"
    assert "NaN or infinite" in sink.records[4].reason
    assert all(np.array_equal(sink.items[i], whole[i]) for i in range(10) if i != 4)


def test_a_denoiser_that_is_always_nan_stops():
    def nan(x, t, mask=None, cond=None):
        return {"x": exact(Toys())(x, t, mask, cond)["x"].map(lambda v: v * torch.nan)}

    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        draw(denoise=nan)


class Fussy(Toys):
    """Refuses points of the left half-plane, raises on some of the right one."""

    def decode(self, state, mask):
        items = super().decode(state, mask)
        if self.raises and any(p[0] > 0 and p[1] > 0.5 for p in items):
            raise KeyError("surprise")
        return [Invalid("", "left") if p[0] < 0 else p for p in items]

    raises = False


def test_invalid_is_reported_and_is_no_failure(whole):
    sink = Memory()
    summary = draw(domain=Fussy(), sink=sink)
    left = sum(p[0] < 0 for p in whole.values())
    assert 0 < left < 10
    assert (summary.invalid, summary.ok, summary.failed) == (left, 10 - left, 0)
    assert {r.reason for r in sink.records.values()} == {"", "left"}


def test_an_error_in_decode_fails_its_samples_only(whole):
    domain = Fussy()
    domain.raises = True
    summary = draw(domain=domain)
    assert summary.failed == sum(p[0] > 0 and p[1] > 0.5 for p in whole.values()) > 0
    assert summary.n == 10
    with pytest.raises(DecodeError, match="KeyError: 'surprise'"):
        draw(domain=domain, indices=[i for i, p in whole.items() if p[0] > 0 and p[1] > 0.5] * 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"n": 0}, "n=0"),
        ({"batch": 0}, "batch=0"),
        ({"seed": -1}, "at least 0"),
        ({"solver": DPMSolverMultistep(denoise_to_zero=True), "steps": 1}, "too few"),
        ({"request": {"lable": 3}}, "unknown key 'lable'"),
    ],
)
def test_impossible_settings(options, message):
    with pytest.raises(ValueError, match=message):
        draw(**options)


def test_a_solver_and_a_schedule_that_do_not_fit_are_named_before_any_work():
    process, calls = Process.single(RectifiedFlow()), []
    with pytest.raises(ValueError, match="solver DPMSolver.*grid LogSNR.*schedule RectifiedFlow"):
        sample(calls.append, process, Toys(), 2, NOISY, 5, LogSNRTimes(), 0)
    with pytest.raises(ValueError, match="do not fit: time grid"):
        sample(calls.append, PROCESS, Toys(), 2, NOISY, 5, GivenTimes((0.9, 0.1)), 0)
    assert not calls


# -- folders ----------------------------------------------------------------------------------

SETTINGS = {"seed": 3, "steps": 6, "n": 10}


def test_a_folder_holds_items_manifest_and_settings(tmp_path, whole):
    sink = Folder(tmp_path, Toys(), SETTINGS)
    sink.finish(draw(sink=sink, batch=4))
    points = list(Toys().read(tmp_path / "samples.csv"))
    assert np.array_equal(np.stack(points), np.stack([whole[i] for i in range(10)]))
    lines = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(10))
    assert {(line["seed"], line["status"], line["reason"]) for line in lines} == {(3, "ok", "")}
    assert lines[-1]["end"] == (tmp_path / "samples.csv").stat().st_size
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings["steps"] == 6
    assert settings["result"]["nfe"] == 6
    assert settings["result"]["ok"] == 10


@pytest.mark.parametrize("batch", [3, 4])
@pytest.mark.parametrize("damage", ["torn manifest", "items without records", "both", "nothing"])
def test_resuming_gives_the_bytes_of_an_uninterrupted_run(tmp_path, batch, damage):
    other = Folder(tmp_path / "other", Toys(), SETTINGS)
    draw(sink=other)
    sink = Folder(tmp_path / "mine", Toys(), SETTINGS)
    draw(sink=sink, n=6, batch=3)
    if damage in ("torn manifest", "both"):
        sink.manifest.write_bytes(sink.manifest.read_bytes() + b'{"index": 6, "se')
    if damage in ("items without records", "both"):
        sink.file.write_bytes(sink.file.read_bytes() + b"0.5,0.5\n0.2")
    again = Folder(tmp_path / "mine", Toys(), SETTINGS)
    assert sorted(again.records) == list(range(6))
    assert draw(sink=again, batch=batch).ok == 10
    assert again.file.read_bytes() == other.file.read_bytes()
    assert [r.index for r in read_manifest(tmp_path / "mine")] == list(range(10))
    assert draw(sink=Folder(tmp_path / "mine", Toys(), SETTINGS)).nfe == 0  # nothing left to do


def test_failed_samples_are_tried_again(tmp_path):
    sink = Folder(tmp_path, Toys(), SETTINGS)
    draw(sink=sink, n=4)
    lines = sink.manifest.read_text().replace(
        '"index": 2, "seed": 3, "status": "ok"', '"index": 2, "seed": 3, "status": "failed"'
    )
    sink.manifest.write_text(lines)
    again = Folder(tmp_path, Toys(), SETTINGS)
    assert draw(sink=again, n=4).ok == 4
    assert [r.index for r in read_manifest(tmp_path)] == [0, 1, 2, 3, 2]


def test_items_stand_at_the_numbers_of_their_records(tmp_path):
    sink, (a, b, c) = Folder(tmp_path, Toys(), SETTINGS), np.arange(6.0).reshape(3, 2)
    status = ("ok", "failed", "ok")
    records = [Record(i, 3, found, "nan" * (i == 1)) for i, found in enumerate(status)]
    sink.put(records, [a, Invalid("1", "nan"), c])
    found = read_items(Toys(), tmp_path)
    assert isinstance(found[1], Invalid)
    np.testing.assert_allclose([found[0], found[2]], [a, c])
    sink.put([Record(1, 3, "ok", "")], [b])
    np.testing.assert_allclose(read_items(Toys(), tmp_path), [a, b, c])
    Toys().write(sink.file, [a])  # of a chunk that was killed before its records were written
    np.testing.assert_allclose(read_items(Toys(), tmp_path), [a, b, c])
    sink.file.unlink()
    Toys().write(sink.file, [a])
    with pytest.raises(ValueError, match="holds 1 items, its manifest says 3"):
        read_items(Toys(), tmp_path)


def test_a_folder_refuses_other_settings_and_changed_files(tmp_path):
    sink = Folder(tmp_path, Toys(), {**SETTINGS, "request": {}})
    draw(sink=sink)
    Folder(tmp_path, Toys(), {**SETTINGS, "n": 20})  # more of the same is fine
    with pytest.raises(ValueError, match="steps=6, now asked for 7"):
        Folder(tmp_path, Toys(), {**SETTINGS, "steps": 7})
    with pytest.raises(ValueError, match=r"more than n=3; give n=\d+ or more"):
        Folder(tmp_path, Toys(), {**SETTINGS, "n": 3})
    settings = {**SETTINGS, "request": {"label": 3, "list": [*range(999)]}}
    with pytest.raises(ValueError, match=r"request.label=None, now asked for 3; choose"):
        Folder(tmp_path, Toys(), settings)
    sink.file.write_bytes(b"")
    with pytest.raises(ValueError, match="was changed"):
        Folder(tmp_path, Toys(), {**SETTINGS, "n": 20})
    sink.manifest.write_text('{"index": 0}\nnonsense\n{"index": 1}\n')
    with pytest.raises(ValueError, match="line 1: not a record"):
        read_manifest(tmp_path)


def test_a_file_of_other_origin_stays(tmp_path):
    mine = tmp_path / "samples.csv"
    mine.write_text("1.0,2.0\n")
    with pytest.raises(ValueError, match="no record of it; choose another out"):
        Folder(tmp_path, Toys(), SETTINGS)
    assert mine.read_text() == "1.0,2.0\n"


KILLED = """
import os, sys
sys.path[:0] = [{tests!r}, {root!r}]
import test_sampling as t
from pathlib import Path

calls = 0
def dies(x, time, mask=None, cond=None):
    global calls
    calls += 1
    if calls == 15:
        os.kill(os.getpid(), 9)
    return t.exact(t.Toys())(x, time, mask, cond)

t.draw(denoise=dies, batch=3, sink=t.Folder(Path({folder!r}), t.Toys(), t.SETTINGS))
"""


def test_a_killed_process_loses_the_chunk_in_flight_only(tmp_path):
    here = Path(__file__).resolve()
    script = KILLED.format(
        tests=str(here.parent), root=str(here.parents[2]), folder=str(tmp_path / "mine")
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", script], env=environment, check=False)
    assert killed.returncode == -9
    assert [r.index for r in read_manifest(tmp_path / "mine")] == list(range(6))
    sink = Folder(tmp_path / "mine", Toys(), SETTINGS)
    draw(sink=sink, batch=3)
    other = Folder(tmp_path / "other", Toys(), SETTINGS)
    draw(sink=other)
    assert sink.file.read_bytes() == other.file.read_bytes()


def test_a_budget_is_never_exceeded():
    process = Process.single(VPLinear())
    for solver, steps in [(Heun(), 5), (Heun(), 2), (DDIM(), 5)]:
        times = time_grid(process, solver, LogSNRTimes(), steps)
        (plan,) = solver.plans(process, times).values()
        assert plan.nfe <= steps
    with pytest.raises(ValueError, match="too few for one step"):
        time_grid(process, Heun(), LogSNRTimes(), 1)


@pytest.mark.parametrize(
    "solver",
    [
        Steered.best_of(Heun(), lambda x: x["x"][:, 0], 3),
        RePaint(Heun(), Known({"x": torch.zeros(1, 2)}, {"x": torch.tensor([[1, 0]]) > 0}), 2, 3),
    ],
)
@pytest.mark.parametrize("steps", [9, 21])
def test_a_budget_holds_around_solvers_too(solver, steps):
    summary = draw(n=2, solver=solver, steps=steps)
    times = time_grid(PROCESS, solver, LogSNRTimes(), steps)
    assert summary.nfe == solver.calls(PROCESS, times) <= steps
