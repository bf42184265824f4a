"""Karras-sigma solvers: parity with k-diffusion and EDM, exactness, orders, churn."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from solver_checks import (
    SCHEDULES,
    affine_map,
    deviation,
    dirac_error,
    gaussian_ode_error,
    gaussian_sde_error,
    golden_denoiser,
    graded,
    measured_order,
    mixture_ode_errors,
    no_draws,
    replay,
    trajectory,
    uniform_log_snr,
)
from torch import Tensor

from shared.process import Field, Process
from shared.schedules import Karras, RectifiedFlow, Schedule, Time, VPCosine, VPLinear, as_time
from shared.solvers.ancestral import DDIM
from shared.solvers.base import PlanSolver
from shared.solvers.karras import DPM2, LMS, DPMpp2SAncestral, Euler, Heun, adams_bashforth

# the published runs churn beyond sigma = 80, so their schedule reaches further
WIDE = Karras(0.002, 200.0)
CHURN = {"s_churn": 6.0, "s_min": 0.05, "s_max": 50.0, "s_noise": 1.003}
K_DIFFUSION: dict[str, PlanSolver] = {
    "euler": Euler(),
    "heun": Heun(),
    "dpm_2": DPM2(),
    "lms2": LMS(2),
    "lms3": LMS(3),
    "lms4": LMS(4),
    "euler_churn": Euler(**CHURN),
    "heun_churn": Heun(**CHURN),
    "dpm_2_churn": DPM2(**CHURN),
    "euler_ancestral": DDIM(eta=1.0),
    "euler_ancestral_eta.5": DDIM(eta=0.5),
    "dpm_2_ancestral": DPM2(eta=1.0),
    "dpmpp_2s_ancestral": DPMpp2SAncestral(),
    "dpmpp_2s_ancestral_eta0": DPMpp2SAncestral(0.0),
}
EDM = {
    "edm_heun": Heun(),
    "edm_heun_churn5": Heun(s_churn=5.0),
    "edm_heun_churn40_.05_50_1.003": Heun(s_churn=40.0, s_min=0.05, s_max=50.0, s_noise=1.003),
}


def draws_of(tensors: dict[str, Tensor], key: str):
    return replay(tensors[f"{key}/noise"]) if f"{key}/noise" in tensors else no_draws


@pytest.mark.golden
@pytest.mark.parametrize("name", K_DIFFUSION)
def test_k_diffusion_parity(golden, name: str) -> None:
    tensors, _ = golden("05_sigma_samplers")
    denoise, solver = golden_denoiser(tensors, WIDE), K_DIFFUSION[name]
    keys = [k for k in tensors if k.startswith(f"kdiff/{name}/") and k.count("/") == 3]
    assert keys
    for key in keys:
        sigmas = tensors[f"sigmas/{key.split('/')[2]}/{key.split('/')[3][1:]}"].tolist()
        end, seen = trajectory(
            solver, denoise, 80.0 * tensors["z"], sigmas, draws_of(tensors, key)
        )
        assert deviation(end, tensors[key]) < 1e-11, key
        if f"{key}/traj" in tensors and len(seen) == len(sigmas):
            assert deviation(torch.stack(seen[:-1]), tensors[f"{key}/traj"]) < 1e-11, key


@pytest.mark.golden
@pytest.mark.parametrize("name", EDM)
def test_edm_sampler_parity(golden, name: str) -> None:
    tensors, about = golden("05_sigma_samplers")
    denoise, solver = golden_denoiser(tensors, WIDE), EDM[name]
    for key in [k for k in tensors if k.startswith(f"nvlabs/{name}/n") and k.count("/") == 2]:
        n = int(key.split("/n")[-1])
        ramp = torch.linspace(0, 1, n, dtype=torch.float64)
        sigmas = (80.0 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 80.0 ** (1 / 7))) ** 7
        times = [80.0, *sigmas[1:].tolist(), 0.0]
        x, draw = {"x": 80.0 * tensors["z"]}, draws_of(tensors, key)
        end = solver.solve(denoise.process, denoise, x, times, draw)["x"]
        assert deviation(end, tensors[key]) < 1e-11, key
        assert solver.plan(WIDE, times).nfe == about["nfe"][key] == 2 * n - 1


@dataclass(frozen=True)
class SquareRoot(Schedule):
    """sigma = sqrt(t), the 've' time of EDM's ablation."""

    t_min: float = 0.0
    t_max: float = 1e4

    def log_alpha(self, t: Time) -> Tensor:
        return 0.0 * as_time(t)

    def log_sigma(self, t: Time) -> Tensor:
        return 0.5 * torch.log(as_time(t))

    def t_from_log_snr(self, log_snr: Time) -> Tensor:
        return torch.exp(-2.0 * as_time(log_snr))


