"""Point operations in plain torch against the form with the full distance matrix.

    python benchmarks/points.py [--sizes 2048 16384] [--repeats 3] [--emd 512 2048 16384]

Every case runs in a process of its own: processor seconds of one thread (the best of the repeats
after one warm-up) and the memory that it adds to the process, from the peak of its resident set.
Clouds are uniform in a cube. On a GPU with pytorch3d a column has its time, too. The second part
compares the exact earth mover's distance (up to --exact points) with its approximation by
assignments in blocks, which is above it by "excess": mean over two pairs of clouds.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from common import markdown, publish
from torch import Tensor

from pointdiff import accelerated
from pointdiff.metrics import chamfer, earth_mover
from pointdiff.ops import ball_query, farthest_points, knn

K, RADIUS, CENTRES = 16, 0.1, 1024


def full_knn(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b).topk(K, largest=False).indices


def full_ball(a: Tensor, b: Tensor) -> Tensor:
    """First K indices inside the ball, by sorting the columns that count."""
    column = torch.arange(b.shape[1], device=b.device).expand(1, a.shape[1], -1)
    far = torch.cdist(a, b) >= RADIUS
    return column.masked_fill(far, b.shape[1]).topk(K, largest=False).values


def full_chamfer(a: Tensor, b: Tensor) -> Tensor:
    distance = torch.cdist(a, b).square()
    return distance.amin(2).mean(1) + distance.amin(1).mean(1)


def full_farthest(a: Tensor, b: Tensor) -> Tensor:
    """Farthest points from the matrix of all distances."""
    distance = torch.cdist(a, a)[0]
    nearest, chosen = distance[0].clone(), [0]
    for _ in range(1, CENTRES):
        chosen.append(int(nearest.argmax()))
        torch.minimum(nearest, distance[chosen[-1]], out=nearest)
    return torch.tensor(chosen)


CASES: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    f"k nearest, k = {K}": (lambda a, b: knn(a, b, K), full_knn),
    f"ball query, {K} in {RADIUS}": (lambda a, b: ball_query(a, b, RADIUS, K), full_ball),
    f"farthest points, {CENTRES}": (lambda a, b: farthest_points(a, CENTRES), full_farthest),
    "Chamfer": (chamfer, full_chamfer),
}


def measure(
    function: Callable[..., Any], n: int, repeats: int, device: str
) -> tuple[float, float]:
    """Seconds, and MiB added to the process (CPU) or the device."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(1, n, 3, generator=generator).to(device) for _ in range(2))
    clock = time.process_time if device == "cpu" else _device_clock
    tiny = (a[:, : 2 * CENTRES], b[:, : 2 * CENTRES])
    function(*(x[:, : max(CENTRES, K)] for x in tiny))
    before, seconds = _memory(device), []
    for _ in range(repeats):
        start = clock()
        function(a, b)
        seconds.append(clock() - start)
    return min(seconds), _memory(device) - before


def _device_clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def _memory(device: str) -> float:
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return torch.cuda.max_memory_allocated() / 2**20


def _child(
    name: str, which: int, n: int, repeats: int, device: str, plain: bool
) -> tuple[float, float]:
    if plain:
        accelerated.library = lambda: None  # type: ignore[assignment]
    return measure(CASES[name][which], n, repeats, device)


def alone(name: str, which: int, n: int, repeats: int, device: str, plain: bool = True) -> Any:
    """:func:`measure` in a new process, so that peaks do not mix."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(_child, name, which, n, repeats, device, plain).result()


def operations(sizes: list[int], repeats: int, device: str) -> list[list[Any]]:
    rows = []
    for name in CASES:
        for n in sizes:
            own, memory = alone(name, 0, n, repeats, device)
            full, most = alone(name, 1, n, repeats, device)
            row = [name, n, own, full, round(memory, 1), round(most, 1)]
            if accelerated.library() is not None and device != "cpu":
                row.append(alone(name, 0, n, repeats, device, plain=False)[0])
            rows.append(row)
    return rows


def earth_movers(sizes: list[int], most: int) -> list[list[Any]]:
    """Points, sweeps (None: exact), seconds for a pair of clouds, and the share above the exact
    distance, where that is found, too."""
    rows: list[list[Any]] = []
    for n in sizes:
        generator = torch.Generator().manual_seed(1)
        a, b = (torch.rand(2, n, 3, generator=generator) for _ in range(2))
        exact = None
        for sweeps in (None, 8, 32):
            if sweeps is None and n > most:
                continue
            start = time.process_time()
            found = earth_mover(a, b, sweeps)
            seconds = (time.process_time() - start) / len(a)
            exact = found if sweeps is None else exact
            excess = None if exact is None else float((found / exact - 1).mean())
            rows.append([n, sweeps, seconds, excess])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[2048, 16384])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--emd", type=int, nargs="*", default=[512, 2048, 16384])
    parser.add_argument("--exact", type=int, default=4096, help="largest clouds, exactly")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    columns = ["operation", "points", "seconds", "full matrix, seconds", "MiB", "full matrix, MiB"]
    if device != "cpu" and accelerated.library() is not None:
        columns.append("pytorch3d, seconds")
    rows = operations(given.sizes, given.repeats, device)
    movers = earth_movers(given.emd, given.exact)
    heads = ["points", "EMD", "seconds", "excess"]
    named = [[n, f"{k} sweeps" if k else "exact", *rest] for n, k, *rest in movers]
    table = markdown(columns, rows) + "\n" + markdown(heads, named)
    result = {"device": device, "columns": columns, "rows": rows, "emd": movers, "seed": 0}
    publish(given.out, "points", result, table)


if __name__ == "__main__":
    main()
