"""Exponential integrators: published outputs, exactness on a point mass, measured orders."""

from __future__ import annotations

import math
import re

import pytest
import torch
from scipy.integrate import quad
from solver_checks import (
    SCHEDULES,
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

from shared.analytic import AnalyticDenoiser, Mixture
from shared.predictions import Prediction
from shared.process import Field, Process
from shared.schedules import (
    Karras,
    RectifiedFlow,
    Schedule,
    VPCosine,
    VPDiscrete,
    VPLinear,
)
from shared.solvers import (
    DDIM,
    DEIS,
    DPMSolverMultistep,
    DPMSolverSDE,
    DPMSolverSinglestep,
    KarrasTimes,
    LogSNRTimes,
    PowerTimes,
    UniPC,
)
from shared.solvers.dpm_solver import singlestep_orders
from shared.solvers.exponential import lagrange_weights, moments, nodes_at, phi

SKIP_TYPES = {
    "time_uniform": PowerTimes(),
    "time_quadratic": PowerTimes(2.0),
    "logSNR": LogSNRTimes(),
    "edm": KarrasTimes(),
}
PUBLISHED = {
    "vp_linear": (VPLinear(), 1.0, 1e-3),
    "cosine_cont": (VPCosine(), 0.9946, 1e-3),
    "ddpm_discrete": (VPDiscrete.linear(), 1.0, 1e-3),
}


def step_orders(n: int, order: int) -> list[int]:
    """Orders of the 'fast' composition of n evaluations (the times only need to be finite)."""
    return singlestep_orders(
        nodes_at(Karras(), [1.0 - i / (n + 2) for i in range(n + 1)]), order, True
    )


def published_times(
    schedule: Schedule, skip: str, n: int, ends: tuple[float, float], orders: list[int]
) -> list[float]:
    """The published singlestep solvers space the *steps*, not the evaluations, in log-SNR."""
    if skip != "logSNR" or not orders:
        return SKIP_TYPES[skip](schedule, n, *ends)
    outer = LogSNRTimes()(schedule, len(orders), *ends)
    times = [outer[0]]
    for order, start, end in zip(orders, outer, outer[1:], strict=False):
        times += LogSNRTimes()(schedule, order, start, end)[1:]
    return times


class TestPublished:
    """Parity with the outputs of the authors' programs; every key of a kind is compared."""

    @pytest.mark.golden
    @pytest.mark.parametrize("name", PUBLISHED)
    def test_dpm_solver(self, golden, name):
        tensors, _ = golden(f"05_dpm_solver_{name}")
        schedule, *ends = PUBLISHED[name]
        denoise = golden_denoiser(tensors, schedule)
        pattern = re.compile(
            r"(dpmsolver(?:\+\+)?)/(multistep|singlestep|singlestep_fixed)/(\w+)/o(\d)/n(\d+)"
            r"(?:/(taylor|denoise_to_zero|no_lower_order_final))?"
        )
        worst, count = 0.0, 0
        for key, want in tensors.items():
            if not (match := pattern.fullmatch(key)):
                continue
            algorithm, method, skip, order, n, variant = match.groups()
            options = {
                "form": "data" if "++" in algorithm else "noise",
                "solver_type": "taylor" if variant == "taylor" else "dpmsolver",
                "denoise_to_zero": variant == "denoise_to_zero",
            }
            o, steps, orders = int(order), int(n), []
            if method == "multistep":
                below = 0 if variant == "no_lower_order_final" else 10
                solver = DPMSolverMultistep(o, lower_final_below=below, **options)
            else:
                fast = method == "singlestep"
                solver = DPMSolverSinglestep(o, fast=fast, **options)
                steps = steps if fast else steps // o * o
                orders = step_orders(steps, o) if fast else [o] * (steps // o)
            times = published_times(schedule, skip, steps, ends, orders)
            got, states = trajectory(solver, denoise, tensors["x_T"], times)
            error = deviation(got, want)
            if f"{key}/traj" in tensors:
                states = torch.stack(states)
                if orders:  # published after each step, without the start
                    states = states[torch.tensor(orders).cumsum(0)]
                error = max(error, deviation(states, tensors[f"{key}/traj"]))
            worst, count = max(worst, error), count + 1
            assert error < 5e-10, key  # few-step extrapolations amplify round-off
        assert count > 300

    @pytest.mark.golden
    @pytest.mark.parametrize("name", PUBLISHED)
    def test_unipc(self, golden, name):
        tensors, _ = golden(f"05_unipc_{name}")
        schedule, *ends = PUBLISHED[name]
        denoise = golden_denoiser(tensors, schedule)
        pattern = re.compile(
            r"(data|noise)_prediction/(bh\d)/(\w+)/o(\d)/n(\d+)"
            r"(?:/(denoise_to_zero|no_lower_order_final))?"
        )
        count = 0
        for key, want in tensors.items():
            if not (match := pattern.fullmatch(key)):
                continue
            form, variant, skip, order, n, other = match.groups()
            solver = UniPC(
                int(order),
                form,
                variant,
                lower_final_below=0 if other == "no_lower_order_final" else math.inf,
                denoise_to_zero=other == "denoise_to_zero",
            )
            times = SKIP_TYPES[skip](schedule, int(n), *ends)
            got, states = trajectory(solver, denoise, tensors["x_T"], times)
            error = deviation(got, want)
            if f"{key}/traj" in tensors:
                error = max(error, deviation(torch.stack(states), tensors[f"{key}/traj"]))
            count += 1
            assert error < 2e-11, key
        assert count > 230

    @pytest.mark.golden
    def test_karras_parametrisation(self, golden):
        tensors, _ = golden("05_edm_param_solvers")
        schedule, ends, count = Karras(), (80.0, 0.002), 0
        denoise = golden_denoiser(tensors, schedule)
        pattern = re.compile(
            r"(dpmsolver(?:\+\+)?|unipc_bh\d)/(?:(multistep|singlestep)/)?(\w+)/o(\d)/n(\d+)"
        )
        for key, want in tensors.items():
            if not (match := pattern.fullmatch(key)):
                continue
            algorithm, method, skip, order, n = match.groups()
            form, o, steps, orders = (
                "data" if "++" in algorithm else "noise",
                int(order),
                int(n),
                [],
            )
            if method is None:
                solver = UniPC(o, "data", algorithm[-3:])
            elif method == "multistep":
                solver = DPMSolverMultistep(o, form, lower_final_below=math.inf)
            else:
                solver, orders = DPMSolverSinglestep(o, form), step_orders(steps, o)
            times = published_times(schedule, skip, steps, ends, orders)
            got, _ = trajectory(solver, denoise, 80.0 * tensors["z"], times)
            count += 1
            assert deviation(got, want) < 1e-11, key
        assert count == 168

    @pytest.mark.golden
    def test_k_diffusion(self, golden):
        tensors, _ = golden("05_sigma_samplers")
        schedule, count = Karras(), 0
        denoise = golden_denoiser(tensors, schedule)
        grids = {
            "karras": KarrasTimes(final_zero=True),
            "exponential": LogSNRTimes(final_zero=True),
        }
        pattern = re.compile(
            r"kdiff/(dpmpp_2m|dpmpp_2m_sde|dpmpp_3m_sde|dpmpp_sde|dpm_fast)"
            r"(?:_(heun|midpoint))?(?:_eta([\d.]+))?(?:/(karras|exponential))?/n(\d+)"
        )
        for key, want in tensors.items():
            if not (match := pattern.fullmatch(key)):
                continue
            name, kind, eta, spacing, n = match.groups()
            eta, outer = 1.0 if eta is None else float(eta), None
            if name == "dpm_fast":
                solver = DPMSolverSinglestep(3, "noise")
                ends, orders = (80.0, 0.002), step_orders(int(n), 3)
                times = published_times(schedule, "logSNR", int(n), ends, orders)
            else:
                times = outer = grids[spacing](schedule, int(n))
                solver = {
                    "dpmpp_2m": DPMSolverMultistep(2, lower_final_below=0),
                    "dpmpp_2m_sde": DPMSolverMultistep(
                        2,
                        solver_type="taylor" if kind == "heun" else "dpmsolver",
                        eta=eta,
                        lower_final_below=0,
                    ),
                    "dpmpp_3m_sde": DPMSolverMultistep(
                        3, solver_type="taylor", eta=eta, lower_final_below=0
                    ),
                    "dpmpp_sde": DPMSolverSDE(coherent=False),
                }[name]
                if name == "dpmpp_sde":
                    times = with_middles(times)
            draw = replay(tensors[f"{key}/noise"]) if f"{key}/noise" in tensors else no_draws
            got, states = trajectory(solver, denoise, 80.0 * tensors["z"], times, draw)
            assert deviation(got, want) < 1e-12, key
            if f"{key}/traj" in tensors:
                before = torch.stack([states[times.index(t)] for t in outer[:-1]])
                assert deviation(before, tensors[f"{key}/traj"]) < 1e-12, key
            count += 1
        assert count == 31

    @pytest.mark.golden
    def test_diffusers_deis(self, golden):
        tensors, info = golden("05_diffusers_schedulers")
        denoise, count = golden_denoiser(tensors, VPDiscrete.linear()), 0
        for key, want in tensors.items():
            if not (match := re.fullmatch(r"deis_o(\d)/n(\d+)", key)):
                continue
            times = [(t + 1.0) / 1000.0 for t in info["info"][key]["timesteps"]] + [1e-3]
            solver = DEIS(int(match[1]), "log_rho", lower_final_below=15)
            got, _ = trajectory(solver, denoise, tensors["x_T"], times)
            count += 1
            # its float32 tables lose most at order 3 with many steps
            assert deviation(got, want) < (3e-4 if key == "deis_o3/n50" else 5e-5), key
        assert count == 12

    @pytest.mark.golden
    def test_inversion(self, golden):
        tensors, _ = golden("05_dpm_solver_vp_linear")
        times = PowerTimes()(VPLinear(), 20, 1.0, 1e-3)[::-1]
        denoise = golden_denoiser(tensors, VPLinear())
        solver = DPMSolverMultistep(2, increasing=True)
        got, _ = trajectory(solver, denoise, tensors["inverse/x0"], times)
        assert deviation(got, tensors["inverse/++multistep/time_uniform/o2/n20"]) < 1e-12


def with_middles(times: list[float]) -> list[float]:
    """The geometric middle put into every interval that does not end at zero."""
    pairs = zip(times, times[1:], strict=False)
    return [times[0], *[t for s, e in pairs for t in ([math.sqrt(s * e), e] if e else [e])]]


# -- exactness and order ----------------------------------------------------------------------

ODE_SOLVERS = {
    "++1": DPMSolverMultistep(1),
    "2M": DPMSolverMultistep(2, "noise", lower_final_below=0),
    "++2M": DPMSolverMultistep(2, lower_final_below=0),
    "++2M taylor": DPMSolverMultistep(2, solver_type="taylor", lower_final_below=0),
    "3M published": DPMSolverMultistep(3, "noise", lower_final_below=0),
    "++3M published": DPMSolverMultistep(3, lower_final_below=0),
    "3M": DPMSolverMultistep(3, "noise", published=False, lower_final_below=0),
    "++3M": DPMSolverMultistep(3, published=False, lower_final_below=0),
    "2S": DPMSolverSinglestep(2, "noise"),
    "++2S": DPMSolverSinglestep(2),
    "++2S taylor": DPMSolverSinglestep(2, solver_type="taylor"),
    "3S": DPMSolverSinglestep(3, "noise", fast=False),
    "++3S": DPMSolverSinglestep(3, fast=False),
    "++3S taylor": DPMSolverSinglestep(3, solver_type="taylor", fast=False),
    "tAB1": DEIS(2),
    "tAB2": DEIS(3),
    "rhoAB1": DEIS(2, "rho"),
    "log rho AB2": DEIS(3, "log_rho"),
    "log rho AB3": DEIS(4, "log_rho"),
    "UniP-2 bh1": UniPC(2, variant="bh1", corrector=False, lower_final_below=0),
    "UniP-3": UniPC(3, corrector=False, lower_final_below=0),
    "UniPC-1": UniPC(1, variant="bh1", lower_final_below=0),
    "UniPC-2": UniPC(2, lower_final_below=0),
    "UniPC-2 noise": UniPC(2, "noise", lower_final_below=0),
    "UniPC-3": UniPC(3, lower_final_below=0),
}
SDE_SOLVERS = {
    "SDE++1": DPMSolverMultistep(1, eta=1.0),
    "SDE++2M": DPMSolverMultistep(2, eta=1.0, lower_final_below=0),
    "SDE++2M half": DPMSolverMultistep(2, eta=0.5, lower_final_below=0),
    "SDE++3M": DPMSolverMultistep(3, solver_type="taylor", eta=1.0, lower_final_below=0),
    "dpmpp_sde": DPMSolverSDE(),
    "dpmpp_sde independent": DPMSolverSDE(coherent=False),
    "dpmpp_sde half": DPMSolverSDE(0.5),
}


@pytest.mark.parametrize("where", SCHEDULES)
@pytest.mark.parametrize("name", [*ODE_SOLVERS, *SDE_SOLVERS])
def test_point_mass_is_exact(name, where):
    schedule, start, end = SCHEDULES[where]
    solver = {**ODE_SOLVERS, **SDE_SOLVERS}[name]
    assert dirac_error(solver, schedule, uniform_log_snr(schedule, 7, start, end)) < 1e-9
    # long steps in log-SNR: noise forms amplify round-off
    assert dirac_error(solver, schedule, PowerTimes()(schedule, 8, start, end)) < 2e-9


@pytest.mark.parametrize("where", SCHEDULES)
@pytest.mark.parametrize("name", ODE_SOLVERS)
def test_order_on_a_gaussian(name, where):
    schedule, start, end = SCHEDULES[where]
    solver, steps = ODE_SOLVERS[name], (60, 120, 240)
    multistep = not isinstance(solver, DPMSolverSinglestep) and solver.order >= 3
    grid = graded if multistep else uniform_log_snr
    errors = [gaussian_ode_error(solver, schedule, grid(schedule, n, start, end)) for n in steps]
    assert measured_order(steps, errors) > solver.order - 0.3


@pytest.mark.parametrize("where", SCHEDULES)
@pytest.mark.parametrize(
    "name", ["++1", "++2M", "++3M published", "++3M", "++3S", "tAB2", "UniPC-2"]
)
def test_order_on_a_mixture(name, where):
    schedule, start, end = SCHEDULES[where]
    solver, steps = ODE_SOLVERS[name], (60, 120)
    grid = graded if solver.order >= 3 and name != "++3S" else uniform_log_snr
    errors = mixture_ode_errors(lambda n: grid(schedule, n, start, end), solver, schedule, steps)
    assert solver.order - 0.25 < measured_order(steps, errors) < solver.order + 0.7


@pytest.mark.parametrize("where", SCHEDULES)
@pytest.mark.parametrize("name", SDE_SOLVERS)
def test_variance_order(name, where):
    schedule, start, end = SCHEDULES[where]
    solver, steps = SDE_SOLVERS[name], (200, 400)
    errors = [
        gaussian_sde_error(solver, schedule, uniform_log_snr(schedule, n, start, end))
        for n in steps
    ]
    assert measured_order(steps, [variance for _, variance in errors]) > solver.order - 0.25
    assert all(mean < 1e-2 for mean, _ in errors)


def test_lower_final_order_costs_the_order():
    """The tests above can fail: lowering the last rows caps the order at 2."""
    schedule, start, end = SCHEDULES["vp"]
    steps = (120, 240)
    errors = [
        gaussian_ode_error(UniPC(3), schedule, graded(schedule, n, start, end)) for n in steps
    ]
    assert measured_order(steps, errors) < 3.2 < UniPC(3).order


# -- identities -------------------------------------------------------------------------------


def tables(solver, schedule, times):
    rows = solver.plan(schedule, times).rows
    return torch.tensor(
        [
            [row.a, *(c.get(k, 0.0) for c in (row.x0, row.eps) for k in range(len(rows)))]
            for row in rows
        ],
        dtype=torch.float64,
    )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (UniPC(2, corrector=False), DPMSolverMultistep(2, lower_final_below=math.inf)),
        (UniPC(3, corrector=False), DPMSolverMultistep(3, published=False, lower_final_below=99)),
        (
            DEIS(3, "log_rho"),
            DPMSolverMultistep(3, "noise", "taylor", published=False, lower_final_below=0),
        ),
        (DEIS(1), DPMSolverMultistep(1, "noise")),
        (DPMSolverMultistep(1), DPMSolverSinglestep(1)),
    ],
)
def test_equal_tables(one, other):
    schedule, start, end = SCHEDULES["vp"]
    times = PowerTimes()(schedule, 7, start, end)
    torch.testing.assert_close(
        tables(one, schedule, times), tables(other, schedule, times), rtol=1e-10, atol=1e-13
    )