def ablation_times(discretisation: str, schedule: Schedule, n: int) -> list[float]:
    """EDM's ablation: noise levels of one discretisation, as times of ``schedule``."""
    ramp = torch.linspace(0, 1, n, dtype=torch.float64)
    vp = VPLinear()
    if discretisation == "vp":
        sigmas = torch.exp(-vp.log_snr(1.0 + ramp * (1e-3 - 1.0)))
    elif discretisation == "ve":
        sigmas = 100.0 * (0.02 / 100.0) ** ramp
    else:
        sigmas = (80.0 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 80.0 ** (1 / 7))) ** 7
    return [*schedule.t_from_log_snr(-torch.log(sigmas)).tolist(), 0.0]


@pytest.mark.golden
@pytest.mark.parametrize("discretisation", ["vp", "ve", "edm"])
def test_edm_ablation_parity(golden, discretisation: str) -> None:
    tensors, _ = golden("05_sigma_samplers")
    schedules = {"vp": VPLinear(), "ve": SquareRoot(), "linear": Karras(0.002, 1e3)}
    keys = [k for k in tensors if k.startswith(f"nvlabs/ablation_{discretisation}_")]
    assert keys
    for key in keys:
        parts = key.split("/")[1].removeprefix(f"ablation_{discretisation}_").split("_")
        n = int(key.split("/n")[-1])
        if parts[0] == "heun":  # edm with the second evaluation at 0.8 of the step
            schedule, solver = schedules["linear"], Heun(variable="time", midpoint=0.8)
        else:
            schedule = schedules[parts[0]]
            solver = (Euler if parts[2] == "euler" else Heun)(variable="time")
        times = ablation_times(discretisation, schedule, n)
        denoise = golden_denoiser(tensors, schedule)
        x = {"x": float(schedule.sigma(times[0])) * tensors["z"]}
        end = solver.solve(denoise.process, denoise, x, times, no_draws)["x"]
        assert deviation(end, tensors[key]) < 1e-11, key


# -- without a network ------------------------------------------------------------------------

EXACT: dict[str, PlanSolver] = {
    "euler": Euler(),
    "heun": Heun(),
    "heun_churn": Heun(s_churn=3.0),
    "midpoint": Heun(midpoint=0.5),
    "dpm_2": DPM2(),
    "dpm_2_ancestral": DPM2(eta=1.0),
    "2s_ancestral": DPMpp2SAncestral(),
    "lms": LMS(4),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", EXACT)
def test_a_point_mass_is_exact_at_any_number_of_steps(name: str, schedule: str) -> None:
    noise, start, end = SCHEDULES[schedule]
    times = uniform_log_snr(noise, 7, start, end)
    assert dirac_error(EXACT[name], noise, times) < 1e-11


def test_a_rectified_flow_in_time_is_exact_for_a_point_mass_from_one_to_zero() -> None:
    flow = RectifiedFlow()
    for solver in (Euler(variable="time"), Heun(variable="time")):
        assert dirac_error(solver, flow, [1.0, 0.7, 0.3, 0.0]) < 1e-13


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    "solver", [Euler(), Heun(), Heun(midpoint=0.6), DPM2(), DPMpp2SAncestral(0.0), LMS(2)]
)
def test_order_on_a_gaussian(solver: PlanSolver, schedule: str) -> None:
    noise, start, end = SCHEDULES[schedule]
    steps = (80, 160)
    errors = [
        gaussian_ode_error(solver, noise, graded(noise, n, start, end, solver.order - 1))
        for n in steps
    ]
    assert measured_order(steps, errors) == pytest.approx(solver.order, abs=0.15)


@pytest.mark.parametrize("order", [3, 4])
def test_order_of_long_multistep_tables_in_the_interior(order: int) -> None:
    """Nodes close to the start carry the start-up; the grid is uniform in sigma."""
    schedule, steps = Karras(), (40, 80)
    errors = []
    for n in steps:
        times = torch.linspace(3.0, 0.3, n + 1).double().tolist()
        step = (times[0] - times[1]) ** 2
        times = [times[0], *(times[0] - step * k / 9 for k in (1, 2, 3)), *times[1:]]
        errors.append(gaussian_ode_error(LMS(order), schedule, times))
    assert measured_order(steps, errors) > order - 0.4


@pytest.mark.parametrize("variable", ["sigma", "time"])
@pytest.mark.parametrize("make", [Euler, Heun])
def test_order_on_a_mixture_in_both_variables(make, variable: str) -> None:
    noise, start, end = SCHEDULES["flow"]
    solver, steps = make(variable=variable), (80, 160)
    errors = mixture_ode_errors(
        lambda n: uniform_log_snr(noise, n, start, end), solver, noise, steps
    )
    assert measured_order(steps, errors) == pytest.approx(solver.order, abs=0.15)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("solver", [DPM2(eta=1.0), DPMpp2SAncestral(), DPM2(eta=0.5)])
def test_second_weak_order_of_the_ancestral_forms(solver: PlanSolver, schedule: str) -> None:
    noise, start, end = SCHEDULES[schedule]
    steps = (80, 160)
    found = [
        gaussian_sde_error(solver, noise, uniform_log_snr(noise, n, start, end)) for n in steps
    ]
    for errors in zip(*found, strict=True):
        assert max(errors) < 1e-10 or measured_order(steps, errors) > 1.85


