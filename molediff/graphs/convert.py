"""Published GDSS checkpoints (Jo et al. 2022) as checkpoints of this program.

A published file is pickled and holds a configuration, two state dictionaries with one block of
weights per channel and, for some sets, moving averages in the order of the parameters. It does
not hold the sampler's settings for all sets, nor the numbers of nodes, which the original draws
from the training graphs: both are kept with the converted weights.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import gamma
from torch import Tensor

from shared import checkpoints
from shared.configuration import build
from shared.denoisers import Denoiser
from shared.inert import read_torch

ELEMENTS = {"QM9": ("C", "N", "O", "F"), "ZINC250k": tuple("C N O F P S Cl Br I".split())}
"""Elements of the molecular sets, in the order of the node features."""

SIZES: dict[str, dict[int, int]] = {
    "QM9": {1: 3, 2: 4, 3: 8, 4: 26, 5: 115, 6: 558, 7: 2903, 8: 16541, 9: 100639},
    "community_small": {12: 21, 14: 20, 16: 15, 18: 13, 20: 11},
    "grid": dict(Counter(a * b for a in range(10, 20) for b in range(10, 20))),
}
"""Numbers of nodes of the training graphs, where they are known without the data: counted for
the first two sets, the law of the generator for grids."""

_LAWS = {
    "ZINC250k": (23.2, 4.5, 6, 38),
    "ego_small": (6.4, 3.0, 4, 18),
    "ENZYMES": (33.0, 15.0, 10, 125),
}
"""Of the other published sets: about the mean and standard deviation of the numbers of nodes, and
their range."""

_SAMPLERS: dict[str, dict[str, Any]] = {
    "QM9": {"predictor": "Reverse", "corrector": "Langevin", "snr": 0.2, "scale_eps": 0.7},
    "ZINC250k": {"predictor": "Reverse", "corrector": "Langevin", "snr": 0.2, "scale_eps": 0.9},
    "community_small": {
        "predictor": "Euler", "corrector": "Langevin", "snr": 0.05, "scale_eps": 0.7
    },
    "ego_small": {"predictor": "Euler", "corrector": "None"},
    "ENZYMES": {
        "predictor": "S4", "corrector": "None", "snr": 0.15, "scale_eps": 0.7, "use_ema": True
    },
    "grid": {
        "predictor": "Reverse", "corrector": "Langevin", "snr": 0.1, "scale_eps": 0.7,
        "use_ema": True,
    },
}  # fmt: skip
"""The published sampling settings; the attention form on ZINC250k uses scale_eps 0.8."""

_ATTENTION = "layers.0.attn.0.gnn_q.weight"
_SDES = {
    "VP": ("shared.schedules.VPLinear", "beta"),
    "VE": ("shared.schedules.VarianceExploding", "sigma"),
    "subVP": ("shared.schedules.SubVP", "beta"),
}


@dataclass(frozen=True)
class Published:
    """A published checkpoint. ``nodes``, ``edges``: state dictionaries with the original names;
    ``averages``: moving averages by the same names, or None; ``config``: as in the file."""

    config: Mapping[str, Any]
    nodes: Mapping[str, Tensor]
    edges: Mapping[str, Tensor]
    averages: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] | None = None

    @property
    def name(self) -> str:
        return str(self.config["data"]["data"])

    @property
    def attention(self) -> bool:
        """Whether the node network is the attention form."""
        return _ATTENTION in self.nodes

    @property
    def sampler(self) -> dict[str, Any]:
        """predictor, corrector, snr, scale_eps, n_steps, use_ema, eps and scales."""
        out: dict[str, Any] = {"n_steps": 1, "use_ema": False, "eps": 1e-4}
        if self.name in _SAMPLERS:
            out.update(_SAMPLERS[self.name])
            if self.attention and self.name == "ZINC250k":
                out["scale_eps"] = 0.8
        else:
            out.update({"predictor": "Euler", "corrector": "None"})
            for key in ("sampler", "sample"):
                out.update(self.config.get(key) or {})
        return {**out, "scales": int(self.config["sde"]["adj"]["num_scales"])}


def recognises(keys: frozenset[str]) -> bool:
    """Whether these are the tensors of a published GDSS checkpoint."""
    return any(re.match(r"adj_state_dict\.(module\.)?layers\.0\.attn\.0\.gnn_q", k) for k in keys)


def read(path: str | Path) -> Published:
    """Read a published checkpoint; nothing in it is executed.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: not a GDSS checkpoint, or a damaged one.
    """
    return parse(read_torch(Path(path)), Path(path))


def parse(content: Any, path: Path) -> Published:
    """The parts of a file that was read already.

    Raises:
        ValueError: not a GDSS checkpoint.
    """
    wanted = ("model_config", "x_state_dict", "adj_state_dict")
    if not isinstance(content, Mapping) or any(key not in content for key in wanted):
        raise ValueError(f"{path} is no GDSS checkpoint: it lacks one of {', '.join(wanted)}.")
    nodes, edges = (_state(content[key]) for key in wanted[1:])
    averages = None
    if "ema_x" in content and "ema_adj" in content:
        averages = (
            _averages(content["ema_x"], nodes, path),
            _averages(content["ema_adj"], edges, path),
        )
    return Published(_plain(content["model_config"]), nodes, edges, averages)


def _plain(value: Any) -> Any:
    return {str(k): _plain(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def _state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix("module."): tensor.detach().float()
        for name, tensor in state.items()
        if isinstance(tensor, Tensor)
    }


def _averages(
    ema: Mapping[str, Any], state: Mapping[str, Tensor], path: Path
) -> dict[str, Tensor]:
    shadows = list(ema["shadow_params"])
    if [s.shape for s in shadows] != [t.shape for t in state.values()]:
        raise ValueError(f"{path}: the moving averages do not have the shapes of the weights.")
    return {name: shadow.detach().float() for name, shadow in zip(state, shadows, strict=True)}


# -- weights ----------------------------------------------------------------------------------

_BLOCKS = (("query", "gnn_q"), ("key", "gnn_k"), ("value", "gnn_v"))


def stacked(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Original names, one block per channel -> names of :mod:`molediff.graphs.layers`, where
    the blocks of all channels are one tensor."""
    out = {}
    for name, tensor in state.items():
        if ".attn." not in name:
            name = name.replace(".multi_channel.", ".mix_nodes.").replace(".mlp.", ".mix_edges.")
            out[name.replace(".linear.", ".linears.0.")] = tensor
    layers = {match[1] for name in state if (match := re.match(r"(layers\.\d+)\.attn\.", name))}
    for layer in layers:
        channels = sum(f"{layer}.attn.{c}.gnn_q.weight" in state for c in range(len(state)))
        for new, old in _BLOCKS:
            for kind, suffix in (("weight", ""), ("bias", "_bias")):
                blocks = [state[f"{layer}.attn.{c}.{old}.{kind}"] for c in range(channels)]
                out[f"{layer}.{new}{suffix}"] = torch.stack(blocks)
    return out


