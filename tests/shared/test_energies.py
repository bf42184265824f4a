from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from shared.analytic import AnalyticDenoiser, Mixture
from shared.denoisers import Denoiser
from shared.geometry import CentredPoints, Geometry, Points, SymmetricEdges
from shared.guidance import (
    AnyOf,
    Classifier,
    Energy,
    Faithful,
    Function,
    Guided,
    Interval,
    Realistic,
    Source,
    SquaredError,
    Term,
    Within,
    low_pass,
)
from shared.predictions import Prediction
from shared.process import Field, Process, State
from shared.schedules import Karras, Polynomial, RectifiedFlow, Schedule, VPCosine, VPLinear
from shared.solvers.ancestral import DDIM, DDPM

F64 = torch.float64
SCHEDULES = {"vp": VPLinear(), "ve": Karras(), "flow": RectifiedFlow()}
MIDDLE = {"vp": 0.4, "ve": 1.7, "flow": 0.6}


def times(schedule: Schedule, n: int, start: float, end: float) -> list[float]:
    first, last = (float(schedule.log_snr(t)) for t in (start, end))
    grid = schedule.t_from_log_snr(torch.linspace(first, last, n + 1, dtype=F64))
    return [start, *grid[1:-1].tolist(), end]


def gaussian(process: Process, mean: Tensor, var: Tensor) -> AnalyticDenoiser:
    return AnalyticDenoiser.single(process, Mixture.gaussian(mean, var))


def exact_energy(
    process: Process, direction: Tensor, y: float, std: float, var: float, length: float
) -> Function:
    """-log p(y | x_t) for y = <direction, x_0> + std z and x_0 ~ N(0, var) on a subspace on which
    <direction, .> has squared norm ``length``; at the estimate of x_0."""
    schedule = process.lead

    def fn(x: State, t: float | Tensor, mask: object, cond: object) -> Tensor:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        left = var * sigma**2 / (alpha**2 * var + sigma**2)
        residual = y - (direction * x["x"]).flatten(1).sum(1)
        return 0.5 * residual**2 / (std**2 + length * left)

    return Function(fn, "measurement")


def noisy(energy: Energy, denoise: AnalyticDenoiser) -> Function:
    """The same energy as a function of x_t."""

    def fn(x: State, t: float | Tensor, mask: object, cond: object) -> Tensor:
        return energy({n: p.x0 for n, p in denoise(x, t).items()}, t)

    return Function(fn, "noisy measurement")


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("at", ["input", "estimate"])
def test_guided_noise_is_that_of_the_exact_posterior(name: str, at: str) -> None:
    process = Process.single(SCHEDULES[name])
    t, std, y = MIDDLE[name], 0.4, 1.3
    prior_mean, var = torch.zeros(3, dtype=F64), 0.7
    direction = torch.tensor([[1.0, 0.0, 0.0]], dtype=F64)
    base = gaussian(process, prior_mean, torch.full((3,), var, dtype=F64))
    energy = exact_energy(process, direction, y, std, var, 1.0)
    if at == "input":
        energy = noisy(energy, base)
    share = var / (var + std**2)
    mean = torch.tensor([share * y, 0.0, 0.0], dtype=F64)
    posterior = gaussian(process, mean, torch.tensor([share * std**2, var, var], dtype=F64))
    x = {"x": torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=F64)}
    for time in (t, torch.full((5,), t, dtype=F64)):
        got = Guided(base, process, [Term(energy, at=at)])(x, time)["x"]
        want = posterior(x, time)["x"]
        torch.testing.assert_close(got.eps, want.eps, atol=1e-12, rtol=1e-10)
        torch.testing.assert_close(got.x0, want.x0, atol=1e-12, rtol=1e-10)


def coordinates(geometry: Geometry, n: int) -> Tensor:
    """An orthonormal frame of the subspace in the length of the geometry, [dim, ...shape]."""
    if isinstance(geometry, SymmetricEdges):
        pairs = [(i, j) for i in range(n) for j in range(i + 1, n)]
        frame = torch.zeros(len(pairs), n, n, dtype=F64)
        for k, (i, j) in enumerate(pairs):
            frame[k, i, j] = frame[k, j, i] = 1.0
        return frame
    white = torch.eye(n, dtype=F64) - 1.0 / n
    basis = torch.linalg.eigh(white).eigenvectors[:, 1:].T
    return torch.einsum("kn,cd->kcnd", basis, torch.eye(3, dtype=F64)).reshape(-1, n, 3)


