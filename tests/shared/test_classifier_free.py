from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from shared.analytic import AnalyticDenoiser, Mixture
from shared.configuration import build
from shared.geometry import Points
from shared.guidance import ClassifierFree
from shared.predictions import Condition, Prediction
from shared.process import Process, State
from shared.schedules import RectifiedFlow, VPLinear

F64 = torch.float64
MEANS = torch.tensor([[-1.0, 0.5], [1.5, 0.0]], dtype=F64)
VAR = torch.tensor([[0.2, 0.3], [0.4, 0.1]], dtype=F64)
WEIGHT = torch.tensor([0.3, 0.7], dtype=F64)
NULL = {"label": torch.tensor([2])}


class TwoClasses:
    """The exact conditional denoiser of a two-class mixture; label 2 = no condition."""

    def __init__(self, process: Process) -> None:
        whole = Mixture(WEIGHT, MEANS, VAR)
        parts = [Mixture.gaussian(MEANS[k], VAR[k]) for k in range(2)]
        self.models = [AnalyticDenoiser.single(process, m) for m in (*parts, whole)]
        self.calls: list[int] = []

    def __call__(
        self,
        x: State,
        t: float | Tensor,
        mask: Tensor | None = None,
        cond: Condition | None = None,
    ) -> dict[str, Prediction]:
        assert cond is not None
        self.calls.append(len(x["x"]))
        outs = [model(x, t)["x"] for model in self.models]
        label = cond["label"][:, None]
        x0, eps = (
            sum((label == k) * out.form(kind) for k, out in enumerate(outs))
            for kind in ("x0", "eps")
        )
        return {"x": Prediction(x["x"], outs[0].alpha, outs[0].sigma, x0=x0, eps=eps)}


def setup(**options: object) -> tuple[ClassifierFree, TwoClasses, State, dict[str, Tensor]]:
    process = Process.single(VPLinear())
    model = TwoClasses(process)
    x = {"x": torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=F64)}
    return (
        ClassifierFree(model, process, NULL, **options),
        model,
        x,
        {"label": torch.tensor([0, 1, 1, 0])},
    )


@pytest.mark.parametrize("per_sample", [False, True])
def test_score_combination_of_a_two_class_mixture(per_sample: bool) -> None:
    guided, model, x, cond = setup(scale=3.0)
    t = torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=F64) if per_sample else 0.4
    got = guided(x, t, None, cond)["x"]
    schedule = VPLinear()
    at = torch.as_tensor(t, dtype=F64).expand(4)
    points = x["x"].clone().requires_grad_()
    alpha, sigma = schedule.alpha(at)[:, None], schedule.sigma(at)[:, None]

    def score(log_prob: Tensor) -> Tensor:
        return torch.autograd.grad(log_prob.sum(), points, retain_graph=True)[0]

    classes = torch.stack(
        [
            score(Mixture.gaussian(MEANS[k], VAR[k]).log_prob(points, alpha, sigma))
            for k in range(2)
        ]
    )
    conditional = classes[cond["label"], torch.arange(4)]
    free = score(Mixture(WEIGHT, MEANS, VAR).log_prob(points, alpha, sigma))
    torch.testing.assert_close(
        got.score, free + 3.0 * (conditional - free), atol=1e-11, rtol=1e-10
    )
    torch.testing.assert_close(alpha * got.x0 + sigma * got.eps, x["x"])
    assert model.calls == [8]


def test_scale_one_and_times_outside_the_interval_cost_one_plain_call() -> None:
    schedule = VPLinear()
    inside = float(schedule.log_snr(0.4))
    guided, model, x, cond = setup(scale=3.0, interval=(inside - 0.1, inside + 0.1))
    plain = model(x, 0.7, None, cond)["x"].eps
    torch.testing.assert_close(guided(x, 0.7, None, cond)["x"].eps, plain)
    guided(x, 0.4, None, cond)
    one = setup(scale=1.0)[0]
    one(x, 0.4, None, cond)
    assert model.calls == [4, 4, 8]
    assert one.denoise.calls == [4]
    mixed = guided(x, torch.tensor([0.4, 0.7, 0.4, 0.7], dtype=F64), None, cond)["x"].eps
    torch.testing.assert_close(mixed[1::2], plain[1::2])
    torch.testing.assert_close(mixed[::2], guided(x, 0.4, None, cond)["x"].eps[::2])


