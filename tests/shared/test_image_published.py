"""Reading published U-Nets by key name.

The references below evaluate tiny networks of every family with weights under the published
names, drawn when first asked for; what they leave behind is a published state dict.
"""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import UNet2DModel
from torch.nn import functional as F

from shared.images.backbones.diffusers import from_diffusers
from shared.images.backbones.families import layers
from shared.images.backbones.published import from_adm, from_edm, from_score_sde
from shared.images.backbones.unet import UNet, UNetOptions

WIDTH = 64
CODE = torch.tensor([0.3, 200.0], dtype=torch.float64)


class Drawn(dict):
    """Weights by name, drawn when first asked for."""

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def draw(self, name, *shape):
        if name not in self:
            size = 1.0 / math.sqrt(math.prod(shape[1:]) or 1)
            noise = torch.randn(shape, generator=self.generator, dtype=torch.float64)
            self[name] = noise * size + (1.0 if "norm" in name.lower() else 0.0)
        return self[name]

    def conv(self, name, x, channels, size=3, **more):
        weight = self.draw(f"{name}.weight", channels, x.shape[1], size, size)
        return F.conv2d(x, weight, self.draw(f"{name}.bias", channels), padding=size // 2, **more)

    def linear(self, name, x, channels, bias=True):
        weight = self.draw(f"{name}.weight", channels, x.shape[1])
        return F.linear(x, weight, self.draw(f"{name}.bias", channels) if bias else None)

    def norm(self, name, x, groups, eps):
        n = x.shape[1]
        weight, bias = self.draw(f"{name}.weight", n), self.draw(f"{name}.bias", n)
        return F.group_norm(x, groups, weight, bias, eps)


def angles(width, endpoint):
    k = torch.arange(width // 2, dtype=torch.float64) / (width // 2 - endpoint)
    return CODE[:, None] * 10_000.0**-k


def attend(q, k, v):
    """[batch, channels, pixels] each."""
    weights = torch.einsum("ncq,nck->nqk", q, k / math.sqrt(q.shape[1])).softmax(-1)
    return torch.einsum("nqk,nck->ncq", weights, v)


def mean_halve(x):
    return 0.25 * sum(x[..., i::2, j::2] for i in (0, 1) for j in (0, 1))


def fir_halve(x):
    line = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype) / 8
    for axis in (2, 3):
        pad = (0, 0, 1, 1) if axis == 2 else (1, 1)
        parts = F.pad(x, pad).unfold(axis, 4, 2)
        x = (parts * line).sum(-1)
    return x


def fir_double(x):
    """Zeros between the pixels, then [1, 3, 3, 1] / 4 in both directions."""
    line = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype) / 4
    for axis in (2, 3):
        spread = torch.stack([x, torch.zeros_like(x)], dim=axis + 1).flatten(axis, axis + 1)
        pad = (0, 0, 2, 1) if axis == 2 else (2, 1)
        x = (F.pad(spread, pad).unfold(axis, 4, 1) * line).sum(-1)
    return x


def fir_convolution(p, name, x):
    """A 3 x 3 convolution, then [1, 3, 3, 1] / 8 with stride 2."""
    line = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype) / 8
    wide = F.conv2d(x, p.draw(f"{name}.weight", WIDTH, 3, 3, 3), padding=2)
    for axis in (2, 3):
        wide = (wide.unfold(axis, 4, 2) * line).sum(-1)
    return wide + p.draw(f"{name}.bias", WIDTH)[:, None, None]


def double(x):
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


# -- EDM --------------------------------------------------------------------------------------


