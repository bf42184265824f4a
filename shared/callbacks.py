"""What happens after a training step: metrics, validation, scores, checkpoints, signals."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any

import lightning
from torch import Tensor

from shared import checkpoints
from shared.denoisers import Denoiser
from shared.runs import Run

if TYPE_CHECKING:
    from shared.training import DenoisingModule

Score = Callable[[Denoiser, int], Mapping[str, float]]


class Signals:
    """A context that turns SIGTERM and Ctrl-C into a note that training looks at between two
    steps; a second one acts at once. The handlers from before return at the end."""

    NUMBERS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # Python allows no other
            self._before = {number: signal.getsignal(number) for number in self.NUMBERS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def catch(self) -> None:
        """Take over."""
        for number in self._before:
            signal.signal(number, self._note)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = number
        once_more = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, once_more)


class Keeper(lightning.Callback):
    """Writes into the run whatever is due after a step.

    ``best`` is the best value so far of the number that training monitors.
    """

    def __init__(self, run: Run, score: Score | None = None) -> None:
        self.run, self.score = run, score
        self.best: float | None = None
        self.signals = Signals()
        self.stopped_by: int | None = None
        self._scaler: Mapping[str, Any] = {}
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def restore(self, checkpoint: checkpoints.Checkpoint) -> None:
        """Go on from a checkpoint of the run."""
        state = checkpoint.training()
        self.best, self._scaler = state["best"], state["scaler"]
        self._sums, self._count = dict(state.get("sums", {})), state.get("count", 0)
        if self.run.writes:
            self.run.rewind(checkpoint.step)
            self.run.log(f"going on from step {checkpoint.step}")

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        if self._scaler:
            trainer.precision_plugin.load_state_dict(dict(self._scaler))
        if module.average is not None and not module.average.updates:
            module.average.start()  # only now all processes have the parameters of the first
        # after Lightning's own handlers, which broadcast from inside a handler: that message
        # can meet the all-reduce of a gradient
        self.signals.catch()

    def on_exception(self, trainer: lightning.Trainer, module: Any, error: BaseException) -> None:
        if self.run.writes:
            self.run.log(f"failed: {error or type(error).__name__}")

    def leave(self) -> None:
        """After training: finish the way the signal asked for, if there was one."""
        if self.stopped_by == signal.SIGINT:
            raise KeyboardInterrupt
        if self.stopped_by is not None:
            raise SystemExit(128 + self.stopped_by)

    # -- after a step -------------------------------------------------------------------------

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        module: DenoisingModule,  # type: ignore[override]
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._collect(module.terms[-1])
        settings, rate = module.settings, module.rate
        if (batch_idx + 1) % settings.accumulate:
            return
        module.step_done()
        step = module.step
        done = step == settings.max_steps
        log, kept = done or _due(step, settings.log_every), _due(step, settings.keep_every)
        if log or kept or _due(step, settings.validate_every) or _due(step, settings.score_every):
            module.check()
        if log:
            self._write_losses(trainer, module, rate)
        better = self._better(self._evaluate(trainer, module), module)
        stop = self._must_stop(trainer, step)
        last = done or stop or _due(step, settings.save_every)
        if last:
            module.check()
        if trainer.is_global_zero:
            for name in ["best"] * better + [f"step-{step:08d}"] * kept:
                self._save(module, name)
            if last:
                self._save(module, "last", self._state(trainer, module))
        if stop:
            trainer.should_stop = True

    def _must_stop(self, trainer: lightning.Trainer, step: int) -> bool:
        asked = self.signals.received
        if trainer.world_size > 1:
            # all processes stop after the same step; agreeing costs a message, so now and then
            if step % 10 or not trainer.strategy.reduce_boolean_decision(bool(asked), all=False):
                return False
            asked = asked or signal.SIGTERM
        self.stopped_by = asked
        return asked is not None

    def _collect(self, terms: Mapping[str, Tensor]) -> None:
        for name, term in terms.items():
            self._sums[name] = self._sums[name] + term if name in self._sums else term
        self._count += 1

    def _write_losses(
        self, trainer: lightning.Trainer, module: DenoisingModule, rate: float
    ) -> None:
        terms = {name: total / self._count for name, total in self._sums.items()}
        self._sums, self._count = {}, 0
        values = _with_total(_mean_over_processes(trainer, terms), "loss")
        values |= {"gradient_norm": float(module.norm), "learning_rate": rate}
        if trainer.is_global_zero:
            self.run.write_metrics(module.step, values)

    def _evaluate(
        self, trainer: lightning.Trainer, module: DenoisingModule
    ) -> Mapping[str, float]:
        settings, step = module.settings, module.step
        values: dict[str, float] = {}
        if _due(step, settings.validate_every):
            terms = _mean_over_processes(trainer, module.validation_losses())
            values |= _with_total(terms, "validation_loss")
        if self.score is not None and _due(step, settings.score_every):
            if trainer.is_global_zero:
                with module.evaluating() as denoiser:
                    values |= {n: float(v) for n, v in self.score(denoiser, step).items()}
            values = trainer.strategy.broadcast(values)
        if values and trainer.is_global_zero:
            self.run.write_metrics(step, values)
        return values

    def _better(self, values: Mapping[str, float], module: DenoisingModule) -> bool:
        settings = module.settings
        value = values.get(settings.monitor, math.nan)
        if not math.isfinite(value):
            return False
        sign = -1.0 if settings.maximise else 1.0
        if self.best is not None and sign * value >= sign * self.best:
            return False
        self.best = value
        return True

    def _state(self, trainer: lightning.Trainer, module: DenoisingModule) -> dict[str, Any]:
        scaler = trainer.precision_plugin.state_dict()
        sums = {name: total.detach().cpu() for name, total in self._sums.items()}
        own = {"best": self.best, "scaler": scaler, "sums": sums, "count": self._count}
        return {**module.state(trainer.optimizers[0]), **own}

    def _save(
        self, module: DenoisingModule, name: str, training: Mapping[str, Any] | None = None
    ) -> None:
        checkpoints.save(
            self.run.checkpoints / name,
            module.denoiser,
            config=self.run.config,
            domain=module.domain.statistics(),
            ema=None if module.average is None else module.average.shadow,
            training=training,
            step=module.step,
        )
        if name == "last":
            self.run.log(f"saved step {module.step}")


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _mean_over_processes(
    trainer: lightning.Trainer, terms: Mapping[str, Tensor]
) -> dict[str, float]:
    reduced = {n: trainer.strategy.reduce(v, reduce_op="mean") for n, v in terms.items()}
    return {name: float(value) for name, value in reduced.items()}


def _with_total(terms: Mapping[str, float], total: str) -> dict[str, float]:
    """The terms named after their ``total``, and the total."""
    return {total: math.fsum(terms.values()), **{f"{total}/{n}": v for n, v in terms.items()}}
