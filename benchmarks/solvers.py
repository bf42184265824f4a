"""Solvers on an analytic mixture: error against the number of denoiser calls, and the loop's
overhead beside the schedulers of diffusers.

    python benchmarks/solvers.py [--out outputs/benchmarks/solvers] [--small] [--threads 2]

Writes solvers.json, solvers.md and solvers.png. ``--small`` runs in seconds and shows only that
everything works.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import markdown, publish

from shared import solvers as S
from shared.analytic import AnalyticDenoiser, Mixture
from shared.predictions import Prediction
from shared.process import Process, State, alpha_sigma
from shared.schedules import VPDiscrete, VPLinear
from shared.solvers.base import Solver

NFE = (5, 6, 8, 10, 12, 15, 20, 25, 50)
SCHEDULE, START, END = VPLinear(), 1.0, 1e-3
DETERMINISTIC: dict[str, Solver] = {
    "DDIM": S.DDIM(),
    "Euler": S.Euler(),
    "Heun": S.Heun(),
    "DPM2": S.DPM2(),
    "LMS-4": S.LMS(4),
    "DPM-Solver-2M": S.DPMSolverMultistep(2, "noise"),
    "DPM-Solver-fast": S.DPMSolverSinglestep(3, "noise"),
    "DPM-Solver++(2S)": S.DPMSolverSinglestep(2),
    "DPM-Solver++(3S)": S.DPMSolverSinglestep(3),
    "DPM-Solver++(2M)": S.DPMSolverMultistep(2),
    "DPM-Solver++(3M) published": S.DPMSolverMultistep(3),
    "DPM-Solver++(3M)": S.DPMSolverMultistep(3, published=False),
    "DEIS tAB2": S.DEIS(3),
    "DEIS log-rho AB2": S.DEIS(3, "log_rho"),
    "UniPC-2": S.UniPC(2),
    "UniPC-3": S.UniPC(3),
    "UniPC-3, no lowering": S.UniPC(3, lower_final_below=0),
}
STOCHASTIC: dict[str, Solver] = {
    "DDPM": S.DDPM(),
    "Euler-Maruyama": S.EulerMaruyama(),
    "reverse diffusion": S.ReverseDiffusion(),
    "DPM2 ancestral": S.DPM2(eta=1.0),
    "DPM-Solver++(2S) ancestral": S.DPMpp2SAncestral(),
    "SDE-DPM-Solver++(2M)": S.DPMSolverMultistep(2, eta=1.0),
    "SDE-DPM-Solver++(3M)": S.DPMSolverMultistep(3, solver_type="taylor", eta=1.0),
    "dpmpp_sde": S.DPMSolverSDE(),
}
ADAPTIVE: dict[str, Solver] = {
    "DPM-Solver-12 adaptive": S.DPMSolverAdaptive(2),
    "DPM-Solver-23 adaptive": S.DPMSolverAdaptive(3),
    "RK45 1e-3": S.RK45(1e-3, 1e-3),
}


def mixture(dim: int = 4, components: int = 5) -> Mixture:
    """A fixed mixture with means in [-1, 1]^dim."""
    gen = torch.Generator().manual_seed(1)
    weight = torch.rand(components, generator=gen, dtype=torch.float64) + 0.5
    mean = 2.0 * torch.rand(components, dim, generator=gen, dtype=torch.float64) - 1.0
    var = 0.02 + 0.1 * torch.rand(components, dim, generator=gen, dtype=torch.float64)
    return Mixture(weight / weight.sum(), mean, var)


class Counted:
    """A denoiser that counts its calls."""

    def __init__(self, denoise: Callable[..., Mapping[str, Prediction]]) -> None:
        self.denoise, self.calls = denoise, 0

    def __call__(self, x: State, t: float | Tensor) -> Mapping[str, Prediction]:
        self.calls += 1
        return self.denoise(x, t)


def solve(solver: Solver, x: Tensor, intervals: int, seed: int) -> tuple[Tensor, int]:
    """The result and the number of denoiser calls; noise keyed by (seed, draw)."""
    denoise = AnalyticDenoiser.single(Process.single(SCHEDULE), mixture())
    counted = Counted(denoise)

    def draw(name: str, j: int) -> Tensor:
        gen = torch.Generator().manual_seed(1_000_003 * (seed + 1) + j)
        return torch.randn(x.shape, generator=gen, dtype=x.dtype)

    times = S.LogSNRTimes()(SCHEDULE, intervals, START, END)
    end = solver.solve(denoise.process, counted, {"x": x}, times, draw)["x"]
    return end, counted.calls


def starts(n: int, seed: int) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=gen, dtype=torch.float64) * SCHEDULE.sigma(START)


def deterministic_rows(n: int, seed: int, budgets: tuple[int, ...]) -> list[dict[str, Any]]:
    """Root mean square distance from the solution of the ODE, per entry."""
    x, rows = starts(n, seed), []
    truth, _ = solve(S.UniPC(3, lower_final_below=0), x, 1500, seed)
    check, _ = solve(S.DPMSolverSinglestep(3), x, 3000, seed)
    floor = float((truth - check).square().mean().sqrt())
    for name, solver in DETERMINISTIC.items():
        for nfe in budgets:
            if solver.intervals(nfe) < 1:
                continue
            got, calls = solve(solver, x, solver.intervals(nfe), seed)
            rms = float((got - truth).square().mean().sqrt())
            rows.append({"solver": name, "nfe": nfe, "calls": calls, "error": rms})
    for name, solver in ADAPTIVE.items():
        got, calls = solve(solver, x, 1, seed)
        rms = float((got - truth).square().mean().sqrt())
        rows.append({"solver": name, "nfe": calls, "calls": calls, "error": rms})
    return [{**row, "n": n, "seed": seed, "reference_error": floor} for row in rows]


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|X-Y| - E|X-X'| - E|Y-Y'|, unbiased: around 0, also below, for equal distributions."""

    def inside(z: Tensor) -> Tensor:
        return torch.cdist(z, z).sum() / (len(z) * (len(z) - 1))

    return float(2.0 * torch.cdist(x, y).mean() - inside(x) - inside(y))


