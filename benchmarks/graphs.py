"""Published tables of graph generation from published GDSS checkpoints, and the speed of the
networks beside their plain formulation.

    python benchmarks/graphs.py CHECKPOINT --data DATA [--test-indices JSON] [--n N] [--seeds K]
        [--steps 50,100,1000] [--solver published|s4|pc|sde|sde_2m|ddim|dpmpp_2m|unipc|heun]
        [--speed] [--small] [--out FOLDER]

DATA is what the model was trained on (any format of molediff.graphs.data, or SMILES): it gives
the numbers of nodes, the training set for novelty and the test set to compare with. --small takes
few samples and steps: it shows that the command works, and its figures mean nothing.
Writes JSON and a markdown table.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from molediff.graphs import convert
from molediff.graphs.convert import Published
from molediff.graphs.models import graph_process, prior_std
from molediff.graphs.pairs import PairDomain
from shared import solvers
from shared.configuration import build
from shared.denoisers import Denoiser
from shared.process import Process
from shared.schedules import Schedule
from shared.solvers.base import Solver

METRICS = {
    "graphs": ("degree", "clustering", "orbit", "average", "spectrum"),
    "molecular_graphs": ("valid_without_correction", "unique", "novel", "nspdk", "fcd"),
}


# -- the plain formulation --------------------------------------------------------------------


class PlainNetwork:
    """The published networks one channel and one head after the other on full matrices, from
    state dictionaries with the original names. Called like :class:`GraphScoreNetwork`."""

    def __init__(
        self, nodes: Mapping[str, Tensor], edges: Mapping[str, Tensor], heads: int = 4
    ) -> None:
        self.nodes, self.edges, self.heads = dict(nodes), dict(edges), heads

    def __call__(self, inputs: Mapping[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
        x, a, flags = inputs["nodes"], inputs["edges"], mask.to(inputs["nodes"].dtype)
        return {
            "nodes": self._node_score(x, a, flags),
            "edges": self._edge_score(x, a, flags),
        }

    def _node_score(self, x: Tensor, a: Tensor, flags: Tensor) -> Tensor:
        state, seen = self.nodes, [x]
        if "layers.0.weight" in state:
            for k in range(_layers(state)):
                x = torch.tanh(self._convolve(state, f"layers.{k}", x, a))
                seen.append(x)
        else:
            stack = torch.stack([a, a @ a], -1)
            for k in range(_layers(state)):
                x, stack = self._attend(state, f"layers.{k}", x, stack, flags)
                x = torch.tanh(x)
                seen.append(x)
        return _perceptron(state, "final", torch.cat(seen, -1)) * flags[..., None]

    def _edge_score(self, x: Tensor, a: Tensor, flags: Tensor) -> Tensor:
        stack = torch.stack([a, a @ a], -1)
        seen = [stack]
        for k in range(_layers(self.edges)):
            x, stack = self._attend(self.edges, f"layers.{k}", x, stack, flags)
            seen.append(stack)
        score = _perceptron(self.edges, "final", torch.cat(seen, -1))[..., 0]
        return score * (1 - torch.eye(score.shape[1])) * flags[:, :, None] * flags[:, None]

    @staticmethod
    def _convolve(state: Mapping[str, Tensor], name: str, x: Tensor, a: Tensor) -> Tensor:
        a = a.clone()
        a.diagonal(dim1=1, dim2=2).fill_(1.0)
        scale = a.sum(-1).clamp(min=1.0) ** -0.5
        norm = scale[:, :, None] * a * scale[:, None, :]
        return norm @ (x @ state[f"{name}.weight"]) + state[f"{name}.bias"]

    def _attend(
        self, state: Mapping[str, Tensor], name: str, x: Tensor, stack: Tensor, flags: Tensor
    ) -> tuple[Tensor, Tensor]:
        values, scores = [], []
        for c in range(stack.shape[-1]):
            q, k, v = (
                self._convolve(state, f"{name}.attn.{c}.gnn_{kind}", x, stack[..., c])
                for kind in "qkv"
            )
            width = q.shape[-1] // self.heads
            products = [
                torch.tanh(a @ b.transpose(1, 2) / math.sqrt(v.shape[-1]))
                for a, b in zip(q.split(width, -1), k.split(width, -1), strict=True)
            ]
            mean = torch.stack(products).mean(0)
            scores.append((mean + mean.transpose(1, 2)) / 2)
            values.append(v)
        x = _perceptron(state, f"{name}.multi_channel", torch.cat(values, -1))
        edges = _perceptron(state, f"{name}.mlp", torch.cat([torch.stack(scores, -1), stack], -1))
        both = flags[:, :, None, None] * flags[:, None, :, None]
        return torch.tanh(x * flags[..., None]), (edges + edges.transpose(1, 2)) * both


def _layers(state: Mapping[str, Tensor]) -> int:
    return 1 + max(int(key.split(".")[1]) for key in state if key.startswith("layers."))


def _perceptron(state: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    k = 0
    while f"{name}.linears.{k}.weight" in state:
        x = F.elu(x) if k else x
        x = F.linear(x, state[f"{name}.linears.{k}.weight"], state[f"{name}.linears.{k}.bias"])
        k += 1
    return x


def speed(published: Published, denoiser: Denoiser, batch: int, repeats: int) -> dict[str, Any]:
    """Processor time of one call of both formulations, alternating on one thread."""
    torch.set_num_threads(1)
    nodes = int(published.config["data"]["max_node_num"])
    features = int(published.config["data"]["max_feat_num"])
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(batch, nodes, features, generator=gen)
    a = torch.randn(batch, nodes, nodes, generator=gen).triu(1)
    inputs, mask = {"nodes": x, "edges": a + a.transpose(1, 2)}, torch.ones(batch, nodes) > 0
    plain = PlainNetwork(published.nodes, published.edges)
    ways: dict[str, Callable[[], Any]] = {
        "plain": lambda: plain(inputs, mask),
        "ours": lambda: denoiser.backbone(inputs, None, mask),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        difference = max(
            float((ways["plain"]()[key] - ways["ours"]()[key]).abs().max()) for key in inputs
        )
        for _ in range(repeats):
            for name, way in ways.items():
                start = time.process_time()
                way()
                seconds[name].append(time.process_time() - start)
    best = {name: min(values) for name, values in seconds.items()}
    per_thousand = {name: 2000 * 1000 * value / batch for name, value in best.items()}
    return {
        "batch": batch,
        "seconds_per_call": best,
        "ratio": best["plain"] / best["ours"],
        "seconds_per_1000_graphs_of_2000_calls": per_thousand,
        "largest_difference": difference,
    }


# -- sampling ---------------------------------------------------------------------------------


def matched(process: Process, moments: Mapping[str, float]) -> Process:
    """The same process, started with the second moments of the data at t_max."""
    schedules = {name: part.schedule for name, part in process.fields.items()}
    prior = {name: prior_std(schedules[name], moments[name]) for name in schedules}
    return graph_process(schedules["nodes"], schedules["edges"], prior)


def recipe(
    name: str, published: Published, steps: int | None
) -> tuple[Solver, Callable[[Schedule], list[float]]]:
    """A solver and its times for about ``steps`` denoiser calls."""
    settings = published.sampler
    if name == "published":
        solver = build(convert.solver_config(settings))
        scales = settings["scales"] if steps is None else steps
        grid = solvers.ScoreSDETimes(eps=settings["eps"])
        return solver, lambda lead: grid(lead, scales)
    calls = 100 if steps is None else steps
    exact = solvers.DPMSolverMultistep
    langevin = solvers.Langevin(0.15, noise_scale=0.7)
    found: dict[str, Solver] = {
        "s4": solvers.SymmetricSplitting(langevin),
        "pc": solvers.PredictorCorrector(exact(points=1, eta=1.0), langevin),
        "sde": exact(points=1, eta=1.0, denoise_to_zero=True),
        "sde_2m": exact(points=2, eta=1.0, denoise_to_zero=True),
        "ddim": exact(points=1, denoise_to_zero=True),
        "dpmpp_2m": exact(points=2, denoise_to_zero=True),
        "unipc": solvers.UniPC(),
        "heun": solvers.Heun(),
    }
    if name not in found:
        raise SystemExit(f"--solver {name}: choose published, {', '.join(found)}.")
    solver = found[name]
    times = solvers.PowerTimes(t_end=1e-2)
    return solver, lambda lead: times(lead, max(solver.intervals(calls), 1))


def generate(
    denoiser: Denoiser,
    process: Process,
    domain: PairDomain[Any],
    solver: Solver,
    times: Sequence[float],
    n: int,
    seed: int,
    batch: int,
) -> list[Any]:
    """Items from a generator of the whole batch, as the published code draws."""
    gen = torch.Generator().manual_seed(seed)
    items: list[Any] = []
    while len(items) < n:
        wanted = min(batch, n - len(items))
        blank = domain.template(seed, range(len(items), len(items) + wanted))
        mask = blank.mask

        def draw(name: str, j: int, blank: Any = blank, mask: Any = mask) -> Tensor:
            white = torch.randn(blank.state[name].shape, generator=gen)
            return process.fields[name].geometry.noise(white, mask)

        def project(name: str, x: Tensor, mask: Any = mask) -> Tensor:
            return process.fields[name].geometry.project(x, mask)

        with torch.no_grad():
            state = solver.solve(
                process,
                lambda x, t, mask=mask: denoiser(x, t, mask),
                process.prior({name: draw(name, 0) for name in blank.state}),
                times,
                draw,
                project,
            )
        items += domain.decode(state, mask)
    return items


def row(
    published: Published,
    denoiser: Denoiser,
    domain: PairDomain[Any],
    name: str,
    steps: int | None,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Mean and standard deviation of the metrics over seeds."""
    solver, grid = recipe(name, published, steps)
    process = denoiser.process
    if name != "published" and not arguments.published_prior:
        process = matched(process, arguments.moments)
    times = grid(process.lead)
    calls = 0

    def counted(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        return Denoiser.forward(denoiser, *given, **named)

    values: dict[str, list[float]] = {}
    start = time.perf_counter()
    for seed in range(arguments.seeds):
        items = generate(
            counted, process, domain, solver, times, arguments.n, seed, arguments.batch
        )
        for key, estimate in arguments.measure(items).items():
            values.setdefault(key, []).append(float(estimate))
    batches = math.ceil(arguments.n / arguments.batch) * arguments.seeds
    return {
        "solver": name,
        "calls": calls / batches,
        "n": arguments.n,
        "seeds": arguments.seeds,
        "seconds": time.perf_counter() - start,
        "metrics": {
            key: {"mean": float(np.mean(v)), "std": float(np.std(v, ddof=1)) if v[1:] else None}
            for key, v in values.items()
        },
    }


# -- the command ------------------------------------------------------------------------------


def load(arguments: argparse.Namespace) -> tuple[Published, Denoiser, PairDomain[Any]]:
    """The converted model, and its domain with the data."""
    published = convert.read(arguments.checkpoint)
    config = convert.full_config(published)["domain"]
    config.update(data=arguments.data)
    if published.name in convert.ELEMENTS:
        config.update(test_indices=arguments.test_indices)
    else:
        config.update(connected=False, features=int(published.config["data"]["max_feat_num"]))
    return published, convert.build_denoiser(published), build(config)


def measure(domain: PairDomain[Any], copies: int) -> Callable[[Sequence[Any]], dict[str, Any]]:
    """Metrics of generated items; plain graphs are compared in sets as large as the test set,
    and the sets averaged."""
    reference = domain.test_items or domain.training_items
    if domain.name != "graphs":
        training = domain.training_items
        from molediff.graphs.chemistry import molecule_metrics

        return lambda items: molecule_metrics(items, reference, training)
    size = len(reference)

    def graphs(items: Sequence[nx.Graph]) -> dict[str, float]:
        sets = [items[k * size : (k + 1) * size] for k in range(copies)]
        found = [domain.metrics(part, reference) for part in sets if len(part) == size]
        return {key: float(np.mean([float(f[key]) for f in found])) for key in found[0]}

    return graphs


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    out.add_argument("checkpoint", type=Path)
    out.add_argument("--data", required=True)
    out.add_argument("--test-indices")
    out.add_argument("--n", type=int, help="samples per seed")
    out.add_argument("--seeds", type=int, default=3)
    out.add_argument("--batch", type=int, default=1024)
    out.add_argument("--steps", default="", help="comma-separated; empty: as published")
    out.add_argument("--solver", default="published", help="comma-separated")
    out.add_argument("--published-prior", action="store_true", help="N(0, 1) for every solver")
    out.add_argument("--speed", action="store_true", help="time the networks, sample nothing")
    out.add_argument("--small", action="store_true")
    out.add_argument("--threads", type=int, default=torch.get_num_threads())
    out.add_argument("--out", type=Path, default=Path("outputs/benchmarks/graphs"))
    return out


def table(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> str:
    """The rows in markdown."""
    lines = [
        f"| solver | calls | n x seeds | {' | '.join(keys)} |",
        "|---" * (3 + len(keys)) + "|",
    ]
    for r in rows:
        cells = []
        for key in keys:
            found = r["metrics"].get(key)
            spread = "" if not found or found["std"] is None else f" ± {found['std']:.4f}"
            cells.append("" if not found else f"{found['mean']:.4f}{spread}")
        size = f"{r['n']} x {r['seeds']}"
        lines.append(f"| {r['solver']} | {r['calls']:.0f} | {size} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    arguments = parser().parse_args(given)
    torch.set_num_threads(arguments.threads)
    published, denoiser, domain = load(arguments)
    result: dict[str, Any] = {
        "checkpoint": arguments.checkpoint.name,
        "machine": platform.processor() or platform.machine(),
        "threads": arguments.threads,
        "torch": torch.__version__,
    }
    if arguments.speed:
        batch, repeats = (32, 2) if arguments.small else (arguments.batch, 5)
        result["speed"] = speed(published, denoiser, batch, repeats)
        text = json.dumps(result["speed"], indent=1)
    else:
        molecular = domain.name != "graphs"
        if arguments.n is None:
            arguments.n = 10_000 if molecular else max(128, 6 * len(domain.test_items))
        if arguments.small:
            arguments.n, arguments.seeds = max(len(domain.test_items[:20]), 8), 1
        arguments.moments = domain.second_moments
        arguments.measure = measure(domain, copies=6)
        steps = [int(s) for s in arguments.steps.split(",") if s] or [None]
        steps = [5] if arguments.small else steps
        result["rows"] = [
            row(published, denoiser, domain, name, count, arguments)
            for name in arguments.solver.split(",")
            for count in steps
        ]
        text = table(result["rows"], METRICS[domain.name])
    arguments.out.mkdir(parents=True, exist_ok=True)
    stem = f"{arguments.checkpoint.stem}{'_speed' if arguments.speed else ''}"
    (arguments.out / f"{stem}.json").write_text(json.dumps(result, indent=1))
    (arguments.out / f"{stem}.md").write_text(text)
    print(text)
    return result


if __name__ == "__main__":
    main()
