"""Reverse SDEs and correctors: parity with score_sde, orders, independence of the batch."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from solver_checks import (
    SCHEDULES,
    deviation,
    gaussian_forms,
    gaussian_ode_error,
    gaussian_sde_error,
    golden_denoiser,
    measured_order,
    small_mixture,
    uniform_log_snr,
)
from torch import Tensor

from shared.analytic import AnalyticDenoiser, Mixture
from shared.geometry import CentredPoints, Points, SymmetricEdges
from shared.predictions import Prediction
from shared.process import Field, Process, State
from shared.randomness import Draws
from shared.schedules import SubVP, VarianceExploding, VPLinear
from shared.solvers.ancestral import DDPM
from shared.solvers.grids import LogSNRTimes
from shared.solvers.karras import Heun
from shared.solvers.langevin import (
    AncestralSDE,
    EulerMaruyama,
    Langevin,
    PredictorCorrector,
    ReverseDiffusion,
    ScoreSDETimes,
)

SDES = {"vp": VPLinear(), "ve": VarianceExploding(), "subvp": SubVP()}
PREDICTORS = {
    "reverse_diffusion": ReverseDiffusion,
    "euler_maruyama": EulerMaruyama,
    "ancestral_sampling": AncestralSDE,
}


def in_call_order(noise: Tensor, predicted: int, correcting: int, predicts: bool) -> Callable:
    """The published order: per step the corrector's draws, then the predictor's."""
    per_step = correcting + predicts

    def draw(name: str, j: int) -> Tensor:
        if j < predicted:
            return noise[1 + j * per_step + correcting]
        i, k = divmod(j - predicted, correcting)
        return noise[1 + i * per_step + k]

    return draw


@pytest.mark.golden
def test_score_sde_parity(golden) -> None:
    tensors, about = golden("11_score_sde_pc")
    noise = tensors["noise"]
    for key, run in about["info"].items():
        sde, predictor, corrector = key.split("/")
        rule, snr, n, *ode = corrector.split("_")
        snr, n = float(snr.removeprefix("snr")), int(n.removeprefix("n"))
        schedule = SDES[sde]
        times = ScoreSDETimes(run["eps"])(schedule, 40)
        denoise = golden_denoiser(tensors, schedule)
        x = {"x": noise[0] * (50.0 if sde == "ve" else 1.0)}
        for kind in ("mean", "sample"):
            options = {"denoise": kind == "mean", "score_sde": True} | (
                {"eta": 0.0} if ode else {}
            )
            solver = PREDICTORS[predictor](**options) if predictor in PREDICTORS else None
            predicted = solver.plan(schedule, times).draws if solver else 0
            draw = in_call_order(noise, predicted, n if rule != "none" else 0, solver is not None)
            if rule != "none":
                rule_name = {"langevin": "batch", "ald": "annealed"}[rule]
                solver = PredictorCorrector(solver, Langevin(snr, n, rule=rule_name))
            got = solver.solve(denoise.process, denoise, x, times, draw)["x"]
            assert deviation(got, tensors[f"{key}/{kind}"]) < 1e-12, key


# -- without a network ------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("make", [ReverseDiffusion, EulerMaruyama, AncestralSDE])
def test_first_weak_order_on_a_gaussian(make, schedule: str) -> None:
    noise, start, end = SCHEDULES[schedule]
    start, end = (0.9, 0.1) if schedule == "flow" else (start, end)
    steps = (160, 320)
    grids = [uniform_log_snr(noise, n, start, end) for n in steps]
    found = [gaussian_sde_error(make(denoise=False), noise, grid) for grid in grids]
    for errors in zip(*found, strict=True):
        assert max(errors) < 1e-12 or measured_order(steps, errors) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("make", [ReverseDiffusion, EulerMaruyama])
def test_first_order_as_an_ode(make) -> None:
    noise, start, end = SCHEDULES["vp"]
    steps = (160, 320)
    grids = [uniform_log_snr(noise, n, start, end) for n in steps]
    errors = [gaussian_ode_error(make(eta=0.0), noise, grid) for grid in grids]
    assert measured_order(steps, errors) == pytest.approx(1.0, abs=0.15)


def test_the_last_noise_is_left_out_when_asked() -> None:
    times = [1.0, 0.5, 0.1]
    assert not EulerMaruyama().plan(VPLinear(), times).rows[-1].z
    assert EulerMaruyama(denoise=False).plan(VPLinear(), times).rows[-1].z


def test_exact_ancestral_steps_are_ddpm() -> None:
    """On a VE schedule the published predictor with exact transitions is beta_tilde's DDPM."""
    schedule = VarianceExploding()
    times = [1.0, 0.6, 0.3, 0.0]
    first = AncestralSDE(denoise=False).plan(schedule, times)
    second = DDPM().plan(schedule, times)
    for a, b, t in zip(first.rows, second.rows, times, strict=False):
        sigma = float(schedule.sigma(t))
        assert a.z[0 if t == 1.0 else next(iter(a.z))] == pytest.approx(next(iter(b.z.values())))
        # x0 = x - sigma eps turns one form into the other
        (x0,) = b.x0.values()
        (eps,) = a.eps.values()
        assert b.a + x0 == pytest.approx(a.a)
        assert -sigma * x0 == pytest.approx(eps)


