"""What every solver declares, and the common way to run one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from shared.solvers.plan import After, Denoise, Draw, Plan, Project, Tape, run

if TYPE_CHECKING:
    from shared.process import Process, State
    from shared.schedules import Schedule


class Solver(ABC):
    """Takes the state from ``times[0]`` to ``times[-1]`` (decreasing).

    ``order``: convergence order in the interior of a grid that is uniform in log-SNR (weak order
    for a stochastic solver); start-up rows and a lowered final order reduce what a whole run
    reaches, see each class. ``stochastic``: draws noise after the start.
    """

    order: int
    stochastic: bool

    @abstractmethod
    def solve(
        self,
        process: Process,
        denoise: Denoise,
        x: State,
        times: Sequence[float],
        draw: Draw,
        project: Project | None = None,
        after: After | None = None,
    ) -> State:
        """Integrate from ``x`` at ``times[0]``; see :func:`shared.solvers.plan.run`."""

    def intervals(self, nfe: int) -> int:
        """The largest number of grid intervals that needs at most ``nfe`` evaluations."""
        return nfe

    def calls(self, process: Process, times: Sequence[float]) -> int | None:
        """How many evaluations this grid costs; None where the state decides."""
        return None


class PlanSolver(Solver):
    """A solver that is a table. Subclasses are frozen dataclasses that implement ``write``.

    ``increasing``: an inversion, from data to noise, over increasing times.
    """

    increasing = False

    def for_field(self, name: str) -> PlanSolver:
        """This solver with the options of one field, where an option is given per field."""
        return self

    @abstractmethod
    def write(
        self, tape: Tape, schedule: Schedule, times: Sequence[float], lead: Schedule
    ) -> None:
        """Write the rows for one field. Times inside an interval are chosen in the log-SNR of
        ``lead``, so that all fields are evaluated at the same times."""

    def plan(
        self, schedule: Schedule, times: Sequence[float], lead: Schedule | None = None
    ) -> Plan:
        """The table for one field.

        Raises:
            ValueError: fewer than two times, times that do not decrease, or times outside the
                schedule.
        """
        check_times(schedule, times, increasing=self.increasing)
        tape = Tape()
        self.write(tape, schedule, times, lead or schedule)
        return tape.plan()

    def plans(self, process: Process, times: Sequence[float]) -> dict[str, Plan]:
        """The tables of all fields; see :meth:`plan`."""
        return {
            name: self.for_field(name).plan(field.schedule, times, process.lead)
            for name, field in process.fields.items()
        }

    def calls(self, process: Process, times: Sequence[float]) -> int | None:
        return next(iter(self.plans(process, times).values())).nfe

    def solve(
        self,
        process: Process,
        denoise: Denoise,
        x: State,
        times: Sequence[float],
        draw: Draw,
        project: Project | None = None,
        after: After | None = None,
    ) -> State:
        return run(self.plans(process, times), denoise, x, draw, project, after)


def check_times(schedule: Schedule, times: Sequence[float], *, increasing: bool = False) -> None:
    """Refuse a time grid that no solver can use.

    Raises:
        ValueError: says what is wrong and what to do.
    """
    if len(times) < 2:
        raise ValueError("time grid: needs at least one step (two times); set steps to 1 or more.")
    pairs = list(zip(times, times[1:], strict=False))
    if increasing and not all(a < b for a, b in pairs):
        raise ValueError("time grid: times must increase strictly for an inversion.")
    if not increasing and not all(a > b for a, b in pairs):
        raise ValueError("time grid: times must decrease strictly, from noise to data.")
    low, high = min(times), max(times)
    slack = 1e-9 * schedule.t_max
    if low < 0.0 or high > schedule.t_max + slack:
        raise ValueError(
            f"time grid: [{low:.6g}, {high:.6g}] leaves the schedule's times "
            f"[0, {schedule.t_max:.6g}]; choose t_start and t_end inside."
        )
