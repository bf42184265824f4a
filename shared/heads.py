"""Variance heads beside the weights of a model: training, files, and when one is used.

A domain says what network its heads are (``Domain.variance_head``); ``variance run=... kind=npr``
trains one on the frozen model, and solvers with ``variance: head`` find it there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from shared.batches import Batches
from shared.checkpoints import HEAD, write_atomically
from shared.denoisers import Denoiser
from shared.domains import Domain
from shared.optimisation import minimise
from shared.variance import VarianceHead


def new_head(
    denoiser: Denoiser, domain: Domain[Any], kind: str = "npr", seed: int = 0
) -> VarianceHead:
    """An untrained head of ``domain`` on the frozen ``denoiser``.

    Raises:
        ValueError: an unknown kind, or a domain without heads.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = domain.variance_head()
    return VarianceHead(denoiser, network.to(next(denoiser.parameters()).device), kind)


def train_head(
    head: VarianceHead,
    batches: Batches,
    updates: int,
    lr: float = 1e-3,
    progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """Fit ``head`` to the squared noise (SN) or to the squared residual (NPR) with ``updates``
    steps of Adam; the loss of every step."""
    device = next(head.head.parameters()).device

    def loss(number: int) -> torch.Tensor:
        noisy = batches[number].to(device)
        batch, t = noisy.batch, head.times.from_uniform(head.process.lead, noisy.u)
        return head.loss(batch.state, noisy.noise, t, batch.mask, batch.cond or None).mean()

    losses = minimise(loss, head.head.parameters(), updates, lr, progress=progress)
    head.eval()
    return losses


def save_head(folder: Path, head: VarianceHead) -> Path:
    """Write ``head`` beside the weights in ``folder``."""
    weights = {name: v.detach().cpu().contiguous() for name, v in head.head.state_dict().items()}
    write_atomically(folder / HEAD, save(weights, {"kind": head.kind}))
    return folder / HEAD


def load_head(folder: Path, denoiser: Denoiser, domain: Domain[Any]) -> VarianceHead:
    """The head beside the weights in ``folder``, on ``denoiser``.

    Raises:
        FileNotFoundError: no head there. ValueError: one of another network.
    """
    if not (folder / HEAD).is_file():
        raise FileNotFoundError(
            f"no variance head in {folder}; `variance run=... kind=npr` trains one."
        )
    with safe_open(folder / HEAD, "pt") as file:
        kind = (file.metadata() or {}).get("kind", "npr")
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    head = new_head(denoiser, domain, kind)
    try:
        head.head.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{folder / HEAD} belongs to another network; train it anew.") from error
    return head.eval()


def with_head(
    solver: Any, folder: Path, denoiser: Denoiser, domain: Domain[Any]
) -> Denoiser | VarianceHead:
    """``denoiser``, with the head in ``folder`` if ``solver`` wants variances per element."""
    if getattr(solver, "variance", None) != "head":
        return denoiser
    return load_head(folder, denoiser, domain)