class Counting:
    def __init__(self, denoise) -> None:
        self.denoise, self.times = denoise, []

    def __call__(self, x: State, t: float) -> dict[str, Prediction]:
        self.times.append(t)
        return self.denoise(x, t)


def two_fields() -> tuple[Process, AnalyticDenoiser]:
    """Node features and a symmetric matrix under two SDEs, as in GDSS."""
    process = Process(
        {
            "x": Field(VPLinear(0.1, 1.0, t_min=0.0), Points()),
            "adj": Field(VarianceExploding(0.2, 1.0), SymmetricEdges()),
        }
    )

    def gaussian(d: int) -> Mixture:
        return Mixture.gaussian(torch.zeros(d).double(), torch.full((d,), 0.25).double())

    return process, AnalyticDenoiser(process, {"x": gaussian(8), "adj": gaussian(16)})


def test_two_fields_under_two_sdes_share_every_evaluation() -> None:
    process, exact = two_fields()
    draws = Draws(0, range(3))
    x = {"x": torch.zeros(3, 4, 2).double(), "adj": torch.zeros(3, 4, 4).double()}

    def draw(name: str, j: int) -> Tensor:
        return draws.normal(name, j, x[name], process.fields[name].geometry)

    denoise = Counting(exact)
    times = ScoreSDETimes(1e-4)(process.lead, 10)
    solver = PredictorCorrector(ReverseDiffusion(score_sde=True), Langevin(0.2, noise_scale=0.7))
    out = solver.solve(process, denoise, x, times, draw)
    assert denoise.times == [t for t in times[:-1] for _ in range(2)]
    assert solver.intervals(20) == 10
    assert torch.equal(out["adj"], out["adj"].transpose(1, 2))
    assert bool((out["adj"].diagonal(dim1=1, dim2=2) == 0).all())
    assert bool((out["x"] != 0).all())


@pytest.mark.parametrize("rule", ["sample", "batch"])
def test_only_the_published_rule_mixes_samples(rule: str) -> None:
    schedule = VPLinear()
    denoise = AnalyticDenoiser.single(Process.single(schedule), small_mixture())
    noise = torch.randn(40, 4, 2, generator=torch.Generator().manual_seed(1)).double()
    solver = PredictorCorrector(corrector=Langevin(0.2, rule=rule))
    times = uniform_log_snr(schedule, 6, 1.0, 1e-3)

    def run(rows: slice) -> Tensor:
        x = {"x": noise[0, rows]}
        draw = lambda name, j: noise[1 + j, rows]  # noqa: E731
        return solver.solve(denoise.process, denoise, x, times, draw)["x"]

    together, alone = run(slice(None)), run(slice(1, 2))
    assert torch.allclose(together[1:2], alone, atol=1e-12, rtol=0) == (rule == "sample")


def test_where_small_langevin_steps_lead() -> None:
    """On a Gaussian in d dimensions, random step sizes e ~ ||z||^2 / ||x||^2 widen the law twice
    by 1 + 2/d: E[e z z'] exceeds E[e], and the stationary density gains a factor 1 / e(x)."""
    schedule, t, var, d = VPLinear(), 0.5, 0.3, 64
    mixture = Mixture.gaussian(torch.zeros(d).double(), torch.full((d,), var).double())
    denoise = AnalyticDenoiser.single(Process.single(schedule), mixture)
    total = gaussian_forms(schedule, t, 0.0, var)[2]
    generator = torch.Generator().manual_seed(0)
    x = {"x": torch.randn(400, d, generator=generator).double() * 0.2}
    draw = lambda name, j: torch.randn(400, d, generator=generator).double()  # noqa: E731
    for rule, want in (("sample", total * (1 + 2 / d) ** 2), ("batch", total)):
        solver = PredictorCorrector(None, Langevin(snr=0.1, steps=250, rule=rule))
        out = solver.solve(denoise.process, denoise, x, [t, 0.4], draw)["x"]
        assert float(out.var()) == pytest.approx(want, rel=0.025), rule


