from __future__ import annotations

import math

import pytest
import torch
from solver_checks import affine_map
from torch import Tensor

from shared.analytic import AnalyticDenoiser, Mixture
from shared.geometry import CentredPoints, Geometry, SymmetricEdges
from shared.guidance import Steered
from shared.guidance.steering import _Particles, systematic
from shared.process import Process, State
from shared.randomness import Draws
from shared.schedules import VPLinear
from shared.solvers.ancestral import DDIM, DDPM
from shared.solvers.base import PlanSolver
from shared.solvers.dpm_solver import DPMSolverMultistep
from shared.solvers.plan import run

F64 = torch.float64
PROCESS = Process.single(VPLinear())
MEAN, VAR = 0.3, 0.5


def prior(dim: int = 1) -> AnalyticDenoiser:
    mixture = Mixture.gaussian(
        torch.full((dim,), MEAN, dtype=F64), torch.full((dim,), VAR, dtype=F64)
    )
    return AnalyticDenoiser.single(PROCESS, mixture)


def times(n: int) -> list[float]:
    ends = [float(VPLinear().log_snr(t)) for t in (1.0, 1e-3)]
    grid = VPLinear().t_from_log_snr(torch.linspace(*ends, n + 1, dtype=F64))
    return [1.0, *grid[1:-1].tolist(), 1e-3]


def normals(batch: int, seed: int = 0, dim: int = 1):  # noqa: ANN201
    generator = torch.Generator().manual_seed(seed)
    made: dict[int, Tensor] = {}

    def draw(name: str, j: int) -> Tensor:
        if j not in made:
            made[j] = torch.randn(batch, dim, generator=generator, dtype=F64)
        return made[j]

    return draw


def linear(x: State) -> Tensor:
    return x["x"][:, 0]


def steer(batch: int = 400, steps: int = 20, **options: object) -> Tensor:
    draw = normals(batch)
    solver = Steered(DDPM(), linear, **options)
    return solver.solve(PROCESS, prior(), {"x": draw("x", -1)}, times(steps), draw)["x"][:, 0]


def law(solver: PlanSolver, steps: int = 20) -> tuple[float, float]:
    """Mean and variance of what the solver itself makes on this grid."""
    found = affine_map(solver.plan(VPLinear(), times(steps)), VPLinear(), MEAN, VAR)
    return found.offset, found.gain**2 * VPLinear().prior_std() ** 2 + found.variance


def check_tilted(got: Tensor, solver: PlanSolver, scale: float) -> None:
    """N(m, v) exp(b x) is N(m + b v, v)."""
    (mean, var), n = law(solver), len(got)
    assert abs(float(got.mean()) - (mean + scale * var)) < 4 * math.sqrt(var / n)
    assert float(got.var()) == pytest.approx(var, abs=4 * var * math.sqrt(2 / n))


@pytest.mark.parametrize(("potential", "scale"), [("difference", 1.6), ("max", 1.6), ("sum", 0.5)])
def test_steering_tilts_the_distribution_to_the_exact_mean(potential: str, scale: float) -> None:
    check_tilted(steer(particles=1), DDPM(), 0.0)
    # the sum weighs the early rewards again and again, which the last weights must take back
    got = steer(particles=32, scale=scale, potential=potential, every=4)
    check_tilted(got, DDPM(), scale)


@pytest.mark.parametrize("options", [{"ess": 0.5}, {"ess": 0.0, "every": 2}, {"every": 0}])
def test_resampling_rules_keep_the_target(options: dict) -> None:
    check_tilted(steer(particles=48, scale=1.6, **options), DDPM(), 1.6)