def test_equal_samples():
    """++1 is DDIM; SDE++1 is DDIM with eta = 1; dpmpp_sde without noise is ++2S."""
    schedule, start, end = SCHEDULES["flow"]
    times = PowerTimes()(schedule, 7, start, end)
    denoise = AnalyticDenoiser.single(
        Process.single(schedule),
        Mixture.gaussian(torch.zeros(3).double(), torch.ones(3).double()),
    )
    noise = torch.randn(9, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for one, other in [
        (DPMSolverMultistep(1), DDIM()),
        (DPMSolverMultistep(1, "noise"), DDIM()),
        (DPMSolverMultistep(1, eta=1.0), DDIM(eta=1.0)),
        (DPMSolverSDE(0.0), DPMSolverSinglestep(2)),
    ]:
        ends = [
            solver.solve(denoise.process, denoise, {"x": noise[8]}, times, replay(noise))["x"]
            for solver in (one, other)
        ]
        torch.testing.assert_close(*ends, rtol=1e-11, atol=1e-12)


# -- ends with infinite log-SNR, fields, options ----------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "times"),
    [
        (Karras(), KarrasTimes(final_zero=True)(Karras(), 8)),
        (RectifiedFlow(), PowerTimes()(RectifiedFlow(), 8)),
        (RectifiedFlow(), [1.0, 0.0]),
        (VPLinear(), PowerTimes(t_end=0.0)(VPLinear(), 7)),
    ],
)
@pytest.mark.parametrize("name", [*ODE_SOLVERS, *SDE_SOLVERS])
def test_zero_sigma_and_zero_alpha(name, schedule, times):
    solver = {**ODE_SOLVERS, **SDE_SOLVERS}[name]
    assert dirac_error(solver, schedule, times) < 2e-9
    plan = solver.plan(schedule, times)
    assert plan.nfe == len(times) - 1
    assert plan.gain < 1e3


