"""EGNN: dense blocks against edge lists, the same weights in one run.

Batch 64 of 18 and 29 atoms, 9 layers of 256: time, peak memory and difference of the outputs,
then cost against the number of atoms. Writes JSON and a markdown table.

    python benchmarks/egnn.py [--small] [--threads N] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from molediff.geometric.egnn import EGNN, EGNNOptions, MessageLayer, StepLayer
from shared.process import State

FEATURES = {"types": 5, "charges": 1}


# -- the plain formulation --------------------------------------------------------------------


def edge_list_forward(net: EGNN, inputs: State, code: Tensor) -> State:
    """The published formulation: one row per directed edge, [h_i, h_j, distances] concatenated,
    sums by scatter. Molecules of one size without padding, so no masks and no self edges."""
    b, n, _ = inputs["positions"].shape
    atoms = torch.arange(n)
    i, j = (
        pair[~torch.eye(n, dtype=torch.bool)]
        for pair in torch.meshgrid(atoms, atoms, indexing="ij")
    )
    offset = (torch.arange(b) * n)[:, None]
    rows, cols = (i + offset).flatten(), (j + offset).flatten()
    x = start = inputs["positions"].flatten(0, 1)
    time_code = code.repeat_interleave(n)[:, None]
    h = net.embedding(torch.cat([*(inputs[k].flatten(0, 1) for k in FEATURES), time_code], -1))
    first = (x[rows] - x[cols]).square().sum(1, keepdim=True)
    for block in net.blocks:
        delta = x[rows] - x[cols]
        square = delta.square().sum(1, keepdim=True)
        direction = delta / ((square + 1e-8).sqrt() + net.options.norm_constant)
        edges = torch.cat([square, first], 1)
        for layer in block.messages:
            h = _message(layer, h, rows, cols, edges)
        x = x + _step(block.step, h, direction, rows, cols, edges)
    moved = (x - start).view(b, n, 3)
    types, charges = torch.split(net.readout(h).view(b, n, -1), list(FEATURES.values()), -1)
    return {"positions": moved - moved.mean(1, keepdim=True), "types": types, "charges": charges}


def _hidden(edge: torch.nn.Module, h: Tensor, rows: Tensor, cols: Tensor, edges: Tensor) -> Tensor:
    silu = torch.nn.functional.silu
    return silu(edge.second(silu(edge.first(torch.cat([h[rows], h[cols], edges], 1)))))


def _scatter(values: Tensor, rows: Tensor, n: int) -> Tensor:
    return values.new_zeros(n, values.shape[1]).scatter_add_(
        0, rows[:, None].expand(-1, values.shape[1]), values
    )


def _message(layer: MessageLayer, h: Tensor, rows: Tensor, cols: Tensor, edges: Tensor) -> Tensor:
    messages = _hidden(layer.edge, h, rows, cols, edges)
    if layer.attention is not None:
        messages = messages * layer.attention(messages).sigmoid()
    return h + layer.node(torch.cat([h, _scatter(messages, rows, len(h))], 1))


def _step(
    layer: StepLayer, h: Tensor, direction: Tensor, rows: Tensor, cols: Tensor, edges: Tensor
) -> Tensor:
    length = layer.length(_hidden(layer.edge, h, rows, cols, edges))
    length = length if layer.range is None else length.tanh() * layer.range
    return _scatter(direction * length, rows, len(h))


# -- measuring --------------------------------------------------------------------------------


def case(
    batch: int, atoms: int, width: int, layers: int, dtype: torch.dtype | None = None
) -> tuple[EGNN, State, Tensor]:
    torch.manual_seed(0)
    net = EGNN(FEATURES, options=EGNNOptions(width=width, layers=layers, matmul_dtype=dtype))
    with torch.no_grad():  # the published start moves nothing; let positions matter
        for block in net.blocks:
            block.step.length.weight.mul_(30.0)
    x = torch.randn(batch, atoms, 3)
    state = {
        "positions": x - x.mean(1, keepdim=True),
        "types": torch.randn(batch, atoms, 5),
        "charges": torch.randn(batch, atoms, 1),
    }
    return net.eval(), state, torch.rand(batch)


def seconds(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Shortest time of each, in turns, so that a busy machine slows all alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: min(values[1:]) for name, values in times.items()}


def peak_memory(which: str, batch: int, atoms: int, width: int, layers: int) -> float:
    """MiB that one forward pass adds to the peak of a fresh process."""
    command = [sys.executable, __file__, "--memory", which]
    command += [str(v) for v in (batch, atoms, width, layers)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout)


@torch.no_grad()
def _memory_child(which: str, batch: int, atoms: int, width: int, layers: int) -> float:
    net, state, code = case(batch, atoms, width, layers)
    forward = edge_list_forward if which == "edge list" else type(net).__call__
    forward(net, {k: v[:1, :2] for k, v in state.items()}, code[:1])  # load kernels
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
    before = _peak()
    forward(net, state, code)
    return _peak() - before


def _peak() -> float:
    """Peak resident memory of this process, MiB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def bf16_speed() -> float:
    """Speed of bf16 matrix products relative to float32."""
    a, b = torch.randn(1024, 256), torch.randn(256, 256)
    c, d = a.bfloat16(), b.bfloat16()
    found = seconds({"float32": lambda: a @ b, "bf16": lambda: c @ d}, 3)
    return found["float32"] / found["bf16"]