def test_second_weak_order_with_churn() -> None:
    noise, start, end = SCHEDULES["vp"]
    steps = (80, 160)
    found = [
        gaussian_sde_error(Heun(s_churn=8.0), noise, uniform_log_snr(noise, n, start, end))
        for n in steps
    ]
    assert measured_order(steps, [variance for _, variance in found]) > 1.85


def test_euler_in_sigma_is_ddim() -> None:
    for noise, start, end in SCHEDULES.values():
        times = uniform_log_snr(noise, 6, start, end)
        first = affine_map(Euler().plan(noise, times), noise, 0.7, 0.3)
        second = affine_map(DDIM().plan(noise, times), noise, 0.7, 0.3)
        assert first.gain == pytest.approx(second.gain, rel=1e-9)
        assert first.offset == pytest.approx(second.offset, rel=1e-9)


def test_euler_in_time_on_a_flow_is_ddim_and_straight() -> None:
    flow, times = RectifiedFlow(), [1.0, 0.6, 0.0]
    row = Euler(variable="time").plan(flow, times).rows[0]
    assert row.a == pytest.approx(0.6)  # x + (s - t)(x - x0) / t
    assert row.x0[0] == pytest.approx(0.4)


def test_heun_and_sigma_time_agree_on_a_karras_schedule() -> None:
    times = [80.0, 20.0, 3.0, 0.1]
    pair = [Heun(variable=v).plan(Karras(), times) for v in ("sigma", "time")]
    for a, b in zip(pair[0].rows, pair[1].rows, strict=True):
        assert a.a == pytest.approx(b.a)
        assert list(a.x0.values()) == pytest.approx(list(b.x0.values()))


def test_a_corrected_x0_moves_the_slope() -> None:
    for solver in (Euler(), Heun(), DPM2()):
        assert not any(row.eps for row in solver.plan(Karras(), [80.0, 1.0, 0.0]).rows)


def test_churn_stays_in_the_schedule_and_between_its_bounds() -> None:
    solver = Heun(s_churn=40.0)
    for schedule, start in ((Karras(), 80.0), (VPCosine(), 0.9946), (VPLinear(), 1.0)):
        times = uniform_log_snr(schedule, 5, start, schedule.t_min)
        rows = solver.plan(schedule, times).rows
        assert max(row.at for row in rows if row.at is not None) <= schedule.t_max
        assert sum(bool(row.z) for row in rows) == 4  # none at the top
    bounded = Heun(s_churn=40.0, s_min=0.1, s_max=10.0).plan(Karras(), [80.0, 5.0, 1.0, 0.01])
    assert sum(bool(row.z) for row in bounded.rows) == 2
    assert bounded.draws == 3  # numbered in every step, as published


def test_two_fields_churn_and_meet_at_the_same_times() -> None:
    fields = {"x": Field(VPLinear()), "h": Field(VPCosine(t_min=1e-3, t_max=1.0))}
    process = Process(fields)
    times = [0.9, 0.5, 0.2, 0.05]
    for solver in (Heun(s_churn=1.0), Heun(midpoint=0.7), DPM2(eta=1.0), DPMpp2SAncestral()):
        at = [[row.at for row in plan.rows] for plan in solver.plans(process, times).values()]
        assert at[0] == at[1]


def test_order_of_the_second_field() -> None:
    """Interior times are the leading field's; the other keeps its order."""
    lead, other, steps = VPLinear(), VPCosine(t_max=1.0), (80, 160)
    for solver in (Heun(midpoint=0.7), DPM2(), DPMpp2SAncestral(0.0)):

        @dataclass(frozen=True)
        class Led(PlanSolver):
            def write(self, tape, schedule, times, _, solver=solver) -> None:
                solver.write(tape, schedule, times, lead)

        errors = [
            gaussian_ode_error(Led(), other, uniform_log_snr(lead, n, 0.9, 1e-2)) for n in steps
        ]
        assert measured_order(steps, errors) == pytest.approx(2.0, abs=0.15)


def test_multistep_weights_integrate_polynomials() -> None:
    nodes, end = [2.0, 2.3, 3.1], 1.5
    weights = adams_bashforth(nodes, end)
    for power in range(3):
        got = math.fsum(w * n**power for w, n in zip(weights, nodes, strict=True))
        assert got == pytest.approx((end ** (power + 1) - nodes[0] ** (power + 1)) / (power + 1))


def test_evaluations_per_step() -> None:
    times = [80.0, 10.0, 1.0, 0.0]
    assert Heun().plan(Karras(), times).nfe == 5
    for solver in (Heun(), DPM2(), DPMpp2SAncestral()):
        assert solver.intervals(5) == 3
    assert LMS(4).plan(Karras(), [*times[:-1], 0.5, 0.1]).memory <= 6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Euler(variable="log"), "variable"),
        (lambda: Heun(midpoint=0.0), "midpoint"),
        (lambda: DPM2(eta=2.0), "eta"),
        (lambda: LMS(5), "order"),
        (lambda: replace(Heun(), variable="s"), "variable"),
        (lambda: Heun().plan(RectifiedFlow(), [1.0, 0.5, 0.0]), "alpha = 0"),
    ],
)
def test_impossible_options_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