def test_best_of_n_is_the_maximum_of_independent_tries() -> None:
    draw = normals(300)
    solver = Steered.best_of(DDIM(), linear, 8)
    got = solver.solve(PROCESS, prior(), {"x": draw("x", -1)}, times(40), draw)["x"][:, 0]
    # expected maximum of 8 standard normals: 1.4236; their deviation: 0.6107
    error = math.sqrt(VAR) * 0.6107 / math.sqrt(300)
    assert abs(float(got.mean()) - (MEAN + 1.4236 * math.sqrt(VAR))) < 4 * error + 0.02


def test_the_best_particle_may_be_chosen_by_another_reward() -> None:
    draw = normals(300)
    start, options = {"x": draw("x", -1)}, {"particles": 8, "scale": 0.0, "pick": "best"}
    solver = Steered(DDPM(), linear, choice=lambda x: -linear(x), **options)
    got = solver.solve(PROCESS, prior(), start, times(300), draw)["x"][:, 0]
    error = math.sqrt(VAR) * 0.6107 / math.sqrt(300)
    assert abs(float(got.mean()) - (MEAN - 1.4236 * math.sqrt(VAR))) < 4 * error + 0.02


@pytest.mark.parametrize("solver", [DDPM(), DPMSolverMultistep(eta=1.0)])
def test_one_particle_changes_nothing(solver: PlanSolver) -> None:
    draw = normals(5)
    x = {"x": draw("x", -1)}
    plain = solver.solve(PROCESS, prior(), x, times(8), draw)["x"]
    got = Steered(solver, linear, 1).solve(PROCESS, prior(), x, times(8), draw)["x"]
    assert torch.equal(got, plain)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    def sample(indices: list[int], threshold: float) -> Tensor:
        draws, like = Draws(2, indices), torch.zeros(len(indices), 2, dtype=F64)
        start = {"x": draws.normal("start", 0, like)}
        solver = Steered(DDPM(), linear, 5, scale=3.0, every=2, ess=threshold)
        return solver.solve(
            PROCESS, prior(2), start, times(6), lambda name, j: draws.normal(name, j, like)
        )["x"]

    for threshold in (1.0, 0.6):
        alone, together = sample([7], threshold), sample([3, 7, 1], threshold)
        torch.testing.assert_close(alone[0], together[1], rtol=0, atol=1e-13)
        assert (together[0] - together[1]).abs().max() > 1e-3


def test_stored_predictions_follow_resampled_states() -> None:
    """Swapping the rows at every evaluation of a multistep solver only swaps the result."""
    solver, x = DPMSolverMultistep(points=3), {"x": torch.tensor([[-1.0], [2.0]], dtype=F64)}
    mixture = Mixture(
        torch.tensor([0.5, 0.5], dtype=F64),
        torch.tensor([[-1.0], [1.0]], dtype=F64),
        torch.tensor([[0.1], [0.1]], dtype=F64),
    )
    denoise = AnalyticDenoiser.single(PROCESS, mixture)
    plans = solver.plans(PROCESS, times(7))
    assert plans["x"].nfe == 7

    def no_draws(name: str, j: int) -> Tensor:
        raise AssertionError("deterministic")

    plain = run(plans, denoise, x, no_draws)["x"]
    swap = torch.tensor([1, 0])
    swapped = run(plans, denoise, x, no_draws, resample=lambda p, t: swap)["x"]
    torch.testing.assert_close(swapped, plain.flip(0), rtol=0, atol=1e-14)
    assert (plain[0] - plain[1]).abs() > 1e-3


def test_multistep_particles_also_reach_the_target() -> None:
    draw = normals(400)
    solver = Steered(DPMSolverMultistep(eta=1.0), linear, 32, scale=1.6, every=4)
    got = solver.solve(PROCESS, prior(), {"x": draw("x", -1)}, times(20), draw)["x"]
    check_tilted(got[:, 0], DPMSolverMultistep(eta=1.0), 1.6)