@torch.no_grad()
def compare(batch: int, atoms: int, width: int, layers: int, repeats: int, bf16: bool) -> dict:
    """One row: dense blocks against edge lists."""
    net, state, code = case(batch, atoms, width, layers)
    plain, ours = edge_list_forward(net, state, code), net(state, code)
    runs = {
        "edge list": lambda: edge_list_forward(net, state, code),
        "blocks": lambda: net(state, code),
    }
    if bf16:
        half, _, _ = case(batch, atoms, width, layers, torch.bfloat16)
        runs["blocks, bf16"] = lambda: half(state, code)
    took = seconds(runs, repeats)
    memory = {k: peak_memory(k, batch, atoms, width, layers) for k in ("edge list", "blocks")}
    largest = max(float(v.abs().max()) for v in plain.values())
    difference = max(float((plain[k] - ours[k]).abs().max()) for k in plain)
    return {
        "batch": batch,
        "atoms": atoms,
        "seconds": took,
        "speedup": {k: took["edge list"] / v for k, v in took.items() if k != "edge list"},
        "peak_MiB": memory,
        "memory_ratio": memory["blocks"] / memory["edge list"],
        "largest_output": largest,
        "difference": difference,
        "relative_difference": difference / largest,
    }


@torch.no_grad()
def cost(atoms: int, width: int, layers: int, repeats: int) -> dict:
    """Milliseconds per molecule and peak memory against the number of atoms."""
    batch = max(1, 64 * 18**2 // atoms**2)
    net, state, code = case(batch, atoms, width, layers)
    took = seconds({"blocks": lambda: net(state, code)}, repeats)["blocks"]
    return {
        "atoms": atoms,
        "batch": batch,
        "ms_per_molecule": 1000 * took / batch,
        "us_per_pair": 1e6 * took / batch / atoms**2,
        "peak_MiB": peak_memory("blocks", batch, atoms, width, layers),
    }


def table(results: dict) -> str:
    lines = [
        f"EGNN, {results['layers']} layers of {results['width']}, {results['threads']} threads, "
        f"{results['cpu']}, torch {results['torch']}; bf16 products run at "
        f"{results['bf16_speed']:.2f} times the speed of float32 here.",
        "",
        "| atoms | batch | edge list s | blocks s | speed-up | bf16 speed-up | peak memory MiB "
        "(edge list / blocks) | relative difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results["comparison"]:
        took, memory, gain = row["seconds"], row["peak_MiB"], row["speedup"]
        half = f"{gain['blocks, bf16']:.1f}" if "blocks, bf16" in gain else "not run"
        lines.append(
            f"| {row['atoms']} | {row['batch']} | {took['edge list']:.3f} | {took['blocks']:.3f} "
            f"| {gain['blocks']:.1f} | {half} | {memory['edge list']:.0f} / "
            f"{memory['blocks']:.0f} | {row['relative_difference']:.1e} |"
        )
    lines += [
        "",
        "| atoms | batch | ms a molecule | us a pair | peak memory MiB |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['atoms']} | {r['batch']} | {r['ms_per_molecule']:.1f} | {r['us_per_pair']:.2f} "
        f"| {r['peak_MiB']:.0f} |"
        for r in results["cost"]
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks"))
    parser.add_argument("--memory", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory:
        print(_memory_child(args.memory[0], *map(int, args.memory[1:])))
        return
    batch, width, layers, repeats = (8, 256, 2, 3) if args.small else (64, 256, 9, 5)
    sizes = (18, 29)
    speed = bf16_speed()
    results = {
        "cpu": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "threads": args.threads,
        "width": width,
        "layers": layers,
        "bf16_speed": speed,
        # without hardware for it bf16 is emulated, a hundred times slower: nothing to learn
        "comparison": [compare(batch, n, width, layers, repeats, speed > 0.5) for n in sizes],
        "cost": [
            cost(n, width, layers, repeats)
            for n in ((9, 29, 60) if args.small else (9, 18, 29, 60, 100, 181))
        ],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "egnn.json").write_text(json.dumps(results, indent=2))
    (args.out / "egnn.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
