"""Every way of guiding, with solvers of every kind, on all kinds of data: what is guided improves.

Molecules, graphs and points are Gaussians on their geometries, whose denoisers are exact; images
come from the digits model of the package.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import pytest
import torch

import shared.images  # noqa: F401 (registers its pretrained models)
from shared.geometry import CentredPoints, Euclidean, Points, SymmetricEdges
from shared.guidance import (
    ClassifierFree,
    Conditioned,
    Faithful,
    Function,
    GaussianNoise,
    Guided,
    Inpainting,
    Known,
    Measurement,
    Product,
    RePaint,
    SDEdit,
    Source,
    SquaredError,
    Steered,
    Term,
    prior_spread,
)
from shared.images.classifier import load_classifier
from shared.images.features import digits
from shared.images.guiding import by_classifier, low_density
from shared.models import load
from shared.predictions import Prediction
from shared.process import Field, Process, alpha_sigma
from shared.randomness import Draws
from shared.schedules import VarianceExploding, VPLinear
from shared.solvers import DDIM, DDPM, DPMSolverMultistep, Heun, LogSNRTimes

SOLVERS = {
    "ddim": DDIM(),
    "dpmpp_2m": DPMSolverMultistep(points=2),
    "heun": Heun(),
    "ddpm": DDPM(),
}
N, SPREAD = 6, 0.3


@dataclass(frozen=True, eq=False)
class Kind:
    """Data N(level * pattern, SPREAD^2) on the geometries, level a condition."""

    process: Process
    shapes: dict[str, tuple[int, ...]]
    mask: torch.Tensor | None = None

    @property
    def lead(self) -> str:
        return next(iter(self.shapes))

    @property
    def like(self):
        return {n: torch.zeros(N, *s, dtype=torch.float64) for n, s in self.shapes.items()}

    @cached_property
    def pattern(self):
        own = torch.Generator().manual_seed(1)
        white = {
            n: torch.randn(1, *s, generator=own).double().expand(N, *s)
            for n, s in self.shapes.items()
        }
        return self.process.noise(white, self.mask)

    def denoise(self, x, t, mask=None, cond=None):
        level = torch.zeros(N, dtype=torch.float64) if not cond else cond["level"].double()
        out = {}
        for name, v in x.items():
            repeat = len(v) // N
            mean = self.pattern[name].repeat(repeat, *(1,) * (v.dim() - 1))
            mean = mean * level.reshape(-1, *(1,) * (v.dim() - 1)) if cond else 0.0 * mean
            a, s = alpha_sigma(self.process.fields[name].schedule, t, v)
            gain = a * SPREAD**2 / (a**2 * SPREAD**2 + s**2)
            out[name] = Prediction(v, a, s, x0=mean + gain * (v - a * mean))
        return out

    def level(self, x):
        """How much of the pattern the leading field holds, [batch]."""
        geometry = self.process.fields[self.lead].geometry
        p = self.pattern[self.lead][:1].expand_as(x[self.lead])
        return geometry.inner(x[self.lead], p) / geometry.norm_squared(p)

    def sample(self, denoise, solver, cond=None, steps=12):
        draws, fields = Draws(0, range(N)), self.process.fields

        def normal(name, number):
            return draws.normal(name, number, self.like[name], fields[name].geometry, self.mask)

        start = self.process.prior({name: normal(name, 0) for name in self.shapes})
        times = LogSNRTimes()(self.process.lead, solver.intervals(steps))
        with torch.no_grad():
            return solver.solve(
                self.process,
                lambda x, t: denoise(x, t, self.mask, cond),
                start,
                times,
                lambda name, j: normal(name, j + 1),
                lambda name, x: fields[name].geometry.project(x, self.mask),
            )


MASK = torch.arange(6) < torch.tensor([6, 5] * (N // 2))[:, None]
VP, VE = VPLinear(), VarianceExploding(0.01, 5.0, t_min=VPLinear().t_min)
KINDS = {
    "molecules": Kind(
        Process({"positions": Field(VP, CentredPoints()), "atoms": Field(VP, Points())}),
        {"positions": (6, 3), "atoms": (6, 4)},
        MASK,
    ),
    "graphs": Kind(
        Process({"adjacency": Field(VP, SymmetricEdges()), "nodes": Field(VE, Points())}),
        {"adjacency": (6, 6), "nodes": (6, 3)},
        MASK,
    ),
    "points": Kind(Process({"x": Field(VP, Points())}), {"x": (16, 3)}),
    "arrays": Kind(Process({"x": Field(VP, Euclidean())}), {"x": (2, 4, 4)}),
}


def energy_at(at):
    def guide(kind, solver):
        # linear, so that the tilted density is the Gaussian moved by its weight times its variance
        weight = 0.8 / SPREAD**2
        geometry, p = kind.process.fields[kind.lead].geometry, kind.pattern[kind.lead]
        energy = Function(lambda x, t, mask, cond: -weight * geometry.inner(x[kind.lead], p))

        def gain(alpha, sigma):  # d x0_hat / d x_t, which only 'estimate' knows by itself
            slope = alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2)
            return {"estimate": 1.0, "input": slope, "frozen": alpha * slope}[at]

        term = Term(energy, at=at, schedule=gain)
        return Guided(kind.denoise, kind.process, [term]), solver, None, 1.0

    return guide


def classifier_free(kind, solver):
    cond = {"level": torch.full((N,), 0.5, dtype=torch.float64)}
    null = {"level": torch.zeros(1, dtype=torch.float64)}
    return ClassifierFree(kind.denoise, kind.process, null, 2.0), solver, cond, 1.0


def product(kind, solver):
    expert = Conditioned(kind.denoise, {"level": torch.ones(1, dtype=torch.float64)})
    return Product([expert], [1.0], kind.denoise), solver, None, 1.0


def measurement(kind, solver):
    observed = torch.ones(1, dtype=torch.float64)
    size = kind.process.fields[kind.lead].geometry.norm_squared(kind.pattern[kind.lead])[0]
    noise = GaussianNoise(0.05, prior_spread(SPREAD / float(size) ** 0.5))
    energy = Measurement(kind.process, lambda x: kind.level(x)[:, None], observed, noise)
    return (
        Guided(kind.denoise, kind.process, [Term(energy, at="estimate")]),
        solver,
        None,
        1.0,
    )


def known(kind):
    name = kind.lead
    nodes = kind.shapes[name][0]
    geometry = kind.process.fields[name].geometry
    if isinstance(geometry, Euclidean):
        keep = torch.zeros(1, *kind.shapes[name], dtype=torch.bool)
        keep[:, : max(1, nodes // 2)] = True
    else:
        keep = (torch.arange(nodes) < 4)[None]
    return Known({name: kind.pattern[name]}, {name: keep})


def repaint(kind, solver):
    return kind.denoise, RePaint(solver, known(kind), 1, 2), None, None


def inpainting(kind, solver):
    energy = Inpainting(kind.process, known(kind), 0.3, prior_spread(SPREAD))
    return Guided(kind.denoise, kind.process, [Term(energy, at="estimate")]), solver, None, None


def sdedit(kind, solver):
    return kind.denoise, SDEdit(solver, kind.pattern, 0.2), None, 1.0


def faithful(kind, solver):
    name = kind.lead
    source = Source(kind.process, name, "source")
    energy = Faithful(lambda x, t: x, source)
    told = {"source": kind.pattern[name], "level": torch.zeros(N, dtype=torch.float64)}
    return (
        Guided(kind.denoise, kind.process, [Term(energy, 5.0, at="estimate")]),
        solver,
        told,
        1.0,
    )


def steered(kind, solver):
    def reward(x):
        return -200.0 * (kind.level(x) - 1.0).square()

    if solver.stochastic:
        return kind.denoise, Steered(solver, reward, 4), None, 1.0
    return kind.denoise, Steered.best_of(solver, reward, 4), None, 1.0


METHODS = {
    "input": energy_at("input"),
    "estimate": energy_at("estimate"),
    "frozen": energy_at("frozen"),
    "classifier_free": classifier_free,
    "product": product,
    "measurement": measurement,
    "repaint": repaint,
    "inpainting": inpainting,
    "sdedit": sdedit,
    "faithful": faithful,
    "steered": steered,
}


@cache
def plain(kind, solver):
    return KINDS[kind].sample(KINDS[kind].denoise, SOLVERS[solver])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_gaussians_on_geometries(kind, method):
    one = KINDS[kind]
    for name, solver in SOLVERS.items():
        denoise, way, cond, target = METHODS[method](one, solver)
        steps = 48 if method == "steered" else 24 if method == "repaint" else 12
        found = one.sample(denoise, way, cond, steps)
        before = plain(kind, name)
        assert all(torch.isfinite(v).all() for v in found.values())
        if target is None:  # the given part
            given = known(one)
            gaps = [
                torch.stack(
                    [v.square().sum() for v in given.missing(one.process, x, one.pattern).values()]
                ).sum()
                for x in (before, found)
            ]
        else:
            gaps = [(one.level(x) - target).square().mean() for x in (before, found)]
        # the best of four draws of a narrow distribution comes only so near
        share = 0.99 if method == "steered" else 0.95
        assert float(gaps[1]) < share * float(gaps[0]), (name, gaps)


# -- images -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return load("digits")


def generate(model, solver, denoise=None, **request):
    grid, calls = LogSNRTimes(), 20 if isinstance(solver, Heun) else 10
    items = model.sample(
        12, solver=solver, grid=grid, steps=calls, seed=0, denoise=denoise, **request
    )
    return np.stack(items)


def share_of(images, label):
    _, logits = digits()(images)
    return float((logits.argmax(1) == label).mean())


@pytest.mark.parametrize("solver", SOLVERS)
def test_images(model, solver):
    solver, process = SOLVERS[solver], model.denoiser.process
    free = generate(model, solver, label="any")
    guided = by_classifier(model.denoiser, process, "digits_classifier", 3.0, label=4)
    assert share_of(generate(model, solver, guided, label="any"), 4) > share_of(free, 4) + 0.4

    null = model.domain.null_condition()
    strong = ClassifierFree(model.denoiser, process, null, 3.0)
    one, two = (generate(model, solver, d, label=8) for d in (None, strong))
    sure = [-np.log(softmax(digits()(x)[1])[:, 8]).mean() for x in (one, two)]
    assert sure[1] < sure[0]

    bright = SquaredError(lambda x, t, mask, cond: x["x"].mean((1, 2, 3)), 0.0, weight=400.0)
    lit = Guided(model.denoiser, process, [Term(bright, at="estimate")])
    values = [x.mean() for x in (free, generate(model, solver, lit, label="any"))]
    assert abs(values[1] - 127.5) < 0.6 * abs(values[0] - 127.5)

    rare = low_density(model.denoiser, process, model.domain, "digits_classifier", 40.0, 1.0, 256)
    similar = [typicality(model, generate(model, solver, d, label=3)) for d in (None, rare)]
    assert similar[1] < similar[0]


def softmax(logits):
    p = np.exp(logits - logits.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def typicality(model, images):
    """Mean cosine similarity to the mean features of the threes."""
    features = load_classifier("digits_classifier", model.denoiser.process)
    pixels, labels = model.domain.training(512)
    with torch.no_grad():
        centre = features.features(pixels[labels == 3], 1e-3).mean((2, 3)).mean(0)
        own = features.features(model.domain.encode(images), 1e-3).mean((2, 3))
    return float(torch.nn.functional.cosine_similarity(own, centre[None], dim=1).mean())
