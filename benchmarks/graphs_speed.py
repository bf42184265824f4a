"""Speed of the networks of graphs beside their plain formulation (one channel and one head after
the other), and of the whole sampler, on one thread.

    python benchmarks/graphs_speed.py CHECKPOINT [--batch 1024] [--repeats 5] [--small]
        [--out FOLDER]

Writes JSON and a markdown table. Times are processor times, both ways by turns in one run.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from common import markdown, publish
from torch import Tensor
from torch.nn import functional as F

from molediff.graphs import convert
from molediff.graphs.convert import Published
from shared.configuration import build
from shared.denoisers import Denoiser
from shared.sampling import sample as run_sampling


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


def fill(published: Published, batch: int) -> tuple[dict[str, Tensor], Tensor]:
    """Random graphs of the largest size."""
    nodes = int(published.config["data"]["max_node_num"])
    features = int(published.config["data"]["max_feat_num"])
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(batch, nodes, features, generator=gen)
    a = torch.randn(batch, nodes, nodes, generator=gen).triu(1)
    return {"nodes": x, "edges": a + a.transpose(1, 2)}, torch.ones(batch, nodes) > 0


def networks(published: Published, denoiser: Denoiser, batch: int, repeats: int) -> dict[str, Any]:
    """Processor seconds of one call of both formulations, the best of ``repeats`` by turns."""
    inputs, mask = fill(published, batch)
    plain = PlainNetwork(published.nodes, published.edges)
    ways: dict[str, Callable[[], Any]] = {
        "plain": lambda: plain(inputs, mask),
        "ours": lambda: denoiser.backbone(inputs, None, mask),
    }
    first, second = (ways[name]() for name in ways)
    best = dict.fromkeys(ways, math.inf)
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.process_time()
            way()
            best[name] = min(best[name], time.process_time() - start)
    return {
        "seconds_per_call": best,
        "ratio": best["plain"] / best["ours"],
        "largest_difference": max(float((first[k] - second[k]).abs().max()) for k in first),
    }


def sampler(published: Published, denoiser: Denoiser, batch: int, steps: int) -> dict[str, Any]:
    """Processor seconds of the whole published sampler: for a call (with draws, projections and
    updates), and what is spent once (sizes, decoding), from two runs with a few of its steps."""
    config = convert.full_config(published)
    domain = build(config["domain"])
    domain.restore(convert.statistics(published))
    seconds: dict[int, float] = {}
    for count in (steps, 3 * steps):
        calls = convert.denoiser_calls({**published.sampler, "scales": count})
        start = time.process_time()
        run_sampling(
            *(denoiser, denoiser.process, domain, batch, build(config["solver"]), calls),
            *(build(config["grid"]), 0),
            batch=batch,
        )
        seconds[calls] = time.process_time() - start
    (few, short), (many, long) = seconds.items()
    each = (long - short) / (many - few)
    return {"seconds": seconds, "seconds_per_call": each, "seconds_once": short - few * each}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.small:
        args.batch, args.repeats = 32, 2
    published = convert.read(args.checkpoint)
    denoiser = convert.build_denoiser(published)
    with torch.no_grad():
        found = networks(published, denoiser, args.batch, args.repeats)
        whole = sampler(published, denoiser, args.batch, 3 if args.small else 10)
    calls = convert.denoiser_calls(published.sampler)
    best, per_thousand = found["seconds_per_call"], calls * 1000 / args.batch
    rows = [
        ("network, plain", best["plain"], best["plain"] * per_thousand),
        ("network, as it is here", best["ours"], best["ours"] * per_thousand),
        (
            "whole sampler, with decoding",
            whole["seconds_per_call"],
            whole["seconds_per_call"] * per_thousand + whole["seconds_once"] * 1000 / args.batch,
        ),
    ]
    head = f"s per 1,000 graphs of {calls} calls"
    text = markdown(("what", f"s per call, batch {args.batch}", head), rows)
    result = {"set": published.name, "batch": args.batch, **found, "sampler": whole}
    publish(args.out, f"graphs_speed_{published.name.lower()}", result, text)


if __name__ == "__main__":
    main()