def weights(published: Published, averaged: bool = False) -> dict[str, Tensor]:
    """The state dictionary of the converted denoiser. What the last attention layer of a network
    would give to the other network is never used, and left out.

    Raises:
        ValueError: averages asked of a checkpoint without them.
    """
    nodes, edges = published.nodes, published.edges
    if averaged:
        if published.averages is None:
            raise ValueError(f"the checkpoint for {published.name} has no moving averages.")
        nodes, edges = published.averages
    idle = {"nodes": ("query", "key", "mix_edges"), "edges": ("value", "mix_nodes")}
    out = {}
    for field, state in (("nodes", nodes), ("edges", edges)):
        last = f"layers.{_depth(state) - 1}."
        unused = tuple(f"{last}{part}" for part in idle[field])
        for name, tensor in stacked(state).items():
            if not name.startswith(unused):
                out[f"backbone.{field}.{name}"] = tensor
    return out


def _depth(state: Mapping[str, Tensor]) -> int:
    return 1 + max(int(name.split(".")[1]) for name in state if name.startswith("layers."))


# -- configuration ----------------------------------------------------------------------------


def schedule_config(sde: Mapping[str, Any], t_min: float) -> dict[str, Any]:
    """The schedule of a published SDE block.

    Raises:
        ValueError: an unknown type.
    """
    if sde["type"] not in _SDES:
        raise ValueError(f"GDSS: SDE type '{sde['type']}' is not one of {', '.join(_SDES)}.")
    target, letter = _SDES[sde["type"]]
    low, high = float(sde["beta_min"]), float(sde["beta_max"])
    return {"_target_": target, f"{letter}_min": low, f"{letter}_max": high, "t_min": t_min}


