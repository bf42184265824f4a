"""The optimal reverse variance: Gamma, and heads that predict it per element."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from shared.analytic import AnalyticDenoiser, Mixture
from shared.denoisers import Denoiser
from shared.domains import Batch
from shared.geometry import CentredPoints, SymmetricEdges
from shared.process import Field, Process, State
from shared.schedules import VPLinear
from shared.solvers.ancestral import DDPM
from shared.variance import Gamma, VarianceHead, estimate_gamma, load_gamma, save_gamma

# -- the table --------------------------------------------------------------------------------


def test_estimated_gamma_is_that_of_a_gaussian() -> None:
    """Gamma = sigma^2 / (alpha^2 v + sigma^2) for data N(m, v)."""
    schedule, var = VPLinear(), 0.3
    mixture = Mixture.gaussian(torch.full((8,), 0.5).double(), torch.full((8,), var).double())
    denoise = AnalyticDenoiser.single(Process.single(schedule), mixture)
    data = mixture.sample(6000, torch.Generator().manual_seed(0))
    batches = [Batch({"x": rows}) for rows in data.split(2500)]
    times = [1e-3, 0.1, 0.3, 0.6, 1.0]
    gamma = estimate_gamma(denoise, denoise.process, batches, times)["x"]
    assert gamma.times == tuple(times)
    for t in times:
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        exact = sigma**2 / (alpha**2 * var + sigma**2)
        assert gamma(t) == pytest.approx(exact, rel=0.03)  # 48,000 terms: 0.6 % standard error
    again = estimate_gamma(denoise, denoise.process, batches, times[::-1])["x"]
    assert again == gamma


class Pretend:
    """eps_hat = eps of a Gaussian with variance ``var`` on the geometry, for every field."""

    def __init__(self, process: Process, var: float) -> None:
        self.process, self.var = process, var

    def __call__(self, x: State, t, mask=None, cond=None):
        out = {}
        for name, value in x.items():
            schedule = self.process.fields[name].schedule
            d = value[0].numel()
            mixture = Mixture.gaussian(
                torch.zeros(d).double(), torch.full((d,), self.var).double()
            )
            single = AnalyticDenoiser.single(Process.single(schedule, name=name), mixture)
            out |= single({name: value}, t)
        return out


def test_gamma_counts_degrees_of_freedom_per_field() -> None:
    """Padded, centred and symmetric fields: the same Gamma as without."""
    schedule, var, t = VPLinear(), 0.3, 0.4
    process = Process(
        {"x": Field(schedule, CentredPoints()), "adj": Field(schedule, SymmetricEdges())}
    )
    mask = torch.arange(6)[None] < torch.randint(
        2, 7, (3000, 1), generator=torch.Generator().manual_seed(0)
    )
    white = {
        "x": torch.randn(3000, 6, 3, generator=torch.Generator().manual_seed(1)).double(),
        "adj": torch.randn(3000, 6, 6, generator=torch.Generator().manual_seed(2)).double(),
    }
    data = {name: math.sqrt(var) * v for name, v in process.noise(white, mask).items()}
    gammas = estimate_gamma(Pretend(process, var), process, [Batch(data, mask)], [t])
    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
    exact = sigma**2 / (alpha**2 * var + sigma**2)
    for name, gamma in gammas.items():
        assert gamma(t) == pytest.approx(exact, rel=0.03), name


def test_gamma_is_linear_between_its_times() -> None:
    gamma = Gamma((0.2, 0.4), (0.5, 0.9))
    assert gamma(0.3) == pytest.approx(0.7)
    assert gamma(0.0) == 0.5
    assert gamma(1.0) == 0.9


def test_variance_of_x0_is_cut() -> None:
    gamma = Gamma((0.0, 1.0), (0.5, 1.2))
    assert gamma.x0_variance(0.0, 1.0, 1.0) == pytest.approx(0.5)
    assert gamma.x0_variance(0.0, 0.1, 1.0, cap=1.0) == 1.0
    assert gamma.x0_variance(1.0, 0.1, 1.0) == 0.0  # Gamma > 1: a bad estimate
    assert gamma.x0_variance(0.0, 0.0, 1.0, cap=2.0) == 2.0


def test_tables_survive_a_file(tmp_path: Path) -> None:
    tables = {"x": Gamma((0.1, 1 / 3), (0.1, 2 / 3)), "h": Gamma((0.5,), (0.9,))}
    path = tmp_path / "gamma.json"
    save_gamma(path, tables)
    assert load_gamma(path) == tables
    for text in ("{", "[1]", json.dumps({"x": {"times": [1]}})):
        path.write_text(text)
        with pytest.raises(ValueError, match="save_gamma"):
            load_gamma(path)


@pytest.mark.parametrize(
    ("times", "values"),
    [((), ()), ((0.1,), (0.1, 0.2)), ((0.2, 0.1), (0.1, 0.2)), ((0.1,), (math.nan,))],
)
def test_impossible_tables_are_refused(times, values) -> None:
    with pytest.raises(ValueError, match="Gamma"):
        Gamma(times, values)


def test_gamma_needs_data() -> None:
    process = Process.single(VPLinear())
    with pytest.raises(ValueError, match="needs data"):
        estimate_gamma(Pretend(process, 1.0), process, [], [0.5])


# -- heads ------------------------------------------------------------------------------------

MIXTURE = Mixture(
    torch.tensor([0.4, 0.6]).double(),
    torch.tensor([[-0.7, 0.2], [0.6, -0.3]]).double(),
    torch.tensor([[0.05, 0.1], [0.1, 0.05]]).double(),
)
PROCESS = Process.single(VPLinear(t_min=0.05))


class ExactBackbone(nn.Module):
    """The exact noise of the mixture; knows its time from the code, log-SNR."""

    def forward(self, inputs: State, code: Tensor, mask, cond) -> State:
        t = PROCESS.lead.t_from_log_snr(code.double())
        alpha, sigma = (f(t)[:, None] for f in (PROCESS.lead.alpha, PROCESS.lead.sigma))
        return {"x": MIXTURE.eps_mean(inputs["x"].double(), alpha, sigma).to(inputs["x"])}


class PointHead(nn.Module):
    """A small MLP on the inputs, the outputs and the time code."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(5, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)
        )

    def forward(self, inputs: State, outputs: State, code: Tensor, mask, cond) -> State:
        parts = [inputs["x"], outputs["x"], code[:, None] / 4]
        return {"x": self.net(torch.cat(parts, 1))}