def test_a_network_sees_the_same_conditions_for_as_long_as_they_do_not_change() -> None:
    process, seen = Process.single(VPLinear()), []

    def denoise(x, t, mask=None, cond=None):
        seen.append(cond["label"])
        alpha, sigma = torch.full((4, 1), 0.6), torch.full((4, 1), 0.8)
        return {"x": Prediction(x["x"], alpha, sigma, x0=x["x"], eps=x["x"])}

    guided = ClassifierFree(denoise, process, NULL)
    x, label = {"x": torch.zeros(2, 2)}, torch.tensor([0, 1])
    for _ in range(2):
        guided(x, 0.5, None, {"label": label})
    assert seen[0] is seen[1]
    assert seen[0].tolist() == [0, 1, 2, 2]
    label += 1
    guided(x, 0.5, None, {"label": label})
    guided(x, 0.5, None, {"label": label.clone()})
    assert seen[2] is not seen[3]
    assert [s.tolist() for s in seen[2:]] == [[1, 2, 2, 2]] * 2


def test_negative_condition_takes_the_place_of_the_null_one() -> None:
    guided, model, x, _ = setup(scale=2.0, negative={"label": torch.tensor([1])})
    zeros = {"label": torch.zeros(4, dtype=torch.long)}
    got = guided(x, 0.4, None, zeros)["x"].eps
    away = model(x, 0.4, None, {"label": torch.ones(4, dtype=torch.long)})["x"].eps
    towards = model(x, 0.4, None, zeros)["x"].eps
    torch.testing.assert_close(got, 2.0 * towards - away)


def test_rescaling_restores_the_deviation_of_the_estimate() -> None:
    guided, model, x, cond = setup(scale=5.0)
    full, half = setup(scale=5.0, rescale=1.0)[0], setup(scale=5.0, rescale=0.5)[0]
    plain = model(x, 0.6, None, cond)["x"].x0
    strong = guided(x, 0.6, None, cond)["x"].x0
    ratio = (plain.std(1) / strong.std(1))[:, None]
    torch.testing.assert_close(full(x, 0.6, None, cond)["x"].x0, ratio * strong)
    got = half(x, 0.6, None, cond)["x"]
    torch.testing.assert_close(got.x0, 0.5 * (ratio + 1.0) * strong)
    torch.testing.assert_close(got.alpha * got.x0 + got.sigma * got.eps, x["x"])


def test_guidance_where_alpha_is_zero() -> None:
    process = Process.single(RectifiedFlow())
    guided = ClassifierFree(TwoClasses(process), process, NULL, 2.0)
    x = {"x": torch.randn(2, 2, generator=torch.Generator().manual_seed(1), dtype=F64)}
    got = guided(x, 1.0, None, {"label": torch.tensor([0, 1])})["x"]
    free = (WEIGHT[:, None] * MEANS).sum(0)
    torch.testing.assert_close(got.x0, 2.0 * MEANS - free)


def test_masks_and_other_conditions_reach_both_sides() -> None:
    process = Process.single(VPLinear(), Points())
    mask = torch.tensor([[True, True], [True, False]])
    seen = {}

    def denoise(x: State, t: float, mask: Tensor, cond: Condition) -> dict[str, Prediction]:
        seen.update(cond, mask=mask)
        return {"x": Prediction(x["x"], 0.8, 0.6, eps=x["x"] * cond["label"][:, None, None])}

    x = {"x": Points().project(torch.ones(2, 2, 1, dtype=F64), mask)}
    cond = {"label": torch.tensor([0, 1]), "cloud": torch.arange(2)}
    out = ClassifierFree(denoise, process, NULL, 2.0, rescale=0.3)(x, 0.5, mask, cond)
    assert seen["label"].tolist() == [0, 1, 2, 2]
    assert seen["cloud"].tolist() == [0, 1, 0, 1]
    assert torch.equal(seen["mask"], torch.cat([mask, mask]))
    assert out["x"].x0[1, 1] == 0.0


def test_wrong_conditions() -> None:
    guided, _, x, cond = setup()
    with pytest.raises(ValueError, match="no condition 'label'.*given: \\[\\]"):
        guided(x, 0.5)
    with pytest.raises(ValueError, match=r"condition 'label' has shape \(3,\).*batch, 4"):
        guided(x, 0.5, None, {"label": torch.zeros(3)})
    wrong = ClassifierFree(guided.denoise, guided.process, {"label": torch.zeros(1, 2)})
    with pytest.raises(ValueError, match=r"null value of 'label' has shape \(1, 2\)"):
        wrong(x, 0.5, None, cond)
    with pytest.raises(ValueError, match="rescale"):
        setup(rescale=2.0)


@pytest.mark.parametrize("name", ["classifier_free", "classifier_free_limited"])
def test_shipped_configurations(name: str) -> None:
    path = Path(__file__).parents[2] / "configs" / "guidance" / f"{name}.yaml"
    plain, _, x, cond = setup()
    guided = build(OmegaConf.load(path), denoise=plain.denoise, process=plain.process, null=NULL)
    for t in (0.1, 0.5, 0.9):
        assert guided(x, t, None, cond)["x"].eps.isfinite().all()