@pytest.mark.parametrize("name", [*ODE_SOLVERS, *SDE_SOLVERS])
def test_fields_with_their_own_schedules(name):
    """Two independent fields give each what it gets alone, to the order of the solver, also when
    the log-SNR of only one of them is infinite at an end."""
    solver = {**ODE_SOLVERS, **SDE_SOLVERS}[name]
    flow, vp = RectifiedFlow(), VPLinear(t_min=0.0)
    times = PowerTimes()(flow, 8, 1.0, 1e-3)  # alpha = 0 of the flow only
    for lead, other in ((flow, vp), (vp, flow)):
        one, two = solver.plan(lead, times, lead), solver.plan(other, times, lead)
        assert [row.at for row in one.rows] == [row.at for row in two.rows]
    process = Process({"a": Field(vp), "b": Field(flow)})
    normal = Mixture.gaussian(torch.ones(2).double(), 0.2 * torch.ones(2).double())
    denoise = AnalyticDenoiser(process, {"a": normal, "b": normal})
    x = {"a": torch.ones(1, 2).double(), "b": torch.ones(1, 2).double()}
    zero = torch.zeros(1, 2).double()
    end = solver.solve(process, denoise, x, times, lambda name, j: zero)
    alone = solver.solve(
        Process({"a": Field(vp)}),
        AnalyticDenoiser(Process({"a": Field(vp)}), {"a": normal}),
        {"a": x["a"]},
        times,
        lambda name, j: zero,
    )
    torch.testing.assert_close(end["a"], alone["a"])
    assert torch.isfinite(end["b"]).all()