def trained(kind: str) -> VarianceHead:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = PointHead()
    model = VarianceHead(Denoiser(ExactBackbone(), PROCESS), head, kind, cap=10.0)
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    for _ in range(300):
        x0 = {"x": MIXTURE.sample(512, generator).float()}
        noise = {"x": torch.randn(512, 2, generator=generator)}
        t = 0.15 + 0.1 * torch.rand(512, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        model.loss(x0, noise, t).mean().backward()
        optimizer.step()
        decay.step()
    return model.eval()


@pytest.mark.parametrize(("kind", "share"), [("sn", 0.75), ("npr", 0.35)])
def test_a_trained_head_approaches_the_exact_variance(kind: str, share: float) -> None:
    """'sn' has to learn eps_hat^2 as well, and is the noisier of the two."""
    model = trained(kind)
    generator = torch.Generator().manual_seed(2)
    for t in (0.17, 0.2, 0.23):
        alpha, sigma = float(PROCESS.lead.alpha(t)), float(PROCESS.lead.sigma(t))
        x = alpha * MIXTURE.sample(2000, generator) + sigma * torch.randn(
            2000, 2, generator=generator, dtype=torch.float64
        )
        with torch.no_grad():
            got = model({"x": x.float()}, t)["x"].form("var").double()
        exact = MIXTURE.x0_variance(x, alpha, sigma)
        error, spread = ((v - exact).abs().mean() for v in (got, exact.mean()))
        assert error < share * spread  # against the best constant
        assert float(got.mean() / exact.mean()) == pytest.approx(1.0, abs=0.15)


class ConstantHead(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, inputs: State, outputs: State, code: Tensor, mask, cond) -> State:
        return {name: self.value.expand_as(v) for name, v in inputs.items()}


@pytest.mark.parametrize("kind", ["sn", "npr"])
def test_the_variance_is_the_papers_and_clipped(kind: str) -> None:
    t, x = 0.5, torch.tensor([[0.3, -0.8], [1.5, 0.1]])
    alpha, sigma = float(PROCESS.lead.alpha(t)), float(PROCESS.lead.sigma(t))
    denoiser = Denoiser(ExactBackbone(), PROCESS)
    model = VarianceHead(denoiser, ConstantHead(0.1), kind, cap=1.0)
    prediction = model({"x": x}, t)["x"]
    h = 0.1 - prediction.eps.square() if kind == "sn" else torch.full_like(x, 0.1)
    want = ((sigma / alpha) ** 2 * h).clamp(0.0, 1.0)
    assert torch.allclose(prediction.form("var"), want)
    plain = denoiser({"x": x}, t)["x"]
    assert torch.equal(prediction.eps, plain.eps)


def test_only_the_head_trains() -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, inputs: State, code, mask, cond) -> State:
            return {"x": self.layer(inputs["x"])}

    model = VarianceHead(Denoiser(Linear(), PROCESS), ConstantHead(0.1)).train()
    assert not model.denoiser.training
    assert model.head.training
    loss = model.loss({"x": torch.ones(3, 2)}, {"x": torch.ones(3, 2)}, torch.full((3,), 0.5))
    assert loss.shape == (3,)
    loss.sum().backward()
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    assert trained == ["head.value"]


def test_padding_and_diagonals_cost_nothing() -> None:
    """The loss per degree of freedom is that of the real entries alone."""
    process = Process.single(VPLinear(), SymmetricEdges())

    class Zero(nn.Module):
        def forward(self, inputs: State, code, mask, cond) -> State:
            return {"x": 0.0 * inputs["x"]}

    model = VarianceHead(Denoiser(Zero(), process), ConstantHead(3.0), "sn")
    mask = torch.tensor([[True, True, True, False]])
    geometry = process.fields["x"].geometry
    noise = geometry.noise(torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(0)), mask)
    got = model.loss({"x": 0.0 * noise}, {"x": noise}, torch.tensor([0.5]), mask)
    edges = noise[0][[0, 0, 1], [1, 2, 2]]
    assert torch.allclose(got, ((3.0 - edges.square()) ** 2).mean()[None])


def test_a_head_samples() -> None:
    """The wrapper follows the protocol of solvers."""
    model = VarianceHead(Denoiser(ExactBackbone(), PROCESS), ConstantHead(0.5))
    noise = torch.randn(5, 4, 2, generator=torch.Generator().manual_seed(0))
    out = DDPM("head").solve(
        PROCESS, model, {"x": noise[0]}, [1.0, 0.5, 0.1, 0.05], lambda name, j: noise[1 + j]
    )
    assert bool(torch.isfinite(out["x"]).all())
    with pytest.raises(ValueError, match="variance head"):
        DDPM("head").solve(
            PROCESS, model.denoiser, {"x": noise[0]}, [1.0, 0.5], lambda name, j: noise[1 + j]
        )


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="sn, npr"):
        VarianceHead(Denoiser(ExactBackbone(), PROCESS), ConstantHead(0.1), "mean")
