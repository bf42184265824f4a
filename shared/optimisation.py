"""Optimizers, learning-rate schedules, gradient clipping and moving averages of weights."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
SHAPES = ("constant", "linear", "cosine", "exponential")


@dataclass(frozen=True)
class OptimizerSettings:
    """Adam, or AdamW with decoupled weight decay.

    Raises:
        ValueError: an unknown name or a rate that is not positive.
    """

    name: str = "adamw"
    lr: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    amsgrad: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        if self.name not in OPTIMIZERS:
            raise ValueError(
                f"trainer.optimizer: name '{self.name}' is not one of {', '.join(OPTIMIZERS)}."
            )
        if not self.lr > 0:
            raise ValueError(f"trainer.optimizer: lr must be positive, not {self.lr}.")

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = OPTIMIZERS[self.name](
            [p for p in parameters if p.requires_grad],
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            amsgrad=self.amsgrad,
        )
        return optimizer


@dataclass(frozen=True)
class LearningRate:
    """Linear warm-up over the first ``warmup`` steps; constant, linear or cosine after it, down
    to ``floor`` (a fraction) over the last ``decay`` (a fraction) of all steps; or exponential:
    halved every ``half_life`` steps, however many there are."""

    shape: str = "constant"
    warmup: int = 0
    decay: float = 1.0
    floor: float = 0.0
    half_life: float | None = None

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(
                f"trainer.learning_rate: shape '{self.shape}' is not one of {', '.join(SHAPES)}."
            )
        if not 0 < self.decay <= 1 or not 0 <= self.floor <= 1 or self.warmup < 0:
            raise ValueError(
                "trainer.learning_rate: needs 0 < decay <= 1, 0 <= floor <= 1, warmup >= 0."
            )
        if (self.shape == "exponential") != bool(self.half_life and self.half_life > 0):
            raise ValueError(
                "trainer.learning_rate: half_life, a number of steps, goes with "
                f"shape=exponential; given shape={self.shape}, half_life={self.half_life}."
            )

    def factor(self, step: int, max_steps: int) -> float:
        """What the rate is multiplied by in step 0, 1, ..., ``max_steps`` - 1."""
        rise = min(1.0, (step + 1) / (self.warmup + 1))
        if self.shape == "constant":
            return rise
        if self.half_life:
            return rise * max(self.floor, 0.5 ** (max(0, step - self.warmup) / self.half_life))
        begin = max(float(self.warmup), (1.0 - self.decay) * max_steps)
        u = min(1.0, max(0.0, (step - begin) / max(1.0, max_steps - begin)))
        left = 1.0 - u if self.shape == "linear" else 0.5 * (1.0 + math.cos(math.pi * u))
        return rise * (self.floor + (1.0 - self.floor) * left)


# -- clipping ---------------------------------------------------------------------------------


class Clipping(ABC):
    """Bounds the norm of the gradient without waiting for the device."""

    @abstractmethod
    def bound(self, norm: Tensor) -> Tensor:
        """The largest norm allowed in this step, a scalar on ``norm``'s device."""

    def observe(self, norm: Tensor) -> None:  # noqa: B027
        """Take note of the norm of this step, after clipping."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Go on from :meth:`state_dict`."""

    def __call__(self, gradients: list[Tensor]) -> Tensor:
        """Scale ``gradients`` in place; returns their norm before."""
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        bound = self.bound(norm)
        torch._foreach_mul_(gradients, (bound / (norm + 1e-6)).clamp(max=1.0))
        self.observe(torch.minimum(norm, bound))
        return norm


class ConstantClipping(Clipping):
    """At most ``most``; infinity only measures."""

    def __init__(self, most: float = math.inf) -> None:
        if not most > 0:
            raise ValueError(f"clipping: the largest norm must be positive, not {most}.")
        self.most = most

    def bound(self, norm: Tensor) -> Tensor:
        return torch.full_like(norm, self.most)


