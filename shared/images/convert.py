"""Published image checkpoints -> run folders, recognised by the names of their tensors.

What does the work is imported when a file is read, so that the command line starts quickly.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.cli import Converter

if TYPE_CHECKING:
    from torch import Tensor

Config = dict[str, Any]
HEAD = "shared.denoisers.Head"
CODE = "shared.denoisers.TimeCode"


# -- reading ----------------------------------------------------------------------------------


def read(path: Path) -> Any:
    """The content of a checkpoint, without running code: a diffusers folder (with 'config' and,
    if there is one, 'scheduler' beside the tensors), .safetensors, a pickled module of NVlabs-EDM
    (.pkl), or a file of ``torch.save``.

    Raises:
        FileNotFoundError, ValueError: nothing there, damaged, or of another kind.
    """
    from shared.checkpoints import read_pickled_tensors
    from shared.inert import is_module_pickle, read_modules

    if not path.exists():
        raise FileNotFoundError(f"no file or folder {path}.")
    if path.is_dir():
        return _read_folder(path)
    if path.suffix == ".safetensors":
        return _safetensors(path)
    if is_module_pickle(path):
        modules = read_modules(path)
        return modules.get("ema", next(iter(modules.values())))
    return read_pickled_tensors(path)


def _read_folder(path: Path) -> dict[str, Any]:
    from shared.checkpoints import read_pickled_tensors

    folder = path / "unet" if (path / "unet" / "config.json").exists() else path
    config = folder / "config.json"
    if not config.exists():
        raise FileNotFoundError(f"{path}: no config.json in it or in its folder unet.")
    content: dict[str, Any] = {"config": json.loads(config.read_text(encoding="utf-8"))}
    for scheduler in (
        folder / "scheduler_config.json",
        folder.parent / "scheduler" / "scheduler_config.json",
    ):
        if scheduler.exists():
            content["scheduler"] = json.loads(scheduler.read_text(encoding="utf-8"))
            break
    weights = folder / "diffusion_pytorch_model.safetensors"
    if weights.exists():
        return {**_safetensors(weights), **content}
    pickled = weights.with_suffix(".bin")
    if not pickled.exists():
        raise FileNotFoundError(f"{folder}: neither {weights.name} nor {pickled.name} in it.")
    return {**read_pickled_tensors(pickled), **content}


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file ({error}).") from None


def tensors_of(content: Any) -> dict[str, Tensor]:
    """The state dict in what :func:`read` gives, averaged weights where there are any; those of
    score_sde come without names, in the order of the parameters.

    Raises:
        ValueError: averages that do not fit.
    """
    from torch import Tensor

    if not isinstance(content, Mapping):
        raise ValueError("the checkpoint is no state dict.")
    for key in ("model", "state_dict", "ema", "net"):
        inner = content.get(key)
        if isinstance(inner, Mapping) and any(isinstance(v, Tensor) for v in inner.values()):
            state = _bare(inner)
            break
    else:
        return _bare(content)
    averages = content.get("ema")
    shadow = averages.get("shadow_params") if isinstance(averages, Mapping) else None
    if shadow is not None:
        fixed = ("sigmas", "all_modules.0.W")
        names = [name for name in state if name not in fixed]
        if [v.shape for v in shadow] != [state[n].shape for n in names]:
            raise ValueError("the averaged weights do not fit the network's own.")
        state.update(zip(names, shadow, strict=True))
    return state


def bare_name(name: str) -> str:
    """The name of a tensor without those of the wrappers around the network."""
    return re.sub(r"^((model|module|state_dict|ema|net)\.)+", "", name)


def _bare(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Names without the wrappers around the network, in full precision."""
    from torch import Tensor

    out = {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            out[bare_name(str(name))] = value.float() if value.is_floating_point() else value
    return out


# -- writing ----------------------------------------------------------------------------------


def _save(
    out: Path,
    model: Config,
    schedule: Config,
    weights: Mapping[str, Tensor],
    side: int,
    autoencoder: str | None = None,
) -> None:
    """Write the run folder. ``model`` has the options of the network beside its target."""
    from omegaconf import OmegaConf

    from shared import checkpoints
    from shared.configuration import build
    from shared.images.domain import Images

    shape: list[int] = [model.pop("channels"), side, side]
    constants: Config = {}
    if autoencoder is not None:
        shape, constants = _published_latents(autoencoder, shape)
    elif shape[0] not in (1, 3):
        raise ValueError(
            f"the network works on {shape[0]} channels: latents of an autoencoder; give "
            "autoencoder=FOLDER, of the one that it was trained with."
        )
    statistics = {"domain": Images.name, "shape": shape, "class_counts": [1] * model["classes"]}
    statistics |= constants
    # the data are the user's; samples need none
    domain = {"_target_": "shared.images.domain.Images", "data": "data.npz"}
    domain |= {"autoencoder": autoencoder} if autoencoder else {}
    config = {"domain": domain, "model": model, "schedule": schedule}
    built = build(OmegaConf.create(domain))
    built.restore(statistics)
    steps = build(OmegaConf.create(schedule))
    denoiser = build(OmegaConf.create(model), domain=built, schedule=steps)
    denoiser.backbone.load_state_dict(weights)
    checkpoints.save(out, denoiser, config=config, domain=statistics, step=0)


def _published_latents(autoencoder: str, shape: list[int]) -> tuple[list[int], Config]:
    """The shape of the images, and the constants of latents of ``shape``."""
    import torch

    from shared.images.latents import open_autoencoder

    opened = open_autoencoder(autoencoder)
    if opened.published_scale is None:
        raise ValueError(
            f"autoencoder={autoencoder} does not tell the scale of its latents; give a folder of "
            "diffusers' AutoencoderKL."
        )
    try:
        with torch.no_grad():
            images = opened.images(torch.zeros(1, *shape))
    except RuntimeError as error:
        raise ValueError(f"autoencoder={autoencoder} has no latents {shape} ({error}).") from None
    scale, weights = opened.published_scale, opened.fingerprint()
    return list(images.shape[1:]), {
        "latents": {"shape": shape, "scale": scale, "weights": weights}
    }


def _head(parameterisation: str, **more: Any) -> Config:
    target = f"shared.predictions.{parameterisation}"
    return {"_target_": HEAD, "parameterisation": {"_target_": target}, **more}


def _code(kind: str, scale: float = 1.0, shift: float = 0.0) -> Config:
    return {"_target_": CODE, "kind": kind, "scale": scale, "shift": shift}


def _unet(options: Mapping[str, Any], head: Config, code: Config, **more: Any) -> Config:
    from dataclasses import asdict

    from shared.images.backbones.unet import UNetOptions

    every = asdict(UNetOptions(**options))
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in every.items()}
    target = "shared.images.backbones.models.unet"
    return {"_target_": target, **plain, "head": head, "time_code": code, **more}


