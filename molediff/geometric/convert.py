"""Weights of published EDM and EEGSDE models under this library's names."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from molediff.geometric.egnn import EGNNOptions

_LAYERS = {
    "edge_mlp.0": "edge.first",
    "edge_mlp.2": "edge.second",
    "att_mlp.0": "attention",
    "node_mlp.0": "node.0",
    "node_mlp.2": "node.2",
    "coord_mlp.0": "edge.first",
    "coord_mlp.2": "edge.second",
    "coord_mlp.4": "length",
}
_HEADS = {"node_dec": "node", "graph_dec": "molecule"}


def edm_weights(state: Mapping[str, Tensor], features: int) -> dict[str, Tensor]:
    """An EDM denoiser's state dict -> that of :class:`molediff.geometric.egnn.EGNN`.

    Args:
        state: keys that contain ``egnn.``, after any prefix (``dynamics.``, ``module.``); others,
            such as the schedule's, are left out.
        features: invariant features per atom; the published readout has rows for time and context
            too, which are never used.

    Raises:
        ValueError: no such keys, or a key that does not belong to an EGNN.
    """
    return _with_readout(_inner(state), features)


def gdm_weights(state: Mapping[str, Tensor], features: int) -> dict[str, Tensor]:
    """The same for EDM's network without equivariance -> that of
    :class:`molediff.geometric.gdm.GDM`; its keys contain ``gnn.`` in place of ``egnn.``."""
    return _with_readout(_inner(state, "gnn."), 3 + features)


def invariant_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of an EEGSDE energy network or an EDM property classifier -> that of
    :class:`molediff.geometric.egnn.InvariantEGNN`.

    Raises:
        ValueError: a key that does not belong to such a network.
    """
    inner = _inner(state) if any("egnn." in key for key in state) else dict(state)
    sublayers = 1 + max(
        (int(m[1]) for key in inner if (m := re.match(r"e_block_\d+\.gcl_(\d+)", key))), default=0
    )
    weights = {}
    for key, value in inner.items():
        if key.startswith("embedding_out."):
            continue  # a leftover of the denoiser, unused
        head, _, rest = key.partition(".")
        if head in _HEADS:
            weights[f"{_HEADS[head]}.{rest}"] = value
            continue
        key = re.sub(
            r"^e_block_(\d+)\.gcl_(\d+)",
            lambda m: f"gcl_{int(m[1]) * sublayers + int(m[2])}",
            key,
        )
        weights[_renamed(key)] = value
    return weights


def edm_options(state: Mapping[str, Tensor], **settings: object) -> EGNNOptions:
    """Width, depth, attention and sine embedding read off the weights; ``settings`` (tanh,
    normalization_factor, ...) leave no trace in them and default to those of EDM."""
    inner = _inner(state)
    width = len(inner["embedding.bias"])
    scalars = inner["e_block_0.gcl_0.edge_mlp.0.weight"].shape[1] - 2 * width
    return EGNNOptions(
        width=width,
        layers=1 + max(int(m[1]) for k in inner if (m := re.match(r"e_block_(\d+)\.", k))),
        sublayers=1 + max(int(m[1]) for k in inner if (m := re.search(r"\.gcl_(\d+)\.", k))),
        attention="e_block_0.gcl_0.att_mlp.0.weight" in inner,
        sin_embedding=scalars > 2,
        **settings,  # type: ignore[arg-type]
    )


def _with_readout(inner: Mapping[str, Tensor], rows: int) -> dict[str, Tensor]:
    weights = {}
    for key, value in inner.items():
        if key.startswith("embedding_out."):
            weights["readout" + key.removeprefix("embedding_out")] = value[:rows].clone()
        else:
            weights[_renamed(key)] = value
    return weights


def _inner(state: Mapping[str, Tensor], name: str = "egnn.") -> dict[str, Tensor]:
    start = re.compile(rf"(^|\.){re.escape(name)}")
    inner = {key[m.end() :]: value for key, value in state.items() if (m := start.search(key))}
    if not inner:
        raise ValueError(
            f"no EGNN weights among {len(state)} keys (first: {next(iter(state), None)}); "
            f"expected keys with '{name}'."
        )
    return inner


def _renamed(key: str) -> str:
    if key.startswith("embedding."):
        return key
    match = re.fullmatch(r"(?:e_block_(\d+)\.)?gcl_(\d+|equiv)\.(\w+\.\d+)\.(weight|bias)", key)
    if match is None or match[3] not in _LAYERS:
        raise ValueError(f"'{key}' is not a weight of an EGNN.")
    block, layer, part, kind = match.groups()
    if block is None:
        return f"layers.{layer}.{_LAYERS[part]}.{kind}"
    where = "step" if layer == "equiv" else f"messages.{layer}"
    return f"blocks.{block}.{where}.{_LAYERS[part]}.{kind}"