class QueueClipping(Clipping):
    """At most 1.5 mean + 2 standard deviations of the last ``length`` norms, of which ``start``
    is the first (the rule of the authors' code of Hoogeboom et al. 2022)."""

    def __init__(self, length: int = 50, start: float = 3000.0) -> None:
        self.length = length
        self.queue = torch.tensor([start], dtype=torch.float64)

    def bound(self, norm: Tensor) -> Tensor:
        self.queue = self.queue.to(norm.device)
        return 1.5 * self.queue.mean() + 2.0 * self.queue.std(correction=0)

    def observe(self, norm: Tensor) -> None:
        # a gradient that is not finite (float16 at too large a scale) must not stay in the queue
        norm = torch.where(norm.isfinite(), norm.to(self.queue), self.queue[0])
        self.queue = torch.cat([norm[None], self.queue])[: self.length]

    def state_dict(self) -> dict[str, Any]:
        return {"queue": self.queue.cpu()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.queue = torch.as_tensor(state["queue"], dtype=torch.float64)


def clipping(rule: float | str | None) -> Clipping:
    """None (no bound), a number, or 'queue'.

    Raises:
        ValueError: anything else.
    """
    if rule == "queue":
        return QueueClipping()
    if isinstance(rule, str):
        raise ValueError(f"trainer.clip: '{rule}' is neither a number, nor 'queue', nor null.")
    return ConstantClipping(math.inf if rule is None else float(rule))


# -- a loop -----------------------------------------------------------------------------------


def minimise(
    loss: Callable[[int], Tensor],
    parameters: Iterable[nn.Parameter],
    updates: int,
    lr: float,
    clip: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """``updates`` steps of Adam on ``loss(number)``, with a rate that falls linearly from ``lr``
    to zero; the losses. For what takes minutes and is not resumed.

    Raises:
        FloatingPointError: a loss that is not finite; names its number.
    """
    own = [p for p in parameters if p.requires_grad]
    optimizer, clipped = torch.optim.Adam(own, lr=lr), ConstantClipping(clip)
    losses = []
    for number in range(updates):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1.0 - number / updates)
        value = loss(number)
        losses.append(float(value.detach()))
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"the loss of update {number} is not finite; lower lr={lr}.")
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        clipped([p.grad for p in own if p.grad is not None])
        optimizer.step()
        if progress is not None:
            progress(number + 1, updates)
    return losses


# -- moving averages --------------------------------------------------------------------------


class MovingAverage:
    """shadow <- d shadow + (1 - d) parameter after every step, starting at the parameters.

    ``warmup``: d = min(decay, (1 + n) / (10 + n)) in update n = 1, 2, ...
    """

    def __init__(self, module: nn.Module, decay: float, warmup: bool = False) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"trainer.ema: the decay must lie in [0, 1), not {decay}.")
        self.decay, self.warmup = decay, warmup
        self._module = module
        self.start()

    def start(self) -> None:
        """Begin at the parameters as they are now."""
        self.updates = 0
        self.shadow = {n: p.detach().clone() for n, p in self._parameters()}

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((n, p) for n, p in self._module.named_parameters() if p.requires_grad)

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters after a step."""
        self.updates += 1
        n, decay = self.updates, self.decay
        if self.warmup:
            decay = min(decay, (1 + n) / (10 + n))
        live = [p.detach() for _, p in self._parameters()]
        self.to(live)
        torch._foreach_lerp_(list(self.shadow.values()), live, 1.0 - decay)

    def to(self, live: list[Tensor]) -> None:
        """Follow the parameters to their device."""
        if live and next(iter(self.shadow.values())).device != live[0].device:
            self.shadow = {
                n: v.to(p.device) for (n, v), p in zip(self.shadow.items(), live, strict=True)
            }

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The averages in place of the parameters, for evaluation."""
        self.to([p for _, p in self._parameters()])
        live = {n: p.data for n, p in self._parameters()}
        try:
            for name, parameter in self._parameters():
                parameter.data = self.shadow[name]
            yield
        finally:
            for name, parameter in self._parameters():
                parameter.data = live[name]

    def install(self) -> None:
        """Make the averages the parameters."""
        with torch.no_grad():
            for name, parameter in self._parameters():
                parameter.copy_(self.shadow[name])

    def load(self, shadow: Mapping[str, Tensor], updates: int) -> None:
        """Go on from saved averages."""
        self.updates = updates
        self.shadow = {n: shadow[n].to(v) for n, v in self.shadow.items()}
