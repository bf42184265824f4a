"""DDPM, DDIM and their optimal variances: parity, exactness, orders, identities."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from solver_checks import (
    SCHEDULES,
    affine_map,
    deviation,
    dirac_error,
    gaussian_forms,
    gaussian_ode_error,
    gaussian_sde_error,
    golden_denoiser,
    measured_order,
    no_draws,
    replay,
    uniform_log_snr,
)
from torch import Tensor

from shared.analytic import AnalyticDenoiser, Mixture
from shared.domains import Batch
from shared.geometry import Euclidean
from shared.predictions import Prediction
from shared.process import Field, Process, State
from shared.schedules import RectifiedFlow, VPDiscrete, VPLinear
from shared.solvers.ancestral import DDIM, DDPM, DDIMInversion
from shared.solvers.base import PlanSolver
from shared.solvers.plan import LogVariance
from shared.solvers.search import table_times
from shared.variance import Gamma, estimate_gamma


def sample(
    solver: PlanSolver, denoise, schedule, x: Tensor, times: list[float], noise: Tensor | None
) -> Tensor:
    draw = no_draws if noise is None else replay(noise)
    return solver.solve(Process.single(schedule), denoise, {"x": x}, times, draw)["x"]


class Clamped:
    """A denoiser whose x0 is clamped to [-1, 1]."""

    def __init__(self, denoise: AnalyticDenoiser) -> None:
        self.denoise = denoise

    def __call__(self, x: State, t: float) -> dict[str, Prediction]:
        return {
            name: p.corrected(lambda x0: x0.clamp(-1.0, 1.0))
            for name, p in self.denoise(x, t).items()
        }


# -- published outputs ------------------------------------------------------------------------


def analytic_case(key: str, gamma: Gamma) -> tuple[PlanSolver, bool]:
    """The solver of one entry, and whether x0 is clamped."""
    method, _, _, *clip = key.split("/")
    options = {}
    if clip or "clip1_pix2" in method:
        idx, pix = (clip[0] if clip else "clip1_pix2").split("_")
        options = {"clip_sigma_idx": int(idx[4:]), "clip_pixel": float(pix[3:])}
    if method.startswith(("a_ddim", "ddim_naive")):
        eta = float(method.split("_eta")[1])
        variance = gamma if method.startswith("a_") else None
        return DDIM(eta=eta, variance=variance, **options), True
    naive = "beta" if "large" in method else "beta_tilde"
    variance = gamma if method.startswith("a_") else naive
    return DDPM(variance=variance, **options), "noclipdenoise" not in method


def kept_draws(steps: list[int], noise: Tensor) -> Tensor:
    """The published code also draws for a step from an entry to itself, which we leave out."""
    sampling = list(reversed(steps))
    keep = [i for i, (r, s) in enumerate(zip(sampling, sampling[1:], strict=False)) if r != s]
    return noise[keep]


@pytest.mark.golden
def test_analytic_dpm_parity(golden) -> None:
    tensors, about = golden("06_analytic_dpm_linear")
    schedule = VPDiscrete(tuple(tensors["betas"][1:].tolist()))
    exact = golden_denoiser(tensors, schedule)
    times = tuple(n / 1000 for n in range(1, 1001))
    gamma = Gamma(times, tuple(tensors["Gamma"][1:].tolist()))
    compared = 0
    for key, want in tensors.items():
        if not key.endswith("/x0"):
            continue
        solver, clamped = analytic_case(key.removesuffix("/x0"), gamma)
        _, path, k = key.split("/")[:3]
        steps = about["info"][f"steps/{path}/{k[1:]}"]
        grid = [n / 1000 for n in sorted(set(steps), reverse=True)] + [0.0]
        denoise = Clamped(exact) if clamped else exact
        noise = kept_draws(steps, tensors["noise"]) if solver.stochastic else None
        got = sample(solver, denoise, schedule, tensors["x_T"], grid, noise)
        assert deviation(got, want) < 1e-10, key
        compared += 1
    assert compared == 84


@pytest.mark.golden
def test_analytic_step_variances(golden) -> None:
    tensors, about = golden("06_analytic_dpm_linear")
    schedule = VPDiscrete(tuple(tensors["betas"][1:].tolist()))
    times = tuple(n / 1000 for n in range(1, 1001))
    gamma = Gamma(times, tuple(tensors["Gamma"][1:].tolist()))
    for key in [k for k in tensors if k.endswith("/sigma2")]:
        solver, _ = analytic_case(key.removesuffix("/sigma2"), gamma)
        _, path, k = key.split("/")[:3]
        steps = about["info"][f"steps/{path}/{k[1:]}"]
        if len(set(steps)) < len(steps):
            continue
        plan = solver.plan(schedule, [n / 1000 for n in reversed(steps)] + [0.0])
        variance = [sum(c**2 for c in row.z.values()) for row in plan.rows]
        assert deviation(torch.tensor(variance, dtype=torch.float64), tensors[key]) < 1e-12, key


class Heads:
    """The exact denoiser with the golden item's heads: per-element variance of x0."""

    def __init__(self, tensors: dict[str, Tensor], schedule, kind: str, clip: bool) -> None:
        self.exact = replace(golden_denoiser(tensors, schedule), variance=True)
        self.bias, self.kind, self.clip = tensors["head_bias"], kind, clip

    def __call__(self, x: State, t: float) -> dict[str, Prediction]:
        prediction = self.exact(x, t)["x"]
        ratio = (prediction.sigma / prediction.alpha) ** 2
        exact_variance = prediction.var / ratio  # Var[eps | x_t]
        square = prediction.eps.square()
        h = {
            "eps": 1.0 - square,
            "eps_eps2": self.bias * (square + exact_variance) - square,
            "eps_epsc": self.bias * exact_variance,
        }[self.kind]
        prediction.var = ratio * h
        if self.clip:
            prediction.var = prediction.var.clamp(0.0, 1.0)
            prediction = prediction.corrected(lambda x0: x0.clamp(-1.0, 1.0))
        return {"x": prediction}


