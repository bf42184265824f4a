"""Published sampling and training of GDSS on converted checkpoints, and the core's solvers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from molediff.graphs import convert
from molediff.graphs.models import graph_denoiser, graph_process, parameterisation, prior_std
from shared import solvers
from shared.configuration import build
from shared.denoisers import Denoiser
from shared.predictions import Noise, Prediction, Score
from shared.schedules import SubVP, VarianceExploding, VPLinear
from shared.solvers.langevin import forward_step

FILES = {"QM9": "gdss/gdss_qm9.pth", "community_small": "gdss/gdss_community_small.pth"}
FIELDS = {"nodes": "x", "edges": "adj"}


class Finished(Exception):
    """Raised inside a run to take the state at a step."""


def model(name: str, data_folder) -> Denoiser:
    return convert.build_denoiser(convert.read(data_folder(FILES[name])), False).double()


def stub(x: dict, process) -> dict:
    """Predictions for steps whose result is thrown away."""
    return {
        key: Prediction(value, 1.0, float(process.fields[key].schedule.sigma(0.5)), eps=value)
        for key, value in x.items()
    }


def run_from(
    solver, denoiser: Denoiser, tensors: dict, prefix: str, draw: Callable, times: list, last: int
) -> dict:
    """The state after step ``last`` of a run into which the published start is put at step i0;
    the steps before do nothing that lasts."""
    first, mask = int(prefix[1:]), tensors["in.flags"] > 0
    start = {key: tensors[f"{prefix}.init.{old}"] for key, old in FIELDS.items()}

    def denoise(x: dict, t: float) -> dict:
        return denoiser(x, t, mask) if t <= times[first] else stub(x, denoiser.process)

    def after(x: dict, time: float | None) -> dict:
        if time == times[first]:
            return start
        if time == times[last]:
            raise Finished(x)
        return x

    def project(key: str, x: Tensor) -> Tensor:
        return denoiser.process.fields[key].geometry.project(x, mask)

    with torch.no_grad():
        try:
            return solver.solve(denoiser.process, denoise, start, times, draw, project, after)
        except Finished as end:
            return end.args[0]


def noises(denoiser: Denoiser, tensors: dict, prefix: str, order: Callable) -> Callable:
    """draw(name, j) -> the published draw, or zeros for a step that is not looked at."""
    mask = tensors["in.flags"] > 0

    def draw(key: str, j: int) -> Tensor:
        number = order(j)
        name = f"{prefix}.raw{0 if number is None else number + (key == 'edges'):02d}"
        white = tensors[name]
        if number is None:
            like = tensors[f"{prefix}.init.{FIELDS[key]}"]
            white = torch.ones_like(like)
        return denoiser.process.fields[key].geometry.noise(white, mask)

    return draw


def worst(state: dict, tensors: dict, prefix: str, suffix: str) -> float:
    return max(
        float((state[key] - tensors[f"{prefix}.out.{old}{suffix}"]).abs().max())
        for key, old in FIELDS.items()
    )


@pytest.mark.golden
@pytest.mark.parametrize(
    ("item", "name", "prefix"),
    [
        ("04_gdss_pc_QM9", "QM9", "i500"),
        ("04_gdss_pc_community_small", "community_small", "i0"),
    ],
)
def test_published_predictor_corrector(golden, data_folder, item, name, prefix) -> None:
    tensors, about = golden(item)
    denoiser = model(name, data_folder)
    settings = {"n_steps": 1, **about["sampler"]}
    solver = build(convert.solver_config(settings))
    steps, first = about["N"], int(prefix[1:])
    times = solvers.ScoreSDETimes(eps=1e-4)(denoiser.process.lead, steps)
    offset = steps - 1  # draws of the predictor come first, without one for the last step

    def order(j: int) -> int | None:
        step, corrects = (j, 0) if j < offset else (j - offset, 1)
        row = step - first
        return 2 + 4 * row + (0 if corrects else 2) if 0 <= row < 2 else None

    draw = noises(denoiser, tensors, prefix, order)
    state = run_from(solver, denoiser, tensors, prefix, draw, times, first + 2)
    assert worst(state, tensors, prefix, "") < 1e-9


@pytest.mark.golden
def test_published_whole_run(golden, data_folder) -> None:
    """20 steps to the end, which is the mean of the last transition."""
    tensors, about = golden("04_gdss_pc_QM9_N20_full")
    denoiser = model("QM9", data_folder)
    solver = build(convert.solver_config({"n_steps": 1, **about["sampler"]}))
    times = solvers.ScoreSDETimes(eps=1e-4)(denoiser.process.lead, 20)

    def order(j: int) -> int:
        return 2 + 4 * j + 2 if j < 19 else 2 + 4 * (j - 19)

    draw = noises(denoiser, tensors, "i0", order)
    state = run_from(solver, denoiser, tensors, "i0", draw, times, -1)
    assert worst(state, tensors, "i0", "_mean") < 1e-8


@pytest.mark.golden
@pytest.mark.parametrize(
    ("item", "name", "prefix"),
    [
        ("04_gdss_s4_QM9", "QM9", "i0"),
        ("04_gdss_s4_community_small", "community_small", "i700"),
    ],
)
def test_published_splitting(golden, data_folder, item, name, prefix) -> None:
    tensors, about = golden(item)
    denoiser = model(name, data_folder)
    solver = build(convert.solver_config({"n_steps": 1, **about["sampler"]}))
    times = solvers.ScoreSDETimes(eps=1e-4)(denoiser.process.lead, about["N"])
    first = int(prefix[1:])

    def order(j: int) -> int | None:
        row, kind = j // 3 - first, j % 3
        return 2 + 6 * row + 2 * kind if 0 <= row < 2 else None

    draw = noises(denoiser, tensors, prefix, order)
    state = run_from(solver, denoiser, tensors, prefix, draw, times, first + 2)
    assert worst(state, tensors, prefix, "") < 1e-9


@pytest.mark.golden
def test_published_loss(golden, data_folder) -> None:
    """0.5 sum((score std + z)^2) counts every edge twice and is not divided by its number."""
    tensors, _ = golden("04_gdss_loss_community_small")
    denoiser = model("community_small", data_folder)
    data = {"nodes": tensors["in.x"], "edges": tensors["in.adj"]}
    mask = tensors["in.adj"].abs().sum(-1) > 0
    white = {"nodes": tensors["in.raw_noise_x"], "edges": tensors["in.raw_noise_adj"]}
    noise = denoiser.process.noise(white, mask)
    times = tensors["in.t"]
    x = denoiser.process.perturb(data, times, noise)
    with torch.no_grad():
        out = denoiser.outputs(x, times, mask)
        for key, factor, wanted in (("nodes", 0.5, "loss_x"), ("edges", 1.0, "loss_adj")):
            loss = denoiser.field_loss(key, out[key], x[key], data[key], noise[key], times, mask)
            size = denoiser.process.fields[key].geometry.dim(x[key], mask)
            found = float((factor * size * loss).mean())
            assert found == pytest.approx(float(tensors[f"out.{wanted}"]), rel=1e-9)


@pytest.mark.golden
def test_published_discretisation(golden) -> None:
    tensors, about = golden("04_gdss_sde_tables")
    n = 1000
    for name, spec in about["specs"].items():
        kind = VPLinear if spec["type"] == "VP" else VarianceExploding
        schedule = kind(spec["beta_min"], spec["beta_max"])
        for row, t in enumerate(tensors["t"].tolist()):
            x = tensors["x"][row]
            assert float(schedule.sigma(t)) == pytest.approx(
                float(tensors[f"{name}.marginal_std"][row]), rel=1e-10
            )
            assert float(schedule.diffusion_squared(t)) ** 0.5 == pytest.approx(
                float(tensors[f"{name}.diffusion"][row]), rel=1e-10
            )
            level = int(t * (n - 1))
            step = forward_step(schedule, [t] * (n + 1), n - 1 - level, score_sde=True)
            drift = tensors[f"{name}.disc_f"][row]
            assert step.variance**0.5 == pytest.approx(float(tensors[f"{name}.disc_G"][row]))
            assert torch.allclose((step.alpha - 1.0) * x, drift, rtol=1e-9, atol=1e-12)


# -- the process ------------------------------------------------------------------------------


class Data:
    features = 4
    sizes = {5: 1, 7: 1}  # noqa: RUF012
    second_moments = {"nodes": 0.25, "edges": 0.1}  # noqa: RUF012


def test_meaning_of_the_output() -> None:
    assert isinstance(parameterisation(VarianceExploding()), Score)
    assert isinstance(parameterisation(VPLinear()), Noise)
    assert isinstance(parameterisation(SubVP()), Noise)


def test_start_is_published_or_matches_the_data() -> None:
    schedule = VPLinear(0.1, 1.0, t_min=1e-5)
    new = graph_denoiser(Data(), schedule, hidden=8, attention=8)
    old = graph_denoiser(Data(), schedule, hidden=8, attention=8, prior=1.0)
    assert old.process.fields["edges"].prior_std == 1.0
    wanted = (0.759572**2 * 0.1 + 0.650423**2) ** 0.5
    assert new.process.fields["edges"].prior_std == pytest.approx(wanted, rel=1e-5)
    assert new.process.fields["nodes"].prior_std == prior_std(schedule, 0.25)
    assert graph_process(schedule, schedule).prior(
        {"nodes": torch.ones(1, 1, 1), "edges": torch.ones(1, 1, 1)}
    )["nodes"].item() == pytest.approx(0.650423, rel=1e-5)


def test_fields_may_have_different_kinds_of_sde() -> None:
    nodes, edges = VPLinear(0.1, 1.0, t_min=1e-5), VarianceExploding(0.2, 1.0, t_min=1e-5)
    denoiser = graph_denoiser(Data(), nodes, edges, 2, 2, 8, 8).double()
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    gen = torch.Generator().manual_seed(0)
    state = {
        "nodes": torch.randn(2, 4, 4, generator=gen).double(),
        "edges": torch.randn(2, 4, 4, generator=gen).double(),
    }
    x = denoiser.process.noise(state, mask)
    predictions = denoiser(x, 0.5, mask)
    raw = denoiser.backbone(x, None, mask)
    assert torch.allclose(predictions["edges"].score, raw["edges"], atol=1e-12)
    std = float(nodes.sigma(0.5))
    assert torch.allclose(predictions["nodes"].score, -raw["nodes"] / std, atol=1e-12)
    with pytest.raises(ValueError, match="different times"):
        graph_denoiser(Data(), nodes, VarianceExploding(0.2, 1.0), 2, 2, 8, 8)


@pytest.mark.parametrize(
    "solver",
    [
        solvers.DDIM(),
        solvers.DPMSolverMultistep(points=2),
        solvers.UniPC(),
        solvers.Heun(),
        solvers.DDPM(),
        solvers.SymmetricSplitting(),
        solvers.PredictorCorrector(),
    ],
    ids=lambda s: type(s).__name__,
)
def test_solvers_of_the_core_keep_the_geometry(solver) -> None:
    nodes, edges = VPLinear(0.1, 1.0, t_min=1e-5), VarianceExploding(0.2, 1.0, t_min=1e-5)
    torch.manual_seed(0)
    denoiser = graph_denoiser(Data(), nodes, edges, 2, 2, 8, 8)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False], [True] + [False] * 4])
    process, gen = denoiser.process, torch.Generator().manual_seed(1)
    shapes = {"nodes": (3, 5, 4), "edges": (3, 5, 5)}

    def draw(name: str, j: int) -> Tensor:
        white = torch.randn(shapes[name], generator=gen)
        return process.fields[name].geometry.noise(white, mask)

    times = solvers.LogSNRTimes(t_end=0.05)(process.lead, 4)
    start = process.prior({name: draw(name, 0) for name in shapes})
    with torch.no_grad():
        end = solver.solve(
            process,
            lambda x, t: denoiser(x, t, mask),
            start,
            times,
            draw,
            lambda name, x: process.fields[name].geometry.project(x, mask),
        )
    for name, value in end.items():
        assert bool(torch.isfinite(value).all())
        assert torch.equal(process.fields[name].geometry.project(value, mask), value)