def test_a_sample_without_degrees_of_freedom_stays() -> None:
    process = Process.single(VPLinear(), CentredPoints())
    mask = torch.tensor([[True, False], [True, True]])

    def denoise(x: State, t: float) -> dict[str, Prediction]:
        alpha, sigma = float(process.lead.alpha(t)), float(process.lead.sigma(t))
        return {"x": Prediction(x["x"], alpha, sigma, eps=0.5 * x["x"])}

    geometry = process.fields["x"].geometry
    generator = torch.Generator().manual_seed(0)
    start = geometry.project(torch.randn(2, 2, 3, generator=generator).double(), mask)
    out = PredictorCorrector(DDPM()).solve(
        process,
        denoise,
        {"x": start},
        [1.0, 0.5, 0.1],
        lambda name, j: geometry.noise(torch.randn(2, 2, 3, generator=generator).double(), mask),
        lambda name, v: geometry.project(v, mask),
    )["x"]
    assert bool((out[0] == 0).all())
    assert bool(torch.isfinite(out).all())


def test_after_sees_every_predicted_state() -> None:
    denoise = AnalyticDenoiser.single(Process.single(VPLinear()), small_mixture())
    noise = torch.randn(20, 3, 2, generator=torch.Generator().manual_seed(1)).double()
    seen: list[float | None] = []

    def after(x: State, time: float | None) -> State:
        seen.append(time)
        return x

    times = [1.0, 0.5, 0.1]
    for predictor in (DDPM(), None):
        seen.clear()
        PredictorCorrector(predictor).solve(
            denoise.process, denoise, {"x": noise[0]}, times, lambda name, j: noise[j], after=after
        )
        assert seen == times[1:]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Langevin(rule="mean"), "rule"),
        (lambda: Langevin(snr=0.0), "snr"),
        (lambda: AncestralSDE(eta=0.5), "DDIM"),
        (lambda: EulerMaruyama(eta=-1.0), "eta"),
    ],
)
def test_impossible_options_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_predictor_with_two_rows_per_step_is_refused() -> None:
    denoise = AnalyticDenoiser.single(Process.single(VPLinear()), small_mixture())
    with pytest.raises(ValueError, match="one row per step"):
        PredictorCorrector(Heun()).solve(
            denoise.process, denoise, {"x": torch.zeros(1, 2).double()}, [1.0, 0.5], lambda n, j: 0
        )


def test_published_levels_of_a_ve_table_end_at_zero() -> None:
    """Reverse diffusion down to sigma = 0 adds all of the last level's variance."""
    times = ScoreSDETimes(1e-5)(VarianceExploding(), 4)
    rows = ReverseDiffusion(score_sde=True, denoise=False).plan(VarianceExploding(), times).rows
    sizes = [next(iter(row.z.values())) for row in rows]
    assert sizes[-1] == pytest.approx(0.01)
    assert math.fsum(c**2 for c in sizes) == pytest.approx(50.0**2)


@pytest.mark.parametrize(
    "solver", [ReverseDiffusion(score_sde=True), EulerMaruyama(score_sde=True)]
)
def test_published_steps_refuse_an_uneven_grid(solver) -> None:
    schedule = VPLinear()
    assert solver.plan(schedule, ScoreSDETimes(1e-4)(schedule, 40)).nfe == 40
    with pytest.raises(ValueError, match="use grid score_sde"):
        solver.plan(schedule, LogSNRTimes()(schedule, 40))


def test_published_steps_need_more_than_beta_max() -> None:
    solver, schedule = ReverseDiffusion(score_sde=True), VPLinear(beta_max=20.0)
    with pytest.raises(ValueError, match="20 steps are too few.*more than beta_max = 20"):
        solver.plan(schedule, ScoreSDETimes()(schedule, 20))
    assert solver.plan(schedule, ScoreSDETimes()(schedule, 21)).nfe == 21
