from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from shared.analytic import AnalyticDenoiser, Mixture
from shared.geometry import CentredPoints, Euclidean, Geometry, Points, SymmetricEdges
from shared.likelihood import (
    ProbabilityFlow,
    bits_per_dim,
    prior_kl,
    prior_log_prob,
    variational_bound,
)
from shared.process import Field, Process, State
from shared.randomness import Draws
from shared.schedules import (
    Karras,
    RectifiedFlow,
    Schedule,
    VarianceExploding,
    VPCosine,
    VPLinear,
)

F64 = torch.float64
SCHEDULES = {
    "vp": VPLinear(),
    "ve": VarianceExploding(),
    "karras": Karras(),
    "flow": RectifiedFlow(t_min=1e-3),
}


def mixture() -> Mixture:
    return Mixture(
        torch.tensor([0.3, 0.7], dtype=F64),
        torch.tensor([[-1.0, 0.5], [0.8, -0.3]], dtype=F64),
        torch.tensor([[0.2, 0.4], [0.3, 0.1]], dtype=F64),
    )


def isotropic(process: Process, size: int, var: float) -> AnalyticDenoiser:
    mixture = Mixture.gaussian(torch.zeros(size, dtype=F64), torch.full((size,), var, dtype=F64))
    return AnalyticDenoiser(process, dict.fromkeys(process.fields, mixture))


def grid(schedule: Schedule, n: int) -> list[float]:
    ends = [float(schedule.log_snr(t)) for t in (schedule.t_max, schedule.t_min)]
    inner = schedule.t_from_log_snr(torch.linspace(*ends, n + 1, dtype=F64))[1:-1]
    return [schedule.t_max, *inner.tolist(), schedule.t_min]


class Fast(Draws):
    """Draws of one generator in place of one stream per sample."""

    def normal(self, name, number, like, geometry=None, mask=None):
        generator = torch.Generator().manual_seed(1000 * number + len(name))
        white = torch.randn(like.shape, generator=generator, dtype=like.dtype)
        return white if geometry is None else geometry.noise(white, mask)

    def uniform(self, name, number):
        generator = torch.Generator().manual_seed(number)
        return torch.rand(len(self.indices), generator=generator, dtype=F64)


