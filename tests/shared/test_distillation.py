"""Distillation: the student's steps are the teacher's, in fewer calls."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shared.analytic import AnalyticDenoiser
from shared.batches import Batches
from shared.denoisers import Head
from shared.distillation import (
    _implied,
    consistency_loss,
    ddim,
    distilled,
    halvings,
    progressive_loss,
)
from shared.geometry import CentredPoints
from shared.predictions import Prediction, Velocity
from shared.process import Field, Process
from shared.sampling import Memory, sample
from shared.schedules import VPCosine, VPLinear
from shared.solvers import DDIM, Consistency, PowerTimes
from shared.toys import Toys, plane_denoiser, ring


@pytest.fixture(scope="module")
def toys():
    domain = Toys("ring", 3, 0.2, 2048)
    schedule = VPCosine()
    teacher = AnalyticDenoiser.single(Process.single(schedule), ring(3, 0.2))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        student = plane_denoiser(domain, schedule, width=32, depth=2, head=Head(Velocity()))
    return domain, teacher, student, Batches(domain, student.process, domain.datasets()[0], 128, 0)


def points(denoise, domain, process, solver, steps, seed=0):
    sink = Memory()
    sample(denoise, process, domain, 64, solver, steps, PowerTimes(), seed, sink=sink)
    return torch.tensor(np.stack([sink.items[i] for i in range(64)]))


def test_rounds_halve_the_steps():
    assert list(halvings(32, 4)) == [32, 16, 8]
    assert list(halvings(18, 2, "consistency")) == [18]
    for first in (4, 12, 31, 2):
        with pytest.raises(ValueError, match="power of two"):
            list(halvings(first, 4))


def test_the_implied_estimate_reproduces_the_two_steps():
    process = Process({"a": Field(VPLinear()), "b": Field(VPLinear(0.2, 15.0), CentredPoints())})
    own = torch.Generator().manual_seed(0)
    shapes = {"a": (5, 3), "b": (5, 4, 3)}
    x, end = (
        process.noise(
            {n: torch.randn(s, generator=own, dtype=torch.float64) for n, s in shapes.items()}
        )
        for _ in range(2)
    )
    t, s = torch.tensor([0.9, 0.5, 0.7, 0.99, 0.1]), torch.tensor([0.8, 0.1, 0.2, 0.01, 0.05])
    t, s = t.double(), s.double()
    x0 = _implied(process, x, end, t, s)

    def oracle(y, time, mask, cond):
        out = {}
        for n, v in y.items():
            schedule = process.fields[n].schedule
            shape = (-1, *(1,) * (v.dim() - 1))
            scales = schedule.alpha(time).reshape(shape), schedule.sigma(time).reshape(shape)
            out[n] = Prediction(v, *scales, x0=x0[n])
        return out

    again = ddim(process, oracle, x, t, s, None, None)
    for name, value in again.items():
        torch.testing.assert_close(value, end[name], rtol=1e-9, atol=1e-9)


def test_a_student_that_is_the_teacher_on_a_fine_grid_has_next_to_no_loss(toys):
    _, teacher, _, batches = toys
    times = [k * 1e-3 for k in range(900, 99, -1)]
    fine = progressive_loss(teacher, teacher, times)(batches[0], 0).mean()
    coarse = progressive_loss(teacher, teacher, [0.9, 0.5, 0.1])(batches[0], 0).mean()
    assert float(fine) < 1e-3 * float(coarse)
    with pytest.raises(ValueError, match="even number"):
        progressive_loss(teacher, teacher, [0.9, 0.5])


def test_two_distilled_steps_follow_four_of_the_teacher(toys):
    domain, teacher, student, batches = toys
    new = distilled(student, batches, PowerTimes(), 2, 4, 250, lr=1e-2, teacher=teacher)
    process = student.process
    truth = points(teacher, domain, process, DDIM(), 4)
    error = (points(new, domain, process, DDIM(), 2) - truth).square().mean()
    plain = (points(teacher, domain, process, DDIM(), 2) - truth).square().mean()
    assert float(error) < 0.3 * float(plain)
    assert all(p.requires_grad for p in new.parameters())


@pytest.mark.parametrize("method", ["consistency", "consistency_training"])
def test_one_jump_of_a_consistency_model_beats_one_of_the_mean(toys, method):
    domain, teacher, student, batches = toys
    new = distilled(student, batches, PowerTimes(), 1, 8, 120, 1e-2, method, teacher)
    process = student.process
    spread = points(new, domain, process, Consistency(), 1).norm(dim=1).mean()
    mean = points(teacher, domain, process, Consistency(), 1).norm(dim=1).mean()
    assert float(mean) < 0.2  # E x_0
    assert float(spread) > 0.5  # on the ring of radius 1


def test_consistency_at_the_last_time_aims_at_the_state(toys):
    _, teacher, _, batches = toys
    one, two = (
        consistency_loss(teacher, ends)(batches[0], 0) for ends in ([0.02, 0.01], [0.9, 0.01])
    )
    assert float(one.mean()) < 0.1 < float(two.mean())


def test_mistakes_are_named(toys):
    _, _, student, batches = toys
    with pytest.raises(ValueError, match="method=fast"):
        distilled(student, batches, PowerTimes(), 2, 8, 1, method="fast")
