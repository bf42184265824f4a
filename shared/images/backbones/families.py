"""How families of published U-Nets name the weights of one and the same network.

Every family evaluates the same layers in the same order, so a family is a list of its own names
in that order, the names of the parts of a block, and the order of its queries, keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shared.images.backbones.unet import UNet, UNetOptions

Weights = Mapping[str, Tensor]
Options = dict[str, Any]


@dataclass(frozen=True)
class Layer:
    """One entry of ``UNet.down``, ``middle`` or ``up``: where, its level, its number among the
    blocks of the level, and whether it changes the resolution."""

    ours: str
    level: int
    number: int
    resizes: bool = False


def layers(options: UNetOptions) -> Iterator[Layer]:
    """All layers in the order of evaluation."""
    levels, blocks = range(len(options.multipliers)), options.blocks
    down, up = [], []
    for level in levels:
        down += [(level, 0, True)] * bool(level) + [(level, k, False) for k in range(blocks)]
    for level in reversed(levels):
        up += [(level, k, False) for k in range(blocks + 1)] + [(level, 0, True)] * bool(level)
    middle = [(levels[-1], 0, False), (levels[-1], 1, False)]
    for name, entries in (("down", down), ("middle", middle), ("up", up)):
        for i, entry in enumerate(entries):
            yield Layer(f"{name}.{i}", *entry)


@dataclass(frozen=True)
class Family:
    """How one family of U-Nets names its weights.

    Args:
        names: options -> our layer, attention of a layer or module -> its own.
        parts: our part of a layer -> its own names, the first that is there is taken.
        qkv: (weights, name of the attention, heads) -> queries, keys and values one after the
            other, each head by head: weight [3 * channels, channels] and bias.
    """

    names: Callable[[UNetOptions], dict[str, str]]
    parts: Mapping[str, tuple[str, ...]]
    qkv: Callable[[Weights, str, int], tuple[Tensor, Tensor]]

    def convert(self, state: Weights, options: UNetOptions) -> dict[str, Tensor]:
        """A published state dict -> that of :class:`UNet`.

        Raises:
            ValueError: a weight that is missing, left over or of another shape.
        """
        with torch.device("meta"):
            network = UNet(options)
        names, used, out = self.names(options), set[str](), {}
        for key, expected in network.state_dict().items():
            module, _, kind = key.rpartition(".")
            if module.endswith("attention.qkv"):
                place = names[module.removesuffix(".qkv")]
                heads = int(network.get_submodule(module.removesuffix(".qkv")).heads)  # type: ignore[arg-type]
                value = self.qkv(state, place, heads)[kind == "bias"]
                used |= {k for k in state if k.startswith(f"{place}.")}
            else:
                found = self._find(state, names, module, kind)
                used.add(found)
                value = state[found]
                if found.endswith(".W") and value.dim() == 2:
                    value = value.T  # stored as [inputs, outputs]
            if value.numel() != expected.numel():
                raise ValueError(
                    f"{key}: {list(value.shape)} in the checkpoint, {list(expected.shape)} here."
                )
            out[key] = value.reshape(expected.shape).contiguous()
        if left := sorted(state.keys() - used):
            raise ValueError(f"{len(left)} weights have no place here, for example '{left[0]}'.")
        return out

    def _find(self, state: Weights, names: Mapping[str, str], module: str, kind: str) -> str:
        if module in names:
            candidates = [names[module]]
        else:
            layer, part = _split(module)
            candidates = [
                f"{names[layer + ('.attention' if part.startswith('attention.') else '')]}.{own}"
                for own in self.parts[part]
            ]
        kinds = {"weight": ("weight", "W"), "bias": ("bias", "b")}.get(kind, (kind,))
        keys = [f"{name}.{k}" for name in candidates for k in kinds]
        found = next((key for key in keys if key in state), None)
        if found is None:
            raise ValueError(f"the checkpoint lacks '{keys[0]}'.")
        return found


def _split(module: str) -> tuple[str, str]:
    """'down.3.attention.norm' -> 'down.3', 'attention.norm'."""
    where, number, part = module.split(".", 2)
    return f"{where}.{number}", part


def joined(a: str, b: str, c: str) -> Callable[[Weights, str, int], tuple[Tensor, Tensor]]:
    """Queries, keys and values in three layers."""

    def qkv(state: Weights, place: str, heads: int) -> tuple[Tensor, Tensor]:
        if f"{place}.{a}.W" in state:
            weights = [state[f"{place}.{n}.W"].T for n in (a, b, c)]
            return torch.cat(weights), torch.cat([state[f"{place}.{n}.b"] for n in (a, b, c)])
        weights = [state[f"{place}.{n}.weight"].flatten(1) for n in (a, b, c)]
        return torch.cat(weights), torch.cat([state[f"{place}.{n}.bias"] for n in (a, b, c)])

    return qkv


def mixed(heads_first: bool) -> Callable[[Weights, str, int], tuple[Tensor, Tensor]]:
    """In one layer: per head queries, keys, values (ADM), or per channel of a head (EDM)."""

    def qkv(state: Weights, place: str, heads: int) -> tuple[Tensor, Tensor]:
        weight, bias = state[f"{place}.qkv.weight"].flatten(1), state[f"{place}.qkv.bias"]
        shape = (heads, 3, -1) if heads_first else (heads, -1, 3)
        order = torch.arange(len(bias)).reshape(shape)
        order = order.transpose(0, 1) if heads_first else order.permute(2, 0, 1)
        return weight[order.flatten()], bias[order.flatten()]

    return qkv


def with_null(table: Tensor) -> Tensor:
    """A label table with a row of zeros for 'any class' behind."""
    return torch.cat([table, torch.zeros_like(table[:1])])
