"""The tape, the plan and the loop."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from shared.analytic import AnalyticDenoiser, Mixture
from shared.predictions import Prediction
from shared.process import Field, Process, State
from shared.schedules import RectifiedFlow, VPCosine, VPLinear
from shared.solvers.ancestral import DDIM, DDPM
from shared.solvers.base import PlanSolver, check_times
from shared.solvers.karras import LMS
from shared.solvers.langevin import EulerMaruyama
from shared.solvers.plan import (
    Form,
    LinearVariance,
    LogVariance,
    Plan,
    Stage,
    Tape,
    run,
)


def constant(x0: float = 2.0, eps: float = 3.0):
    """A denoiser whose forms are constants, var = 0.25."""

    def denoise(x: State, t: float) -> dict[str, Prediction]:
        return {
            name: Prediction(
                v,
                0.8,
                0.6,
                x0=torch.full_like(v, x0),
                eps=torch.full_like(v, eps),
                var=torch.full_like(v, 0.25),
            )
            for name, v in x.items()
        }

    return denoise


def numbered(name: str, j: int) -> Tensor:
    """Draw j is 10^j."""
    return torch.full((2, 1), 10.0**j, dtype=torch.float64)


def one(value: float = 1.0) -> State:
    return {"x": torch.full((2, 1), value, dtype=torch.float64)}


def end(plan: Plan, denoise=None, x: State | None = None) -> float:
    out = run({"x": plan}, denoise or constant(), x or one(), numbered)["x"]
    assert bool((out == out[0]).all())
    return float(out[0])


# -- writing ----------------------------------------------------------------------------------


def test_a_row_says_what_its_form_says() -> None:
    tape = Tape()
    x = tape.start()
    x0, eps = tape.predict(x, 0.5)
    z = tape.draw()
    tape.step(0.5 * x + 2.0 * x0 - eps / 4.0 + 3.0 * z + tape.constant(7.0), 0.25)
    plan = tape.plan()
    row = plan.rows[0]
    assert (row.at, row.base, row.a, row.time) == (0.5, 0, 0.5, 0.25)
    assert (row.x0, row.eps, row.z, row.const) == ({0: 2.0}, {0: -0.25}, {0: 3.0}, 7.0)
    assert end(plan) == pytest.approx(0.5 + 4.0 - 0.75 + 3.0 + 7.0)


def test_forms_are_linear() -> None:
    a, b = Form({("x", 0): 1.0}), Form({("x0", 0): 2.0})
    total = 2.0 * (a + b) - a / 2.0
    assert total.terms == {("x", 0): 1.5, ("x0", 0): 4.0}
    assert (a - a).terms == {("x", 0): 0.0}


def test_zero_coefficients_leave_the_row() -> None:
    tape = Tape()
    x0, eps = tape.predict(tape.start(), 1.0)
    tape.step(x0 + 0.0 * eps + 0.0 * tape.draw())
    row = tape.plan().rows[0]
    assert not row.eps
    assert not row.z
    assert row.base is None


def test_predicting_at_an_old_state_is_refused() -> None:
    tape = Tape()
    x = tape.start()
    x0, _ = tape.predict(x, 1.0)
    tape.step(x0, 0.5)
    with pytest.raises(ValueError, match="step to it first"):
        tape.predict(x, 0.5)


def test_predicting_at_a_form_that_is_no_state_is_refused() -> None:
    tape = Tape()
    with pytest.raises(ValueError, match="current state"):
        tape.predict(2.0 * tape.start(), 1.0)


def test_predicting_twice_at_one_state_is_refused() -> None:
    tape = Tape()
    x = tape.start()
    tape.predict(x, 1.0)
    with pytest.raises(ValueError, match="already"):
        tape.predict(x, 1.0)


def test_a_row_with_two_bases_is_refused() -> None:
    tape = Tape()
    x = tape.start()
    x0, _ = tape.predict(x, 1.0)
    y = tape.step(0.5 * x + x0, 0.5)
    with pytest.raises(ValueError, match="one state"):
        tape.step(x + y)


def test_a_row_may_start_from_an_older_state() -> None:
    tape = Tape()
    x = tape.start()
    x0, _ = tape.predict(x, 1.0)
    y = tape.step(x0, 0.5)
    y0, _ = tape.predict(y, 0.5)
    tape.step(x + y0)
    assert end(tape.plan()) == pytest.approx(1.0 + 2.0)


def test_an_unfinished_tape_is_refused() -> None:
    tape = Tape()
    tape.predict(tape.start(), 1.0)
    with pytest.raises(ValueError, match="not followed by a step"):
        tape.plan()


def test_learned_coefficients_are_neither_scaled_nor_added() -> None:
    noise = Tape().learned_noise(LinearVariance(0, 0.1, 0.2))
    with pytest.raises(TypeError, match="scaled"):
        _ = 2.0 * noise
    with pytest.raises(TypeError, match="added"):
        _ = noise + noise


# -- validation -------------------------------------------------------------------------------


def stage(**changes) -> Stage:
    options = {"at": 1.0, "base": 0, "a": 1.0, "x0": {0: 1.0}, "eps": {}, "z": {}}
    return Stage(**(options | changes))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((), "no rows"),
        ((stage(x0={}),), "never used"),
        ((stage(), stage(x0={0: 1.0})), r"rows \[1\] are never used"),
        ((stage(a=math.nan),), "not finite"),
        ((stage(x0={0: math.inf}),), "not finite"),
        ((stage(z={0: math.nan}),), "not finite"),
        ((stage(const=math.inf),), "not finite"),
        ((stage(x0={0: torch.tensor([1.0, math.nan])}),), "not finite"),
        ((stage(base=1),), "does not exist"),
        ((stage(x0={1: 1.0}), stage()), "does not exist"),
        ((stage(at=None, x0={0: 1.0}),), "does not exist"),
        ((stage(at=None, x0={}, z={0: LinearVariance(0, 0.1, 0.1)}),), "does not exist"),
    ],
)
def test_impossible_plans_are_refused(rows, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan(rows)


def test_an_evaluation_for_its_variance_alone_counts_as_used() -> None:
    assert Plan((stage(x0={}, z={0: LinearVariance(0, 0.1, 0.1)}),), 1).nfe == 1


def test_a_grid_into_infinite_log_snr_is_named() -> None:
    with pytest.raises(ValueError, match="t_start and t_end"):
        EulerMaruyama().plan(RectifiedFlow(), [1.0, 0.5])


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([1.0], "at least one step"),
        ([0.5, 0.5], "decrease"),
        ([0.2, 0.5], "decrease"),
        ([1.2, 0.5], "leaves the schedule"),
        ([1.0, -0.1], "leaves the schedule"),
        ([1.0, math.nan], "decrease"),
    ],
)
def test_impossible_times_are_refused(times: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_times(VPLinear(), times)


# -- figures ----------------------------------------------------------------------------------


def test_memory_and_last_use() -> None:
    times = [80.0, 40.0, 20.0, 10.0, 5.0, 2.0]
    schedule = VPLinear()
    short = [t / 80.0 for t in times]
    assert DDIM().plan(schedule, short).memory <= 4  # state, x0, eps, the new state
    two, four = (LMS(n).plan(schedule, short) for n in (2, 4))
    assert four.memory == two.memory + 2
    assert two.last_use["eps", 0] == 1
    assert four.last_use["eps", 0] == 3
    assert ("x0", 0) not in two.last_use


def test_the_loop_holds_no_more_than_the_plan_says() -> None:
    """Forms that no row reads are not asked for; dead arrays are dropped."""
    asked: list[str] = []

    class Watched(Prediction):
        __slots__ = ()

        def form(self, kind: str) -> Tensor:
            asked.append(kind)
            return super().form(kind)

    def denoise(x: State, t: float) -> dict[str, Prediction]:
        return {"x": Watched(x["x"], 0.8, 0.6, eps=x["x"].clone())}

    plan = LMS(2).plan(VPLinear(), [1.0, 0.7, 0.4, 0.1])
    run({"x": plan}, denoise, one(), numbered)
    assert asked == ["eps"] * 3


def test_gain_is_the_largest_sum_of_prediction_weights() -> None:
    plan = Plan((stage(x0={0: -3.0}, eps={0: 2.0}), stage(x0={1: 1.0})))
    assert plan.gain == 5.0


def test_a_plan_prints_as_formulas() -> None:
    text = str(DDPM().plan(VPLinear(), [1.0, 0.5, 0.1]))
    assert text.splitlines()[0].startswith("   0  x[1] = ")
    assert "x0[0]" in text
    assert "predict at t=0.5" in text


# -- running ----------------------------------------------------------------------------------


def test_draws_are_asked_for_by_number() -> None:
    tape = Tape()
    first, second = tape.draw(), tape.draw()
    x = tape.step(tape.start() + 2.0 * second)
    tape.step(x + 3.0 * first + 5.0 * second)
    plan = tape.plan()
    assert plan.draws == 2
    assert end(plan) == pytest.approx(1.0 + 20.0 + 3.0 + 50.0)


@pytest.mark.parametrize(
    ("std", "want"),
    [
        (LinearVariance(0, 0.11, 1.0), 0.6),
        (LinearVariance(0, 0.11, 1.0, cap=0.04), 0.2),
        (LogVariance(0, math.log(1.0), math.log(16.0)), math.sqrt(2.0)),
    ],
)
def test_learned_coefficients_are_completed_by_the_head(std, want: float) -> None:
    tape = Tape()
    x = tape.start()
    tape.predict(x, 1.0)
    tape.step(x + tape.learned_noise(std))  # var = 0.25, draw 0 = 1
    assert end(tape.plan()) == pytest.approx(1.0 + want)


def test_coefficients_may_be_arrays() -> None:
    tape = Tape()
    x = tape.start()
    x0, _ = tape.predict(x, 1.0)
    tape.step(x + torch.tensor([1.0, 10.0]) * x0)
    start = {"x": torch.zeros(1, 2, dtype=torch.float64)}
    out = run({"x": tape.plan()}, constant(), start, numbered)["x"]
    assert out.tolist() == [[2.0, 20.0]]


def test_the_start_is_not_changed() -> None:
    x = one()
    run({"x": DDPM().plan(VPLinear(), [1.0, 0.5])}, constant(), x, numbered)
    assert torch.equal(x["x"], one()["x"])


def test_hooks_run_after_every_row_and_change_the_state() -> None:
    log: list[str] = []

    def project(name: str, y: Tensor) -> Tensor:
        log.append("project")
        return y + 100.0

    def after(x: State, time: float | None) -> State:
        log.append(f"after {time}")
        return {"x": x["x"] + 1000.0}

    plan = Plan((stage(time=0.5), stage(x0={1: 1.0}, base=1, time=0.1)))
    out = run({"x": plan}, constant(), one(), numbered, project, after)["x"]
    assert log == ["project", "after 0.5", "project", "after 0.1"]
    assert float(out[0]) == 1.0 + 2 * (2.0 + 1100.0)


def test_resampling_takes_states_and_predictions_along() -> None:
    x = {"x": torch.tensor([[1.0], [5.0]], dtype=torch.float64)}

    def denoise(x: State, t: float) -> dict[str, Prediction]:
        return {"x": Prediction(x["x"], 0.8, 0.6, x0=10.0 * x["x"])}

    plan = Plan((stage(),))
    out = run({"x": plan}, denoise, x, numbered, resample=lambda p, t: torch.tensor([1, 1]))
    assert out["x"].tolist() == [[55.0], [55.0]]


def two_fields() -> tuple[Process, AnalyticDenoiser]:
    process = Process({"a": Field(VPLinear()), "b": Field(VPCosine(t_max=1.0))})
    mixture = Mixture.gaussian(torch.zeros(1).double(), torch.ones(1).double())
    return process, AnalyticDenoiser(process, {"a": mixture, "b": mixture})


def test_fields_follow_their_own_tables_with_one_call_per_row() -> None:
    process, exact = two_fields()
    calls: list[float] = []

    def denoise(x: State, t: float) -> dict[str, Prediction]:
        calls.append(t)
        return exact(x, t)

    times = [0.9, 0.5, 0.1]
    x = {"a": one()["x"], "b": one(2.0)["x"]}
    out = DDIM().solve(process, denoise, x, times, numbered)
    assert calls == times[:-1]
    for name in ("a", "b"):  # independent fields: the same alone
        single = Process({name: process.fields[name]})
        alone = DDIM().solve(
            single,
            AnalyticDenoiser(single, {name: exact.mixtures[name]}),
            {name: x[name]},
            times,
            numbered,
        )
        assert torch.equal(out[name], alone[name])


def test_plans_with_other_times_or_fields_are_refused() -> None:
    first = DDIM().plan(VPLinear(), [1.0, 0.5])
    second = DDIM().plan(VPLinear(), [0.9, 0.5])
    x = {"a": one()["x"], "b": one()["x"]}
    with pytest.raises(ValueError, match="'b' evaluates at other times"):
        run({"a": first, "b": second}, constant(), x, numbered)
    with pytest.raises(ValueError, match="plans are for"):
        run({"a": first}, constant(), x, numbered)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_denoiser_that_is_not_finite_is_named_with_sample_and_step(bad: float) -> None:
    def denoise(x: State, t: float) -> dict[str, Prediction]:
        x0 = torch.zeros_like(x["x"])
        if t < 0.6:
            x0[1] = bad
        return {"x": Prediction(x["x"], 0.8, 0.6, x0=x0, eps=x0)}

    plan = DDPM().plan(VPLinear(), [1.0, 0.5, 0.1])
    with pytest.raises(FloatingPointError, match=r"step 1 \(t=0.5\).*1 of 2 samples.*\[1\]"):
        run({"x": plan}, denoise, one(), numbered)


def test_the_loop_keeps_the_dtype() -> None:
    x = {"x": torch.ones(2, 1)}
    out = run({"x": DDPM().plan(VPLinear(), [1.0, 0.5])}, constant(), x, lambda n, j: x["x"])
    assert out["x"].dtype == torch.float32


def test_gradients_flow_through_the_loop() -> None:
    x = torch.ones(2, 1, dtype=torch.float64, requires_grad=True)
    plan = DDIM().plan(VPLinear(), [1.0, 0.5, 0.1])

    def denoise(state: State, t: float) -> dict[str, Prediction]:
        return {"x": Prediction(state["x"], 0.8, 0.6, eps=torch.tanh(state["x"]))}

    run({"x": plan}, denoise, {"x": x}, numbered)["x"].sum().backward()
    assert x.grad is not None
    assert bool((x.grad != 0).all())


def test_solver_defaults() -> None:
    class Plain(PlanSolver):
        order, stochastic = 1, False

        def write(self, tape, schedule, times, lead) -> None:
            x0, _ = tape.predict(tape.start(), times[0])
            tape.step(x0, times[-1])

    assert Plain().intervals(7) == 7
    assert Plain().for_field("x").plan(VPLinear(), [1.0, 0.5]).nfe == 1
