"""Images as latents of an autoencoder (Rombach et al. 2022)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from shared.checkpoints import fingerprint
from shared.extras import need
from shared.images.pictures import Pictures
from shared.images.records import scaled

BLOCK = 64  # images at a time
Constants = Mapping[str, Any]
"""'shape' of the latents, 'scale' that brings them to a standard deviation of 1, and 'weights',
the fingerprint of the autoencoder: they travel with the weights of a model of latents."""


class Autoencoder(Protocol):
    """What latents need of an autoencoder. ``published_scale``: the factor of its latents that
    models of it were published with, None for one to be measured."""

    published_scale: float | None

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [n, channels, height, width] in [-1, 1] -> mean and standard deviation of their
        latents, [n, k, h, w]."""
        ...

    def images(self, latents: Tensor) -> Tensor:
        """Latents [n, k, h, w] -> images [n, channels, height, width]."""
        ...

    def fingerprint(self) -> str:
        """What tells its weights from others."""
        ...


class DiffusersAutoencoder(nn.Module):
    """diffusers' AutoencoderKL."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        self.published_scale: float | None = network.config.get("scaling_factor")

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        found = self.network.encode(images).latent_dist
        return found.mean, found.std

    def images(self, latents: Tensor) -> Tensor:
        decoded: Tensor = self.network.decode(latents).sample
        return decoded

    def fingerprint(self) -> str:
        return fingerprint(self)


def open_autoencoder(name: str) -> Autoencoder:
    """A trained run, or a folder of diffusers with config.json and safetensors.

    Raises:
        FileNotFoundError, ValueError: nothing there, or no autoencoder.
        ModuleNotFoundError: a folder of diffusers, which is not installed.
    """
    folder = Path(name)
    inside = folder / "vae" if (folder / "vae" / "config.json").exists() else folder
    if (inside / "config.json").exists():
        return _diffusers(inside)
    from shared.images.autoencoder import KLAutoencoder
    from shared.models import load  # it builds domains, the image domain among them

    model: Any = load(name).denoiser
    if not isinstance(model, KLAutoencoder):
        raise ValueError(
            f"domain.autoencoder={name} holds no autoencoder; train one with experiment="
            "digits_vae or model=autoencoder."
        )
    return model.requires_grad_(False).eval()


def _diffusers(folder: Path) -> DiffusersAutoencoder:
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_class_name")
    if kind != "AutoencoderKL":
        raise ValueError(f"domain.autoencoder={folder}: {kind}, and no AutoencoderKL.")
    if not (folder / "diffusion_pytorch_model.safetensors").exists():
        raise FileNotFoundError(
            f"domain.autoencoder={folder}: no diffusion_pytorch_model.safetensors in it; pickled "
            "weights are not read."
        )
    diffusers = need("diffusers", f"domain.autoencoder={folder}", "peers")
    try:
        network = diffusers.AutoencoderKL.from_pretrained(
            str(folder), use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False
        )
    except Exception as error:  # a foreign reader
        raise ValueError(f"domain.autoencoder={folder} cannot be read ({error}).") from error
    return DiffusersAutoencoder(network.requires_grad_(False).eval())


@dataclass(frozen=True, eq=False)
class Drawn:
    """A latent of picture ``row`` by torch's generator, scaled. ``moments``: mean and standard
    deviation, [n, 2, k, h, w]."""

    moments: np.ndarray
    scale: float

    def __call__(self, row: int) -> Tensor:
        mean, deviation = torch.from_numpy(self.moments[row].astype(np.float32))
        return (mean + deviation * torch.randn(mean.shape)) * self.scale


class Latents:
    """The way between pictures and the latents of the autoencoder ``name``."""

    def __init__(self, name: str) -> None:
        self.name = name

    @cached_property
    def _network(self) -> Any:
        from shared.models import find_device

        network: Any = open_autoencoder(self.name)
        return network.to(find_device("auto"))

    @cached_property
    def weights(self) -> str:
        """The fingerprint of the autoencoder."""
        return str(self._network.fingerprint())

    def _checked(self, constants: Constants) -> Any:
        if constants["weights"] != self.weights:
            raise ValueError(
                f"domain.autoencoder={self.name} is not the one that the model was trained with "
                f"(its weights are {self.weights}, not {constants['weights']})."
            )
        return self._network

    @torch.no_grad()
    def blocks(self, pictures: np.ndarray | Pictures) -> Iterator[np.ndarray]:
        """Moments [n, 2, k, h, w] of pictures [n, height, width(, 3)], some at a time.

        Raises:
            ValueError: pictures that the autoencoder does not take.
        """
        device = next(self._network.parameters()).device
        for first in range(0, len(pictures), BLOCK):
            pixels = scaled(pictures[first : first + BLOCK]).to(device)
            try:
                both = torch.stack(self._network.moments(pixels), 1)
            except RuntimeError as error:
                raise ValueError(
                    f"domain.autoencoder={self.name} does not take images "
                    f"{list(pixels.shape[1:])} ({error})."
                ) from error
            yield both.float().cpu().numpy()

    def statistics(self, pictures: np.ndarray) -> dict[str, Any]:
        """The constants, measured on some training pictures."""
        moments = np.concatenate(list(self.blocks(pictures)))
        mean, deviation = moments[:, 0].astype(np.float64), moments[:, 1].astype(np.float64)
        spread = float(np.sqrt(mean.var() + np.square(deviation).mean()))
        scale = self._network.published_scale or 1.0 / spread
        return {"shape": list(moments.shape[2:]), "scale": scale, "weights": self.weights}

    def reader(
        self, data: str, pictures: Pictures, constants: Constants
    ) -> Callable[[int], Tensor]:
        """Number of a picture -> a latent. The moments come from the folder ``data`` where
        ``imagediff prepare`` has put them, else they are computed here and kept in memory."""
        self._checked(constants)
        file = Path(data) / f"moments-{self.weights}.npy"
        if file.exists():
            moments = np.load(file, mmap_mode="r", allow_pickle=False)
        else:
            moments = np.concatenate(list(self.blocks(pictures)))
        if len(moments) != len(pictures):
            raise ValueError(f"{file}: {len(moments)} latents of {len(pictures)} pictures.")
        return Drawn(moments, constants["scale"])

    def encode(self, images: np.ndarray, constants: Constants) -> Tensor:
        """Pictures -> the means of their latents, scaled."""
        self._checked(constants)
        means = np.concatenate([block[:, 0] for block in self.blocks(images)])
        return torch.from_numpy(means) * constants["scale"]

    @torch.no_grad()
    def decode(self, x: Tensor, constants: Constants) -> Tensor:
        """Scaled latents [n, k, h, w] -> images [n, channels, height, width] on the CPU."""
        network = self._checked(constants)
        device = next(network.parameters()).device
        parts = [network.images(b.to(device)).cpu() for b in (x / constants["scale"]).split(BLOCK)]
        return torch.cat(parts).float()