@pytest.mark.parametrize("geometry", [CentredPoints(), SymmetricEdges()])
def test_guidance_is_exact_on_subspaces(geometry: Geometry) -> None:
    n, var, std, y, t = 4, 0.7, 0.4, 2.0, 0.35
    process = Process.single(VPLinear(), geometry)
    frame = coordinates(geometry, n)
    gen = torch.Generator().manual_seed(1)
    direction = torch.randn(1, *frame.shape[1:], generator=gen, dtype=F64)
    b = (frame * direction).flatten(1).sum(1)
    size = frame[0].numel()
    base = gaussian(process, torch.zeros(size, dtype=F64), torch.full((size,), var, dtype=F64))
    energy = exact_energy(process, direction, y, std, var, float(b @ b))
    x = geometry.noise(torch.randn(6, *frame.shape[1:], generator=gen, dtype=F64))
    got = Guided(base, process, [Term(energy, at="estimate")])({"x": x}, t)["x"].eps

    u = torch.stack([geometry.inner(x, e.expand_as(x)) for e in frame], 1)
    cov = torch.linalg.inv(torch.eye(len(b), dtype=F64) / var + torch.outer(b, b) / std**2)
    mean = cov @ b * y / std**2
    alpha, sigma = float(process.lead.alpha(t)), float(process.lead.sigma(t))
    total = alpha**2 * cov + sigma**2 * torch.eye(len(b), dtype=F64)
    want = sigma * torch.linalg.solve(total, (u - alpha * mean).T).T
    torch.testing.assert_close(got, torch.einsum("bk,k...->b...", want, frame), atol=1e-11, rtol=0)
    torch.testing.assert_close(geometry.project(got), got, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_guided_sampling_reaches_the_posterior_at_first_order(name: str) -> None:
    schedule = SCHEDULES[name]
    process = Process.single(schedule)
    start, end = {"vp": (1.0, 1e-3), "ve": (80.0, 2e-3), "flow": (0.999, 1e-3)}[name]
    var, std, y = 0.7, 0.4, 1.3
    base = gaussian(process, torch.zeros(1, dtype=F64), torch.full((1,), var, dtype=F64))
    energy = exact_energy(process, torch.ones(1, 1, dtype=F64), y, std, var, 1.0)
    guided = Guided(base, process, [Term(energy, at="estimate")])
    share = var / (var + std**2)
    mean, left = share * y, share * std**2
    a, b = ((float(schedule.alpha(t)), float(schedule.sigma(t))) for t in (start, end))
    spread = [alpha**2 * left + sigma**2 for alpha, sigma in (a, b)]
    x = torch.tensor([[-1.0], [0.5], [1.6]], dtype=F64) * math.sqrt(spread[0])
    want = b[0] * mean + math.sqrt(spread[1] / spread[0]) * (x - a[0] * mean)
    errors = []
    for n in (100, 200):
        with torch.no_grad():
            grid = times(schedule, n, start, end)
            got = DDIM().solve(process, guided, {"x": x}, grid, lambda name, j: x)["x"]
        errors.append(float((got - want).abs().max()))
    assert errors[1] < 0.02
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1.0, abs=0.1)


