"""Training: exact resumption, several processes, divergence, signals, and that it learns."""

from __future__ import annotations

import dataclasses
import os
import signal

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from shared import checkpoints, configuration
from shared.analytic import AnalyticDenoiser, Mixture
from shared.batches import Batches
from shared.denoisers import Denoiser
from shared.domains import Batch
from shared.losses import Vlb
from shared.nn.embedding import Sinusoidal, TimeEmbedding
from shared.optimisation import LearningRate, OptimizerSettings
from shared.process import Process
from shared.runs import Run
from shared.schedules import LearnedGamma, VPLinear
from shared.training import Diverged, TrainerSettings, fit
from shared.verbs import begin_from

MIXTURE = Mixture(
    torch.tensor([0.3, 0.7]), torch.tensor([[-1.0, 0.5], [0.6, -0.4]]), torch.full((2, 2), 0.05)
)


class Plane:
    """Points of a mixture."""

    name = "plane"

    def __init__(self, count=256, spoiled=None):
        self.points = MIXTURE.sample(count + 256, torch.Generator().manual_seed(0))
        self.count = count
        if spoiled is not None:
            self.points[spoiled, 0] = torch.nan

    def statistics(self):
        return {"scale": 1.0}

    def datasets(self):
        return TensorDataset(self.points[: self.count]), TensorDataset(self.points[self.count :])

    def collate(self, records):
        return Batch({"x": torch.stack([point for (point,) in records])})


class Network(nn.Module):
    def __init__(self, width, dropout):
        super().__init__()
        self.time = TimeEmbedding(16, width, Sinusoidal(16, max_period=20.0))
        self.enter, self.middle = nn.Linear(2, width), nn.Linear(width, width)
        self.leave, self.dropout = nn.Linear(width, 2), nn.Dropout(dropout)

    def forward(self, inputs, code, mask, cond):
        h = nn.functional.silu(self.enter(inputs["x"]) + self.time(code))
        h = h + nn.functional.silu(self.middle(self.dropout(h)))
        return {"x": self.leave(h)}


def build(width=16, dropout=0.0, schedule=None, **arguments):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        process = Process.single(schedule or VPLinear(t_min=1e-2))
        return Denoiser(Network(width, dropout), process, **arguments)


def settings(**changes):
    base = {"max_steps": 12, "batch_size": 16, "save_every": 5, "log_every": 2}
    base |= {"validate_every": 4, "validation_batches": 2}
    return TrainerSettings(**{**base, "accelerator": "cpu", "progress": False, **changes})


def train(folder, denoiser=None, domain=None, score=None, **changes):
    """Trains in ``folder`` and returns the denoiser."""
    denoiser = denoiser or build()
    with Run.create(folder, {"seed": 1}) as run:
        fit(denoiser, domain or Plane(), run, settings(**changes), run.seed, score)
    return denoiser


def test_an_empty_validation_set_is_refused_before_the_first_step(tmp_path):
    domain = Plane()
    domain.datasets = lambda: (TensorDataset(domain.points), TensorDataset(domain.points[:0]))
    with pytest.raises(ValueError, match="validation set is empty. Set trainer.validate_every"):
        train(tmp_path / "a", domain=domain, log_every=1)
    assert not list(Run.open(tmp_path / "a").metrics())
    train(tmp_path / "b", domain=domain, validate_every=None, max_steps=2)


def last(folder):
    return checkpoints.load(folder / "checkpoints" / "last")


def assert_same(first, second, **tolerance):
    for ours, theirs in ((first.weights, second.weights), (first.ema, second.ema)):
        assert ours.keys() == theirs.keys()
        for name in ours:
            if tolerance:
                torch.testing.assert_close(ours[name], theirs[name], **tolerance)
            else:
                assert torch.equal(ours[name], theirs[name]), name


def test_a_run_opened_for_reading_is_refused(tmp_path):
    Run.create(tmp_path / "r", {"seed": 1}).close()
    with pytest.raises(ValueError, match="open for reading; make it with Run.create"):
        fit(build(), Plane(), Run.open(tmp_path / "r"), settings(), 1)


class Stop(Exception):
    pass


def stop_at(step, action=None):
    def score(denoiser, now):
        if now == step:
            if action is not None:
                action()
            else:
                raise Stop
        return {}

    return score


HARD = {
    "accumulate": 2,
    "clip": "queue",
    "ema_warmup": True,
    "learning_rate": LearningRate("cosine", warmup=3),
}


