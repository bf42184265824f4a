"""U-ViT (Bao et al. 2023): a vision transformer with long skip connections, everything a token.

Parameters have the names of the published checkpoints, so these load as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.nn.embedding import sinusoidal
from shared.predictions import Condition
from shared.process import State

SIZES: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        "small": {"width": 512, "depth": 12, "heads": 8},
        "small_deep": {"width": 512, "depth": 16, "heads": 8},
        "mid": {"width": 768, "depth": 16, "heads": 12},
        "large": {"width": 1024, "depth": 20, "heads": 16},
        "huge": {"width": 1152, "depth": 28, "heads": 16},
    }
)
"""The published sizes (Table 1; ``depth`` does not count the middle block)."""


class Attention(nn.Module):
    """Self-attention of tokens [batch, tokens, width]."""

    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed: Tensor = self.proj(
            F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        )
        return mixed


class Block(nn.Module):
    """Pre-norm transformer block; in the second half it first merges the long skip."""

    def __init__(self, width: int, heads: int, qkv_bias: bool, skip: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, qkv_bias)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)}
        )
        self.skip_linear = nn.Linear(2 * width, width) if skip else None

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip_linear is not None:
            assert skip is not None
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))
        return out


class UViT(nn.Module):
    """[batch, channels, side, side] -> the same. Tokens: the class if there are any, the time
    code, the patches, in this order.

    Args:
        channels, side: of the image. patch: side of a patch.
        width, depth, heads: see :data:`SIZES`.
        classes: number of classes, 0 without condition; the label ``classes``, or no condition
            at all, means 'any class'.
        time_layers: two layers between the sinusoids of the time code and its token.
        qkv_bias: biases of queries, keys and values. last_conv: a convolution at the end.

    Raises:
        ValueError: sizes that do not divide, or an odd depth.
    """

    def __init__(
        self,
        channels: int,
        side: int,
        patch: int = 2,
        width: int = 512,
        depth: int = 12,
        heads: int = 8,
        classes: int = 0,
        time_layers: bool = False,
        qkv_bias: bool = False,
        last_conv: bool = True,
    ) -> None:
        super().__init__()
        if side % patch or width % heads or depth % 2:
            raise ValueError(
                f"UViT: side={side} must be divisible by patch={patch}, width={width} by "
                f"heads={heads}, depth={depth} by 2."
            )
        self.patch, self.width, self.classes = patch, width, classes
        self.extras = 2 if classes else 1
        conv = nn.Conv2d(channels, width, patch, stride=patch)
        self.patch_embed = nn.ModuleDict({"proj": conv})
        self.time_embed = _time_layers(width) if time_layers else nn.Identity()
        self.label_emb = nn.Embedding(classes + 1, width) if classes else None
        self.pos_embed = nn.Parameter(torch.zeros(1, self.extras + (side // patch) ** 2, width))

        def block(skip: bool = False) -> Block:
            return Block(width, heads, qkv_bias, skip)

        self.in_blocks = nn.ModuleList(block() for _ in range(depth // 2))
        self.mid_block = block()
        self.out_blocks = nn.ModuleList(block(skip=True) for _ in range(depth // 2))
        self.norm = nn.LayerNorm(width)
        self.decoder_pred = nn.Linear(width, patch**2 * channels)
        self.final_layer = nn.Conv2d(channels, channels, 3, padding=1) if last_conv else None
        self.apply(_initialise)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(
        self, inputs: State, code: Tensor, mask: Tensor | None, cond: Condition | None
    ) -> State:
        patches = self.patch_embed["proj"](inputs["x"])
        rows = patches.shape[2]
        x = torch.cat([*self._extra_tokens(code, cond), patches.flatten(2).mT], dim=1)
        x, skips = x + self.pos_embed, []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())
        x = self.decoder_pred(self.norm(x))[:, self.extras :]
        x = x.unflatten(1, (rows, -1)).unflatten(3, (self.patch, self.patch, -1))
        image = x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return {"x": image if self.final_layer is None else self.final_layer(image)}

    def _extra_tokens(self, code: Tensor, cond: Condition | None) -> list[Tensor]:
        time = self.time_embed(sinusoidal(code, self.width, cosine_first=True))
        if self.label_emb is None:
            return [time[:, None]]
        label = torch.full_like(code, self.classes, dtype=torch.long)
        if cond is not None and "label" in cond:
            label = cond["label"]
        return [self.label_emb(label)[:, None], time[:, None]]


def _time_layers(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))


def _initialise(layer: nn.Module) -> None:
    """Truncated normals of standard deviation 0.02 in linear layers, as published."""
    if isinstance(layer, nn.Linear):
        nn.init.trunc_normal_(layer.weight, std=0.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def uvit_options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of :class:`UViT` that a published state dict was made with. The number of
    heads leaves no trace: taken as that of :data:`SIZES`, or one per 64 channels."""
    width, channels, patch, _ = state["patch_embed.proj.weight"].shape
    rows = len(state["label_emb.weight"]) if "label_emb.weight" in state else 0
    tokens = state["pos_embed"].shape[1] - (2 if rows else 1)
    heads = {size["width"]: size["heads"] for size in SIZES.values()}
    return {
        "channels": channels,
        "side": patch * round(tokens**0.5),
        "patch": patch,
        "width": width,
        "depth": 2 * len({k.split(".")[1] for k in state if k.startswith("in_blocks.")}),
        "heads": heads.get(width, max(1, width // 64)),
        "classes": rows - 1 if _has_null(rows) else rows,
        "time_layers": "time_embed.0.weight" in state,
        "qkv_bias": "mid_block.attn.qkv.bias" in state,
        "last_conv": "final_layer.weight" in state,
    }


def uvit_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict for :class:`UViT`: as it is, but a label table without a row for
    'any class' gets one of zeros."""
    out = dict(state)
    table = state.get("label_emb.weight")
    if table is not None and not _has_null(len(table)):
        out["label_emb.weight"] = torch.cat([table, torch.zeros_like(table[:1])])
    return out


def _has_null(rows: int) -> bool:
    """Published models of ImageNet that know 'any class' keep it in row 1,001."""
    return rows == 1001