def test_every_field_is_guided_with_its_own_sigma() -> None:
    process = Process(
        {
            "x": Field(VPLinear(t_max=0.99), CentredPoints()),
            "h": Field(VPCosine(t_max=0.99), Points()),
        }
    )
    mask = torch.tensor([[True, True, True], [True, True, False]])
    gen = torch.Generator().manual_seed(3)
    x = {
        "x": CentredPoints().project(torch.randn(2, 3, 3, generator=gen, dtype=F64), mask),
        "h": Points().project(torch.randn(2, 3, 2, generator=gen, dtype=F64), mask),
    }

    def denoise(x: State, t: float, mask: object = None, cond: object = None) -> dict:
        return {
            n: Prediction(
                v,
                float(process.fields[n].schedule.alpha(t)),
                float(process.fields[n].schedule.sigma(t)),
                eps=torch.zeros_like(v),
            )
            for n, v in x.items()
        }

    def fn(x: State, t: object, mask: object, cond: object) -> Tensor:
        return 3.0 * x["x"][:, :, 0].square().sum(1) + 2.0 * x["h"].sum((1, 2))

    out = Guided(denoise, process, [Term(Function(fn), scale=0.5)])(x, 0.3, mask)
    slope = torch.zeros_like(x["x"])
    slope[..., 0] = 6.0 * x["x"][..., 0]
    sigma = {n: float(f.schedule.sigma(0.3)) for n, f in process.fields.items()}
    want = 0.5 * sigma["x"] * CentredPoints().project(slope, mask)
    torch.testing.assert_close(out["x"].eps, want)
    torch.testing.assert_close(
        out["h"].eps, 0.5 * sigma["h"] * 2.0 * mask[..., None].expand_as(x["h"]).to(F64)
    )
    assert out["x"].eps[1, 2].abs().max() == 0.0


def quadratic(name: str = "quadratic") -> Function:
    return Function(lambda x, t, mask, cond: x["x"].square().sum(1), name)


def simple() -> tuple[Process, AnalyticDenoiser, State]:
    process = Process.single(VPLinear())
    x = {"x": torch.tensor([[0.3, -0.8], [1.1, 0.4], [2.0, 3.0]], dtype=F64)}
    return process, gaussian(process, torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64)), x


def push(term: Term, t: float | Tensor = 0.5) -> Tensor:
    """(guided eps - eps) / sigma."""
    process, base, x = simple()
    plain = base(x, t)["x"]
    return (Guided(base, process, [term])(x, t)["x"].eps - plain.eps) / plain.sigma


def test_schedules_normalisation_and_clipping() -> None:
    x = simple()[2]["x"]
    schedule = VPLinear()
    alpha, sigma = float(schedule.alpha(0.5)), float(schedule.sigma(0.5))
    torch.testing.assert_close(push(Term(quadratic(), 2.0)), 4.0 * x)
    weighted = push(Term(quadratic(), schedule=lambda a, s: a / s))
    torch.testing.assert_close(weighted, 2.0 * x * alpha / sigma)
    rms = (2.0 * x).square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(push(Term(quadratic(), 3.0, normalise=True)), 3.0 * 2.0 * x / rms)
    clipped = push(Term(quadratic(), clip=2.0))
    torch.testing.assert_close(clipped, 2.0 * x * (2.0 / rms).clamp(max=1.0))
    assert bool((rms < 2.0).any())
    assert bool((rms > 2.0).any())
    # eps_hat held constant: d x0_hat / dx = 1 / alpha
    process, base, state = simple()
    estimate = base(state, 0.5)["x"].x0
    torch.testing.assert_close(push(Term(quadratic(), at="frozen")), 2.0 * estimate / alpha)


def test_intervals_also_for_one_time_per_sample() -> None:
    x = simple()[2]["x"]
    centre = float(VPLinear().log_snr(0.5))
    term = Term(quadratic(), schedule=Interval(centre - 0.1, centre + 0.1))
    torch.testing.assert_close(push(term), 2.0 * x)
    assert push(term, 0.9).abs().max() == 0.0
    got = push(term, torch.tensor([0.5, 0.9, 0.5], dtype=F64))
    torch.testing.assert_close(got, 2.0 * x * torch.tensor([[1.0], [0.0], [1.0]], dtype=F64))


def test_sums_scales_negations_and_mixtures() -> None:
    x = simple()[2]
    e = quadratic()
    f = Function(lambda x, t, mask, cond: (x["x"] - 1.0).square().sum(1), "shifted")
    a, b = e(x, 0.5), f(x, 0.5)
    torch.testing.assert_close((e + 2.0 * f)(x, 0.5), a + 2.0 * b)
    torch.testing.assert_close((-e - f)(x, 0.5), -a - b)
    torch.testing.assert_close(AnyOf((e, f))(x, 0.5), -torch.log((-a).exp() + (-b).exp()))
    assert (e + f).name == "quadratic + shifted"
    torch.testing.assert_close(push(Term(e + f)), push(Term(e)) + push(Term(f)))