def _learned_range(options: Mapping[str, Any]) -> Config:
    """What a head needs for a network that gives a variance too."""
    return {"learned_range": options["outputs"] == 2 * options["channels"]}


TABLE = {"_target_": "shared.schedules.VPDiscrete.linear"}
LATENT_TABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
STEPS = {"_target_": "shared.losses.UniformTime", "steps": 1000}


# -- one function per family ------------------------------------------------------------------


def convert_diffusers(content: Mapping[str, Any], path: Path, out: Path) -> None:
    """A ``UNet2DModel`` folder; without a scheduler beside it, with the table of DDPM."""
    from shared.images.backbones.diffusers import (
        PREDICTIONS,
        from_diffusers,
        from_scheduler,
        prediction_type,
    )

    if "config" not in content:
        raise ValueError(f"{path}: give the folder with config.json instead of the weights alone.")
    config, scheduler = content["config"], content.get("scheduler")
    options, weights = from_diffusers(tensors_of(content), config)
    schedule: Config = TABLE
    if scheduler is not None:
        betas = list(from_scheduler(scheduler).betas)
        schedule = {"_target_": "shared.schedules.VPDiscrete", "betas": betas}
    kind = PREDICTIONS[prediction_type(scheduler or {})].__name__
    head = _head(kind, **_learned_range(options))
    steps = len(schedule.get("betas", range(1000)))
    side = config.get("sample_size")
    if not isinstance(side, int):
        raise ValueError(f"config.json: sample_size={side}; give the side of the images.")
    more = {"times": {**STEPS, "steps": steps}} if head["learned_range"] else {}
    _save(out, _unet(options, head, _code("time", steps, -1.0), **more), schedule, weights, side)


