"""A small U-Net for images with an optional class condition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.denoisers import Denoiser, Head
from shared.losses import TimeSampler
from shared.nn.embedding import Sinusoidal, TimeEmbedding
from shared.predictions import Condition
from shared.process import Process, State
from shared.schedules import Schedule

if TYPE_CHECKING:
    from shared.images.domain import Images


class Block(nn.Module):
    """Two convolutions with a residual connection; the embedding scales and shifts between them.
    The second convolution starts at zero, so an untrained block passes its input on."""

    def __init__(
        self, channels_in: int, channels: int, embedding: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(_group_count(channels_in), channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.film = nn.Linear(embedding, 2 * channels)
        self.norm2 = nn.GroupNorm(_group_count(channels), channels)
        self.drop = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        self.skip = nn.Conv2d(channels_in, channels, 1) if channels_in != channels else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.film(F.silu(embedding))[..., None, None].chunk(2, dim=1)
        h = self.conv2(self.drop(F.silu(self.norm2(h) * (1.0 + scale) + shift)))
        return h + (x if self.skip is None else self.skip(x))


def _group_count(channels: int) -> int:
    return next(g for g in (8, 4, 2, 1) if channels % g == 0)


class UNet(nn.Module):
    """[batch, channels, height, width] -> the same; height and width divisible by
    2^(len(widths) - 1).

    Args:
        channels: of the image. widths: channels per level, finest first.
        blocks: residual blocks per level. classes: number of classes, 0 without condition; the
            label ``classes``, or no condition at all, means 'any class'.
        dropout: in the blocks. outputs: channels of the output, those of the image unless given.
        augment: entries of the condition 'augment', all zero for an image as it is.
    """

    def __init__(
        self,
        channels: int,
        widths: Sequence[int] = (32, 64),
        blocks: int = 1,
        classes: int = 0,
        dropout: float = 0.0,
        outputs: int | None = None,
        augment: int = 0,
    ) -> None:
        super().__init__()
        self.classes, embedding = classes, 4 * widths[0]
        self.time = TimeEmbedding(64, embedding, Sinusoidal(64, max_period=100.0))
        self.label = nn.Embedding(classes + 1, embedding) if classes else None
        self.augment = nn.Linear(augment, embedding, bias=False) if augment else None
        self.enter = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        now, skips = widths[0], []
        for width in widths:
            for _ in range(blocks):
                self.down.append(Block(now, width, embedding, dropout))
                now = width
            skips.append(now)
        self.middle = Block(now, now, embedding, dropout)
        for width, skip in zip(reversed(widths), reversed(skips), strict=True):
            for k in range(blocks):
                entering = now + (skip if k == 0 else 0)
                self.up.append(Block(entering, width, embedding, dropout))
                now = width
        self.blocks, self.levels = blocks, len(widths)
        self.leave = nn.Conv2d(now, outputs or channels, 3, padding=1)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)  # type: ignore[arg-type]

    def forward(
        self, inputs: State, code: Tensor, mask: Tensor | None, cond: Condition | None
    ) -> State:
        embedding = self._embed(code, cond)
        h, skips = self.enter(inputs["x"]), []
        for level in range(self.levels):
            h = F.avg_pool2d(h, 2) if level else h
            for block in self._level(self.down, level):
                h = block(h, embedding)
            skips.append(h)
        h = self.middle(h, embedding)
        for level in range(self.levels):
            h = F.interpolate(h, scale_factor=2.0) if level else h
            h = torch.cat([h, skips.pop()], dim=1)
            for block in self._level(self.up, level):
                h = block(h, embedding)
        return {"x": self.leave(F.silu(h))}

    def _level(self, blocks: nn.ModuleList, level: int) -> nn.ModuleList:
        return blocks[level * self.blocks : (level + 1) * self.blocks]

    def _embed(self, code: Tensor, cond: Condition | None) -> Tensor:
        time: Tensor = self.time(code)
        if self.augment is not None and cond is not None and "augment" in cond:
            time = time + self.augment(cond["augment"])
        if self.label is None:
            return time
        label = torch.full_like(code, self.classes, dtype=torch.long)
        if cond is not None and "label" in cond:
            label = cond["label"]
        return time + self.label(label)


class Concatenated(nn.Module):
    """A network that sees the condition 'low' beside the image, as further channels (SR3, Saharia
    et al. 2021)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, inputs: State, code: Tensor, mask: Tensor | None, cond: Condition | None
    ) -> State:
        if cond is None or "low" not in cond:
            raise ValueError("this model enlarges images: give request.low=FILE of small ones.")
        both = torch.cat([inputs["x"], cond["low"].to(inputs["x"])], dim=1)
        return self.network({"x": both}, code, mask, cond)


class VarianceNetwork(nn.Module):
    """The network of a variance head for images: a small U-Net over what the frozen network saw
    and what it gave (the published heads see its last features instead)."""

    def __init__(self, channels: int, widths: Sequence[int], classes: int = 0) -> None:
        super().__init__()
        self.network = UNet(2 * channels, widths, classes=classes, outputs=channels)

    def forward(
        self,
        inputs: State,
        outputs: State,
        code: Tensor,
        mask: Tensor | None,
        cond: Condition | None,
    ) -> State:
        both = torch.cat([inputs["x"], outputs["x"]], dim=1)
        return self.network({"x": both}, code, mask, cond)


def image_denoiser(
    domain: Images,
    schedule: Schedule,
    widths: Sequence[int] = (32, 64),
    blocks: int = 1,
    conditional: bool = True,
    dropout: float = 0.0,
    head: Head | None = None,
    times: TimeSampler | None = None,
) -> Denoiser:
    """The denoiser of an image data set; ``conditional`` uses its labels, if it has any.

    Raises:
        ValueError: images whose sides cannot be halved often enough.
    """
    channels, height, width = domain.shape
    fold = 2 ** (len(widths) - 1)
    if height % fold or width % fold:
        raise ValueError(
            f"model.widths: {len(widths)} levels need sides divisible by {fold}; the images are "
            f"{height} x {width}."
        )
    classes = domain.classes if conditional else 0
    network: nn.Module
    seen = channels if domain.upscale is None else 2 * channels
    network = UNet(seen, widths, blocks, classes, dropout, channels, domain.augment_entries)
    if domain.upscale is not None:
        network = Concatenated(network)
    return Denoiser(network, Process.single(schedule), head, times=times)