def test_a_run_that_died_goes_on_bit_by_bit(tmp_path):
    whole = train(tmp_path / "whole", build(dropout=0.2), **HARD)
    with pytest.raises(Stop):
        train(tmp_path / "cut", build(dropout=0.2), score=stop_at(8), score_every=1, **HARD)
    assert last(tmp_path / "cut").step == 5
    resumed = train(tmp_path / "cut", build(dropout=0.2), **HARD)
    assert last(tmp_path / "cut").step == 12
    assert_same(last(tmp_path / "whole"), last(tmp_path / "cut"))
    assert torch.equal(resumed.backbone.leave.weight, whole.backbone.leave.weight)
    ema = last(tmp_path / "whole").ema["backbone.leave.weight"]
    assert torch.equal(whole.backbone.leave.weight, ema)  # fit leaves the averages
    rows = [Run.open(tmp_path / name).metrics() for name in ("whole", "cut")]
    validation = [[r for r in one if r[1] == "validation_loss"] for one in rows]
    assert [r[0] for r in validation[0]] == [4, 8, 12]
    assert validation[0] == validation[1]
    losses = [[r for r in one if r[1] in ("loss", "loss/x")] for one in rows]
    assert losses[0] == losses[1]  # the average over steps before and after, too


def test_a_finished_run_is_extended_and_not_repeated(tmp_path):
    train(tmp_path / "whole", max_steps=12)
    train(tmp_path / "grown", max_steps=6)
    before = last(tmp_path / "grown")
    train(tmp_path / "grown", max_steps=6)
    assert_same(before, last(tmp_path / "grown"))
    train(tmp_path / "grown", max_steps=12)
    assert_same(last(tmp_path / "whole"), last(tmp_path / "grown"))


def test_two_processes_give_the_result_of_one(tmp_path):
    one = train(tmp_path / "one")
    two = train(tmp_path / "two", devices=2, strategy="ddp_fork")
    assert_same(last(tmp_path / "one"), last(tmp_path / "two"), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(one.backbone.leave.weight, two.backbone.leave.weight)
    rows = [Run.open(tmp_path / name).metrics() for name in ("one", "two")]
    assert [r[:2] for r in rows[0]] == [r[:2] for r in rows[1]]
    torch.testing.assert_close(
        torch.tensor([r[2] for r in rows[0]]), torch.tensor([r[2] for r in rows[1]])
    )
    with pytest.raises(Exception, match="15 samples do not divide among 2 processes"):
        train(tmp_path / "odd", devices=2, strategy="ddp_fork", batch_size=15)


def test_other_seeds_give_other_weights(tmp_path):
    with Run.create(tmp_path / "r", {"seed": 2}) as run:
        fit(build(), Plane(), run, settings(), run.seed)
    train(tmp_path / "s")
    first, second = last(tmp_path / "r"), last(tmp_path / "s")
    assert not torch.equal(
        first.weights["backbone.leave.weight"], second.weights["backbone.leave.weight"]
    )


@pytest.mark.parametrize(("record", "accumulate"), [(0, 1), (100, 2)])
def test_divergence_names_step_and_field_and_keeps_the_last_checkpoint(
    tmp_path, record, accumulate
):
    domain = Plane(spoiled=record)
    found = Batches(domain, build().process, domain.datasets()[0], 16, seed=1)
    first = next(n for n in range(99) if not found[n].batch.state["x"].isfinite().all()) + 1
    with pytest.raises(Diverged, match=f"step {first}: the loss of field 'x' is not finite"):
        train(
            tmp_path / "r",
            domain=domain,
            max_steps=40,
            save_every=1,
            validate_every=None,
            accumulate=accumulate,
        )
    if first > 1:
        saved = last(tmp_path / "r")
        assert saved.step == first - 1
        assert all(value.isfinite().all() for value in saved.weights.values())
        assert all(value.isfinite().all() for value in saved.ema.values())
    else:
        assert not (tmp_path / "r" / "checkpoints" / "last").exists()
    assert "not finite" in (tmp_path / "r" / "log.txt").read_text()


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_signal_saves_and_leaves(tmp_path, number, error):
    before = signal.getsignal(number)
    kill = stop_at(3, lambda: os.kill(os.getpid(), number))
    with pytest.raises(error) as caught:
        train(tmp_path / "cut", score=kill, score_every=1)
    if error is SystemExit:
        assert caught.value.code == 143
    assert signal.getsignal(number) is before
    assert last(tmp_path / "cut").step == 3
    train(tmp_path / "cut")
    train(tmp_path / "whole")
    assert_same(last(tmp_path / "whole"), last(tmp_path / "cut"))


def test_scores_are_written_and_the_best_checkpoint_kept(tmp_path):
    seen = []

    def score(denoiser, step):
        seen.append((step, denoiser.training, denoiser.backbone.leave.bias.detach().clone()))
        return {"quality": [0.1, 0.9, 0.5][len(seen) - 1]}

    train(
        tmp_path / "r", score=score, score_every=4, monitor="quality", maximise=True, keep_every=6
    )
    run = Run.open(tmp_path / "r")
    rows = [row for row in run.metrics() if row[1] == "quality"]
    assert rows == [(4, "quality", 0.1), (8, "quality", 0.9), (12, "quality", 0.5)]
    best = checkpoints.load(run.checkpoint())
    assert best.step == 8
    assert best.training_path is None
    assert not seen[1][1]
    assert torch.equal(seen[1][2], best.ema["backbone.leave.bias"])  # scored as it was averaged
    assert sorted(p.name for p in run.checkpoints.iterdir()) == [
        "best",
        "last",
        "step-00000006",
        "step-00000012",
    ]
    assert {name for _, name, _ in run.metrics()} >= {"loss", "loss/x", "gradient_norm"}


def test_training_comes_close_to_the_analytic_optimum(tmp_path):
    domain = Plane(4096)
    denoiser = train(
        tmp_path / "r",
        build(width=48),
        domain,
        max_steps=300,
        batch_size=128,
        save_every=300,
        validate_every=None,
        ema=0.95,
        optimizer=OptimizerSettings(lr=1e-2),
        learning_rate=LearningRate("cosine"),
    )
    exact = AnalyticDenoiser.single(denoiser.process, MIXTURE)
    noisy = Batches(domain, denoiser.process, domain.datasets()[1], 256, 0, "validation")[0]
    t = denoiser.times.from_uniform(denoiser.process.lead, noisy.u)
    x = denoiser.process.perturb(noisy.batch.state, t, noisy.noise)

    def error(denoise):
        with torch.no_grad():
            return float((denoise(x, t)["x"].eps - noisy.noise["x"]).square().mean())

    optimum, reached, start = error(exact), error(denoiser), error(build(width=48))
    assert start > 2.5 * optimum
    assert reached < 1.15 * optimum


def test_a_learned_schedule_trains(tmp_path):
    schedule = LearnedGamma(width=8)
    before = {name: value.clone() for name, value in schedule.state_dict().items()}
    denoiser = build(schedule=schedule)
    denoiser.heads["x"] = type(denoiser.heads["x"])(weighting=Vlb())
    train(tmp_path / "r", denoiser, max_steps=3)
    assert any(not torch.equal(before[n], v) for n, v in schedule.state_dict().items())
    assert any(name.startswith("schedules.x.") for name in last(tmp_path / "r").ema)


def test_half_precision_trains(tmp_path):
    whole = train(tmp_path / "whole", ema=None)
    half = train(tmp_path / "half", precision="bfloat16", keep_float32=("x",), ema=None)
    a, b = whole.backbone.leave.weight, half.backbone.leave.weight
    assert a.dtype == b.dtype == torch.float32
    assert not torch.equal(a, b)
    torch.testing.assert_close(a, b, rtol=0.1, atol=0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": 0}, "trainer.max_steps must be at least 1, not 0"),
        ({"validate_every": 0}, r"trainer.validate_every must be at least 1 \(null: never\)"),
        ({"batch_size": 15, "accumulate": 2}, r"\(15\) must be a multiple of trainer.accumulate"),
    ],
)
def test_wrong_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)