def stochastic_rows(n: int, seed: int, budgets: tuple[int, ...]) -> list[dict[str, Any]]:
    """Energy distance from exact draws of the end's distribution."""
    x, rows = starts(n, seed), []
    gen = torch.Generator().manual_seed(seed + 100)

    def exact() -> Tensor:
        noise = torch.randn(n, 4, generator=gen, dtype=torch.float64)
        return SCHEDULE.alpha(END) * mixture().sample(n, gen) + SCHEDULE.sigma(END) * noise

    truth = exact()
    floor = math.sqrt(statistics.mean(energy_distance(exact(), truth) ** 2 for _ in range(5)))
    for name, solver in STOCHASTIC.items():
        for nfe in budgets:
            if solver.intervals(nfe) < 1:
                continue
            got, calls = solve(solver, x, solver.intervals(nfe), seed)
            row = {"solver": name, "nfe": nfe, "calls": calls}
            rows.append({**row, "error": energy_distance(got, truth)})
    return [{**row, "n": n, "seed": seed, "exact_draws": floor} for row in rows]


# -- overhead ---------------------------------------------------------------------------------


def overhead_rows(repetitions: int, steps: int = 50) -> list[dict[str, Any]]:
    """Time per step of the whole run (tables included) with a network that costs nothing, batch
    64 of 3 x 32 x 32 in float32, ours and theirs in turns."""
    from diffusers import (
        DDIMScheduler,
        DPMSolverMultistepScheduler,
        UniPCMultistepScheduler,
    )

    gen = torch.Generator().manual_seed(0)
    x, out = torch.randn(2, 64, 3, 32, 32, generator=gen)
    schedule = VPDiscrete.linear()
    process, times = Process.single(schedule), S.PowerTimes()(schedule, steps)

    def denoise(state: State, t: float) -> dict[str, Prediction]:
        alpha, sigma = alpha_sigma(schedule, t, state["x"])
        return {"x": Prediction(state["x"], alpha, sigma, eps=out)}

    def ours(solver: Solver) -> None:
        solver.solve(process, denoise, {"x": x}, times, lambda name, j: x)

    def theirs(scheduler: Any) -> None:
        scheduler.set_timesteps(steps)
        y = x
        for t in scheduler.timesteps:
            y = scheduler.step(out, t, y).prev_sample

    table = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    pairs: dict[str, tuple[Solver, Any]] = {
        "DDIM": (S.DDIM(), DDIMScheduler(clip_sample=False, **table)),
        "DPM-Solver++(2M)": (S.DPMSolverMultistep(2), DPMSolverMultistepScheduler(**table)),
        "UniPC-2": (S.UniPC(2), UniPCMultistepScheduler(**table)),
    }
    rows = []
    for name, (solver, scheduler) in pairs.items():
        spent: dict[str, list[float]] = {"ours": [], "diffusers": []}
        for turn in range(repetitions + 1):
            for side, work in (("ours", lambda: ours(solver)), ("diffusers", lambda: theirs(scheduler))):  # fmt: skip  # noqa: B023, E501
                begin = time.perf_counter()
                work()
                if turn:  # the first turn warms up
                    spent[side].append((time.perf_counter() - begin) / steps * 1e3)
        ms = {side: statistics.median(values) for side, values in spent.items()}
        rows.append(
            {
                "solver": name,
                "ms_per_step": ms["ours"],
                "diffusers_ms_per_step": ms["diffusers"],
                "ratio": ms["ours"] / ms["diffusers"],
                "fastest_ratio": min(spent["ours"]) / min(spent["diffusers"]),
                "repetitions": repetitions,
            }
        )
    return rows