def test_targets_ranges_and_classes() -> None:
    x = {"x": torch.tensor([[0.0, 1.0], [2.0, 5.0]], dtype=F64)}
    cond = {"y": torch.tensor([[1.0, 1.0], [2.0, 2.0]], dtype=F64), "c": torch.tensor([1, 0])}

    def predict(x: State, t: object, mask: object, cond: object) -> Tensor:
        return x["x"]

    assert SquaredError(predict, "y")(x, 0.1, cond=cond).tolist() == [1.0, 9.0]
    weight = torch.tensor([1.0, 0.5])
    assert SquaredError(predict, 1.0, weight)(x, 0.1).tolist() == [1.0, 1.0 + 8.0]
    assert Within(predict, low=1.0, high=3.0)(x, 0.1).tolist() == [1.0, 4.0]
    assert Within(predict, high=torch.tensor([0.0, 9.0]))(x, 0.1).tolist() == [0.0, 4.0]
    got = Classifier(predict, "c")(x, 0.1, cond=cond)
    want = -torch.stack([x["x"][0].log_softmax(0)[1], x["x"][1].log_softmax(0)[0]])
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(Classifier(predict, 1)(x, 0.1)[:1], want[:1])
    with pytest.raises(ValueError, match="low, high or both"):
        Within(predict)


def test_similarity_to_a_source() -> None:
    process = Process.single(VPLinear())
    gen = torch.Generator().manual_seed(2)
    x, source, noise = (torch.randn(2, 3, 4, 4, generator=gen, dtype=F64) for _ in range(3))
    cond = {"source": source, "noise": noise}
    clean, noised = Source(process, "x"), Source(process, "x", noise="noise")
    faithful = Faithful(low_pass(2), clean)
    assert faithful({"x": source}, 0.5, cond=cond).tolist() == [0.0, 0.0]
    blocks = (x - source).reshape(2, 3, 2, 2, 2, 2).mean((3, 5)).square().flatten(1).sum(1)
    torch.testing.assert_close(faithful({"x": x}, 0.5, cond=cond), blocks)
    realistic = Realistic(lambda x, t: x, noised)
    at = float(VPLinear().alpha(0.5)) * source + float(VPLinear().sigma(0.5)) * noise
    torch.testing.assert_close(realistic({"x": at}, 0.5, cond=cond), torch.ones(2, dtype=F64))
    assert realistic({"x": x}, 0.5, cond=cond).abs().max() < 0.9
    with pytest.raises(ValueError, match="'realistic' needs the condition 'noise'"):
        realistic({"x": x}, 0.5, cond={"source": source})


# -- autograd -----------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2, dtype=F64)
        self.graph = None

    def forward(self, inputs: State, code: Tensor, mask: object, cond: object) -> State:
        self.graph = torch.is_grad_enabled()
        return {"x": torch.tanh(self.layer(inputs["x"]))}


def test_no_gradient_reaches_parameters_and_no_graph_is_kept() -> None:
    process, _, x = simple()
    net, energy_net = Net(), nn.Linear(2, 1, dtype=F64)
    energy = Function(lambda x, t, mask, cond: energy_net(x["x"])[:, 0].square())
    base = Denoiser(net, process)
    for at, through in (("input", False), ("frozen", False), ("estimate", True)):
        for context in (torch.no_grad(), torch.enable_grad()):
            with context:
                out = Guided(base, process, [Term(energy, at=at)])(x, 0.5)["x"]
            assert net.graph is through
            assert not out.eps.requires_grad
            assert not out.x0.requires_grad
    assert all(p.grad is None for p in (*base.parameters(), *energy_net.parameters()))
    assert not x["x"].requires_grad


def test_a_caller_can_differentiate_through_the_guidance() -> None:
    process, base, x = simple()
    energy = Function(lambda x, t, mask, cond: (x["x"] ** 3).sum(1))
    guided = Guided(base, process, [Term(energy)])
    point = x["x"].clone().requires_grad_()
    predicted = guided({"x": point}, 0.5)["x"]
    (slope,) = torch.autograd.grad(predicted.eps.sum(), point)
    sigma = predicted.sigma  # the data are standard normal: eps_hat = sigma x
    torch.testing.assert_close(slope, sigma + sigma * 6.0 * x["x"])