def test_systematic_resampling_has_the_right_expectation() -> None:
    weights = torch.tensor([[0.05, 0.4, 0.3, 0.25], [0.25] * 4], dtype=F64).T
    n = 4000
    u = (torch.arange(n, dtype=F64) + 0.5) / n
    counts = torch.zeros(4, 2, dtype=F64)
    for value in u[:: n // 200]:
        parents = systematic(weights, value.expand(2))
        for column in range(2):
            each = torch.bincount(parents[:, column], minlength=4)
            assert bool(((each - 4 * weights[:, column]).abs() < 1.0 + 1e-9).all())
            counts[:, column] += each / 200
    torch.testing.assert_close(counts, 4 * weights, atol=0.02, rtol=0)


@pytest.mark.parametrize("geometry", [CentredPoints(), SymmetricEdges()])
def test_uniform_numbers_made_of_normals_on_a_geometry(geometry: Geometry) -> None:
    n, draws = 4000, Draws(0, range(4000))

    def sample(padding: int) -> Tensor:
        width = 3 + padding if isinstance(geometry, SymmetricEdges) else 3
        like = torch.zeros(n, 3 + padding, width, dtype=F64)
        mask = torch.zeros(n, 3 + padding, dtype=torch.bool)
        mask[:, :3] = True

        def draw(name: str, j: int) -> Tensor:
            return draws.normal(name, j, like, geometry, mask)

        return _Particles(Steered(DDPM(), linear), n, draw, "x").uniform()

    u = sample(0).sort().values
    expected = (torch.arange(n, dtype=F64) + 0.5) / n
    assert float((u - expected).abs().max()) < 1.63 / math.sqrt(n)  # Kolmogorov, 1 %
    torch.testing.assert_close(sample(2).sort().values, u, atol=1e-6, rtol=0)


def test_projection_and_hooks_see_one_batch_at_a_time() -> None:
    sizes: list[int] = []

    def project(name: str, x: Tensor) -> Tensor:
        sizes.append(len(x))
        return x

    def after(x: State, time: float | None) -> State:
        sizes.append(len(x["x"]))
        return x

    draw = normals(3)
    solver = Steered(DDPM(), linear, 4)
    end = solver.solve(PROCESS, prior(), {"x": draw("x", -1)}, times(2), draw, project, after)
    assert set(sizes) == {3}
    assert end["x"].shape == (3, 1)
    assert solver.intervals(100) == 25


def test_particles_of_an_edit_start_where_they_are_told() -> None:
    starts: list[Tensor] = []
    base = prior()

    def denoise(x: State, t: float) -> dict:
        if t == 1.0:
            starts.append(x["x"])
        return base(x, t)

    draw = normals(2)
    x = {"x": torch.tensor([[5.0], [6.0]], dtype=F64)}
    Steered(DDPM(), linear, 3, scatter=False).solve(PROCESS, denoise, x, times(2), draw)
    assert all(torch.equal(start, x["x"]) for start in starts)
    assert len(starts) == 3


def test_errors() -> None:
    draw = normals(2)

    def solve(reward, **options):  # noqa: ANN001, ANN003, ANN202
        x = {"x": draw("x", -1)}
        return Steered(DDPM(), reward, 2, **options).solve(PROCESS, prior(), x, times(2), draw)

    with pytest.raises(FloatingPointError, match="reward is NaN"):
        solve(lambda x: torch.tensor([1.0, math.nan]))
    with pytest.raises(ValueError, match=r"reward has shape \(2, 1\).*\[2\]"):
        solve(lambda x: x["x"])
    with pytest.raises(ValueError, match="DDIM draws no noise"):
        Steered(DDIM(), linear)
    with pytest.raises(ValueError, match="potential 'mean'"):
        solve(linear, potential="mean")
    with pytest.raises(ValueError, match="pick 'worst'"):
        solve(linear, pick="worst")
    with pytest.raises(ValueError, match="choice needs pick='best'"):
        solve(linear, choice=linear)
    with pytest.raises(ValueError, match="ess=2"):
        solve(linear, ess=2.0)