def model_config(published: Published) -> dict[str, Any]:
    """How to build the denoiser; sizes are those of the tensors.

    Raises:
        ValueError: a kind of convolution or SDE that no published checkpoint has.
    """
    config, edges = published.config, stacked(published.edges)
    kind = config["model"].get("conv", "GCN")
    if kind != "GCN" or "layers.0.query" not in edges:
        raise ValueError(f"GDSS: convolution '{kind}' is not supported, only GCN.")
    depth = _depth(published.edges)
    channels = [len(edges[f"layers.{k}.query"]) for k in range(depth)]
    width = edges["final.linears.0.weight"].shape[1]
    middle = channels[1] if depth > 1 else int(config["model"]["c_hid"])
    linears = sum(name.startswith("layers.0.mix_edges") for name in edges) // 2
    return {
        "_target_": "molediff.graphs.models.graph_denoiser",
        "edges": schedule_config(config["sde"]["adj"], _t_min(config)),
        "node_depth": _depth(published.nodes),
        "edge_depth": depth,
        "hidden": edges["layers.0.value"].shape[-1],
        "attention": edges[f"layers.{depth - 1}.query"].shape[-1],
        "channels": [channels[0], middle, width - channels[0] - middle * (depth - 1)],
        "linears": linears,
        "heads": int(config["model"]["num_heads"]),
        "node_attention": published.attention,
        "prior": 1.0,  # N(0, 1) whatever the marginal at t_max, as published
    }


def _t_min(config: Mapping[str, Any]) -> float:
    return float(config["train"].get("eps", 1e-5))


def solver_config(sampler: Mapping[str, Any], rule: str = "batch") -> dict[str, Any]:
    """The published sampler in this program's words; ``rule``: the norm of the Langevin step."""
    corrector = {
        "_target_": "shared.solvers.Langevin",
        "snr": sampler.get("snr"),
        "steps": sampler["n_steps"],
        "noise_scale": sampler.get("scale_eps"),
        "rule": rule,
    }
    if sampler["predictor"] == "S4":  # corrects whatever its settings say
        target = "shared.solvers.SymmetricSplitting"
        return {"_target_": target, "corrector": corrector, "score_sde": True}
    name = "ReverseDiffusion" if sampler["predictor"] == "Reverse" else "EulerMaruyama"
    predictor = {"_target_": f"shared.solvers.{name}", "score_sde": True}
    if sampler["corrector"] != "Langevin":
        return predictor
    target = "shared.solvers.PredictorCorrector"
    return {"_target_": target, "predictor": predictor, "corrector": corrector}


def denoiser_calls(sampler: Mapping[str, Any]) -> int:
    """Calls of the denoiser in a published run."""
    corrects = sampler["predictor"] != "S4" and sampler["corrector"] == "Langevin"
    return int(sampler["scales"]) * (1 + (int(sampler["n_steps"]) if corrects else 0))