@pytest.mark.parametrize("schedule", [RectifiedFlow(), VPLinear()])
def test_the_ends_of_time_stay_as_they_are(schedule: Schedule) -> None:
    process = Process.single(schedule)
    base = gaussian(process, torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64))
    guided = Guided(base, process, [Term(quadratic(), 5.0)])
    x = simple()[2]
    for t in [0.0] + [1.0] * isinstance(schedule, RectifiedFlow):
        torch.testing.assert_close(guided(x, t)["x"].x0, base(x, t)["x"].x0)


def test_errors_name_the_energy() -> None:
    process, base, x = simple()

    def run(fn: Callable, cond: dict | None = None) -> None:
        Guided(base, process, [Term(Function(fn, "gap"))])(x, 0.5, None, cond)

    with pytest.raises(FloatingPointError, match=r"energy 'gap' is NaN.*t=0.5 for 1 of 3.*\[1\]"):
        run(lambda x, t, m, c: x["x"].sum(1) * torch.tensor([1.0, math.nan, 1.0]))
    with pytest.raises(FloatingPointError, match="gradient of energy 'gap' by 'x'"):
        run(lambda x, t, m, c: (x["x"] * 0.0).norm(dim=1).sqrt())
    with pytest.raises(ValueError, match=r"energy 'gap' has shape \(3, 2\)"):
        run(lambda x, t, m, c: x["x"])
    with pytest.raises(ValueError, match="energy 'gap' does not depend on the state"):
        run(lambda x, t, m, c: x["x"].detach().sum(1))
    with pytest.raises(ValueError, match=r"condition 'y' has shape \(2,\).*batch, 3"):
        run(lambda x, t, m, c: x["x"].sum(1), {"y": torch.zeros(2)})
    wrong = SquaredError(lambda x, t, m, c: x["x"][:, :1], "y", name="gap")
    with pytest.raises(ValueError, match=r"energy 'gap': the target has shape \(3,\).*\(3, 1\)"):
        Guided(base, process, [Term(wrong)])(x, 0.5, None, {"y": torch.zeros(3)})
    with pytest.raises(ValueError, match="'gap' needs the condition 'y'"):
        Guided(base, process, [Term(wrong)])(x, 0.5)
    with pytest.raises(ValueError, match="at='x0'"):
        Term(quadratic(), at="x0")  # type: ignore[arg-type]
    with torch.inference_mode(), pytest.raises(RuntimeError, match="no_grad"):
        Guided(base, process, [Term(quadratic())])(x, 0.5)


@pytest.mark.golden
@pytest.mark.parametrize("step", [0, 120, 600, 999])
def test_published_eegsde_step(golden: Callable, step: int) -> None:
    data, about = golden("03_eegsde_single")
    mask = data["in.node_mask"][..., 0].bool()
    process = Process(
        {"x": Field(Polynomial(), CentredPoints()), "h": Field(Polynomial(), Points())}
    )

    def cut(key: str) -> State:
        value = data[f"step_s{step}.{key}"]
        return {"x": value[..., :3], "h": value[..., 3:]}

    slope, zt = cut("grad_projected1"), cut("zt")

    def fn(x: State, t: object, mask: object, cond: object) -> Tensor:
        return sum((slope[n] * x[n]).flatten(1).sum(1) for n in x)

    def denoise(x: State, t: float, mask: object = None, cond: object = None) -> dict:
        eps, field = cut("eps"), process.fields["x"].schedule
        a, s = float(field.alpha(t)), float(field.sigma(t))
        return {n: Prediction(x[n], a, s, eps=eps[n]) for n in x}

    guided = Guided(denoise, process, [Term(Function(fn), about["l"][0])])
    grid = [(step + 1) / 1000, step / 1000]
    ends = [
        DDPM().solve(
            process,
            lambda x, t, d=d: d(x, t, mask),
            zt,
            grid,
            lambda name, j: torch.zeros_like(zt[name]),
            lambda name, v: process.fields[name].geometry.project(v, mask),
        )
        for d in (denoise, guided)
    ]
    plain, published = cut("zs_unguided"), cut("zs_guided")
    for name in ("x", "h"):
        want = published[name] - plain[name]
        assert want.abs().max() > 0.0
        # the difference of two states of size ~1 keeps about 1e-15 absolute
        torch.testing.assert_close(ends[1][name] - ends[0][name], want, rtol=1e-7, atol=2e-14)
