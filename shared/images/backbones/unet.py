"""One U-Net for the published families: DDPM, DDPM++ and NCSN++, ADM, and EDM's versions of them.

They share a skeleton and differ in the details that :class:`UNetOptions` names;
:data:`PRESETS` has the published choices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.nn.embedding import Fourier, Sinusoidal
from shared.predictions import Condition
from shared.process import State

TIMES = ("sine", "cosine", "fourier")
RESAMPLINGS = ("convolution", "asymmetric", "block", "fir")


@dataclass(frozen=True)
class UNetOptions:
    """What distinguishes the published U-Nets.

    Args:
        channels: of the image. outputs: of the network; twice ``channels`` adds 'x_variance'.
        classes: number of classes, 0 without condition; the label ``classes``, or no condition
            at all, means 'any class'. augment: entries of the condition 'augment', all zero for
            an image as it is (Karras et al. 2022, Appendix F.2).
        width: channels that the ``multipliers`` of every level refer to; enter: behind the first
            convolution, ``width`` unless given.
        blocks: residual blocks per level. attention: levels with attention, 0 is the finest.
        last_attention: on the way up only behind the last block of a level.
        head_channels: of one attention head; None: a single head.
        film: the embedding scales and shifts (ADM) instead of being added (DDPM).
        resampling: strided 'convolution', one with 'asymmetric' padding (DDPM), or within a
            residual 'block' by means of 2 x 2 pixels, or of [1, 3, 3, 1] ('fir').
        resampling_skip: a 1 x 1 convolution on the skip of resampling blocks.
        residual_input: the image is added again on every level (NCSN++).
        skip_scale: factor after every residual sum. groups, group_size: groups of the
            normalisations, at most ``groups`` and of no fewer than ``group_size`` channels.
        time: 'sine' first with end point (DDPM), 'cosine' first without (ADM), or 'fourier'.
        label_first: label and augmentation join the time before its two layers (EDM's DDPM++)
            instead of the label behind them.

    Raises:
        ValueError: an unknown choice or a level that does not exist.
    """

    channels: int = 3
    outputs: int | None = None
    classes: int = 0
    augment: int = 0
    width: int = 128
    enter: int | None = None
    multipliers: Sequence[float] = (1, 2, 2, 2)
    blocks: int = 2
    attention: Sequence[int] = (1,)
    last_attention: bool = False
    head_channels: int | None = None
    film: bool = False
    resampling: str = "asymmetric"
    resampling_skip: bool = False
    residual_input: bool = False
    skip_scale: float = 1.0
    groups: int = 32
    group_size: int = 1
    eps: float = 1e-6
    dropout: float = 0.0
    time: str = "sine"
    label_first: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (
            ("time", self.time, TIMES),
            ("resampling", self.resampling, RESAMPLINGS),
        ):
            if value not in known:
                raise ValueError(f"UNet: {name}='{value}' is not one of {', '.join(known)}.")
        if wrong := [a for a in self.attention if not 0 <= a < len(self.multipliers)]:
            raise ValueError(
                f"UNet: attention on level {wrong[0]}, but the {len(self.multipliers)} levels "
                f"are 0 to {len(self.multipliers) - 1}."
            )

    @property
    def fold(self) -> int:
        """Sides of images must be divisible by this."""
        return int(2 ** (len(self.multipliers) - 1))

    @property
    def widths(self) -> list[int]:
        """Channels of every level."""
        return [round(self.width * m) for m in self.multipliers]

    def norm(self, channels: int) -> nn.GroupNorm:
        groups = max(1, min(self.groups, channels // self.group_size))
        return nn.GroupNorm(groups, channels, self.eps)


_SONG = {
    "blocks": 4,
    "attention": (1,),
    "last_attention": True,
    "resampling": "block",
    "resampling_skip": True,
    "skip_scale": math.sqrt(0.5),
    "group_size": 4,
}
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "ddpm": {},  # CIFAR-10
        "ddpmpp": _SONG,
        "ncsnpp": {**_SONG, "resampling": "fir", "residual_input": True, "time": "fourier"},
        "adm": {  # ImageNet of 64 x 64 pixels
            "width": 192,
            "multipliers": (1, 2, 3, 4),
            "blocks": 3,
            "attention": (1, 2, 3),
            "head_channels": 64,
            "film": True,
            "resampling": "block",
            "time": "cosine",
            "eps": 1e-5,
        },
    }
)
"""Ho et al. 2020; Song et al. 2021 (continuous models of CIFAR-10, images of 32 x 32); Dhariwal &
Nichol 2021. EDM's CIFAR-10 models are 'ddpmpp' with multipliers (2, 2, 2) and ``label_first``."""


class Attention(nn.Module):
    """Self-attention of pixels; adds nothing when untrained."""

    def __init__(self, options: UNetOptions, channels: int) -> None:
        super().__init__()
        self.heads = channels // (options.head_channels or channels)
        self.norm = options.norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = _zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).unflatten(1, (3, self.heads, -1)).unbind(1)
        mixed = F.scaled_dot_product_attention(q.mT, k.mT, v.mT).mT
        out: Tensor = self.proj(mixed.reshape(x.shape))
        return out