def full_config(published: Published) -> dict[str, Any]:
    """domain, schedule and model to build again, and the published way to sample."""
    data, sampler = published.config["data"], published.sampler
    domain: dict[str, Any] = {"_target_": "molediff.graphs.domain.GraphDomain", "data": None}
    if published.name in ELEMENTS:
        domain["_target_"] = "molediff.graphs.molecular.MolecularGraphDomain"
        domain["elements"] = list(ELEMENTS[published.name])
    return {
        "domain": {**domain, "nodes": int(data["max_node_num"])},
        "schedule": schedule_config(published.config["sde"]["x"], _t_min(published.config)),
        "model": model_config(published),
        "solver": solver_config(sampler),
        "grid": {"_target_": "shared.solvers.ScoreSDETimes", "eps": float(sampler["eps"])},
        "steps": denoiser_calls(sampler),
        "published": {"name": published.name, "sampler": sampler, "config": published.config},
    }


def approximate_sizes(name: str) -> dict[int, int]:
    """Numbers of nodes of a published set from a gamma law with about its mean and standard
    deviation; empty for a set that is not known."""
    if name not in _LAWS:
        return {}
    mean, std, low, high = _LAWS[name]
    shape, scale = ((mean - low + 0.5) / std) ** 2, std**2 / (mean - low + 0.5)
    ends = gamma.cdf(np.arange(high - low + 2), shape, scale=scale)
    counts = np.rint(1e6 * np.diff(ends)).astype(int)
    return {low + k: int(count) for k, count in enumerate(counts) if count}


def statistics(published: Published, data: str | None = None) -> dict[str, Any]:
    """The constants of the domain. ``data``: the training graphs or molecules, as the domain
    reads them; without them numbers of nodes are those of :data:`SIZES`, or nearly, and a set
    that is not known has none.

    Raises:
        FileNotFoundError, ValueError: data that cannot be read, or that the model cannot hold.
    """
    config = full_config(published)["domain"]
    out: dict[str, Any] = {
        "domain": "graphs",
        "nodes": int(published.config["data"]["max_node_num"]),
        "features": int(published.config["data"]["max_feat_num"]),
        "second_moments": {"nodes": 0.0, "edges": 0.0},
    }
    if published.name in ELEMENTS:
        out.update(domain="molecular_graphs", elements=list(config["elements"]))
    else:
        config.update(features=out["features"], connected=False)
    sizes = SIZES.get(published.name) or approximate_sizes(published.name)
    if data is not None:
        domain = build({**config, "data": data, "test": 0.0})
        sizes, out["second_moments"] = domain.sizes, domain.second_moments
    return {**out, "sizes": {str(n): int(count) for n, count in sorted(sizes.items())}}


def build_denoiser(published: Published, averaged: bool | None = None) -> Denoiser:
    """The denoiser of a published checkpoint. ``averaged``: moving averages instead of weights;
    None: as published for its set."""
    config = full_config(published)
    domain = build(config["domain"])
    domain.restore(statistics(published))
    denoiser = build(config["model"], domain=domain, schedule=build(config["schedule"]))
    chosen = published.sampler["use_ema"] if averaged is None else averaged
    denoiser.load_state_dict(weights(published, bool(chosen)))
    return denoiser.eval()  # type: ignore[no-any-return]


def convert(content: Any, path: Path, out: Path, sizes: str | None = None) -> str | None:
    """Write a checkpoint folder. The weights used are those of the published sampling: moving
    averages go with them only where they were sampled from.

    Args:
        content: what :func:`shared.inert.read_torch` gave for ``path``.
        sizes: the training data, for the numbers of nodes.

    Returns:
        What the user should know about the numbers of nodes, if anything.

    Raises:
        ValueError: not a GDSS checkpoint, one of an unknown kind, or data that do not fit it.
        FileNotFoundError: no such data.
    """
    published = parse(content, path)
    constants = statistics(published, sizes)
    use = bool(published.sampler["use_ema"])
    checkpoints.save(
        out,
        build_denoiser(published, averaged=False),
        config=full_config(published),
        domain=constants,
        ema=weights(published, averaged=True) if use else None,
        step=0,
    )
    if sizes is not None or published.name in SIZES:
        return None
    if constants["sizes"]:
        return (
            "numbers of nodes follow the mean and spread of the published set; convert with "
            "sizes=DATA for those of its training graphs"
        )
    return "the checkpoint has no numbers of nodes: convert with sizes=DATA or give request.nodes"
