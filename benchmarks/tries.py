"""Molecules whose tries compete, where every molecule has targets of its own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from molediff.design.tries import fittest
from molediff.geometric.domain import Molecules
from shared.guidance import Steered, Term
from shared.models import Model
from shared.sampling import Memory, sample


def generate(
    model: Model[Any],
    domain: Molecules,
    denoise: Any,
    terms: Sequence[Term],
    *,
    n: int,
    steps: int,
    tries: int,
    seed: int,
    batch: int,
) -> tuple[list[Any], int, float]:
    """Items, denoiser calls of each, and the seconds of all; ``terms``, told the conditions of
    ``domain``, choose among the ``tries``, which share the ``steps``."""
    process, memory = model.denoiser.process, Memory()
    solver, grid, steps = model.chosen("auto", "auto", steps)
    calls, start = 0, time.perf_counter()
    for chunk in np.array_split(np.arange(n), -(-n // batch)):
        indices, method = chunk.tolist(), solver
        if tries > 1:
            fit = fittest(domain, terms, process.lead.t_min, domain.template(seed, indices).cond)
            method = Steered.best_of(solver, fit, tries)
        made = sample(
            denoise, process, domain, len(chunk), method, steps, grid, seed,
            indices=indices, batch=len(chunk), sink=memory,
        )  # fmt: skip
        calls = max(calls, made.nfe)
    return [memory.items[i] for i in range(n)], calls, time.perf_counter() - start
