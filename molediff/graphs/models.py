"""Denoisers of graphs: two fields, 'nodes' [b, n, F] and 'edges' [b, n, n], each with its own
schedule, and the networks of GDSS."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

from molediff.graphs.networks import GraphScoreNetwork
from shared.denoisers import Denoiser, Head
from shared.geometry import Points, SymmetricEdges
from shared.losses import TimeSampler
from shared.predictions import Noise, Parameterisation, Score
from shared.process import Field, Process
from shared.schedules import Schedule, VarianceExploding


class GraphData(Protocol):
    """What a model needs to know about its data. ``features``: width of a node; ``sizes``: number
    of nodes -> number of graphs; ``second_moments``: mean square of the entries of each field."""

    features: int
    sizes: Mapping[int, int]
    second_moments: Mapping[str, float]


def parameterisation(schedule: Schedule) -> Parameterisation:
    """What the output of a published network means: the score itself under a VE process, else
    the noise (the score is -output / sigma)."""
    return Score() if isinstance(schedule, VarianceExploding) else Noise()


def prior_std(schedule: Schedule, second_moment: float) -> float:
    """Standard deviation of a sampler's start that matches the second moment of x at t_max.

    The published schedules end with much of the signal left (alpha = 0.76 for VP with beta up to
    1), where the published start N(0, 1) is too wide.
    """
    alpha, sigma = float(schedule.alpha(schedule.t_max)), float(schedule.sigma(schedule.t_max))
    return math.hypot(alpha * math.sqrt(second_moment), sigma)


def graph_process(
    nodes: Schedule, edges: Schedule, prior: float | Mapping[str, float] | None = None
) -> Process:
    """The process of both fields. ``prior``: standard deviations of the start, 1 as published;
    None: sigma(t_max).

    Raises:
        ValueError: schedules on different time intervals.
    """
    if not isinstance(prior, Mapping):
        prior = {} if prior is None else {"nodes": prior, "edges": prior}
    return Process(
        {
            "nodes": Field(nodes, Points(), prior.get("nodes")),
            "edges": Field(edges, SymmetricEdges(), prior.get("edges")),
        }
    )


def loss_weights(domain: GraphData) -> dict[str, float]:
    """Half the entries of the nodes, and the pairs, of a graph of mean size."""
    total = max(sum(domain.sizes.values()), 1)
    nodes = sum(n * count for n, count in domain.sizes.items()) / total
    pairs = sum(n * (n - 1) / 2 * count for n, count in domain.sizes.items()) / total
    return {"nodes": 0.5 * nodes * domain.features or 1.0, "edges": pairs or 1.0}


def graph_denoiser(
    domain: GraphData,
    schedule: Schedule,
    edges: Schedule | None = None,
    node_depth: int = 3,
    edge_depth: int = 5,
    hidden: int = 32,
    attention: int = 32,
    channels: tuple[int, int, int] = (2, 8, 4),
    linears: int = 2,
    heads: int = 4,
    node_attention: bool = False,
    summed_loss: bool = True,
    prior: float | None = None,
    times: TimeSampler | None = None,
) -> Denoiser:
    """The denoiser of graphs with the networks of GDSS.

    Args:
        domain: gives the width of a node and the second moments of the data.
        schedule: of the nodes; ``edges``: of the edges, the same if not given.
        node_depth, ..., node_attention: see :meth:`GraphScoreNetwork.build`.
        summed_loss: losses of the published size, half the sum of squared errors of the arrays of
            a graph of mean size (it matters beside weight decay and clipping); else their means.
        prior: standard deviation of the sampler's start; None: matched to the data at t_max.

    Raises:
        ValueError: sizes or schedules that do not fit together.
    """
    edges = schedule if edges is None else edges
    network = GraphScoreNetwork.build(
        domain.features,
        node_depth,
        edge_depth,
        hidden,
        attention,
        (channels[0], channels[1], channels[2]),
        linears,
        heads,
        node_attention,
    )
    moments = domain.second_moments
    matched = {
        "nodes": prior_std(schedule, moments["nodes"]),
        "edges": prior_std(edges, moments["edges"]),
    }
    process = graph_process(schedule, edges, matched if prior is None else prior)
    weights = loss_weights(domain) if summed_loss else {"nodes": 1.0, "edges": 1.0}
    heads_of = {
        "nodes": Head(parameterisation(schedule), weight=weights["nodes"]),
        "edges": Head(parameterisation(edges), weight=weights["edges"]),
    }
    return Denoiser(network, process, heads_of, times=times)
