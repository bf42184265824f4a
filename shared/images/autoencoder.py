"""A small variational autoencoder whose latents another model can generate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional as F

from shared.checkpoints import fingerprint
from shared.denoisers import Denoiser
from shared.predictions import Condition
from shared.process import Process, State
from shared.schedules import Schedule

if TYPE_CHECKING:
    from shared.images.domain import Images


class Residual(nn.Module):
    """Two convolutions beside a shortcut; an untrained one passes its input on."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(math.gcd(8, channels_in), channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(math.gcd(8, channels), channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        same = channels_in == channels
        self.skip = nn.Identity() if same else nn.Conv2d(channels_in, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        skipped: Tensor = self.skip(x)
        return skipped + self.conv2(F.silu(self.norm2(h)))


def encoder(channels: int, latent: int, widths: Sequence[int], blocks: int) -> nn.Sequential:
    """Images -> mean and log-variance of latents, twice ``latent`` channels, with sides smaller by
    2^(len(widths) - 1)."""
    layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], 3, padding=1)]
    now = widths[0]
    for level, width in enumerate(widths):
        if level:
            layers.append(nn.Conv2d(now, now, 3, stride=2, padding=1))
        for _ in range(blocks):
            layers.append(Residual(now, width))
            now = width
    return nn.Sequential(*layers, *_leaving(now, 2 * latent))


def decoder(channels: int, latent: int, widths: Sequence[int], blocks: int) -> nn.Sequential:
    """Latents -> images: the same way back."""
    now = widths[-1]
    layers: list[nn.Module] = [nn.Conv2d(latent, now, 3, padding=1)]
    for level, width in reversed(list(enumerate(widths))):
        for _ in range(blocks):
            layers.append(Residual(now, width))
            now = width
        if level:
            layers += [nn.Upsample(scale_factor=2.0), nn.Conv2d(now, now, 3, padding=1)]
    return nn.Sequential(*layers, *_leaving(now, channels))


def _leaving(channels: int, outputs: int) -> list[nn.Module]:
    norm = nn.GroupNorm(math.gcd(8, channels), channels)
    return [norm, nn.SiLU(), nn.Conv2d(channels, outputs, 3, padding=1)]


class Network(nn.Module):
    """Encoder and decoder; as a backbone it reconstructs images from the means of their
    latents."""

    def __init__(self, channels: int, latent: int, widths: Sequence[int], blocks: int) -> None:
        super().__init__()
        self.encode = encoder(channels, latent, widths, blocks)
        self.decode = decoder(channels, latent, widths, blocks)

    def forward(
        self, inputs: State, code: Tensor, mask: Tensor | None, cond: Condition | None
    ) -> State:
        mean, _ = self.encode(inputs["x"]).chunk(2, dim=1)
        return {"x": self.decode(mean)}


def divergence(mean: Tensor, deviation: Tensor) -> Tensor:
    """KL(N(mean, deviation^2) || N(0, 1)) in nats, summed over everything but the batch."""
    variance = deviation**2
    return 0.5 * (mean**2 + variance - 1.0 - variance.log()).flatten(1).sum(1)


class KLAutoencoder(Denoiser):
    """A Gaussian autoencoder (Kingma & Welling 2014). It trains like a denoiser, but on clean
    images: the mean square error of pixels plus ``kl_weight`` times the divergence of the latents
    from a standard normal, both per pixel and channel. Without the perceptual and adversarial
    losses of Rombach et al. 2022, images that are made much smaller come back blurred."""

    published_scale: float | None = None

    def __init__(self, network: Network, process: Process, kl_weight: float) -> None:
        super().__init__(network, process)
        self.kl_weight = kl_weight

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of images [n, channels, height, width]."""
        mean, log_variance = self.backbone.encode(images).chunk(2, dim=1)  # type: ignore[operator]
        return mean, (0.5 * log_variance.clamp(-30.0, 20.0)).exp()

    def images(self, latents: Tensor) -> Tensor:
        """Images of latents."""
        decoded: Tensor = self.backbone.decode(latents)  # type: ignore[operator]
        return decoded

    def fingerprint(self) -> str:
        """A hash of the weights."""
        return fingerprint(self)

    def outputs(
        self,
        x: State,
        t: float | Tensor,
        mask: Tensor | None = None,
        cond: Condition | None = None,
    ) -> State:
        raise ValueError(
            "an autoencoder denoises nothing; train a model of its latents with "
            "domain.autoencoder=RUN."
        )

    def losses(
        self,
        x0: State,
        noise: State,
        t: Tensor,
        mask: Tensor | None = None,
        cond: Condition | None = None,
    ) -> dict[str, Tensor]:
        """'x', the error of the pixels, and 'kl', each [batch]; the latents are drawn with the
        first numbers of ``noise``."""
        images = x0["x"]
        with self.precision.autocast(images.device):
            mean, deviation = self.moments(images)
            white = noise["x"].flatten(1)[:, : mean[0].numel()].reshape(mean.shape)
            found = self.images(mean + deviation * white)
        error = (found.float() - images).square().flatten(1).mean(1)
        per_pixel = divergence(mean.float(), deviation.float()) / images[0].numel()
        return {"x": error, "kl": self.kl_weight * per_pixel}


def kl_autoencoder(
    domain: Images,
    schedule: Schedule,
    latent: int = 4,
    widths: Sequence[int] = (32, 64),
    blocks: int = 1,
    kl_weight: float = 1e-4,
) -> KLAutoencoder:
    """An autoencoder of the images of ``domain``; every level of ``widths`` but the first halves
    the sides (two levels: 2 times, four: 8 times smaller).

    Args:
        latent: channels of the latents.

    Raises:
        ValueError: sides that cannot be halved so often, latents larger than the images, or a
            domain that works on latents already.
    """
    if domain.autoencoder is not None:
        raise ValueError("model: an autoencoder learns from images; set domain.autoencoder=null.")
    channels, height, width = domain.shape
    factor = 2 ** (len(widths) - 1)
    if height % factor or width % factor:
        raise ValueError(
            f"model.widths: {len(widths)} levels need sides divisible by {factor}; the images "
            f"are {height} x {width}."
        )
    if latent > channels * factor**2:
        raise ValueError(
            f"model.latent={latent}: more numbers than the images have; give at most "
            f"{channels * factor**2}."
        )
    network = Network(channels, latent, widths, blocks)
    return KLAutoencoder(network, Process.single(schedule), kl_weight)