def test_intervals_and_costs():
    times = PowerTimes()(VPLinear(), 11)
    for solver in (*ODE_SOLVERS.values(), *SDE_SOLVERS.values()):
        assert solver.intervals(11) == 11
        assert solver.plan(VPLinear(), times).nfe == 11
    for solver in (
        DPMSolverMultistep(2, denoise_to_zero=True),
        DPMSolverSinglestep(3, denoise_to_zero=True),
        UniPC(3, denoise_to_zero=True),
    ):
        assert solver.intervals(12) == 11
        assert solver.plan(VPLinear(), times).nfe == 12


@pytest.mark.parametrize(
    ("n", "order", "fast", "want"),
    [
        (6, 3, True, [3, 2, 1]),
        (7, 3, True, [3, 3, 1]),
        (8, 3, True, [3, 3, 2]),
        (3, 3, True, [2, 1]),
        (6, 3, False, [3, 3]),
        (5, 2, True, [2, 2, 1]),
        (2, 3, True, [2]),
        (3, 1, True, [1, 1, 1]),
    ],
)
def test_singlestep_orders(n, order, fast, want):
    nodes = nodes_at(Karras(), [float(n + 1 - i) for i in range(n + 1)])
    assert singlestep_orders(nodes, order, fast) == want
    ends = nodes_at(RectifiedFlow(), [1.0 - i / (n + 2) for i in range(n + 2)] + [0.0])
    assert singlestep_orders(ends, order, fast) == [1, *want, 1]


