"""Points in the plane from mixtures of Gaussians whose density is known exactly.

The smallest complete domain: it trains in seconds, and the quality of its samples is measured
against the exact distribution.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from shared.analytic import Mixture
from shared.configuration import reject_unknown
from shared.denoisers import Denoiser, Head
from shared.domains import Batch, Domain, Invalid
from shared.losses import TimeSampler
from shared.metrics import Estimate, proportion
from shared.nn.embedding import Sinusoidal, TimeEmbedding
from shared.predictions import Condition
from shared.process import Process, State
from shared.resampling import jackknife
from shared.schedules import Schedule

Point = np.ndarray
FARTHEST = 1e3


def ring(components: int, std: float) -> Mixture:
    """Equal Gaussians on the unit circle."""
    angle = torch.arange(components, dtype=torch.float64) * (2 * math.pi / components)
    return _equal(torch.stack([angle.cos(), angle.sin()], dim=1), std)


def grid(components: int, std: float) -> Mixture:
    """Equal Gaussians on a square grid over [-1, 1]^2; ``components`` is a square number."""
    side = math.isqrt(components)
    if side * side != components or side < 2:
        raise ValueError(f"toys: a grid needs 4, 9, 16, ... components, not {components}.")
    ticks = torch.linspace(-1.0, 1.0, side, dtype=torch.float64)
    return _equal(torch.cartesian_prod(ticks, ticks), std)


def spiral(components: int, std: float) -> Mixture:
    """Gaussians along one and a half turns of a spiral, denser towards its centre."""
    u = torch.linspace(0.1, 1.0, components, dtype=torch.float64)
    angle = 3 * math.pi * u
    return _equal(torch.stack([u * angle.cos(), u * angle.sin()], dim=1), std)


SHAPES = {"ring": ring, "grid": grid, "spiral": spiral}


def _equal(mean: Tensor, std: float) -> Mixture:
    weight = torch.full((len(mean),), 1.0 / len(mean), dtype=torch.float64)
    return Mixture(weight, mean, torch.full_like(mean, std**2))


class Toys(Domain[Point]):
    """Items are points, float32 arrays [2].

    Args:
        shape: 'ring', 'grid' or 'spiral'. components: number of Gaussians. std: their width.
        size: number of training points; a tenth as many validate.

    Raises:
        ValueError: an unknown shape or impossible values.
    """

    name: ClassVar[str] = "toys"

    def __init__(
        self, shape: str = "ring", components: int = 8, std: float = 0.1, size: int = 8192
    ) -> None:
        reject_unknown("toys, shape", [shape], SHAPES)
        if components < 1 or std <= 0 or size < 10:
            raise ValueError("toys: needs components >= 1, std > 0 and size >= 10.")
        self.shape, self.components, self.std, self.size = shape, components, std, size
        self.mixture = SHAPES[shape](components, std)

    def statistics(self) -> dict[str, Any]:
        own = {"shape": self.shape, "components": self.components, "std": self.std}
        return {"domain": self.name, **own, "size": self.size}

    def restore(self, statistics: Mapping[str, Any]) -> None:
        if statistics.get("domain") != self.name:
            raise ValueError(f"the checkpoint is of domain {statistics.get('domain')}, not toys.")
        values = {k: v for k, v in statistics.items() if k != "domain"}
        self.__init__(**values)  # type: ignore[misc]

    def datasets(self) -> tuple[Dataset[Any], Dataset[Any]]:
        return self._draws(self.size, 0), self._draws(self.size // 10, 1)

    def _draws(self, n: int, seed: int) -> TensorDataset:
        return TensorDataset(self.exact(n, seed).float())

    def exact(self, n: int, seed: int) -> Tensor:
        """``n`` points of the exact distribution, float64 [n, 2]."""
        return self.mixture.sample(n, torch.Generator().manual_seed(seed))

    def collate(self, records: Sequence[Any]) -> Batch:
        return Batch({"x": torch.stack([record[0] for record in records])})

    def template(self, seed: int, indices: Sequence[int], **request: Any) -> Batch:
        reject_unknown("toys, request", request, ())
        return Batch({"x": torch.zeros(len(indices), 2)})

    def decode(self, state: State, mask: Tensor | None) -> list[Point | Invalid]:
        points = state["x"].detach().to(torch.float32).numpy()
        return [_checked(point, str(i)) for i, point in enumerate(points)]

    @property
    def suffix(self) -> str:
        return ".csv"

    def read(self, path: Path) -> Iterator[Point | Invalid]:
        if not path.exists():
            raise FileNotFoundError(f"no file {path}.")
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                if "points" not in arrays:
                    raise ValueError(f"{path}: no array 'points' in it.")
                for i, row in enumerate(arrays["points"]):
                    yield _checked(row, f"{path.name}, row {i}")
        elif path.suffix == ".csv":
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip() != "x,y":
                        yield _parsed(line, f"{path.name}, line {number}")
        else:
            raise ValueError(f"{path}: toys are read from .csv and .npz files.")

    def write(self, path: Path, items: Iterable[Point]) -> None:
        if path.suffix == ".npz":
            old = (
                [p for p in self.read(path) if not isinstance(p, Invalid)] if path.exists() else []
            )
            np.savez(path, points=np.stack([*old, *items]))
        elif path.suffix == ".csv":
            new = not path.exists() or path.stat().st_size == 0
            with path.open("a", encoding="utf-8") as out:
                out.write("x,y\n" * new)
                out.writelines(f"{float(x)!r},{float(y)!r}\n" for x, y in items)
        else:
            raise ValueError(f"{path}: toys are written to .csv and .npz files.")

    def metrics(
        self, items: Sequence[Point | Invalid], reference: Sequence[Point] | None = None
    ) -> dict[str, Estimate]:
        """Share of valid points; energy distance and sliced 2-Wasserstein distance to
        ``reference``, or to as many points of the exact distribution; share of points within
        three standard deviations of a component."""
        points = np.array([i for i in items if not isinstance(i, Invalid)]).reshape(-1, 2)
        out = {"valid": proportion(len(points), len(items))}
        if not len(points):
            return out
        truth = self.exact(max(len(points), 1000), 2).numpy()
        if reference is not None:
            truth = np.asarray(reference, dtype=np.float64).reshape(-1, 2)
        out["energy_distance"] = jackknife(lambda p: energy_distance(p, truth), points[:2000])
        out["sliced_wasserstein"] = jackknife(lambda p: sliced_wasserstein(p, truth), points)
        if reference is None:
            gap = points[:, None] - self.mixture.mean.numpy()
            near = (np.square(gap).sum(-1) < (3 * self.std) ** 2).any(1)
            out["on_a_component"] = proportion(int(near.sum()), len(near))
        return out

    def view(self, items: Sequence[Point]) -> str:
        """A scatter plot as SVG."""
        dots = "".join(f'<circle cx="{x:.3f}" cy="{-y:.3f}" r="0.012"/>' for x, y in items[:3000])
        return (
            '<svg viewBox="-1.6 -1.6 3.2 3.2" width="360" height="360" role="img" '
            f'aria-label="{len(items)} points"><g fill="#2b6cb0" fill-opacity="0.6">{dots}</g>'
            "</svg>"
        )


def _checked(values: Any, record: str) -> Point | Invalid:
    point = np.asarray(values, dtype=np.float32)
    if point.shape != (2,):
        return Invalid(record, f"{point.size} numbers instead of 2")
    if not np.isfinite(point).all() or np.abs(point).max() > FARTHEST:
        return Invalid(record, f"not a finite point within {FARTHEST:g}")
    return point


def _parsed(line: str, record: str) -> Point | Invalid:
    try:
        return _checked([float(number) for number in line.split(",")], record)
    except ValueError:
        return Invalid(record, "not numbers separated by a comma")


def energy_distance(a: np.ndarray, b: np.ndarray, block: int = 2000) -> float:
    """2 E|X-Y| - E|X-X'| - E|Y-Y'| (Szekely & Rizzo 2013) between samples [n, d] and [m, d],
    without the pairs of a point with itself, so its mean is zero for equal distributions. At most
    ``block`` points of each sample are used."""
    x, y = (torch.tensor(v[:block].copy(), dtype=torch.float64) for v in (a, b))
    within = [torch.cdist(v, v).sum() / max(len(v) * (len(v) - 1), 1) for v in (x, y)]
    return float(2 * torch.cdist(x, y).mean() - within[0] - within[1])


def sliced_wasserstein(a: np.ndarray, b: np.ndarray, directions: int = 64) -> float:
    """Root mean square over ``directions`` evenly spaced projections of the one-dimensional
    2-Wasserstein distance between plane samples [n, 2] and [m, 2], by 512 quantiles."""
    angle = (np.arange(directions) + 0.5) * np.pi / directions
    axes = np.stack([np.cos(angle), np.sin(angle)])
    levels = (np.arange(512) + 0.5) / 512
    gap = np.quantile(a @ axes, levels, axis=0) - np.quantile(b @ axes, levels, axis=0)
    return float(np.sqrt(np.square(gap).mean()))


# -- the network ------------------------------------------------------------------------------


class PlaneNetwork(nn.Module):
    """Residual layers on a point, [batch, 2] -> [batch, 2], modulated by the time."""

    def __init__(self, width: int = 128, depth: int = 3) -> None:
        super().__init__()
        self.time = TimeEmbedding(64, width, Sinusoidal(64, max_period=100.0))
        self.enter = nn.Linear(2, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.leave = nn.Linear(width, 2)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(
        self, inputs: State, code: Tensor, mask: Tensor | None, cond: Condition | None
    ) -> State:
        time = self.time(code)
        h = self.enter(inputs["x"])
        for layer in self.layers:
            h = h + nn.functional.silu(layer(h + time))
        return {"x": self.leave(h)}


def plane_denoiser(
    domain: Toys,
    schedule: Schedule,
    width: int = 128,
    depth: int = 3,
    head: Head | None = None,
    times: TimeSampler | None = None,
) -> Denoiser:
    """The denoiser of a toy."""
    process = Process.single(schedule)
    return Denoiser(PlaneNetwork(width, depth), process, head, times=times)
