"""Denoisers of images with the published networks, as configurations name them."""

from __future__ import annotations

from typing import Any

from torch import nn

from shared.denoisers import Denoiser, Head, TimeCode
from shared.images.backbones.unet import PRESETS, UNet, UNetOptions
from shared.images.backbones.uvit import SIZES, UViT
from shared.images.domain import Images
from shared.images.networks import Concatenated
from shared.losses import TimeSampler
from shared.process import Process
from shared.schedules import Schedule


def unet(
    domain: Images,
    schedule: Schedule,
    preset: str = "ddpm",
    conditional: bool = True,
    head: Head | None = None,
    times: TimeSampler | None = None,
    time_code: TimeCode | None = None,
    **options: Any,
) -> Denoiser:
    """A U-Net for the images of ``domain``; ``options`` of :class:`UNetOptions` change those of
    ``preset``. A head with a learned range doubles the output.

    Raises:
        ValueError: an unknown preset or option, or sides that cannot be halved often enough.
    """
    if preset not in PRESETS:
        raise ValueError(f"model.preset={preset}: give one of {', '.join(PRESETS)}.")
    channels, height, width = domain.shape
    own = {"classes": domain.classes if conditional else 0, "augment": domain.augment_entries}
    settings = {**PRESETS[preset], **own, **options}
    ranged = head is not None and head.learned_range
    if ranged and domain.upscale is not None:
        raise ValueError("model: a model that enlarges (domain.upscale) has no learned range.")
    if ranged or domain.upscale is not None:
        settings["outputs"] = 2 * channels if ranged else channels
    seen = channels if domain.upscale is None else 2 * channels
    chosen = UNetOptions(**{**settings, "channels": seen})
    if height % chosen.fold or width % chosen.fold:
        raise ValueError(
            f"model.multipliers: {len(chosen.multipliers)} levels need sides divisible by "
            f"{chosen.fold}; the images are {height} x {width}."
        )
    network: nn.Module = UNet(chosen)
    if domain.upscale is not None:
        network = Concatenated(network)
    return _denoiser(network, schedule, head, times, time_code)


def uvit(
    domain: Images,
    schedule: Schedule,
    size: str = "small",
    patch: int = 2,
    conditional: bool = True,
    head: Head | None = None,
    times: TimeSampler | None = None,
    time_code: TimeCode | None = None,
    **options: Any,
) -> Denoiser:
    """A U-ViT for the images of ``domain``; ``options`` (width, depth, heads and the switches of
    :class:`UViT`) change those of the published ``size``.

    Raises:
        ValueError: an unknown size, images that are not square, sizes that do not divide, or
            augmentation, of which U-ViT cannot be told.
    """
    if domain.augment_entries:
        raise ValueError("domain.augment: U-ViT takes no augmentation labels; choose a U-Net.")
    if size not in SIZES:
        raise ValueError(f"model.size={size}: give one of {', '.join(SIZES)}.")
    channels, height, width = domain.shape
    if height != width:
        raise ValueError(f"model: U-ViT takes square images; these are {height} x {width}.")
    settings = {**SIZES[size], "classes": domain.classes if conditional else 0, **options}
    network = UViT(channels=channels, side=height, patch=patch, **settings)
    return _denoiser(network, schedule, head, times, time_code)


def _denoiser(
    network: nn.Module,
    schedule: Schedule,
    head: Head | None,
    times: TimeSampler | None,
    time_code: TimeCode | None,
) -> Denoiser:
    code = time_code or TimeCode("time", 999.0)  # as score_sde and U-ViT do for times up to 1
    return Denoiser(network, Process.single(schedule), head, code, times=times)
