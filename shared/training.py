"""Training for every domain: one Lightning module, one callback, one function :func:`fit`.

A run that was stopped, killed or extended goes on exactly: batch, times, noise and dropout of a
step depend on the seed and the number of the step alone, and the rest of the state lies in the
checkpoint.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from torch import Tensor
from torch.utils.data import DataLoader

from shared import checkpoints
from shared.batches import Batches, NoisyBatch, Share
from shared.callbacks import Keeper, Score
from shared.denoisers import Denoiser
from shared.domains import Domain
from shared.optimisation import LearningRate, MovingAverage, OptimizerSettings, clipping
from shared.precision import Precision
from shared.randomness import stream
from shared.runs import Run, process_rank


@dataclass(frozen=True)
class TrainerSettings:
    """How to train. Steps are steps of the optimizer; ``None`` for an interval means never.

    Args:
        batch_size: samples per step over all processes and ``accumulate`` micro-batches.
        clip: None, the largest norm of the gradient, or 'queue' (the rule of EDM).
        ema: decay of the moving averages of the weights, None for none; ``ema_warmup`` starts
            with smaller decays.
        precision: dtype of the backbone's matrix products; fields in ``keep_float32`` enter it
            unrounded.
        keep_every: keep a separate checkpoint of the weights every so many steps.
        score_every: call ``score`` every so many steps.
        monitor: the number whose best value marks the best checkpoint; ``maximise``: the larger.
        devices, nodes, accelerator, strategy: as Lightning's Trainer takes them.
        workers: processes that load data, per device.
        compile: compile the repeated layers of the backbone (it takes a while at
            first; worth it for long runs of layers made of many small operations).
    """

    max_steps: int = 100_000
    batch_size: int = 128
    accumulate: int = 1
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    learning_rate: LearningRate = field(default_factory=LearningRate)
    clip: float | str | None = 1.0
    ema: float | None = 0.999
    ema_warmup: bool = False
    precision: str = "float32"
    keep_float32: tuple[str, ...] = ()
    log_every: int = 50
    save_every: int = 1000
    keep_every: int | None = None
    validate_every: int | None = 1000
    validation_batches: int = 8
    score_every: int | None = None
    monitor: str = "validation_loss"
    maximise: bool = False
    accelerator: str = "auto"
    devices: int | str = 1
    nodes: int = 1
    strategy: str = "auto"
    workers: int = 0
    compile: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep_float32", tuple(self.keep_float32))
        for name in ("max_steps", "batch_size", "accumulate", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"trainer.{name} must be at least 1, not {getattr(self, name)}.")
        for name in ("keep_every", "validate_every", "score_every"):
            every = getattr(self, name)
            if every is not None and every < 1:
                raise ValueError(f"trainer.{name} must be at least 1 (null: never), not {every}.")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"trainer.batch_size ({self.batch_size}) must be a multiple of "
                f"trainer.accumulate ({self.accumulate})."
            )


class Diverged(ArithmeticError):
    """A loss or gradient that is not a finite number."""


class DenoisingModule(lightning.LightningModule):
    """What Lightning trains: the losses of a denoiser, their optimizer, clipping and averages."""

    def __init__(
        self, denoiser: Denoiser, domain: Domain[Any], settings: TrainerSettings, seed: int
    ) -> None:
        super().__init__()
        self.denoiser, self.domain = denoiser, domain
        self.settings, self.seed, self.step = settings, seed, 0
        self.clip = clipping(settings.clip)
        self.average = (
            None
            if settings.ema is None
            else MovingAverage(denoiser, settings.ema, settings.ema_warmup)
        )
        self.norm = torch.tensor(0.0)
        self.terms: list[dict[str, Tensor]] = []
        self._optimizer_state: Mapping[str, Any] | None = None

    def setup(self, stage: str) -> None:
        self.seed = self.trainer.strategy.broadcast(self.seed)

    # -- data ---------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader[NoisyBatch]:
        if self.settings.validate_every is not None:
            self._batches("validation")  # an empty set is refused now, not after many steps
        parts = self.settings.accumulate
        numbers = range(self.step * parts, self.settings.max_steps * parts)
        return self._batches("train").loader(numbers, self.settings.workers)

    def validation_loader(self) -> DataLoader[NoisyBatch]:
        """The first batches of the validation set, always with the same times and noise."""
        batches = self._batches("validation")
        most = max(1, batches.count // batches.size)
        return batches.loader(range(min(most, self.settings.validation_batches)))

    @cached_property
    def _datasets(self) -> tuple[Any, Any]:
        return self.domain.datasets()

    def _batches(self, name: str) -> Batches:
        training, validation = self._datasets
        return Batches(
            self.domain,
            self.denoiser.process,
            training if name == "train" else validation,
            self.settings.batch_size // self.settings.accumulate,
            self.seed,
            name,
            shuffle=name == "train",
            share=Share(self.trainer.global_rank, self.trainer.world_size),
        )

    # -- one step -----------------------------------------------------------------------------

    def losses(self, noisy: NoisyBatch) -> dict[str, Tensor]:
        """Mean loss of every field over the batch."""
        batch, denoiser = noisy.batch, self.denoiser
        t = denoiser.times.from_uniform(denoiser.process.lead, noisy.u)
        terms = denoiser.losses(batch.state, noisy.noise, t, batch.mask, batch.cond)
        return {name: term.mean() for name, term in terms.items()}

    def validation_losses(self) -> dict[str, Tensor]:
        """Mean losses over the validation batches of this process, with averaged weights."""
        sums: dict[str, list[Tensor]] = {}
        with self.evaluating():
            for noisy in self.validation_loader():
                for name, term in self.losses(noisy.to(self.device)).items():
                    sums.setdefault(name, []).append(term)
        return {name: torch.stack(terms).mean() for name, terms in sums.items()}

    def training_step(self, noisy: NoisyBatch, number: int) -> Tensor:
        if number % self.settings.accumulate == 0:
            self.check()
        with self._own_randomness(number):
            terms = self.losses(noisy)
        self.terms.append({name: term.detach() for name, term in terms.items()})
        total = torch.stack(list(terms.values())).sum()
        if self.settings.progress:
            self.log("loss", total, prog_bar=True, batch_size=len(noisy))
        return total

    @contextmanager
    def _own_randomness(self, number: int) -> Iterator[None]:
        """Dropout that repeats; the caller's generators are left as they were."""
        part = number % self.settings.accumulate
        own = stream(self.seed, self.step, f"dropout/{self.global_rank}", part)
        seed, gpu = int(own.integers(2**62)), self.device.type == "cuda"
        with torch.random.fork_rng(devices=[self.device] if gpu else []):
            torch.default_generator.manual_seed(seed)
            if gpu:
                torch.cuda.manual_seed(seed)
            yield

    def check(self) -> None:
        """Look at the last step's losses and gradient; one step late, because waiting for the
        device in every step would leave it idle.

        Raises:
            Diverged: one is not finite; names the step and the field.
        """
        terms, self.terms = self.terms, []
        bad = [n for losses in terms for n, loss in losses.items() if not loss.isfinite()]
        # float16 skips a step whose scaled gradient overflows
        gradient = self.settings.precision != "float16" and not self.norm.isfinite()
        if bad or gradient:
            what = f"the loss of field '{bad[0]}'" if bad else "the gradient"
            raise Diverged(
                f"step {self.step}: {what} is not finite. The last checkpoint is from before "
                "that; lower trainer.optimizer.lr, clip the gradient (trainer.clip) or look at "
                "the data."
            )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = self.settings.optimizer.build(self.parameters())
        if self._optimizer_state is not None:
            optimizer.load_state_dict(dict(self._optimizer_state))
        return optimizer

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            group["lr"] = self.rate

    @property
    def rate(self) -> float:
        """The learning rate of this step."""
        settings = self.settings
        factor = settings.learning_rate.factor(self.step, settings.max_steps)
        return settings.optimizer.lr * factor

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, *_: Any, **__: Any
    ) -> None:
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        if gradients:
            self.norm = self.clip(gradients)

    def step_done(self) -> None:
        self.step += 1
        if self.average is not None:
            self.average.update()

    @contextmanager
    def evaluating(self) -> Iterator[Denoiser]:
        """The denoiser as it is used after training: averaged weights, no dropout, no gradient."""
        average = nullcontext() if self.average is None else self.average.applied()
        self.denoiser.eval()
        try:
            with average, torch.no_grad():
                yield self.denoiser
        finally:
            self.denoiser.train()

    # -- state --------------------------------------------------------------------------------

    def state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """What exact resumption needs beside weights and averages."""
        updates = 0 if self.average is None else self.average.updates
        return {
            "optimizer": optimizer.state_dict(),
            "clip": self.clip.state_dict(),
            "updates": updates,
        }

    def restore(self, checkpoint: checkpoints.Checkpoint) -> None:
        """Go on from a checkpoint with its training state."""
        state = checkpoint.training()
        checkpoints.apply(checkpoint, self.denoiser, ema=False)
        self.step = checkpoint.step
        self.clip.load_state_dict(state["clip"])
        self._optimizer_state = state["optimizer"]
        if self.average is not None and checkpoint.ema is not None:
            self.average.load(checkpoint.ema, state["updates"])