@pytest.mark.golden
def test_extended_analytic_parity(golden) -> None:
    tensors, about = golden("06_extended_analytic_linear")
    schedule = VPDiscrete(tuple(tensors["betas"][1:].tolist()))
    compared = 0
    for key, want in tensors.items():
        method, *rest = key.split("/")
        if not method.startswith(("ddpm", "ddim")):
            continue
        denoise = Heads(tensors, schedule, rest[0], rest[1] == "clip1")
        options: dict = {"variance": "head"}
        if rest[2] == "sample":
            options["clip_sigma_idx"] = int(rest[4][4])
        solver = (
            DDPM(**options)
            if method == "ddpm"
            else DDIM(eta=float(method.split("_eta")[1]), **options)
        )
        if rest[2] == "sample":
            times = table_times(schedule, int(rest[3][1:]))
            got = sample(solver, denoise, schedule, tensors["x_T"], times, tensors["noise"])
            assert deviation(got, want) < 1e-10, key
        else:
            check_single_steps(solver, denoise, tensors, about, key)
        compared += 1
    assert compared == 72


def check_single_steps(solver, denoise, tensors, about, key: str) -> None:
    """Mean and variance of single steps; without clipping the variance may be negative."""
    schedule, x = denoise.exact.process.lead, tensors["x_t"]
    for i, (s, t) in enumerate(about["info"]["single_steps_s_t"]):
        if s == 0:  # the last step has no noise here; the published variance is not used
            continue
        grid = [t / 1000, s / 1000]
        if key.endswith("step_var"):
            (std,) = solver.plan(schedule, grid).rows[0].z.values()
            got = std.small + std.gain * denoise({"x": x}, grid[0])["x"].var
        else:
            silent = replace(solver, variance="beta_tilde" if isinstance(solver, DDPM) else None)
            got = sample(silent, denoise, schedule, x, grid, torch.zeros(1, *x.shape).double())
        assert deviation(got, tensors[key][i]) < 1e-12, key