class Block(nn.Module):
    """Two convolutions with a residual connection, then attention; ``resize`` acts in front of
    the first convolution and on the skip."""

    def __init__(
        self,
        options: UNetOptions,
        channels_in: int,
        channels: int,
        attention: bool = False,
        resize: Callable[[Tensor], Tensor] | None = None,
        joins: bool = False,
    ) -> None:
        super().__init__()
        self.film, self.scale = options.film, options.skip_scale
        self.resize, self.joins = resize, joins
        self.norm1 = options.norm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.embed = nn.Linear(4 * options.width, channels * (2 if options.film else 1))
        self.norm2 = options.norm(channels)
        self.dropout = nn.Dropout(options.dropout)
        self.conv2 = _zeroed(nn.Conv2d(channels, channels, 3, padding=1))
        project = channels_in != channels or (resize is not None and options.resampling_skip)
        self.skip = nn.Conv2d(channels_in, channels, 1) if project else None
        self.attention = Attention(options, channels) if attention else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = F.silu(self.norm1(x))
        if self.resize is not None:
            h, x = self.resize(h), self.resize(x)
        h, e = self.conv1(h), self.embed(embedding)[..., None, None]
        if self.film:
            scale, shift = e.chunk(2, dim=1)
            h = self.norm2(h) * (1.0 + scale) + shift
        else:
            h = self.norm2(h + e)
        h = self.conv2(self.dropout(F.silu(h)))
        x = ((x if self.skip is None else self.skip(x)) + h) * self.scale
        return x if self.attention is None else (x + self.attention(x)) * self.scale


class Halve(nn.Module):
    """A convolution of stride 2."""

    joins = False

    def __init__(self, channels: int, asymmetric: bool) -> None:
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        halved: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)
        return halved


class Double(nn.Module):
    """Every pixel four times, then a convolution."""

    joins = False

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        doubled: Tensor = self.conv(_double(x))
        return doubled