def test_memory_and_rows():
    times = PowerTimes()(VPLinear(), 10)
    assert DPMSolverMultistep(2).plan(VPLinear(), times).memory == 4
    assert UniPC(3).plan(VPLinear(), times).memory <= 7
    assert "x0[0]" in str(DPMSolverMultistep(2).plan(VPLinear(), times))


def test_phi_and_moments_by_quadrature():
    for z in (-7.0, -1.01, -0.99, -1e-6, 0.0, 1e-3, 0.5, 3.0, 8.0):
        for k in range(1, 6):
            want, _ = quad(
                lambda u, z=z, k=k: math.exp(z * (1 - u)) * u ** (k - 1) / math.factorial(k - 1),
                0.0,
                1.0,
                epsabs=0,
                epsrel=1e-13,
            )
            assert phi(k, z) == pytest.approx(want, rel=2e-12)
    weights = lagrange_weights(moments(-0.8, 3), [0.0, -0.7, 1.0])
    for k, c in enumerate(moments(-0.8, 3)):
        powers = [u**k for u in (0.0, -0.7, 1.0)]
        assert math.fsum(w * p for w, p in zip(weights, powers, strict=True)) == pytest.approx(c)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DPMSolverMultistep(4), "points is 4"),
        (lambda: DPMSolverMultistep(form="velocity"), "form is 'velocity'"),
        (lambda: DPMSolverMultistep(solver_type="heun"), "solver_type is 'heun'"),
        (lambda: DPMSolverMultistep(form="noise", eta=1.0), "form='data'"),
        (lambda: DPMSolverMultistep(eta=1.0, increasing=True), "eta is 1.0"),
        (lambda: DPMSolverSinglestep(0), "order is 0"),
        (lambda: DPMSolverSDE(-0.1), "eta is -0.1"),
        (lambda: DEIS(5), "order is 5"),
        (lambda: DEIS(variable="t"), "variable is 't'"),
        (lambda: UniPC(5), "points is 5"),
        (lambda: UniPC(variant="vary_coeff"), "variant is 'vary_coeff'"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_time_grids_are_checked():
    with pytest.raises(ValueError, match="decrease"):
        UniPC().plan(VPLinear(), [0.1, 0.5])
    with pytest.raises(ValueError, match="increase"):
        DPMSolverMultistep(increasing=True).plan(VPLinear(), [0.5, 0.1])


def test_weighing_a_fresh_prediction_equals_making_both_forms():
    x, out = torch.randn(2, 4, generator=torch.Generator().manual_seed(1)).double()
    for given in ("x0", "eps"):
        terms = Prediction(x, 0.8, 0.6, **{given: out}).weighted(0.3, -1.2)
        prediction = Prediction(x, 0.8, 0.6, **{given: out})
        want = 0.3 * prediction.x0 - 1.2 * prediction.eps
        torch.testing.assert_close(sum(c * v for c, v in terms), want)
        clamped = prediction.corrected(lambda y: y.clamp(-0.1, 0.1))
        want = 0.3 * clamped.x0 - 1.2 * clamped.eps
        torch.testing.assert_close(sum(c * v for c, v in clamped.weighted(0.3, -1.2)), want)