@pytest.mark.golden
def test_fastdpm_parity(golden) -> None:
    tensors, _ = golden("07_fastdpm_pdr")
    schedule = VPDiscrete.linear()
    compared = 0
    for key, want in tensors.items():
        if "/kappa" not in key:
            continue
        _, method, spacing, s, kappa, _ = key.split("/")
        prefix = f"T1000/{method}/{spacing}/{s}"
        if method == "var":  # the published noise levels and network times
            log_alpha = 0.5 * tensors[f"{prefix}/gamma_bar"].log()
            grid = schedule.t_from_log_alpha(log_alpha).flip(0).tolist()
            taus = dict(zip(grid, tensors[f"{prefix}/tau"].tolist(), strict=True))
            index = list(range(len(grid)))
        else:
            steps = tensors[f"{prefix}/steps"].flip(0).tolist()
            index = [i for i, n in enumerate(steps) if i + 1 == len(steps) or n != steps[i + 1]]
            grid = [(steps[i] + 1) / 1000 for i in index]
            taus = {t: steps[i] for t, i in zip(grid, index, strict=True)}

        def network(x: State, t: float, taus=taus) -> dict[str, Prediction]:
            eps = torch.sin(1.3 * x["x"]) * math.cos(0.001 * taus[t]) + 0.2 * x["x"]
            alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
            return {"x": Prediction(x["x"], alpha, sigma, eps=eps)}

        noise = tensors["noise"][1:][index]
        solver = DDIM(eta=float(kappa[5:]))
        draws = noise if solver.stochastic else None
        got = sample(solver, network, schedule, tensors["noise"][0], [*grid, 0.0], draws)
        assert deviation(got, want) < 1e-9, key
        compared += 1
    assert compared == 36


@pytest.mark.golden
def test_thousand_step_ddpm_parity(golden) -> None:
    tensors, _ = golden("07_fastdpm_pdr")
    schedule = VPDiscrete.linear()

    def network(x: State, t: float) -> dict[str, Prediction]:
        eps = torch.sin(1.3 * x["x"]) * math.cos(t - 0.001) + 0.2 * x["x"]
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        return {"x": Prediction(x["x"], alpha, sigma, eps=eps)}

    noise = tensors["T1000/ddpm_full/noise"].unsqueeze(1)
    grid = [n / 1000 for n in range(1000, -1, -1)]
    got = sample(DDPM(), network, schedule, noise[0], grid, noise[1:])
    assert deviation(got, tensors["T1000/ddpm_full/x0"]) < 1e-9


@pytest.mark.golden
@pytest.mark.parametrize(
    ("name", "solver"),
    [
        ("ddim_eta0", DDIM()),
        ("ddim_eta1_clip", DDIM(eta=1.0)),
        ("ddim_trailing", DDIM()),
        ("ddpm_small", DDPM()),
        ("ddpm_large_clip", DDPM(variance="beta")),
    ],
)
def test_diffusers_parity(golden, name: str, solver: PlanSolver) -> None:
    """The reference keeps its tables in float32."""
    tensors, about = golden("05_diffusers_schedulers")
    schedule = VPDiscrete.linear()
    denoise = golden_denoiser(tensors, schedule)
    if name.endswith("clip"):
        denoise = Clamped(denoise)
    for n in (5, 10, 20, 50):
        key = f"{name}/n{n}"
        grid = [(t + 1.0) / 1000 for t in about["info"][key]["timesteps"]] + [0.0]
        got = sample(solver, denoise, schedule, tensors["x_T"], grid, tensors.get(f"{key}/noise"))
        assert deviation(got, tensors[key]) < 5e-5, key


# -- without a network ------------------------------------------------------------------------

