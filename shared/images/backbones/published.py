"""Weights of guided-diffusion, NVlabs-EDM and score_sde for :class:`UNet`, read by their keys."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import torch
from torch import Tensor

from shared.images.backbones.families import (
    Family,
    Options,
    Weights,
    joined,
    layers,
    mixed,
    with_null,
)
from shared.images.backbones.unet import PRESETS, UNetOptions

# -- guided-diffusion -------------------------------------------------------------------------


def _adm_names(o: UNetOptions) -> dict[str, str]:
    names = {
        "time_layers.0": "time_embed.0",
        "time_layers.1": "time_embed.2",
        "label": "label_emb",
        "enter": "input_blocks.0.0",
        "norm": "out.0",
        "leave": "out.2",
    }
    ups = -1
    for layer in layers(o):
        where, number = layer.ours.split(".")
        if where == "down":
            block, attention = f"input_blocks.{int(number) + 1}", 1
            names[layer.ours] = f"{block}.0"
        elif where == "middle":
            block, attention = "middle_block", 1
            names[layer.ours] = f"middle_block.{2 * layer.number}"
        else:
            ups += not layer.resizes
            block, attention = f"output_blocks.{ups}", 1
            resize = 2 if layer.level in o.attention else 1
            names[layer.ours] = f"{block}.{resize if layer.resizes else 0}"
        names[f"{layer.ours}.attention"] = f"{block}.{attention}"
    return names


_ADM = Family(
    _adm_names,
    {
        "norm1": ("in_layers.0",),
        "conv1": ("in_layers.2",),
        "embed": ("emb_layers.1",),
        "norm2": ("out_layers.0",),
        "conv2": ("out_layers.3",),
        "skip": ("skip_connection",),
        "attention.norm": ("norm",),
        "attention.proj": ("proj_out",),
    },
    mixed(heads_first=True),
)


def from_adm(state: Weights) -> tuple[Options, dict[str, Tensor]]:
    """A guided-diffusion state dict of the published kind (residual resampling, scale and shift,
    heads of 64 channels, queries, keys and values per head) -> options and weights.

    Raises:
        ValueError: another kind.
    """
    inputs = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("input_blocks."))
    outputs = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("output_blocks."))
    resizing = {k.split(".")[1] for k in state if re.match(r"output_blocks\.\d+\.[12]\.in_la", k)}
    levels = len(resizing) + 1
    blocks = outputs // levels - 1
    if inputs != levels * (blocks + 1) or any(".op." in k for k in state):
        raise ValueError(
            "this guided-diffusion network resamples by convolutions; only those with "
            "resblock_updown are read."
        )
    first = [1 + level * (blocks + 1) for level in range(levels)]
    width = state["time_embed.0.weight"].shape[1]
    widths = [len(state[f"input_blocks.{n}.0.out_layers.3.bias"]) for n in first]
    options = {
        **PRESETS["adm"],
        "channels": state["input_blocks.0.0.weight"].shape[1],
        "outputs": len(state["out.2.bias"]),
        "classes": len(state["label_emb.weight"]) if "label_emb.weight" in state else 0,
        "width": width,
        "enter": len(state["input_blocks.0.0.bias"]),
        "multipliers": [w / width for w in widths],
        "blocks": blocks,
        "attention": [v for v, n in enumerate(first) if f"input_blocks.{n}.1.qkv.weight" in state],
    }
    weights = dict(state)
    if options["classes"]:
        weights["label_emb.weight"] = with_null(weights["label_emb.weight"])
    return options, _ADM.convert(weights, UNetOptions(**options))


# -- NVlabs-EDM -------------------------------------------------------------------------------


def _edm_names(side: int) -> Callable[[UNetOptions], dict[str, str]]:
    def names(o: UNetOptions) -> dict[str, str]:
        end = ("out_norm", "out_conv")
        song = (f"dec.{side}x{side}_aux_norm", f"dec.{side}x{side}_aux_conv")
        norm, leave = song if o.resampling_skip else end
        out = {
            "time": "map_noise",
            "time_layers.0": "map_layer0",
            "time_layers.1": "map_layer1",
            "label": "map_label",
            "augment": "map_augment",
            "enter": f"enc.{side}x{side}_conv",
            "norm": norm,
            "leave": leave,
        }
        for level in range(1, len(o.multipliers)):
            res = side >> level
            out[f"residual.{level - 1}"] = f"enc.{res}x{res}_aux_residual"
        for layer in layers(o):
            where, res = layer.ours.split(".")[0], side >> layer.level
            place = f"{'enc' if where == 'down' else 'dec'}.{res}x{res}"
            name = f"{place}_{'in' if where == 'middle' else 'block'}{layer.number}"
            if layer.resizes:
                name = f"{place}_down" if where == "down" else f"dec.{2 * res}x{2 * res}_up"
            out[layer.ours] = out[f"{layer.ours}.attention"] = name
        return out

    return names


_EDM_PARTS = {
    "norm1": ("norm0",),
    "conv1": ("conv0",),
    "embed": ("affine",),
    "norm2": ("norm1",),
    "conv2": ("conv1",),
    "skip": ("skip",),
    "attention.norm": ("norm2",),
    "attention.proj": ("proj",),
}


def edm_side(state: Weights) -> int:
    """Side of the images of a network of EDM."""
    return _edm_sides(state)[0]


def _edm_sides(state: Weights) -> list[int]:
    """Of every level, finest first."""
    found = {int(m[1]) for k in state if (m := re.match(r"enc\.(\d+)x", k))}
    return sorted(found, reverse=True)


def from_edm(state: Weights) -> tuple[Options, dict[str, Tensor]]:
    """The state dict of EDM's ``SongUNet`` (DDPM++, NCSN++) or ``DhariwalUNet`` (ADM) -> options
    and weights.

    Raises:
        ValueError: an encoder or decoder with image skips.
    """
    side, song = edm_side(state), "out_conv.weight" not in state
    levels = [f"enc.{s}x{s}" for s in _edm_sides(state)]
    base = state["map_layer0.weight"].shape[0] // 4
    leave = f"dec.{side}x{side}_aux_conv.bias" if song else "out_conv.bias"
    labels = state["map_label.weight"].shape[1] if "map_label.weight" in state else 0
    options: Options = {
        **PRESETS[_edm_preset(state, song)],
        "channels": state[f"{levels[0]}_conv.weight"].shape[1],
        "outputs": len(state[leave]),
        "classes": labels,
        "augment": state["map_augment.weight"].shape[1] if "map_augment.weight" in state else 0,
        "width": base,
        "enter": len(state[f"{levels[0]}_conv.bias"]),
        "multipliers": [len(state[f"{level}_block0.conv0.bias"]) / base for level in levels],
        "blocks": sum(k.startswith(levels[0]) and k.endswith(".conv0.bias") for k in state),
        "attention": [v for v, name in enumerate(levels) if f"{name}_block0.qkv.weight" in state],
        "group_size": 4,
        "label_first": song,
    }
    family = Family(_edm_names(side), _EDM_PARTS, mixed(heads_first=False))
    return options, family.convert(_edm_embeddings(state, labels, song), UNetOptions(**options))


def _edm_preset(state: Weights, song: bool) -> str:
    if not song:
        return "adm"
    return "ncsnpp" if "map_noise.freqs" in state else "ddpmpp"


def _edm_embeddings(state: Weights, labels: int, song: bool) -> dict[str, Tensor]:
    """The label layer as a table, its bias in every row; frequencies times 2 pi."""
    out = {k: v for k, v in state.items() if not k.endswith("resample_filter")}
    if labels:
        scale = math.sqrt(labels) if song else 1.0
        table = with_null(out.pop("map_label.weight").T * scale)
        out["map_label.weight"] = table + out.pop("map_label.bias", torch.zeros(()))
    if "map_noise.freqs" in out:
        out["map_noise.frequencies"] = out.pop("map_noise.freqs") * (2 * math.pi)
    return out


# -- score_sde --------------------------------------------------------------------------------


_SCORE_SDE_PARTS = {
    "norm1": ("GroupNorm_0",),
    "conv1": ("Conv_0",),
    "embed": ("Dense_0",),
    "norm2": ("GroupNorm_1",),
    "conv2": ("Conv_1",),
    "skip": ("Conv_2", "NIN_0"),
    "conv": ("Conv_0",),
    "attention.norm": ("GroupNorm_0",),
    "attention.proj": ("NIN_3",),
}


def from_score_sde(state: Weights) -> tuple[Options, dict[str, Tensor]]:
    """The state dict of score_sde's ``ddpm`` or ``ncsnpp`` network (``all_modules.N...``, the
    image scaled to [-1, 1]) -> options and weights.

    Raises:
        ValueError: a network that is not DDPM, DDPM++ or NCSN++ as published.
    """
    kinds = _score_sde_kinds(state)
    start = kinds.count("linear") + kinds.count("fourier")
    enter = state[f"all_modules.{start}.weight"]
    fourier, biggan = "fourier" in kinds, any(k.endswith(".Conv_2.weight") for k in state)
    if fourier != ("pyramid" in kinds) or (fourier and not biggan):
        raise ValueError("score_sde: only DDPM, DDPM++ and NCSN++ as published are read.")
    levels = kinds.count("resize") // 2 + 1
    blocks = (kinds.count("block") - 2 - levels) // (2 * levels)
    body = [n for n, kind in enumerate(kinds) if kind == "block"]
    first = body[: levels * blocks : blocks]
    options: Options = {
        **PRESETS["ncsnpp" if fourier else "ddpmpp" if biggan else "ddpm"],
        "channels": enter.shape[1],
        "outputs": len(state[f"all_modules.{len(kinds) - 1}.bias"]),
        "width": len(enter),
        "multipliers": [len(state[f"all_modules.{n}.Conv_1.bias"]) / len(enter) for n in first],
        "blocks": blocks,
        "attention": [v for v, n in enumerate(first) if kinds[n + 1] == "attention"],
        "last_attention": True,
    }
    weights = {k: v for k, v in state.items() if k.startswith("all_modules.")}
    if fourier:
        weights["all_modules.0.frequencies"] = weights.pop("all_modules.0.W") * (2 * math.pi)
    family = Family(
        lambda o: _score_sde_names(o, kinds, start),
        _SCORE_SDE_PARTS,
        joined("NIN_0", "NIN_1", "NIN_2"),
    )
    return options, family.convert(weights, UNetOptions(**options))


def _score_sde_kinds(state: Weights) -> list[str]:
    """What every entry of ``all_modules`` is. A residual block that resamples has a convolution
    on its skip although its channels stay."""
    parts: dict[int, dict[str, Tensor]] = {}
    for key, value in state.items():
        if key.startswith("all_modules."):
            _, number, part = key.split(".", 2)
            parts.setdefault(int(number), {})[part] = value
    return [_score_sde_kind(parts[n]) for n in sorted(parts)]


def _score_sde_kind(part: Weights) -> str:
    if "Dense_0.weight" in part:
        skip = part.get("Conv_2.weight")
        return "resize" if skip is not None and skip.shape[0] == skip.shape[1] else "block"
    for name, kind in (
        ("W", "fourier"),
        ("NIN_3.W", "attention"),
        ("Conv2d_0.weight", "pyramid"),
        ("Conv_0.weight", "resize"),
    ):
        if name in part:
            return kind
    return "linear" if part["weight"].dim() == 2 else "other"


def _score_sde_names(o: UNetOptions, kinds: list[str], start: int) -> dict[str, str]:
    names = {
        "time": "all_modules.0",
        "time_layers.0": f"all_modules.{start - 2}",
        "time_layers.1": f"all_modules.{start - 1}",
        "enter": f"all_modules.{start}",
        "norm": f"all_modules.{len(kinds) - 2}",
        "leave": f"all_modules.{len(kinds) - 1}",
    }
    n = start + 1
    for layer in layers(o):
        names[layer.ours] = f"all_modules.{n}"
        n += 1
        if n < len(kinds) and kinds[n] == "pyramid":
            names[f"residual.{layer.level - 1}"] = f"all_modules.{n}.Conv2d_0"
            n += 1
        if n < len(kinds) and kinds[n] == "attention":
            names[f"{layer.ours}.attention"] = f"all_modules.{n}"
            n += 1
    return names
