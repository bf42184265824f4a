"""Distillation: a model that needs a few denoiser calls, made from one that needs many.

The teacher may be guided (Meng et al. 2023), so that the student needs neither guidance nor its
second call. Everything goes through predictions of x_0 and the geometries, so every denoiser can
be distilled, whatever its fields and parameterisation. A student that predicts the noise learns
badly, because at the first times its x_0 is a difference of large numbers (Salimans & Ho 2022,
Section 4): prefer models that predict velocity or data.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor

from shared import checkpoints
from shared.batches import Batches, NoisyBatch
from shared.cli import Outcome, Program, Progress
from shared.configuration import ConfigurationError, option, plain
from shared.denoisers import Denoiser
from shared.models import find_choice, find_device, guided, load
from shared.optimisation import minimise
from shared.predictions import Condition, Denoise, Prediction
from shared.process import Process, State, alpha_sigma
from shared.solvers.grids import Grid

METHODS = ("progressive", "consistency", "consistency_training")
HUBER = 0.00054  # of the pseudo-Huber loss, times the root of the dimension (Song & Dhariwal 2024)
Loss = Callable[[NoisyBatch, int], Tensor]


def progressive_loss(teacher: Denoise, student: Denoiser, times: Sequence[float]) -> Loss:
    """The student's DDIM step over two intervals of ``times`` against the teacher's two steps
    (Salimans & Ho 2022, Algorithm 2): the error of x_0 with the weight max(SNR, 1).

    Args:
        times: the teacher's grid, decreasing, with an even number of intervals.
    """
    if len(times) % 2 == 0:
        raise ValueError(f"distillation: {len(times) - 1} teacher steps; give an even number.")

    def loss(noisy: NoisyBatch, number: int) -> Tensor:
        batch, process = noisy.batch, student.process
        cond = batch.cond or None
        pick = 2 * _pick(noisy, (len(times) - 1) // 2)
        t, middle, s = (_at(times, pick + k, batch.state) for k in range(3))
        x = process.perturb(batch.state, t, noisy.noise)
        with torch.no_grad():
            halfway = ddim(process, teacher, x, t, middle, batch.mask, cond)
            end = ddim(process, teacher, halfway, middle, s, batch.mask, cond)
        found = student(x, t, batch.mask, cond)
        return _error(process, found, _implied(process, x, end, t, s), t, batch.mask)

    return loss


def consistency_loss(
    student: Denoiser, times: Sequence[float], teacher: Denoise | None = None
) -> Loss:
    """The student's x_0 at one time against its own x_0 at the next on the same trajectory, which
    at the last time is the state itself. The trajectory is a DDIM step of the teacher (consistency
    distillation), or without one the line of the same noise (consistency training); Song et al.
    2023, with the pseudo-Huber distance and without a slow copy of the student as in Song &
    Dhariwal 2024."""

    def loss(noisy: NoisyBatch, number: int) -> Tensor:
        batch, process = noisy.batch, student.process
        mask, cond = batch.mask, batch.cond or None
        pick = _pick(noisy, len(times) - 1)
        t, s = (_at(times, pick + k, batch.state) for k in range(2))
        x = process.perturb(batch.state, t, noisy.noise)
        with torch.no_grad():
            if teacher is None:
                y = process.perturb(batch.state, s, noisy.noise)
            else:
                y = ddim(process, teacher, x, t, s, mask, cond)
            later = student(y, s, mask, cond)
            target = {name: p.raw_x0 for name, p in later.items()}
            last = pick == len(times) - 2
            for name, v in y.items():
                alpha, _ = alpha_sigma(process.fields[name].schedule, s, v)
                target[name] = torch.where(_column(last, v), v / alpha, target[name])
        found = student(x, t, mask, cond)
        square = _error(process, found, target, None, mask)
        offset = HUBER * process.dim(x, mask).to(square).sqrt()
        return (square + offset**2).sqrt() - offset

    return loss


def _pick(noisy: NoisyBatch, steps: int) -> Tensor:
    """A step of each sample, stratified, [batch]."""
    return (noisy.u * steps).long().clamp(max=steps - 1)


def _at(times: Sequence[float], pick: Tensor, like: State) -> Tensor:
    table = torch.tensor(list(times), dtype=torch.float64)
    return table[pick.cpu()].to(next(iter(like.values())).device)


def _column(value: Tensor, like: Tensor) -> Tensor:
    return value.to(like.device).reshape(-1, *(1,) * (like.dim() - 1))


def ddim(
    process: Process,
    denoise: Denoise,
    x: State,
    t: Tensor,
    s: Tensor,
    mask: Tensor | None,
    cond: Condition | None,
) -> State:
    """One deterministic step of every sample from its time ``t`` to its time ``s``, [batch]."""
    predictions = denoise(x, t, mask, cond)
    out = {}
    for name, p in predictions.items():
        alpha, sigma = alpha_sigma(process.fields[name].schedule, s, x[name])
        out[name] = (alpha * p.raw_x0 + sigma * p.eps).to(x[name])
    return process.project(out, mask)


def _implied(process: Process, x: State, end: State, t: Tensor, s: Tensor) -> State:
    """The x_0 whose single DDIM step takes ``x`` at ``t`` to ``end`` at ``s``."""
    out = {}
    for name, v in x.items():
        schedule = process.fields[name].schedule
        (alpha_t, sigma_t), (alpha_s, sigma_s) = (alpha_sigma(schedule, u, v) for u in (t, s))
        ratio = sigma_s / sigma_t
        out[name] = (end[name] - ratio * v) / (alpha_s - ratio * alpha_t)
    return out


def _error(
    process: Process,
    found: Mapping[str, Prediction],
    target: State,
    t: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """Squared error of x_0 over all fields, [batch]; at times ``t`` per degree of freedom and with
    the weight max(SNR, 1) of every field."""
    terms = []
    for name, p in found.items():
        field = process.fields[name]
        square = field.geometry.norm_squared(p.raw_x0 - target[name])
        if t is not None:
            weight = torch.exp(2.0 * field.schedule.log_snr(t)).clamp(min=1.0)
            dim = field.geometry.dim(target[name], mask).clamp(min=1.0)
            square = square * (weight / dim).to(square)
        terms.append(square)
    return torch.stack(terms).sum(0)


def distilled(
    denoiser: Denoiser,
    batches: Batches,
    grid: Grid,
    steps: int,
    first: int,
    updates: int,
    lr: float = 5e-4,
    method: str = "progressive",
    teacher: Denoise | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Denoiser:
    """A copy of ``denoiser`` that makes its samples in ``steps`` calls.

    Args:
        grid: the times of the student; the teacher's contain them.
        first: calls of the first teacher. 'progressive': ``steps`` times a power of two, halved in
            every round; 'consistency': intervals of the trajectory.
        updates: steps of Adam per round, whose rate falls from ``lr`` to zero.
        method: 'progressive'; 'consistency' follows the teacher, 'consistency_training' needs
            none. Sample these two with ``solver=consistency``.
        teacher: ``denoiser`` under guidance; itself by default.

    Raises:
        ValueError: an unknown method, or numbers of steps that do not fit.
    """
    if method not in METHODS:
        raise ValueError(f"method={method}: give one of {', '.join(METHODS)}.")
    lead, rounds = denoiser.process.lead, list(halvings(first, steps, method))
    student = copy.deepcopy(denoiser)
    guide: Denoise = denoiser.eval() if teacher is None else teacher
    device = next(student.parameters()).device
    for done, count in enumerate(rounds):
        student.train()
        times = grid(lead, count)
        if method == "progressive":
            loss = progressive_loss(guide, student, times)
        else:
            follows = guide if method == "consistency" else None
            loss = consistency_loss(student, times, follows)

        def step(number: int, loss: Loss = loss, done: int = done) -> Tensor:
            return loss(batches[done * updates + number].to(device), number).mean()

        def report(made: int, _: int, done: int = done) -> None:
            if progress is not None:
                progress(done * updates + made, len(rounds) * updates)

        # dropout would blur the targets
        minimise(step, student.eval().parameters(), updates, lr, progress=report)
        guide = copy.deepcopy(student)
    return student.eval()


def halvings(first: int, steps: int, method: str = "progressive") -> Iterator[int]:
    """The teacher's numbers of steps, round by round.

    Raises:
        ValueError: ``first`` is not ``steps`` times a power of two.
    """
    if method != "progressive":
        yield first
        return
    if steps < 1 or first <= steps or first % steps or (first // steps) & (first // steps - 1):
        raise ValueError(
            f"first={first}, steps={steps}: first must be steps times a power of two, such as "
            f"{8 * max(1, steps)}."
        )
    while first > steps:
        yield first
        first //= 2


# -- the verb ---------------------------------------------------------------------------------


def distill(config: DictConfig, program: Program, progress: Progress | None = None) -> Outcome:
    """Distill the run ``config.run`` into the folder ``config.out``, which ``sample`` takes as a
    run and samples as distilled unless told otherwise."""
    model = load(config.run, config.checkpoint, config.data)
    program.check_domain(model.checkpoint.config["domain"])
    if config.out is None:
        raise ConfigurationError("distill: 'out' is missing; give out=FOLDER.")
    folder = Path(config.out)
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigurationError(f"out={folder} exists already; choose another folder.")
    denoiser = model.denoiser.to(find_device(config.device))
    grid = find_choice(config.grid, model.domain, model.checkpoint)
    records = model.records()
    student = distilled(
        denoiser,
        Batches(model.domain, denoiser.process, records, config.batch, config.seed),
        grid,
        config.steps,
        config.first,
        config.updates,
        config.lr,
        config.method,
        guided(config.guidance, denoiser, model.domain),
        progress,
    )
    solver = "ddim" if config.method == "progressive" else "consistency"
    sampling = {
        "solver": plain(option("solver", solver)),
        "grid": plain(config.grid),
        "steps": config.steps,
    }
    checkpoints.save(
        folder,
        student,
        config={**model.checkpoint.config, **sampling},
        domain=model.checkpoint.statistics,
        step=model.checkpoint.step,
    )
    return Outcome((f"distilled to {config.steps} steps: {folder}",), folder)
