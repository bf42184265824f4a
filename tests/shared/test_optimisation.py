"""Clipping and averages against published outputs; learning-rate shapes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from shared.optimisation import (
    ConstantClipping,
    LearningRate,
    MovingAverage,
    OptimizerSettings,
    QueueClipping,
    clipping,
)


def parameter(value):
    module = nn.Module()
    module.p = nn.Parameter(value.clone())
    return module


def test_queue_clipping_follows_the_published_run(golden):
    data, _ = golden("11_edm_utils")
    clip = QueueClipping()
    parts = torch.tensor([0.6, 0.0]).double(), torch.tensor([0.8]).double()
    parts = [part / torch.cat(parts).norm() for part in parts]
    for i, norm in enumerate(data["clip.grad_norm"]):
        gradient = [part * norm for part in parts]
        torch.testing.assert_close(clip.bound(norm), data["clip.max_norm"][i], rtol=1e-9, atol=0)
        torch.testing.assert_close(clip(gradient), norm, rtol=1e-12, atol=0)
        after = torch.linalg.vector_norm(torch.cat(gradient))
        torch.testing.assert_close(after, data["clip.norm_after"][i], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(clip.queue, data["clip.queue_final"], rtol=1e-9, atol=0)


def test_queue_clipping_goes_on_from_its_state_and_forgets_infinities():
    first, second = (QueueClipping(length=3, start=2.0) for _ in range(2))
    for value in (1.0, math.inf, 3.0):
        first.observe(torch.tensor(value))
    assert first.queue.tolist() == [3.0, 1.0, 1.0]
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.bound(torch.tensor(0.0)), second.bound(torch.tensor(0.0)))


@pytest.mark.parametrize(("most", "expected"), [(1.0, 1.0), (10.0, 5.0), (math.inf, 5.0)])
def test_constant_clipping(most, expected):
    gradients = [torch.tensor([3.0]).double(), torch.tensor([4.0]).double()]
    assert float(ConstantClipping(most)(gradients)) == 5.0
    assert float(torch.cat(gradients).norm()) == pytest.approx(expected, rel=1e-6)


def test_clipping_rules():
    assert isinstance(clipping("queue"), QueueClipping)
    assert clipping(None).most == math.inf
    assert clipping(0.5).most == 0.5
    with pytest.raises(ValueError, match="trainer.clip: 'quue'"):
        clipping("quue")
    with pytest.raises(ValueError, match="must be positive"):
        clipping(0.0)


def test_average_follows_the_published_edm_run(golden):
    data, _ = golden("11_edm_utils")
    params, shadows = data["ema.param"], data["ema.shadow"]
    decay = float(data["ema.beta"])
    start = (shadows[0] - (1 - decay) * params[0]) / decay
    module = parameter(start)
    average = MovingAverage(module, decay)
    for value, shadow in zip(params, shadows, strict=True):
        module.p.data.copy_(value)
        average.update()
        torch.testing.assert_close(average.shadow["p"], shadow, rtol=1e-9, atol=1e-12)


def test_average_with_warmup_follows_the_published_gdss_run(golden):
    data, _ = golden("11_gdss_ema")
    module = parameter(data["param"][0])
    average = MovingAverage(module, 0.999, warmup=True)
    for value, shadow in zip(data["param"][1:], data["shadow"], strict=True):
        module.p.data.copy_(value)
        average.update()
        torch.testing.assert_close(average.shadow["p"], shadow, rtol=1e-5, atol=1e-6)


def test_average_is_applied_for_a_while_or_for_good():
    module = parameter(torch.tensor([1.0]))
    module.q = nn.Parameter(torch.tensor([7.0]), requires_grad=False)
    average = MovingAverage(module, 0.5)
    module.p.data.fill_(3.0)
    average.update()
    assert list(average.shadow) == ["p"]
    with average.applied():
        assert module.p.tolist() == [2.0]
    assert module.p.tolist() == [3.0]
    with pytest.raises(KeyError), average.applied():
        raise KeyError
    assert module.p.tolist() == [3.0]
    average.install()
    assert module.p.tolist() == [2.0]
    with pytest.raises(ValueError, match="trainer.ema"):
        MovingAverage(module, 1.0)


def test_average_begins_where_the_parameters_are():
    module = torch.nn.Linear(2, 2)
    average = MovingAverage(module, 0.9)
    average.update()
    with torch.no_grad():
        module.weight.fill_(7.0)  # as when another process's parameters arrive
    average.start()
    assert average.updates == 0
    assert torch.equal(average.shadow["weight"], module.weight)


def test_learning_rate_shapes():
    flat = LearningRate(warmup=4)
    assert [flat.factor(s, 100) for s in (0, 1, 4, 99)] == [0.2, 0.4, 1.0, 1.0]
    line = LearningRate("linear", decay=0.5, floor=0.1)
    assert [line.factor(s, 100) for s in (0, 50, 75, 100)] == pytest.approx([1, 1, 0.55, 0.1])
    wave = LearningRate("cosine", warmup=10)
    assert [wave.factor(s, 110) for s in (10, 35, 60, 110)] == pytest.approx(
        [1.0, (2 + 2**0.5) / 4, 0.5, 0.0]
    )
    fall = LearningRate("exponential", warmup=4, half_life=10.0, floor=0.2)
    steps = (0, 4, 14, 24, 99)
    assert [fall.factor(s, 100) for s in steps] == pytest.approx([0.2, 1.0, 0.5, 0.25, 0.2])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: LearningRate("cosin"), "'cosin' is not one of constant, linear, cosine"),
        (lambda: LearningRate("linear", decay=0.0), "0 < decay"),
        (lambda: LearningRate("exponential"), "half_life=None"),
        (lambda: LearningRate("cosine", half_life=9.0), "shape=cosine, half_life=9"),
        (lambda: OptimizerSettings("sgdd"), "'sgdd' is not one of adam, adamw"),
        (lambda: OptimizerSettings(lr=0.0), "lr must be positive"),
    ],
)
def test_wrong_settings_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


def test_optimizer_takes_its_settings():
    module = parameter(torch.zeros(2))
    built = OptimizerSettings("adam", lr=0.1, betas=(0.5, 0.6), amsgrad=True).build(
        module.parameters()
    )
    assert type(built) is torch.optim.Adam
    assert built.defaults["betas"] == (0.5, 0.6)
    assert built.defaults["amsgrad"]