@pytest.mark.parametrize("name", configuration.options("trainer"))
def test_every_shipped_trainer_can_be_built(name):
    built = configuration.choose("trainer", name)
    assert isinstance(built, TrainerSettings)
    expected = {"edm": ("queue", 0.9999), "gdss": (1.0, 0.999)}.get(name, (1.0, 0.999))
    assert (built.clip, built.ema) == expected


def test_the_default_trainer_file_offers_every_setting():
    file = configuration.option("trainer", "default")
    for node, target in (
        (file, TrainerSettings),
        (file.optimizer, OptimizerSettings),
        (file.learning_rate, LearningRate),
    ):
        assert set(node) - {"_target_"} == {field.name for field in dataclasses.fields(target)}
    assert configuration.build(file) == TrainerSettings()


def test_a_run_starts_from_the_weights_of_another_as_far_as_they_fit(tmp_path):
    denoiser = build()
    with Run.create(tmp_path / "first", {"seed": 0}) as run:
        fit(denoiser, Plane(), run, settings(max_steps=2), 0)
    wider = build()
    wider.backbone.leave = nn.Linear(16, 3)
    left = begin_from(wider, str(tmp_path / "first"))
    assert left == ["backbone.leave.bias", "backbone.leave.weight"]
    torch.testing.assert_close(
        wider.state_dict()["backbone.enter.weight"], denoiser.state_dict()["backbone.enter.weight"]
    )
    with pytest.raises(configuration.ConfigurationError, match="none of its weights"):
        begin_from(nn.Linear(1, 1), str(tmp_path / "first"))