class FIRConvolution(nn.Conv2d):
    """A 3 x 3 convolution, then [1, 3, 3, 1] with stride 2, padded once for both."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__(channels_in, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        h = F.conv2d(F.pad(x, (2, 2, 2, 2)), self.weight)
        return F.conv2d(h, _fir(h), stride=2, groups=h.shape[1]) + self.bias[:, None, None]


class UNet(nn.Module):
    """[batch, channels, height, width] -> the same; sides divisible by ``options.fold``.

    ``down``, ``middle`` and ``up`` are flat lists in the order of evaluation; layers of ``up``
    that ``joins`` take one skip more from the end of ``down``.
    """

    def __init__(self, options: UNetOptions) -> None:
        super().__init__()
        o = self.options = options
        features = o.width * (2 if o.time == "fourier" else 1)
        self.time = _features(o.time, features)
        self.time_layers = nn.ModuleList(
            [nn.Linear(features, 4 * o.width), nn.Linear(4 * o.width, 4 * o.width)]
        )
        label = features if o.label_first else 4 * o.width
        self.label = nn.Embedding(o.classes + 1, label) if o.classes else None
        self.augment = nn.Linear(o.augment, features, bias=False) if o.augment else None
        self.enter = nn.Conv2d(o.channels, o.enter or o.width, 3, padding=1)
        self.down, skips = _way_down(o)
        now = skips[-1]
        self.middle = nn.ModuleList([Block(o, now, now, attention=True), Block(o, now, now)])
        self.residual = _residual(o) if o.residual_input else None
        self.up, now = _way_up(o, skips)
        self.norm = o.norm(now)
        self.leave = _zeroed(nn.Conv2d(now, o.outputs or o.channels, 3, padding=1))

    def forward(
        self, inputs: State, code: Tensor, mask: Tensor | None, cond: Condition | None
    ) -> State:
        embedding = F.silu(self._embed(code, cond or {}))
        h = self.enter(inputs["x"])
        skips, image, levels = [h], inputs["x"], 0
        for layer in self.down:
            finer, h = h, layer(h, embedding)
            if self.residual is not None and h.shape[-1] < finer.shape[-1]:
                h = image = (self.residual[levels](image) + h) * self.options.skip_scale
                levels += 1
            skips.append(h)
        for layer in self.middle:
            h = layer(h, embedding)
        for layer in self.up:
            h = layer(torch.cat([h, skips.pop()], dim=1) if layer.joins else h, embedding)
        out = self.leave(F.silu(self.norm(h)))
        if self.options.outputs != 2 * self.options.channels:
            return {"x": out}
        mean, variance = out.chunk(2, dim=1)
        return {"x": mean, "x_variance": variance}

    def _embed(self, code: Tensor, cond: Condition) -> Tensor:
        h = self.time(code)
        if self.augment is not None and "augment" in cond:
            h = h + self.augment(cond["augment"])
        if self.label is not None:
            null = torch.full_like(code, self.options.classes, dtype=torch.long)
            label = self.label(cond.get("label", null))
        if self.label is not None and self.options.label_first:
            h = h + label
        h = self.time_layers[1](F.silu(self.time_layers[0](h)))
        return h if self.label is None or self.options.label_first else h + label


# -- the parts of a U-Net ---------------------------------------------------------------------


def _features(kind: str, width: int) -> nn.Module:
    if kind == "fourier":
        return Fourier(width)
    return Sinusoidal(width, cosine_first=kind == "cosine", endpoint=kind == "sine")


def _way_down(o: UNetOptions) -> tuple[nn.ModuleList, list[int]]:
    """The layers, and the channels of every skip."""
    layers: list[nn.Module] = []
    now = o.enter or o.width
    skips = [now]
    for level, width in enumerate(o.widths):
        if level:
            layers.append(_halve(o, now))
            skips.append(now)
        for _ in range(o.blocks):
            layers.append(Block(o, now, width, level in o.attention))
            now = width
            skips.append(now)
    return nn.ModuleList(layers), skips


def _way_up(o: UNetOptions, skips: Sequence[int]) -> tuple[nn.ModuleList, int]:
    """The layers, and the channels behind them."""
    left, now = list(skips), skips[-1]
    layers: list[nn.Module] = []
    for level, width in reversed(list(enumerate(o.widths))):
        for k in range(o.blocks + 1):
            attends = level in o.attention and (k == o.blocks or not o.last_attention)
            layers.append(Block(o, now + left.pop(), width, attends, joins=True))
            now = width
        if level:
            layers.append(_double_layer(o, now))
    return nn.ModuleList(layers), now


def _halve(o: UNetOptions, channels: int) -> nn.Module:
    if o.resampling in ("block", "fir"):
        resize = _fir_halve if o.resampling == "fir" else _mean_halve
        return Block(o, channels, channels, resize=resize)
    return Halve(channels, o.resampling == "asymmetric")


def _double_layer(o: UNetOptions, channels: int) -> nn.Module:
    if o.resampling in ("block", "fir"):
        resize = _fir_double if o.resampling == "fir" else _double
        return Block(o, channels, channels, resize=resize)
    return Double(channels)


def _residual(o: UNetOptions) -> nn.ModuleList:
    widths = [o.channels, *o.widths[:-1]]
    pairs = zip(widths, widths[1:], strict=False)
    return nn.ModuleList(FIRConvolution(a, b) for a, b in pairs)


def _zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    """Starts at zero, so that an untrained block passes its input on."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def _mean_halve(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2)


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0)


def _fir(x: Tensor) -> Tensor:
    """[1, 3, 3, 1] in both directions for every channel of ``x``, with sum 1."""
    line = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype, device=x.device) / 8.0
    return torch.outer(line, line).expand(x.shape[1], 1, 4, 4)


def _fir_halve(x: Tensor) -> Tensor:
    return F.conv2d(x, _fir(x), stride=2, padding=1, groups=x.shape[1])


def _fir_double(x: Tensor) -> Tensor:
    return F.conv_transpose2d(x, 4.0 * _fir(x), stride=2, padding=1, groups=x.shape[1])