# -- the whole --------------------------------------------------------------------------------


def fit(
    denoiser: Denoiser,
    domain: Domain[Any],
    run: Run,
    trainer: TrainerSettings,
    seed: int,
    score: Score | None = None,
) -> None:
    """Train ``denoiser`` up to ``trainer.max_steps``, from the last checkpoint of ``run`` if
    there is one. The averaged weights are in the checkpoints and, at the end, in ``denoiser``.

    On several devices or nodes Lightning starts the processes, or finds those of torchrun or
    Slurm; the result is that of one process up to rounding.

    Args:
        run: made by ``Run.create``.
        score: called as ``score(denoiser, step)`` every ``trainer.score_every`` steps on process
            zero, with averaged weights; its numbers go to metrics.csv.

    Raises:
        ValueError: the run is open for reading only.
        Diverged: a loss or gradient is not finite; the last checkpoint stays.
        KeyboardInterrupt, SystemExit: after Ctrl-C or SIGTERM, once a checkpoint is saved.
    """
    if not run.writes and process_rank() == 0:
        raise ValueError(f"run {run.folder} is open for reading; make it with Run.create.")
    denoiser.precision = Precision(trainer.precision, trainer.keep_float32)
    module = DenoisingModule(denoiser, domain, trainer, seed)
    keeper = Keeper(run, score)
    if (run.checkpoints / "last" / checkpoints.MANIFEST).exists():
        checkpoint = checkpoints.load(run.checkpoints / "last")
        module.restore(checkpoint)
        keeper.restore(checkpoint)
    elif run.writes:
        run.rewind(0)
    if module.step < trainer.max_steps:
        denoiser.train()
        if trainer.compile:
            _compile(denoiser)
        with _quiet(), keeper.signals:
            _lightning_trainer(trainer, module, keeper, run).fit(module)
        keeper.leave()
    if module.step < trainer.max_steps:  # Lightning trained in processes of its own
        checkpoints.apply(checkpoints.load(run.checkpoints / "last"), denoiser)
    elif module.average is not None:
        module.average.install()
    denoiser.eval()