def edm_block(p, name, x, emb, out, song, attention=False, resize=None):
    eps, s = (1e-6, math.sqrt(0.5)) if song else (1e-5, 1.0)
    groups = lambda n: min(32, n // 4)  # noqa: E731
    resized = resize or (lambda v: v)
    h = p.conv(
        f"{name}.conv0", resized(F.silu(p.norm(f"{name}.norm0", x, groups(x.shape[1]), eps))), out
    )
    params = p.linear(f"{name}.affine", emb, out * (1 if song else 2))[..., None, None]
    if song:
        h = F.silu(p.norm(f"{name}.norm1", h + params, groups(out), eps))
    else:
        scale, shift = params.chunk(2, dim=1)
        h = F.silu(shift + p.norm(f"{name}.norm1", h, groups(out), eps) * (scale + 1))
    project = out != x.shape[1] or (resize and song)
    x = p.conv(f"{name}.skip", resized(x), out, 1) if project else resized(x)
    x = (p.conv(f"{name}.conv1", h, out) + x) * s
    if not attention:
        return x
    heads = 1 if song else out // 64
    qkv = p.conv(f"{name}.qkv", p.norm(f"{name}.norm2", x, groups(out), eps), 3 * out, 1)
    q, k, v = qkv.reshape(len(x) * heads, out // heads, 3, -1).unbind(2)
    return (p.conv(f"{name}.proj", attend(q, k, v).reshape(x.shape), out, 1) + x) * s


def edm(p, x, label, augment, kind):
    song, fir = kind != "adm", kind == "ncsnpp"
    if fir:
        phase = CODE[:, None] * (2 * math.pi * p.draw("map_noise.freqs", WIDTH))
        emb = torch.cat([phase.sin(), phase.cos()], 1)
    else:
        phase = angles(WIDTH, endpoint=song)
        emb = torch.cat([phase.sin(), phase.cos()] if song else [phase.cos(), phase.sin()], 1)
    hot = F.one_hot(label, 4)[:, :3].double()  # 3 is 'any class'
    if song:
        emb = emb + p.linear("map_label", hot * math.sqrt(3), emb.shape[1])
    emb = emb + p.linear("map_augment", augment, emb.shape[1], bias=False)
    emb = p.linear("map_layer1", F.silu(p.linear("map_layer0", emb, 4 * WIDTH)), 4 * WIDTH)
    emb = F.silu(emb if song else emb + p.linear("map_label", hot, 4 * WIDTH, bias=False))
    down, up = (fir_halve, fir_double) if fir else (mean_halve, double)
    aux, h = x, p.conv("enc.8x8_conv", x, WIDTH)
    skips = [h]
    for level, res in enumerate((8, 4)):
        if level:
            h = edm_block(p, "enc.4x4_down", h, emb, WIDTH, song, resize=down)
            if fir:
                h = aux = (h + fir_convolution(p, "enc.4x4_aux_residual", aux)) / math.sqrt(2)
            skips.append(h)
        for k in range(2):
            name = f"enc.{res}x{res}_block{k}"
            h = edm_block(p, name, h, emb, WIDTH * (level + 1), song, attention=level == 1)
            skips.append(h)
    h = edm_block(p, "dec.4x4_in0", h, emb, 2 * WIDTH, song, attention=True)
    h = edm_block(p, "dec.4x4_in1", h, emb, 2 * WIDTH, song)
    for level, res in ((1, 4), (0, 8)):
        if not level:
            h = edm_block(p, "dec.8x8_up", h, emb, 2 * WIDTH, song, resize=up)
        for k in range(3):
            attention = level == 1 and (not song or k == 2)
            h = torch.cat([h, skips.pop()], 1)
            name = f"dec.{res}x{res}_block{k}"
            h = edm_block(p, name, h, emb, WIDTH * (level + 1), song, attention)
    norm, conv = ("dec.8x8_aux_norm", "dec.8x8_aux_conv") if song else ("out_norm", "out_conv")
    return p.conv(conv, F.silu(p.norm(norm, h, 16, 1e-6 if song else 1e-5)), 3)


@pytest.mark.parametrize("kind", ["ddpmpp", "ncsnpp", "adm"])
def test_edm(kind):
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    label, augment = torch.tensor([1, 3]), torch.tensor([[0.0] * 9, [0.5] * 9]).double()
    published = Drawn()
    expected = edm(published, x, label, augment, kind)
    options, weights = from_edm({**published, "enc.4x4_down.conv0.resample_filter": x})
    network = UNet(UNetOptions(**options)).double()
    network.load_state_dict(weights)
    out = network({"x": x}, CODE, None, {"label": label, "augment": augment})["x"]
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    assert options["attention"] == [1]


# -- guided-diffusion -------------------------------------------------------------------------


def adm_block(p, name, x, emb, out, resize=None):
    resized = resize or (lambda v: v)
    h = resized(F.silu(p.norm(f"{name}.in_layers.0", x, 32, 1e-5)))
    h = p.conv(f"{name}.in_layers.2", h, out)
    scale, shift = p.linear(f"{name}.emb_layers.1", F.silu(emb), 2 * out)[..., None, None].chunk(
        2, 1
    )
    h = F.silu(p.norm(f"{name}.out_layers.0", h, 32, 1e-5) * (1 + scale) + shift)
    x = p.conv(f"{name}.skip_connection", x, out, 1) if x.shape[1] != out else resized(x)
    return x + p.conv(f"{name}.out_layers.3", h, out)


def adm_attention(p, name, x):
    n, width = len(x), x.shape[1]
    h = p.norm(f"{name}.norm", x, 32, 1e-5).flatten(2)
    weight, bias = (
        p.draw(f"{name}.qkv.weight", 3 * width, width, 1),
        p.draw(f"{name}.qkv.bias", 3 * width),
    )
    q, k, v = F.conv1d(h, weight, bias).reshape(n * width // 64, 3 * 64, -1).split(64, dim=1)
    weight, bias = (
        p.draw(f"{name}.proj_out.weight", width, width, 1),
        p.draw(f"{name}.proj_out.bias", width),
    )
    return x + F.conv1d(attend(q, k, v).reshape(n, width, -1), weight, bias).reshape(x.shape)


def adm(p, x, label):
    phase = angles(WIDTH, endpoint=False)
    emb = p.linear("time_embed.0", torch.cat([phase.cos(), phase.sin()], 1), 4 * WIDTH)
    emb = (
        p.linear("time_embed.2", F.silu(emb), 4 * WIDTH)
        + p.draw("label_emb.weight", 3, 256)[label]
    )
    h = p.conv("input_blocks.0.0", x, WIDTH)
    skips = [h]
    for n, (out, attention, resize) in enumerate(
        [(64, False, None), (64, False, mean_halve), (128, True, None)], start=1
    ):
        h = adm_block(p, f"input_blocks.{n}.0", h, emb, out, resize)
        h = adm_attention(p, f"input_blocks.{n}.1", h) if attention else h
        skips.append(h)
    h = adm_block(p, "middle_block.0", h, emb, 128)
    h = adm_block(p, "middle_block.2", adm_attention(p, "middle_block.1", h), emb, 128)
    for n, out in enumerate((128, 128, 64, 64)):
        h = adm_block(p, f"output_blocks.{n}.0", torch.cat([h, skips.pop()], 1), emb, out)
        h = adm_attention(p, f"output_blocks.{n}.1", h) if out == 128 else h
        h = adm_block(p, "output_blocks.1.2", h, emb, 128, double) if n == 1 else h
    return p.conv("out.2", F.silu(p.norm("out.0", h, 32, 1e-5)), 6)


def test_guided_diffusion():
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    label, published = torch.tensor([0, 2]), Drawn()
    expected = adm(published, x, label)
    options, weights = from_adm(published)
    network = UNet(UNetOptions(**options)).double()
    network.load_state_dict(weights)
    out = network({"x": x}, CODE, None, {"label": label})
    out = torch.cat([out["x"], out["x_variance"]], 1)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    swapped = {**published, "input_blocks.2.0.op.weight": x}
    with pytest.raises(ValueError, match="resblock_updown"):
        from_adm(swapped)


# -- score_sde --------------------------------------------------------------------------------


class ScoreSDE:
    """Numbers the modules in the order of their first use."""

    def __init__(self, published, kind):
        self.p, self.n, self.biggan = published, -1, kind != "ddpm"
        self.fir, self.scale = kind == "ncsnpp", math.sqrt(0.5) if kind != "ddpm" else 1.0

    def next(self):
        self.n += 1
        return f"all_modules.{self.n}"

    def nin(self, name, x, out):
        w, b = self.p.draw(f"{name}.W", x.shape[1], out), self.p.draw(f"{name}.b", out)
        return torch.einsum("nchw,cd->ndhw", x, w) + b[:, None, None]

    def norm(self, name, x):
        groups = min(x.shape[1] // 4, 32) if self.biggan else 32
        return self.p.norm(name, x, groups, 1e-6)

    def block(self, x, emb, out, resize=None):
        p, name, resized = self.p, self.next(), resize or (lambda v: v)
        h = p.conv(f"{name}.Conv_0", resized(F.silu(self.norm(f"{name}.GroupNorm_0", x))), out)
        h = h + p.linear(f"{name}.Dense_0", F.silu(emb), out)[..., None, None]
        h = p.conv(f"{name}.Conv_1", F.silu(self.norm(f"{name}.GroupNorm_1", h)), out)
        x = resized(x)
        if self.biggan and (resize or out != x.shape[1]):
            x = p.conv(f"{name}.Conv_2", x, out, 1)
        elif out != x.shape[1]:
            x = self.nin(f"{name}.NIN_0", x, out)
        return (x + h) * self.scale

    def attention(self, x):
        name = self.next()
        h = self.norm(f"{name}.GroupNorm_0", x)
        q, k, v = (self.nin(f"{name}.NIN_{i}", h, x.shape[1]).flatten(2) for i in range(3))
        return (
            x + self.nin(f"{name}.NIN_3", attend(q, k, v).reshape(x.shape), x.shape[1])
        ) * self.scale

    def halve(self, h, emb):
        if self.biggan:
            return self.block(h, emb, h.shape[1], fir_halve if self.fir else mean_halve)
        name, out = f"{self.next()}.Conv_0", h.shape[1]
        weight, bias = (
            self.p.draw(f"{name}.weight", out, out, 3, 3),
            self.p.draw(f"{name}.bias", out),
        )
        return F.conv2d(F.pad(h, (0, 1, 0, 1)), weight, bias, stride=2)

    def __call__(self, x):
        p = self.p
        if self.fir:
            phase = CODE[:, None] * p.draw(f"{self.next()}.W", WIDTH) * 2 * math.pi
        else:
            phase = angles(WIDTH, endpoint=True)
        emb = p.linear(self.next(), torch.cat([phase.sin(), phase.cos()], 1), 4 * WIDTH)
        emb = p.linear(self.next(), F.silu(emb), 4 * WIDTH)
        h = p.conv(self.next(), x, WIDTH)
        skips = [h]
        for _ in range(2):
            h = self.block(h, emb, WIDTH)
            skips.append(h)
        h = self.halve(h, emb)
        if self.fir:
            h = (h + fir_convolution(p, f"{self.next()}.Conv2d_0", x)) * self.scale
        skips.append(h)
        for _ in range(2):
            h = self.attention(self.block(h, emb, 2 * WIDTH))
            skips.append(h)
        h = self.block(self.attention(self.block(h, emb, 2 * WIDTH)), emb, 2 * WIDTH)
        for out in (2 * WIDTH, WIDTH):
            for _ in range(3):
                h = self.block(torch.cat([h, skips.pop()], 1), emb, out)
            if out == 2 * WIDTH:
                h = self.attention(h)
                if self.biggan:
                    h = self.block(h, emb, out, fir_double if self.fir else double)
                else:
                    h = p.conv(f"{self.next()}.Conv_0", double(h), out)
        h = F.silu(self.norm(self.next(), h))
        return p.conv(self.next(), h, 3)


@pytest.mark.parametrize("kind", ["ddpm", "ddpmpp", "ncsnpp"])
def test_score_sde(kind):
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    published = Drawn()
    expected = ScoreSDE(published, kind)(x)
    options, weights = from_score_sde({**published, "sigmas": torch.ones(5)})
    network = UNet(UNetOptions(**options)).double()
    network.load_state_dict(weights)
    out = network({"x": x}, CODE, None, None)["x"]
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)


# -- diffusers --------------------------------------------------------------------------------

PLAIN = {
    "layers_per_block": 2,
    "norm_num_groups": 8,
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
DDPM = {
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "num_class_embeds": 5,
}
FILM = {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 8}
RESIDUAL = {
    **FILM,
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
    "up_block_types": ("ResnetUpsampleBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
}


@pytest.mark.parametrize("more", [{}, DDPM, FILM, RESIDUAL])
def test_diffusers(more):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        theirs = UNet2DModel(**{**PLAIN, **more}).eval().double()
        x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    label = torch.tensor([1, 4]) if "num_class_embeds" in more else None
    options, weights = from_diffusers(theirs.state_dict(), dict(theirs.config))
    ours = UNet(UNetOptions(**options)).double()
    ours.load_state_dict(weights)
    with torch.no_grad():
        out = ours({"x": x}, CODE, None, None if label is None else {"label": label})["x"]
        expected = theirs(x, CODE, class_labels=label).sample
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)  # their time is float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flip_sin_to_cos": False}, "freq_shift"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type=fourier"),
        ({"down_block_types": ("SkipDownBlock2D",) * 3}, "SkipDownBlock2D"),
        ({"attn_norm_num_groups": 4}, "attn_norm_num_groups=4"),
        ({"downsample_type": "resnet"}, "downsample_type"),
    ],
)
def test_what_diffusers_offers_beyond_is_refused(change, message):
    config = {"in_channels": 3, "out_channels": 3, **PLAIN, **change}
    with pytest.raises(ValueError, match=message):
        from_diffusers({}, config)


def test_missing_and_left_over_weights_are_named():
    config = {**UNet2DModel(**PLAIN).config}
    state = UNet2DModel(**PLAIN).state_dict()
    with pytest.raises(ValueError, match="no place here, for example 'extra'"):
        from_diffusers({**state, "extra": torch.zeros(1)}, config)
    state.pop("mid_block.resnets.1.conv2.bias")
    with pytest.raises(ValueError, match="lacks 'mid_block.resnets.1.conv2.bias'"):
        from_diffusers(state, config)


@pytest.mark.parametrize("blocks", [1, 3])
def test_layers_are_those_of_the_network(blocks):
    options = UNetOptions(width=8, groups=4, blocks=blocks, multipliers=(1, 2, 2))
    network = UNet(options)
    listed = [layer.ours for layer in layers(options)]
    for name in ("down", "middle", "up"):
        own = [f"{name}.{i}" for i in range(len(getattr(network, name)))]
        assert [n for n in listed if n.startswith(name)] == own
    resizes = [layer.ours for layer in layers(options) if layer.resizes]
    assert all(hasattr(network.get_submodule(name), "conv") for name in resizes)
