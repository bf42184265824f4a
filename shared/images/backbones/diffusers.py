"""Between here and diffusers: networks and schedulers from there, schedules for there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from shared.denoisers import Denoiser, Head, TimeCode
from shared.images.backbones.families import (
    Family,
    Options,
    Weights,
    joined,
    layers,
    with_null,
)
from shared.images.backbones.unet import UNetOptions
from shared.predictions import Condition, Data, Noise, Parameterisation, Velocity
from shared.process import Process, State
from shared.schedules import Karras, Schedule, VariancePreserving, VPDiscrete

PREDICTIONS: Mapping[str, type[Parameterisation]] = {
    "epsilon": Noise,
    "v_prediction": Velocity,
    "sample": Data,
}


def _diffusers_names(o: UNetOptions) -> dict[str, str]:
    names = {
        "time_layers.0": "time_embedding.linear_1",
        "time_layers.1": "time_embedding.linear_2",
        "label": "class_embedding",
        "enter": "conv_in",
        "norm": "conv_norm_out",
        "leave": "conv_out",
    }
    last = len(o.multipliers) - 1
    for layer in layers(o):
        where = layer.ours.split(".")[0]
        block = {"down": f"down_blocks.{layer.level}", "middle": "mid_block"}.get(
            where, f"up_blocks.{last - layer.level}"
        )
        names[layer.ours] = f"{block}.resnets.{layer.number}"
        names[f"{layer.ours}.attention"] = f"{block}.attentions.{layer.number}"
        if layer.resizes:
            halves = f"down_blocks.{layer.level - 1}.downsamplers.0"
            names[layer.ours] = halves if where == "down" else f"{block}.upsamplers.0"
    return names


_DIFFUSERS = Family(
    _diffusers_names,
    {
        "norm1": ("norm1",),
        "conv1": ("conv1",),
        "embed": ("time_emb_proj",),
        "norm2": ("norm2",),
        "conv2": ("conv2",),
        "skip": ("conv_shortcut",),
        "conv": ("conv",),
        "attention.norm": ("group_norm", "norm"),
        "attention.proj": ("to_out.0", "proj_attn"),
    },
    lambda state, place, heads: joined(
        *(
            ("query", "key", "value")
            if f"{place}.query.weight" in state
            else ("to_q", "to_k", "to_v")
        )
    )(state, place, heads),
)


def from_diffusers(state: Weights, config: Mapping[str, Any]) -> tuple[Options, dict[str, Tensor]]:
    """Weights and config.json of a ``UNet2DModel`` -> options and weights of :class:`UNet`.

    Raises:
        ValueError: a choice that :class:`UNet` does not offer.
    """
    options = _diffusers_options(config)
    weights = dict(state)
    if options["classes"]:
        weights["class_embedding.weight"] = with_null(weights["class_embedding.weight"])
    return options, _DIFFUSERS.convert(weights, UNetOptions(**options))


def _diffusers_options(config: Mapping[str, Any]) -> Options:
    down, up = config["down_block_types"], config["up_block_types"]
    sine = (config.get("flip_sin_to_cos", True), config.get("freq_shift", 0))
    ways = {_resampling(kind, config.get("downsample_type", "conv")) for kind in down[:-1]}
    ways |= {_resampling(kind, config.get("upsample_type", "conv")) for kind in up[:-1]}
    for key, value, known in (
        ("down_block_types", sorted({*down} - _DOWN), [[]]),
        ("up_block_types", sorted({*up} - _UP), [[]]),
        ("time_embedding_type", config.get("time_embedding_type", "positional"), ["positional"]),
        ("flip_sin_to_cos, freq_shift", sine, [(True, 0), (False, 1)]),
        ("act_fn", config.get("act_fn", "silu"), ["silu", "swish"]),
        ("class_embed_type", config.get("class_embed_type"), [None]),
        ("add_attention", config.get("add_attention", True), [True]),
        ("mid_block_scale_factor", config.get("mid_block_scale_factor", 1), [1]),
        ("center_input_sample", config.get("center_input_sample", False), [False]),
        ("downsample_type and upsample_type", sorted(ways), [["conv"], ["resnet"], []]),
        ("attn_norm_num_groups", config.get("attn_norm_num_groups"), _mid_groups(config)),
        ("attention", [k for k, d in enumerate(down) if "Attn" in d], [_up_attention(up)]),
    ):
        if value not in known:
            raise ValueError(f"config.json: {key}={value} is not supported by this U-Net.")
    widths = config["block_out_channels"]
    convolution = "convolution" if config.get("downsample_padding", 1) else "asymmetric"
    return {
        "channels": config["in_channels"],
        "outputs": config["out_channels"],
        "classes": config.get("num_class_embeds") or 0,
        "width": widths[0],
        "multipliers": [w / widths[0] for w in widths],
        "blocks": config.get("layers_per_block", 2),
        "attention": _up_attention(up),
        "head_channels": config.get("attention_head_dim", 8),
        "film": config.get("resnet_time_scale_shift", "default") == "scale_shift",
        "resampling": "block" if "resnet" in ways else convolution,
        "groups": config.get("norm_num_groups", 32),
        "eps": config.get("norm_eps", 1e-5),
        "time": "cosine" if sine == (True, 0) else "sine",
    }


_DOWN = {"DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"}
_UP = {"UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"}


def _resampling(kind: str, attention: str) -> str:
    """Blocks with attention resample as the config says, the others as their names say."""
    return attention if "Attn" in kind else "resnet" if kind.startswith("Resnet") else "conv"


def _mid_groups(config: Mapping[str, Any]) -> list[int | None]:
    """What the normalisation of the middle may say; with scale and shift, None leaves it out."""
    groups = config.get("norm_num_groups", 32)
    film = config.get("resnet_time_scale_shift", "default") == "scale_shift"
    return [groups] if film else [groups, None]


def _up_attention(up: list[str]) -> list[int]:
    return [level for level, kind in enumerate(reversed(up)) if "Attn" in kind]


# -- networks and schedulers ------------------------------------------------------------------


class DiffusersNetwork(nn.Module):
    """A network of diffusers, called as (sample, timestep, ...), as a backbone. Keys of the
    condition are passed on by name, 'label' as ``class_labels``; twice the channels are mean and
    variance."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, inputs: State, code: Tensor, mask: Tensor | None, cond: Condition | None
    ) -> State:
        names = {"label": "class_labels"}
        more = {names.get(name, name): value for name, value in (cond or {}).items()}
        out = self.network(inputs["x"], code, **more).sample
        if out.shape[1] != 2 * inputs["x"].shape[1]:
            return {"x": out}
        mean, variance = out.chunk(2, dim=1)
        return {"x": mean, "x_variance": variance}


