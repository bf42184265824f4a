"""The sampling loop: templates in chunks, numbered draws, a solver, decoding, streaming to disk.

Sample ``i`` of seed ``s`` uses the same random numbers whatever the chunk size, the order or an
interruption; a chunk that does not fit in memory is halved and tried again, never skipped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from shared.domains import Batch, Domain, Invalid
from shared.predictions import Denoise, Prediction
from shared.process import Process, State
from shared.randomness import Draws
from shared.solvers.base import Solver
from shared.solvers.grids import Grid
from shared.solvers.plan import After

STATUSES = ("ok", "invalid", "failed")


@dataclass(frozen=True)
class Record:
    """One line of a manifest: what became of one sample. ``status`` is 'ok', 'invalid' (the
    domain could not decode it) or 'failed' (an error); ``end`` is the size in bytes of the sample
    file once its chunk was written, None if there is no such file."""

    index: int
    seed: int
    status: str
    reason: str = ""
    end: int | None = None


@dataclass(frozen=True)
class Summary:
    """How many samples a folder or list holds by status, and what they cost. ``nfe`` is the
    number of denoiser calls per sample, counted; 0 when nothing was left to do."""

    ok: int = 0
    invalid: int = 0
    failed: int = 0
    nfe: int = 0
    seconds: float = 0.0

    @property
    def n(self) -> int:
        return self.ok + self.invalid + self.failed


class Sink(Protocol):
    """Where samples go. ``done`` are the indices that need no more work."""

    @property
    def records(self) -> Mapping[int, Record]: ...

    def put(self, records: Sequence[Record], items: Sequence[Any]) -> None: ...


@dataclass
class Memory:
    """Keeps items in a dictionary, index -> item or Invalid."""

    items: dict[int, Any] = field(default_factory=dict)
    records: dict[int, Record] = field(default_factory=dict)

    def put(self, records: Sequence[Record], items: Sequence[Any]) -> None:
        for record, item in zip(records, items, strict=True):
            self.items[record.index] = item
            self.records[record.index] = record


# -- the time grid and the solver -------------------------------------------------------------


def time_grid(process: Process, solver: Solver, grid: Grid, steps: int) -> list[float]:
    """The solver's times for a budget of ``steps`` denoiser calls, checked against the process.

    Raises:
        ValueError: too few steps, or a solver, grid and schedule that do not fit together.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: the number of denoiser calls must be at least 1.")
    intervals = solver.intervals(steps)
    name = type(solver).__name__
    if intervals < 1:
        raise ValueError(f"steps={steps} is too few for one step of {name}; give more.")
    try:
        times = grid(process.lead, intervals)
        # a last step that does not end at sigma = 0 may cost one call more
        while (solver.calls(process, times) or 0) > steps:
            if len(times) == 2:
                raise ValueError(f"steps={steps} is too few for one step; give more.")
            times = grid(process.lead, len(times) - 2)
    except ValueError as error:
        raise ValueError(
            f"solver {name}, grid {type(grid).__name__} and schedule "
            f"{type(process.lead).__name__} do not fit: {error}"
        ) from error
    return times


# -- the loop ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """Everything that turns indices into items."""

    denoise: Denoise
    process: Process
    domain: Domain[Any]
    solver: Solver
    times: Sequence[float]
    seed: int
    request: Mapping[str, Any] = field(default_factory=dict)
    device: torch.device | str = "cpu"
    after: After | None = None

    def items(self, indices: Sequence[int]) -> tuple[list[Any], int]:
        """The items of ``indices`` in order, and the number of denoiser calls."""
        batch = self.domain.template(self.seed, indices, **self.request).to(self.device)
        state, calls = self._solve(batch, Draws(self.seed, indices))
        batch = batch.to("cpu")
        try:
            state = self.domain.finish({k: v.cpu() for k, v in state.items()}, batch)
            return self.domain.decode(state, batch.mask), calls
        except Exception as error:
            raise DecodeError(f"decoding failed: {type(error).__name__}: {error}") from error

    def _solve(self, batch: Batch, draws: Draws) -> tuple[State, int]:
        calls, mask, cond = 0, batch.mask, batch.cond

        def denoise(x: State, t: float) -> Mapping[str, Prediction]:
            nonlocal calls
            calls += 1
            return self.denoise(x, t, mask, cond or None)

        def normal(name: str, number: int) -> Tensor:
            geometry = self.process.fields[name].geometry
            return draws.normal(name, number, batch.state[name], geometry, mask)

        def project(name: str, x: Tensor) -> Tensor:
            return self.process.fields[name].geometry.project(x, mask)

        # draw 0 of every field is the start; the solver's draw j is number j + 1
        white = batch.noise or {name: normal(name, 0) for name in batch.state}
        start = self.process.prior(white)
        with torch.no_grad():
            state = self.solver.solve(
                self.process,
                denoise,
                start,
                self.times,
                lambda name, number: normal(name, number + 1),
                project,
                self.after,
            )
        return state, calls