def convert_score_sde(content: Mapping[str, Any], path: Path, out: Path) -> None:
    """score_sde: DDPM with its table, DDPM++ with the linear VP process, NCSN++ with VE. The side
    is the one that puts attention at 16 x 16, as published."""
    from shared.images.backbones.published import from_score_sde

    options, weights = from_score_sde(tensors_of(content))
    side = 16 * 2 ** options["attention"][0]
    head, code = _head("Noise"), _code("time", 999.0)
    schedule: Config = {"_target_": "shared.schedules.VPLinear"}
    if options.get("time") == "fourier":
        # it sees images in [0, 1] and gives sigma times the score: here noise is twice as large,
        # the code log(sigma / 2), and the sign that of the noise
        schedule = {"_target_": "shared.schedules.VarianceExploding"}
        schedule |= {"sigma_min": 0.02, "sigma_max": 100.0}
        code = _code("karras", 4.0, -math.log(2.0))
        weights = _negated(weights)
    elif not options.get("resampling_skip"):
        schedule, code = TABLE, _code("time", 1000.0, -1.0)
    _save(out, _unet(options, head, code), schedule, weights, side)


def _negated(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    last = ("leave.weight", "leave.bias")
    return {name: -value if name in last else value for name, value in weights.items()}


def convert_adm(content: Mapping[str, Any], path: Path, out: Path) -> None:
    """guided-diffusion, whose attention starts at 32 x 32; the cosine table for images of 64 x
    64, the linear one for others, as published."""
    from shared.images.backbones.published import from_adm

    options, weights = from_adm(tensors_of(content))
    side = 32 * 2 ** options["attention"][0]
    schedule = {"_target_": "shared.schedules.VPDiscrete.cosine"} if side == 64 else TABLE
    head = _head("Noise", **_learned_range(options))
    model = _unet(options, head, _code("time", 1000.0, -1.0), times=STEPS)
    _save(out, model, schedule, weights, side)


def convert_edm(content: Mapping[str, Any], path: Path, out: Path) -> None:
    """NVlabs-EDM with EDM's own preconditioning."""
    from shared.images.backbones.published import edm_side, from_edm

    state = tensors_of(content)
    options, weights = from_edm(state)
    head = _head("KarrasPreconditioned", weighting={"_target_": "shared.losses.Native"})
    model = _unet(options, head, _code("karras"))
    model["times"] = {"_target_": "shared.losses.NormalLogSNR"}
    schedule = {"_target_": "shared.schedules.Karras"}
    _save(out, model, schedule, weights, edm_side(state))


def convert_uvit(
    content: Mapping[str, Any], path: Path, out: Path, autoencoder: str | None = None
) -> None:
    """U-ViT, with the linear VP process; the huge models, which are of latents, with the table of
    betas of latent diffusion, as published."""
    from shared.images.backbones.diffusers import from_scheduler
    from shared.images.backbones.uvit import SIZES, uvit_options, uvit_weights

    state = tensors_of(content)
    options = uvit_options(state)
    side, target = options.pop("side"), "shared.images.backbones.models.uvit"
    parts = {"head": _head("Noise"), "time_code": _code("time", 999.0)}
    schedule: Config = {"_target_": "shared.schedules.VPLinear"}
    if options["width"] == SIZES["huge"]["width"]:
        betas = from_scheduler({**LATENT_TABLE, "num_train_timesteps": 1000}).betas
        schedule = {"_target_": "shared.schedules.VPDiscrete", "betas": list(betas)}
        parts["time_code"] = _code("time", 1000.0)
    model = {"_target_": target, **options, **parts}
    _save(out, model, schedule, uvit_weights(state), side, autoencoder)


def _with(*names: str) -> Callable[[frozenset[str]], bool]:
    return lambda keys: {bare_name(key) for key in keys}.issuperset(names)


CONVERTERS = (
    Converter("U-ViT", _with("patch_embed.proj.weight", "pos_embed"), convert_uvit),
    Converter(
        "diffusers",
        _with("conv_in.weight", "time_embedding.linear_1.weight"),
        convert_diffusers,
    ),
    Converter(
        "guided-diffusion",
        _with("input_blocks.0.0.weight", "time_embed.0.weight", "out.2.weight"),
        convert_adm,
    ),
    Converter("NVlabs-EDM", _with("map_layer0.weight", "map_layer1.weight"), convert_edm),
    Converter(
        "score_sde",
        _with("all_modules.2.weight"),
        convert_score_sde,
    ),
)