# -- probability flow -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_flow_likelihood_is_the_exact_mixture_density(name: str) -> None:
    schedule, data = SCHEDULES[name], mixture()
    process = Process.single(schedule)
    ends = [
        (float(schedule.alpha(t)), float(schedule.sigma(t)))
        for t in (schedule.t_min, schedule.t_max)
    ]
    flow = ProbabilityFlow(
        process,
        AnalyticDenoiser.single(process, data),
        trace="exact",
        prior=lambda x, mask: data.log_prob(x["x"], *ends[1]),
        rtol=1e-6,
        atol=1e-6,
    )
    x = data.sample(6, torch.Generator().manual_seed(0))
    got, latent = flow.log_prob({"x": x})
    torch.testing.assert_close(got, data.log_prob(x, *ends[0]), atol=1e-4, rtol=0)
    assert float(latent["x"].std() / ends[1][1]) < 4.0
    if name == "flow":  # alpha(1) = 0: the sampler's own start is the exact one
        own = ProbabilityFlow(process, flow.denoise, "exact", rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(own.log_prob({"x": x})[0], got, atol=1e-7, rtol=0)


@pytest.mark.parametrize("geometry", [CentredPoints(), SymmetricEdges(), Points()])
@pytest.mark.parametrize("trace", ["exact", "rademacher"])
def test_density_on_a_subspace_with_padding(geometry: Geometry, trace: str) -> None:
    """N(0, v) on the subspace; its flow is linear, so Rademacher probes leave no variance where
    the frame is the coordinates' own, and little where it is centred."""
    schedule, var = VPLinear(), 0.6
    process = Process.single(schedule, geometry)
    mask = torch.tensor([[True] * 4 + [False], [True] * 3 + [False] * 2])
    shape = (2, 5, 5) if isinstance(geometry, SymmetricEdges) else (2, 5, 3)
    draws = Draws(0, [3, 4])
    x = draws.normal("x", 0, torch.zeros(shape, dtype=F64), geometry, mask)
    flow = ProbabilityFlow(
        process, isotropic(process, math.prod(shape[1:]), var), trace, probes=30
    )
    got, latent = flow.log_prob({"x": x}, draws, mask)
    alpha, sigma = float(schedule.alpha(schedule.t_min)), float(schedule.sigma(schedule.t_min))
    total = alpha**2 * var + sigma**2
    dim, square = geometry.dim(x, mask), geometry.norm_squared(x)
    want = -0.5 * square / total - 0.5 * dim * math.log(2 * math.pi * total)
    exact = trace == "exact" or not isinstance(geometry, CentredPoints)
    torch.testing.assert_close(got, want, atol=1e-3 if exact else 0.8, rtol=0)
    torch.testing.assert_close(geometry.project(latent["x"], mask), latent["x"])


def test_random_traces_are_unbiased_and_belong_to_samples() -> None:
    data = mixture()
    process = Process.single(RectifiedFlow(t_min=1e-2))
    denoise = AnalyticDenoiser.single(process, data)
    x = {"x": data.sample(3, torch.Generator().manual_seed(1))}
    options = {"method": "rk4", "steps": 6}
    exact = ProbabilityFlow(process, denoise, "exact", **options).log_prob(x)[0]
    many = {"x": x["x"].repeat_interleave(600, 0)}
    for trace in ("rademacher", "gaussian"):
        flow = ProbabilityFlow(process, denoise, trace, **options)
        got = flow.log_prob(many, Fast(0, range(1800)))[0].reshape(3, 600)
        error = got.std(1) / math.sqrt(600)
        assert bool(((got.mean(1) - exact).abs() < 4 * error + 1e-9).all())
        batch = flow.log_prob(x, Draws(0, [5, 6, 7]))[0]
        alone = flow.log_prob({"x": x["x"][1:2]}, Draws(0, [6]))[0]
        torch.testing.assert_close(batch[1:2], alone, atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="need draws"):
        flow.log_prob(x)
    broken = ProbabilityFlow(
        process, lambda x, t, m, c: denoise({"x": x["x"] / (t > 0.5)}, t), "exact", **options
    )
    with pytest.raises(FloatingPointError, match="NaN or infinite at t=0.01"):
        broken.log_prob(x)
    with pytest.raises(ValueError, match="trace 'full'"):
        ProbabilityFlow(process, denoise, "full")  # type: ignore[arg-type]


def test_single_precision_states_and_default_end() -> None:
    process = Process.single(RectifiedFlow())
    seen = []

    def denoise(x: State, t: float, mask: object = None, cond: object = None) -> dict:
        seen.append((x["x"].dtype, t))
        return isotropic(process, 2, 1.0)(x, t)

    flow = ProbabilityFlow(process, denoise, "exact", rtol=1e-3, atol=1e-3)
    got, latent = flow.log_prob({"x": torch.zeros(2, 2)})
    assert got.dtype == F64
    assert latent["x"].dtype == torch.float32
    assert {dtype for dtype, _ in seen} == {torch.float32}
    assert min(t for _, t in seen) == pytest.approx(1e-3)


def test_two_fields_add_up() -> None:
    process = Process(
        {
            "x": Field(VPLinear(t_max=0.99), CentredPoints()),
            "h": Field(VPCosine(t_max=0.99), Points()),
        }
    )
    x = {
        "x": CentredPoints().project(torch.ones(1, 3, 2, dtype=F64).cumsum(1)),
        "h": torch.ones(1, 3, 2, dtype=F64),
    }
    denoise = isotropic(process, 6, 0.5)
    both = ProbabilityFlow(process, denoise, "exact").log_prob(x)[0]
    parts = []
    for name, field in process.fields.items():
        alone = Process({name: field})
        part = ProbabilityFlow(
            alone, AnalyticDenoiser(alone, {name: denoise.mixtures[name]}), "exact"
        )
        parts.append(part.log_prob({name: x[name]})[0])
    torch.testing.assert_close(both, parts[0] + parts[1], atol=1e-4, rtol=0)


# -- variational bounds ---------------------------------------------------------------------------


def bound_of_gaussian(
    schedule: Schedule,
    geometry: Geometry,
    times: list[float] | None,
    repeats: int = 300,
    **kw: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean over draws of the bound of one point, its standard error, and log p of the point."""
    var = 0.6
    process = Process.single(schedule, geometry)
    shape = (3, 3) if not isinstance(geometry, Euclidean) else (2,)
    x = geometry.noise(torch.ones(1, *shape, dtype=F64).cumsum(1).cumsum(-1) * 0.3)
    many = {"x": x.expand(repeats, *shape)}
    denoise = isotropic(process, math.prod(shape), var)
    got = variational_bound(process, denoise, many, Fast(0, range(repeats)), times, **kw).elbo
    dim, square = geometry.dim(x), geometry.norm_squared(x)
    want = -0.5 * square / var - 0.5 * dim * math.log(2 * math.pi * var)
    return got.mean(), got.std() / math.sqrt(repeats), want[0]


@pytest.mark.parametrize("name", ["vp", "karras", "flow"])
def test_bound_tends_to_the_density_of_a_gaussian(name: str) -> None:
    schedule = SCHEDULES[name]
    if name == "flow":  # log-SNR is infinite at t = 1
        schedule = RectifiedFlow(t_min=1e-3, t_max=0.9999)
    gaps = []
    for n in (10, 40, 160):
        got, error, want = bound_of_gaussian(schedule, Euclidean(), grid(schedule, n))
        gaps.append(float(want - got))
        assert float(got) < float(want) + 3 * float(error)
    assert gaps[0] > gaps[1] > gaps[2] > -0.05
    assert gaps[2] < 0.12 * gaps[0]
    got, error, want = bound_of_gaussian(schedule, Euclidean(), None)
    assert abs(float(got - want)) < 4 * float(error) + 0.02


@pytest.mark.parametrize("geometry", [CentredPoints(), SymmetricEdges()])
def test_bounds_on_subspaces(geometry: Geometry) -> None:
    got, error, want = bound_of_gaussian(VPLinear(), geometry, None)
    assert abs(float(got - want)) < 4 * float(error) + 0.02
    gaps = []
    for n in (50, 200):
        got, error, want = bound_of_gaussian(VPLinear(), geometry, grid(VPLinear(), n))
        gaps.append(float(want - got))
    assert 0.0 < gaps[1] < 0.35 * gaps[0]


def test_few_evaluations_are_unbiased() -> None:
    times = grid(VPLinear(), 40)
    full, error, _ = bound_of_gaussian(VPLinear(), Euclidean(), times)
    few, other, _ = bound_of_gaussian(VPLinear(), Euclidean(), times, evaluations=7)
    assert abs(float(full - few)) < 4 * math.hypot(float(error), float(other))


def test_parts_of_the_bound_and_their_randomness() -> None:
    process = Process.single(VPLinear(), CentredPoints())
    mask = torch.tensor([[True, True, True], [True, True, False]])
    x = {"x": CentredPoints().project(torch.arange(18, dtype=F64).reshape(2, 3, 3).sin(), mask)}
    denoise = isotropic(process, 9, 0.5)
    seen = {}

    def decoder(x0: State, predictions: dict, mask: Tensor | None) -> Tensor:
        seen.update(predictions, mask=mask)
        return torch.zeros(len(x0["x"]), dtype=F64)

    times = grid(VPLinear(), 5)
    got = variational_bound(
        process, denoise, x, Draws(0, [0, 1]), times, decoder=decoder, mask=mask
    )
    torch.testing.assert_close(got.elbo, -got.prior_kl - got.diffusion_kl)
    torch.testing.assert_close(got.prior_kl, prior_kl(process, x, mask))
    assert torch.equal(seen["mask"], mask)
    alone = variational_bound(
        process,
        isotropic(process, 6, 0.5),
        {"x": x["x"][1:, :2]},
        Draws(0, [1]),
        times,
        decoder=decoder,
    )
    torch.testing.assert_close(alone.diffusion_kl, got.diffusion_kl[1:])
    with pytest.raises(ValueError, match="grid from t_max = 1"):
        variational_bound(process, denoise, x, Draws(0, [0, 1]), [0.5, 0.1])
    flow = Process.single(RectifiedFlow(), CentredPoints())
    with pytest.raises(ValueError, match="sigma is 0"):
        variational_bound(flow, denoise, x, Draws(0, [0, 1]), [1.0, 0.0])


def test_prior_terms_in_closed_form() -> None:
    schedule = VPLinear()
    process = Process({"x": Field(schedule, CentredPoints(), prior_std=1.3)})
    x = {"x": CentredPoints().project(torch.arange(12, dtype=F64).reshape(1, 4, 3) ** 1.5)}
    alpha, sigma = float(schedule.alpha(1.0)), float(schedule.sigma(1.0))
    mean = torch.distributions.Normal(alpha * x["x"].flatten(), sigma)
    full = torch.distributions.kl_divergence(mean, torch.distributions.Normal(0.0, 1.3)).sum()
    per_entry = math.log(1.3 / sigma) + 0.5 * (sigma / 1.3) ** 2 - 0.5
    torch.testing.assert_close(prior_kl(process, x)[0], full - 3 * per_entry, atol=1e-6, rtol=0)
    log_prob = torch.distributions.Normal(0.0, 1.3).log_prob(x["x"]).sum()
    want = log_prob + 3 * (math.log(1.3) + 0.5 * math.log(2 * math.pi))
    torch.testing.assert_close(prior_log_prob(process, x)[0], want.double(), atol=1e-3, rtol=0)


def test_bits_per_dimension() -> None:
    # a uniform density on [-1, 1]^d needs 8 bits for each of the 256 values
    log_prob = torch.tensor([-3.0 * math.log(2.0)])
    assert bits_per_dim(log_prob, 3).item() == pytest.approx(8.0)
    assert bits_per_dim(log_prob, torch.tensor([3.0]), 1.0).item() == pytest.approx(1.0)