EVERY = {
    "ddpm": DDPM(),
    "ddim": DDIM(),
    "ddim_eta.5": DDIM(eta=0.5),
    "ddim_eta1": DDIM(eta=1.0),
    "ddpm_head": DDPM(variance="head"),
    "ddim_head": DDIM(variance="head"),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", EVERY)
def test_a_point_mass_is_exact_at_any_number_of_steps(name: str, schedule: str) -> None:
    noise, start, end = SCHEDULES[schedule]
    times = uniform_log_snr(noise, 7, start, end)
    assert dirac_error(EVERY[name], noise, times) < 1e-13


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", EVERY)
def test_first_order_on_a_gaussian(name: str, schedule: str) -> None:
    solver, (noise, start, end) = EVERY[name], SCHEDULES[schedule]
    steps = (160, 320)
    grids = [uniform_log_snr(noise, n, start, end) for n in steps]
    if solver.stochastic:
        found = [gaussian_sde_error(solver, noise, grid) for grid in grids]
        assert max(mean for mean, _ in found) < 1e-12 or measured_order(
            steps, [mean for mean, _ in found]
        ) == pytest.approx(1.0, abs=0.1)
        if name.endswith("head"):  # the exact variance of every step makes the law exact
            assert max(variance for _, variance in found) < 1e-12
        else:
            assert measured_order(steps, [v for _, v in found]) > 0.9
    else:
        errors = [gaussian_ode_error(solver, noise, grid) for grid in grids]
        assert measured_order(steps, errors) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddim_with_eta_one_is_ddpm(schedule: str) -> None:
    noise, start, end = SCHEDULES[schedule]
    times = uniform_log_snr(noise, 9, start, end)
    first = affine_map(DDIM(eta=1.0).plan(noise, times), noise, 0.7, 0.3)
    second = affine_map(DDPM().plan(noise, times), noise, 0.7, 0.3)
    assert first.gain == pytest.approx(second.gain, rel=1e-12, abs=1e-14)
    assert first.noise == pytest.approx(second.noise, rel=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddim_is_exponential_euler(schedule: str) -> None:
    """x_s = (sigma_s/sigma_t) x - alpha_s (e^-h - 1) x0, DPM-Solver++ of first order."""
    noise, start, end = SCHEDULES[schedule]
    times = uniform_log_snr(noise, 5, start, end)
    plan = DDIM().plan(noise, times)
    got = affine_map(plan, noise, 0.7, 0.3)
    gain, offset = 1.0, 0.0
    for t, s in zip(times, times[1:], strict=False):
        alpha, sigma, total = gaussian_forms(noise, t, 0.7, 0.3)
        alpha_s, sigma_s, _ = gaussian_forms(noise, s, 0.7, 0.3)
        slope = alpha * 0.3 / total
        keep = sigma_s / sigma
        add = -alpha_s * math.expm1(float(noise.log_snr(t) - noise.log_snr(s)))
        offset = keep * offset + add * (0.7 + slope * (offset - alpha * 0.7))
        gain *= keep + add * slope
    assert got.gain == pytest.approx(gain, rel=1e-10)
    assert got.offset == pytest.approx(offset, rel=1e-10, abs=1e-12)


def test_a_clamped_x0_leaves_the_direction_of_ddim_alone() -> None:
    plan = DDIM(eta=0.5).plan(VPLinear(), [0.9, 0.5, 0.1])
    for row in plan.rows:
        assert row.base is None
        assert set(row.x0) == set(row.eps)
    row = DDPM().plan(VPLinear(), [0.9, 0.5]).rows[0]
    assert not row.eps
    assert row.base == 0


def test_no_noise_into_sigma_zero_but_before() -> None:
    rows = DDPM().plan(RectifiedFlow(), [0.9, 0.5, 0.0]).rows
    assert rows[0].z
    assert not rows[1].z
    assert DDPM().plan(RectifiedFlow(), [0.9, 0.5, 0.1]).rows[1].z


def test_from_alpha_zero_to_sigma_zero() -> None:
    """A rectified flow from t = 1 to t = 0: finite tables, exact for a point mass."""
    flow = RectifiedFlow()
    for solver in (DDPM(), DDPM(variance=Gamma((0.5, 1.0), (0.5, 1.0))), DDIM(eta=1.0), DDIM()):
        rows = solver.plan(flow, [1.0, 0.5, 0.0]).rows
        assert rows[0].time == 0.5
        assert sum(rows[-1].x0.values()) == pytest.approx(1.0)


def test_last_noise_is_clipped_in_grey_levels() -> None:
    times = [1.0, 0.7, 0.4, 0.2, 0.1]
    cap = 2.0 * 2.0 / 255.0 * math.sqrt(math.pi / 2.0)
    free = DDPM().plan(VPLinear(), times).rows
    rows = DDPM(clip_sigma_idx=2).plan(VPLinear(), times).rows
    sizes = [next(iter(row.z.values())) for row in rows]
    assert sizes[:2] == [next(iter(row.z.values())) for row in free[:2]]
    assert sizes[2:] == pytest.approx([cap, cap])


def test_learned_range_lies_between_the_two_betas() -> None:
    times = [1.0, 0.5, 0.1]
    ranged = DDPM(variance="range").plan(VPLinear(), times)
    for fraction, fixed in ((0.0, "beta_tilde"), (1.0, "beta")):
        want = DDPM(variance=fixed).plan(VPLinear(), times)
        for row, other in zip(ranged.rows, want.rows, strict=True):
            (std,) = row.z.values()
            assert isinstance(std, LogVariance)
            got = float(std.std(torch.tensor(fraction).double()))
            assert got == pytest.approx(next(iter(other.z.values())), rel=1e-12)


def test_analytic_variance_is_exact_on_a_gaussian_at_ten_steps() -> None:
    """With the true Gamma, Analytic-DPM has the right law where beta_tilde is too narrow."""
    schedule = VPLinear()
    times = uniform_log_snr(schedule, 10, 1.0, 1e-3)
    knots = sorted(times)
    values = []
    for t in knots:
        alpha, sigma, total = gaussian_forms(schedule, t, 0.7, 0.3)
        values.append(sigma**2 / total)
    optimal = DDPM(variance=Gamma(tuple(knots), tuple(values)))
    assert gaussian_sde_error(optimal, schedule, times)[1] < 1e-12
    assert gaussian_sde_error(DDPM(), schedule, times)[1] > 1e-2


def test_analytic_variance_beats_beta_tilde_on_a_mixture() -> None:
    """Wasserstein distance between samples of ten steps and data; a variance per element is
    better again."""
    mixture = Mixture(
        torch.tensor([0.3, 0.7]).double(),
        torch.tensor([[-0.6], [0.6]]).double(),
        torch.full((2, 1), 0.1).double(),
    )
    schedule, generator = VPLinear(), torch.Generator().manual_seed(0)
    denoise = AnalyticDenoiser.single(Process.single(schedule), mixture, variance=True)
    data = mixture.sample(20000, generator)
    times = uniform_log_snr(schedule, 10, 1.0, 1e-3)
    noise = torch.randn(11, 20000, 1, generator=generator, dtype=torch.float64)
    table = estimate_gamma(denoise, denoise.process, [Batch({"x": data[:4000]})], times)

    def distance(variance: str | Gamma) -> float:
        got = sample(DDPM(variance), denoise, schedule, noise[0], times, noise[1:])
        return float((got.sort(0).values - data.sort(0).values).abs().mean())

    assert distance(table["x"]) < 0.5 * distance("beta_tilde")
    assert distance(table["x"]) < 0.8 * distance("beta")
    assert distance("head") < 0.6 * distance(table["x"])


def test_tables_of_several_fields() -> None:
    fields = {"x": Field(VPLinear(), Euclidean()), "h": Field(VPLinear(), Euclidean())}
    process = Process(fields)
    tables = {"x": Gamma((0.0, 1.0), (0.9, 0.9)), "h": Gamma((0.0, 1.0), (0.5, 0.5))}
    plans = DDPM(variance=tables, cov_max=math.inf).plans(process, [1.0, 0.5, 0.1])
    sizes = {n: next(iter(p.rows[1].z.values())) for n, p in plans.items()}
    assert sizes["x"] < sizes["h"]
    with pytest.raises(ValueError, match="field 'h'"):
        DDPM(variance={"x": tables["x"]}).plans(process, [1.0, 0.5])
    with pytest.raises(ValueError, match="for_field"):
        DDPM(variance=tables).plan(VPLinear(), [1.0, 0.5])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_inversion_goes_back_where_it_came_from(schedule: str) -> None:
    noise, start, end = SCHEDULES[schedule]
    steps = (160, 320)
    errors = []
    for n in steps:
        times = uniform_log_snr(noise, n, start, end)
        there = affine_map(DDIMInversion().plan(noise, times[::-1]), noise, 0.7, 0.3)
        back = affine_map(DDIM().plan(noise, times), noise, 0.7, 0.3)
        errors.append(abs(there.gain * back.gain - 1.0))
    assert errors[1] < 0.05
    assert measured_order(steps, errors) == pytest.approx(1.0, abs=0.1)


def test_inversion_wants_increasing_times() -> None:
    with pytest.raises(ValueError, match="increase"):
        DDIMInversion().plan(VPLinear(), [1.0, 0.5])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DDPM(variance="learned"), "beta_tilde"),
        (lambda: DDPM(variance="range", clip_sigma_idx=1), "clip_sigma_idx"),
        (lambda: DDIM(eta=1.5), "eta"),
        (lambda: DDIM(variance="beta"), "head"),
    ],
)
def test_impossible_options_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