def from_pipeline(pipeline: Any) -> Denoiser:
    """The network of a diffusers pipeline (its ``unet`` and ``scheduler``) as a denoiser that our
    solvers and guidance take.

    Raises:
        ValueError: a scheduler without a table of betas, or a prediction that is none of ours.
    """
    config = pipeline.scheduler.config
    schedule = from_scheduler(config)
    head = Head(PREDICTIONS[prediction_type(config)]())
    code = TimeCode("time", float(schedule.steps), -1.0)
    return Denoiser(DiffusersNetwork(pipeline.unet), Process.single(schedule), head, code)


def prediction_type(config: Mapping[str, Any]) -> str:
    """What a scheduler's configuration says that the network predicts.

    Raises:
        ValueError: something unknown.
    """
    kind = str(config.get("prediction_type", "epsilon"))
    if kind not in PREDICTIONS:
        raise ValueError(f"prediction_type={kind} is not one of {', '.join(PREDICTIONS)}.")
    return kind


def from_scheduler(config: Mapping[str, Any]) -> VPDiscrete:
    """The schedule of a diffusers scheduler's configuration.

    Raises:
        ValueError: a ``beta_schedule`` that is none of linear, scaled_linear and
            squaredcos_cap_v2, without ``trained_betas``.
    """
    if config.get("trained_betas") is not None:
        return VPDiscrete(tuple(float(beta) for beta in config["trained_betas"]))
    kind, steps = config.get("beta_schedule", "linear"), int(config["num_train_timesteps"])
    if kind == "squaredcos_cap_v2":
        return VPDiscrete.cosine(steps)
    first, last = float(config["beta_start"]), float(config["beta_end"])
    if kind == "linear":
        return VPDiscrete.linear(steps, first, last)
    if kind == "scaled_linear":
        roots = torch.linspace(first**0.5, last**0.5, steps, dtype=torch.float64)
        return VPDiscrete(tuple((roots**2).tolist()))
    raise ValueError(
        f"beta_schedule={kind}: give linear, scaled_linear, squaredcos_cap_v2 or trained_betas."
    )


def scheduler_config(
    schedule: Schedule, parameterisation: Parameterisation | None = None, steps: int = 1000
) -> dict[str, Any]:
    """The configuration of a diffusers scheduler with our schedule: ``DDPMScheduler`` with the
    table of betas at n/``steps`` (other discrete ones take it too), or ``EDMEulerScheduler``.

    Raises:
        ValueError: a schedule or a parameterisation that diffusers does not have.
    """
    kinds = {kind: name for name, kind in PREDICTIONS.items()}
    kind = type(parameterisation or Noise())
    if isinstance(schedule, Karras):
        return {
            "_class_name": "EDMEulerScheduler",
            "sigma_min": schedule.sigma_min,
            "sigma_max": schedule.sigma_max,
            "sigma_data": getattr(parameterisation, "sigma_data", 0.5),
            "prediction_type": "epsilon",
        }
    if not isinstance(schedule, VariancePreserving) or kind not in kinds:
        raise ValueError(
            f"diffusers has no scheduler for {type(schedule).__name__} with {kind.__name__}; "
            f"it takes variance-preserving schedules with {', '.join(k.__name__ for k in kinds)}, "
            "and Karras."
        )
    betas = _betas(schedule, steps)
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": len(betas),
        "trained_betas": betas,
        "prediction_type": kinds[kind],
        "clip_sample": False,
    }


def _betas(schedule: Schedule, steps: int) -> list[float]:
    if isinstance(schedule, VPDiscrete) and not schedule.from_zero:
        return list(schedule.betas)
    t = torch.arange(1, steps + 1, dtype=torch.float64) * (schedule.t_max / steps)
    log_alpha = torch.cat([torch.zeros(1, dtype=torch.float64), schedule.log_alpha(t).detach()])
    return (-torch.expm1(2.0 * log_alpha.diff())).tolist()