def _compile(denoiser: Denoiser) -> None:
    """Compile the layers one by one: alike, they share the work, and state keys stay."""
    import torch.fx.experimental._config as symbols

    symbols.use_duck_shape = False  # sizes that happen to agree would compile again and again
    torch._dynamo.config.recompile_limit = 64  # with and without mask, gradients, ...
    torch._dynamo.config.optimize_ddp = False  # it splits whole models, and fails on layers
    layers = getattr(denoiser.backbone, "layers", None)
    for part in layers if isinstance(layers, torch.nn.ModuleList) else [denoiser.backbone]:
        part.compile(dynamic=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Lightning without its advertisements and its advice on loaders."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(max(level, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        logger.setLevel(level)


def _lightning_trainer(
    settings: TrainerSettings, module: DenoisingModule, keeper: Keeper, run: Run
) -> lightning.Trainer:
    trainer = lightning.Trainer(
        max_steps=settings.max_steps - module.step,
        max_epochs=1,
        accelerator=settings.accelerator,
        devices=settings.devices,
        num_nodes=settings.nodes,
        strategy=settings.strategy,
        # bfloat16 needs no scaling of the loss: the denoiser's own policy is all
        precision="16-mixed" if settings.precision == "float16" else "32-true",
        accumulate_grad_batches=settings.accumulate,
        callbacks=[keeper],
        default_root_dir=run.folder,
        use_distributed_sampler=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=settings.progress,
    )
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if isinstance(environment, SLURMEnvironment):
        environment.auto_requeue = False  # it would save and look for checkpoints of its own
    return trainer