# -- output -----------------------------------------------------------------------------------


def error_table(rows: list[dict[str, Any]], budgets: tuple[int, ...]) -> str:
    fixed = [r for r in rows if r["solver"] not in ADAPTIVE]
    names = list(dict.fromkeys(r["solver"] for r in fixed))
    found = {(r["solver"], r["nfe"]): r["error"] for r in fixed}
    lines: list[list[Any]] = [
        [name, *(found.get((name, nfe)) for nfe in budgets)] for name in names
    ]
    return markdown(["calls", *map(str, budgets)], lines)


def report(result: dict[str, Any], budgets: tuple[int, ...]) -> str:
    ode, sde, cost = result["deterministic"], result["stochastic"], result["overhead"]
    adaptive = [r for r in ode if r["solver"] in ADAPTIVE]
    columns = ["solver", "ms_per_step", "diffusers_ms_per_step", "ratio", "fastest_ratio"]
    return "\n".join(
        [
            "# Solvers on an analytic mixture\n",
            "Five Gaussians in four dimensions, linear VP schedule from t = 1 to 1e-3, grids "
            "uniform in log-SNR, exact denoiser, float64.\n",
            f"Root mean square error against the probability-flow ODE (n = {ode[0]['n']}, seed "
            f"{ode[0]['seed']}; two references differ by {ode[0]['reference_error']:.1e}):\n",
            error_table(ode, budgets),
            "Adaptive solvers:\n",
            markdown(
                ["solver", "calls", "error"],
                [[r[k] for k in ("solver", "calls", "error")] for r in adaptive],
            ),  # fmt: skip
            f"Energy distance from exact draws (n = {sde[0]['n']}, seed {sde[0]['seed']}; exact "
            f"draws scatter by {sde[0]['exact_draws']:.1e} around 0):\n",
            error_table(sde, budgets),
            "Overhead, 64 x 3 x 32 x 32 float32, CPU, 50 steps:\n",
            markdown(columns, [[r[k] for k in columns] for r in cost]),
        ]
    )


def draw_figure(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(13, 5.5), layout="constrained")
    titles = {"deterministic": "RMS error of the ODE", "stochastic": "energy distance"}
    for axis, (part, title) in zip(axes, titles.items(), strict=True):
        names = list(dict.fromkeys(r["solver"] for r in result[part]))
        colours = plt.get_cmap("turbo")(torch.linspace(0.05, 0.95, len(names)).numpy())
        for name, colour in zip(names, colours, strict=True):
            rows = [r for r in result[part] if r["solver"] == name]
            points = [(r["calls"], max(r["error"], r.get("exact_draws", 0.0))) for r in rows]
            style = "*" if name in ADAPTIVE else "o-"
            axis.loglog(*zip(*points, strict=True), style, ms=4, lw=1.2, c=colour, label=name)
        axis.set(xlabel="denoiser calls", ylabel=title)
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/solvers"))
    parser.add_argument("--small", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--overhead", action="store_true", help="measure that again, keep the rest of solvers.json"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    budgets = (5, 10) if args.small else NFE
    n_ode, n_sde, repetitions = (16, 64, 2) if args.small else (128, 2048, 30)
    with torch.no_grad():
        overhead = overhead_rows(repetitions)
        if args.overhead:
            result = json.loads((args.out / "solvers.json").read_text())
            del result["environment"]
        else:
            result = {
                "deterministic": deterministic_rows(n_ode, args.seed, budgets),
                "stochastic": stochastic_rows(n_sde, args.seed, budgets),
            }
        result["overhead"] = overhead
    publish(args.out, "solvers", result, report(result, budgets))
    draw_figure(result, args.out / "solvers.png")


if __name__ == "__main__":
    main()