def sample(
    denoise: Denoise,
    process: Process,
    domain: Domain[Any],
    n: int,
    solver: Solver,
    steps: int,
    grid: Grid,
    seed: int,
    *,
    indices: Iterable[int] | None = None,
    request: Mapping[str, Any] | None = None,
    batch: int = 64,
    device: torch.device | str = "cpu",
    after: After | None = None,
    sink: Sink | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Generate the samples ``0..n-1`` of ``seed``; those that the sink has already are skipped.

    Args:
        denoise: predicts, guided or not. process: its fields.
        steps: budget of denoiser calls per sample.
        grid: where the steps begin and end.
        indices: the samples to make instead of ``range(n)``.
        request: the domain's own keys (class, number of atoms, ...), for ``domain.template``.
        batch: the first chunk size; an out-of-memory error halves it.
        sink: where samples go: :class:`Memory` or ``shared.sample_folders.Folder``.
        progress: called with (done, total) after every chunk.

    Raises:
        ValueError: settings that do not fit together, before any work.
        RuntimeError: not even one sample fits in memory.
        FloatingPointError, DecodeError: every sample of a chunk of two or more failed; one that
            fails among others, or alone, is recorded as 'failed' instead.
    """
    if batch < 1 or n < 1:
        raise ValueError(f"n={n}, batch={batch}: both must be at least 1.")
    sink = Memory() if sink is None else sink
    times = time_grid(process, solver, grid, steps)
    job = Job(denoise, process, domain, solver, times, seed, request or {}, device, after)
    wanted = list(range(n)) if indices is None else list(indices)
    todo = [i for i in wanted if i not in sink.records or sink.records[i].status == "failed"]
    started, calls, made = time.perf_counter(), 0, len(wanted) - len(todo)
    size = batch
    while todo:
        chunk = todo[:size]
        try:
            items, used = job.items(chunk)
        except (RuntimeError, MemoryError) as error:
            size = _halved(len(chunk), error)
            continue
        except (FloatingPointError, DecodeError):
            items, used = _one_by_one(job, chunk)
        calls = max(calls, used)
        sink.put([_record(i, seed, item) for i, item in zip(chunk, items, strict=True)], items)
        todo, made = todo[len(chunk) :], made + len(chunk)
        if progress is not None:
            progress(made, len(wanted))
    return _summary(sink, wanted, calls, time.perf_counter() - started)


class Failed(Invalid):
    """A sample that an error kept from being made."""


class DecodeError(Exception):
    """A domain's ``decode`` raised instead of saying Invalid."""


def _record(index: int, seed: int, item: Any) -> Record:
    if not isinstance(item, Invalid):
        return Record(index, seed, "ok")
    return Record(index, seed, "failed" if isinstance(item, Failed) else "invalid", item.reason)


def _one_by_one(job: Job, chunk: Sequence[int]) -> tuple[list[Any], int]:
    """A chunk in which some sample failed, sample by sample, so that the others survive.

    Raises:
        FloatingPointError, DecodeError: every sample of the chunk failed.
    """
    items: list[Any] = []
    calls = 0
    for index in chunk:
        try:
            made, used = job.items([index])
        except (FloatingPointError, DecodeError) as error:
            if len(chunk) > 1 and len(items) == len(chunk) - 1 and all(map(_failed, items)):
                raise
            made, used = [Failed(str(index), " ".join(str(error).split()))], 0
        items += made
        calls = max(calls, used)
    return items, calls


def _failed(item: Any) -> bool:
    return isinstance(item, Failed)


def _halved(size: int, error: BaseException) -> int:
    """Half the chunk after an out-of-memory error; anything else is raised again."""
    text = str(error).lower()
    memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        sign in text for sign in ("out of memory", "can't allocate memory", "alloc_failed")
    )
    if not memory:
        raise error
    if size == 1:
        raise RuntimeError(
            "out of memory for a single sample; use a smaller model, a shorter guidance or "
            f"another device ({' '.join(str(error).split())[:200]})"
        ) from error
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return size // 2


def _summary(sink: Sink, wanted: Iterable[int], nfe: int, seconds: float) -> Summary:
    status = [sink.records[i].status for i in wanted]
    counts = {name: status.count(name) for name in STATUSES}
    return Summary(**counts, nfe=nfe, seconds=seconds)
