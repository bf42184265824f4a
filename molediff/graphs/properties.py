"""Guidance of graphs by properties: a network that predicts them for noisy graphs (as in MOOD,
Lee et al. 2023), and energies that need none.

A property network trains like a denoiser (``experiment=gdss_qm9_qed``); ``guidance=graph_property
guidance.run=...`` puts it to work. Energies are those of :mod:`shared.guidance`; the two fields
have noise of different size, and each feels the gradient times its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from molediff.geometric.properties import PROPERTIES, PropertyModel
from molediff.graphs.models import graph_process, parameterisation
from molediff.graphs.pairs import PairDomain
from shared.configuration import ConfigurationError
from shared.denoisers import Denoiser, Head
from shared.guidance import Function, Guided, SquaredError, Term
from shared.losses import UniformTime
from shared.models import load
from shared.nn.embedding import TimeEmbedding
from shared.predictions import Condition, Denoise
from shared.process import Process, State
from shared.schedules import Schedule


class GraphRegressor(nn.Module):
    """Numbers per graph: messages weighted by functions of the (noisy) edge and of the paths of
    length two beside it, then gated sums and means over the nodes.

    Args:
        features: width of a node's row. outputs: how many numbers.
        depth, hidden: layers and their width. channels: functions of an edge.
    """

    def __init__(
        self, features: int, outputs: int = 1, depth: int = 3, hidden: int = 64, channels: int = 4
    ) -> None:
        super().__init__()
        self.enter = nn.Linear(features, hidden)
        self.time = TimeEmbedding(16, hidden)
        self.edges = nn.Sequential(
            nn.Linear(2, 4 * channels), nn.SiLU(), nn.Linear(4 * channels, channels * depth)
        )
        self.send = nn.ModuleList(
            nn.Linear(hidden, channels * hidden, bias=False) for _ in range(depth)
        )
        self.update = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(2 * hidden), nn.Linear(2 * hidden, hidden), nn.SiLU(),
                          nn.Linear(hidden, hidden)) for _ in range(depth)
        )  # fmt: skip
        self.gate, self.leave = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.graph = nn.Sequential(
            nn.Linear(2 * hidden, hidden), nn.SiLU(), nn.Linear(hidden, outputs)
        )

    def forward(
        self,
        inputs: Mapping[str, Tensor],
        code: Tensor,
        mask: Tensor | None = None,
        cond: Condition | None = None,
    ) -> State:
        """'nodes' [b, n, F], 'edges' [b, n, n] -> {'properties': [b, outputs]}."""
        x, a = inputs["nodes"], inputs["edges"]
        real = x.new_ones(x.shape[:2]) if mask is None else mask.to(x.dtype)
        size = real.sum(1).clamp(min=1.0)[:, None]
        pairs = real[:, :, None] * real[:, None]
        weights = self.edges(torch.stack([a, (a @ a) / size[..., None].sqrt()], -1))
        weights = (weights * pairs[..., None]).unflatten(-1, (len(self.send), -1))
        h = self.enter(x) + self.time(code)[:, None]
        for k, (send, update) in enumerate(zip(self.send, self.update, strict=True)):
            sent = send(h).unflatten(-1, (weights.shape[-1], -1))
            heard = torch.einsum("bijc,bjch->bih", weights[:, :, :, k], sent)
            h = h + update(torch.cat([h, heard / size[..., None].sqrt()], -1))
        pooled = torch.sigmoid(self.gate(h)) * self.leave(h) * real[..., None]
        total = pooled.sum(1)
        return {PROPERTIES: self.graph(torch.cat([total / size, total / 10.0], -1))}


def graph_property(
    domain: PairDomain[Any],
    schedule: Schedule,
    edges: Schedule | None = None,
    depth: int = 3,
    hidden: int = 64,
    loss: str = "squared",
) -> PropertyModel:
    """Predicts ``domain.properties`` of noisy graphs.

    Raises:
        ValueError: a domain without properties.
    """
    if not domain.properties:
        raise ValueError(
            "domain.properties is empty: name what the model is to predict, such as "
            "domain.properties=[qed]."
        )
    edges = schedule if edges is None else edges
    heads = {"nodes": Head(parameterisation(schedule)), "edges": Head(parameterisation(edges))}
    network = GraphRegressor(domain.features, len(domain.properties), depth, hidden)
    process = graph_process(schedule, edges)
    return PropertyModel(network, process, heads, domain.properties, UniformTime(), loss)


# -- guidance ---------------------------------------------------------------------------------


def steer_property(
    denoise: Denoiser,
    process: Process,
    domain: PairDomain[Any],
    run: str | Path,
    property: str | None = None,  # noqa: A002 - the name that users give
    target: float | None = None,
    maximise: bool = True,
    scale: float = 1.0,
    clip: float | None = None,
) -> Guided:
    """The denoiser, drawn to a ``target`` of a property or, without one, to large (small) values.

    Args:
        run: of a property model of the same kind of graphs.
        property: one that it predicts; None: the first.
        scale: of the energy, (y - target)^2 or -y (y) of the standardised property.
        clip: largest root mean square of the gradient.

    Raises:
        ConfigurationError: a run that is no property model, or one of other graphs.
    """
    model = load(run)
    if not isinstance(model.denoiser, PropertyModel):
        raise ConfigurationError(f"guidance.run={run}: train it with model=gdss_property.")
    theirs = model.domain.statistics()
    ours = domain.statistics()
    for key in ("domain", "features", "elements"):
        if theirs.get(key) != ours.get(key):
            raise ConfigurationError(
                f"guidance.run={run}: its {key} ({theirs.get(key)}) is not the model's "
                f"({ours.get(key)})."
            )
    names = list(theirs["properties"])
    if property is not None and property not in names:
        raise ConfigurationError(f"guidance.property={property}: {run} has {', '.join(names)}.")
    name = names[0] if property is None else property
    predict = _column(model.denoiser.to(_device(denoise)), names.index(name))
    if target is None:
        sign = -1.0 if maximise else 1.0
        energy: Any = Function(lambda *given: sign * predict(*given), name)
    else:
        row = theirs["properties"][name]
        energy = SquaredError(predict, (target - row["mean"]) / row["mad"], name=name)
    return Guided(denoise, process, [Term(energy, scale, clip=clip)])


def _column(
    model: PropertyModel, column: int
) -> Callable[[State, Any, Tensor | None, Condition | None], Tensor]:
    def predict(x: State, t: Any, mask: Tensor | None, cond: Condition | None) -> Tensor:
        return model.predict(x, t, mask, cond)[:, column]

    return predict


def _device(denoise: Denoiser) -> torch.device:
    return next(denoise.parameters()).device


def edge_density(
    x: State, t: Any = None, mask: Tensor | None = None, cond: Condition | None = None
) -> Tensor:
    """Edges of a rounded graph over its pairs, [batch], made differentiable: an entry counts by
    a steep sigmoid around 0.5."""
    edges = x["edges"]
    real = edges.new_ones(edges.shape[:2]) if mask is None else mask.to(edges.dtype)
    pairs = real[:, :, None] * real[:, None] * (1.0 - torch.eye(edges.shape[1]).to(edges))
    found = (F.sigmoid((edges - 0.5) / 0.1) * pairs).sum((1, 2))
    return found / pairs.sum((1, 2)).clamp(min=1.0)


def steer_density(
    denoise: Denoise, process: Process, target: float = 0.3, scale: float = 1000.0
) -> Guided:
    """The denoiser, drawn to graphs with a share ``target`` of all possible edges, through its
    estimate of the clean graph.

    Raises:
        ValueError: the model makes no graphs.
    """
    if "edges" not in process.fields:
        raise ValueError(f"density of edges: the model has only {', '.join(process.fields)}.")
    energy = SquaredError(edge_density, target, name="edge density")
    return Guided(denoise, process, [Term(energy, scale, at="estimate")])
