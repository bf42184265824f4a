"""Bits per dimension of images under a model."""

from __future__ import annotations

from typing import Any

import torch
from omegaconf import DictConfig

from shared.cli import Outcome, Program, Progress
from shared.images.domain import Images
from shared.likelihood import bits_per_dim, variational_bound
from shared.metrics import Estimate, mean
from shared.models import Model, load
from shared.randomness import Draws

BIN = 2.0 / 255.0  # width of a grey level in model units


def bits(model: Model[Any], n: int = 180, evaluations: int = 64, seed: int = 0) -> Estimate:
    """Upper bound of the bits per dimension of the first ``n`` validation images, as 8-bit images
    with uniform dequantisation, by the variational bound in continuous time.

    Args:
        evaluations: denoiser calls per image, stratified.

    Raises:
        ValueError: a model of something else.
    """
    domain, process = model.domain, model.denoiser.process
    if not isinstance(domain, Images):
        raise ValueError("bits: this model makes no images.")
    if domain.autoencoder is not None:
        raise ValueError("bits: the model gives a density of latents, and none of images.")
    held: Any = domain.datasets()[1]
    indices = list(range(min(n, len(held))))
    batch, draws = domain.collate([held[i] for i in indices]), Draws(seed, indices)
    x = batch.state["x"]
    shift = torch.special.ndtr(draws.normal("dequantisation", 0, x)) - 0.5
    state = {"x": x + BIN * shift}
    bound = variational_bound(
        process, model.denoiser, state, draws, evaluations=evaluations, cond=batch.cond or None
    )
    return mean(bits_per_dim(bound.elbo, process.dim(state), BIN).numpy())


def verb(config: DictConfig, program: Program, progress: Progress | None = None) -> Outcome:
    """``imagediff bits``."""
    model = load(config.run, config.checkpoint)
    program.check_domain(model.checkpoint.config["domain"])
    found = bits(model, config.n, config.evaluations, config.seed)
    return Outcome((f"bits per dimension (upper bound, validation images): {found}",))
