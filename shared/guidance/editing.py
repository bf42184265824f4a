"""Editing: start from a given input instead of from noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shared.geometry import Geometry
from shared.process import Process, Scale, State
from shared.solvers.base import Solver
from shared.solvers.plan import After, Denoise, Draw, Project

START = 1 << 42  # the draw that noises the input


def truncate(times: Sequence[float], t_start: float) -> list[float]:
    """A decreasing grid from ``t_start`` on: that time, then the grid's times below it.

    Raises:
        ValueError: ``t_start`` is not inside the grid.
    """
    if not times[-1] < t_start <= times[0]:
        raise ValueError(
            f"t_start={t_start:.6g} is not inside the time grid ({times[-1]:.6g}, {times[0]:.6g}]."
        )
    return [t_start, *(t for t in times if t < t_start)]


@dataclass(frozen=True, eq=False)
class SDEdit(Solver):
    """Noise the input to ``t_start`` and integrate from there (Meng et al. 2022): the larger
    ``t_start``, the more realistic and the less faithful.

    ``source``: field -> the input, [batch or 1, ...]; the state that the solver is given is
    replaced. The solver keeps the grid's times below ``t_start``, so it takes fewer steps.
    """

    solver: Solver
    source: State
    t_start: float

    stochastic = True

    @property
    def order(self) -> int:  # type: ignore[override]
        return self.solver.order

    def intervals(self, nfe: int) -> int:
        return self.solver.intervals(nfe)

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
        if self.source.keys() != x.keys():
            raise ValueError(
                f"SDEdit: the source has fields {sorted(self.source)}, the state {sorted(x)}."
            )
        grid = truncate(times, self.t_start)
        source = {name: self.source[name].to(v).expand_as(v) for name, v in x.items()}
        noise = {name: draw(name, START) for name in x}
        start = process.perturb(source, self.t_start, noise)
        return self.solver.solve(process, denoise, start, grid, draw, project, after)


def interpolate(process: Process, first: State, second: State, share: Scale) -> State:
    """Latents between two latents of the same fields, along the sphere (Shoemake 1985), which
    keeps the length that noise has; ``share`` in [0, 1] or [batch]. Encode data with an inversion
    (:class:`shared.solvers.ancestral.DDIMInversion`) first."""
    return {
        name: _slerp(process.fields[name].geometry, a, second[name], share)
        for name, a in first.items()
    }


def _slerp(geometry: Geometry, a: torch.Tensor, b: torch.Tensor, share: Scale) -> torch.Tensor:
    lengths = (geometry.norm_squared(a) * geometry.norm_squared(b)).sqrt()
    cosine = geometry.inner(a, b) / lengths.clamp(min=torch.finfo(a.dtype).tiny)
    angle = torch.arccos(cosine.clamp(-1.0, 1.0)).clamp(min=1e-6)
    column = (-1, *(1,) * (a.dim() - 1))
    left = torch.sin((1.0 - share) * angle) / torch.sin(angle)
    right = torch.sin(share * angle) / torch.sin(angle)
    return left.reshape(column) * a + right.reshape(column) * b
