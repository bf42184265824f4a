"""Augmentation that does not leak into samples (Karras et al. 2022, Appendix F.2): the network is
told what was done to an image, and asked for images to which nothing was done."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from shared.configuration import reject_unknown

Drawn = tuple[Tensor, list[float]]
"""A matrix, and the labels of what it does."""


@dataclass(frozen=True)
class Augmentation:
    """Random transforms, each with probability ``p`` (the flip of ``x_flip`` in half of all cases,
    whatever ``p``), of the strengths of EDM; the defaults are those of its models of CIFAR-10.
    Randomness comes from torch's generator.

    Geometric transforms are one bicubic interpolation of the image reflected at its edges, where
    EDM samples a doubled image with an orthogonal wavelet: shrunken images alias a little more.
    ``brightness`` to ``saturation`` work on colours in [-1, 1].

    Raises:
        ValueError: ``p`` is no probability.
    """

    p: float = 0.12
    x_flip: bool = True
    y_flip: bool = True
    rotate_90: bool = False
    shift_pixels: bool = False
    scale: bool = True
    rotate: bool = True
    stretch: bool = True
    shift: bool = True
    brightness: bool = False
    contrast: bool = False
    luma_flip: bool = False
    hue: bool = False
    saturation: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.p <= 1.0:
            raise ValueError(f"domain.augment: p={self.p} is no probability.")

    @staticmethod
    def of(setting: Augmentation | Mapping[str, Any] | float | None) -> Augmentation | None:
        """From a configuration: null, the probability, or options by name.

        Raises:
            ValueError: an unknown option.
        """
        if setting is None or isinstance(setting, Augmentation):
            return setting
        if isinstance(setting, (int, float)) and not isinstance(setting, bool):
            return Augmentation(float(setting))
        if not isinstance(setting, Mapping):
            raise ValueError(f"domain.augment={setting}: give a probability such as 0.12.")
        known = [field.name for field in fields(Augmentation)]
        reject_unknown("domain.augment", [str(key) for key in setting], known)
        return Augmentation(**{str(key): value for key, value in setting.items()})

    @property
    def entries(self) -> int:
        """Length of the labels."""
        return sum(n for name, (n, _) in {**PIXELS, **PLANE, **COLOUR}.items() if self._has(name))

    def __call__(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """[channels, height, width] -> the same transformed, and the labels [entries], which are
        zero where nothing was done.

        Raises:
            ValueError: a quarter turn of an image that is not square.
        """
        labels: list[float] = []
        for name, (_, move) in PIXELS.items():
            if self._has(name):
                active = _chance(1.0 if name == "x_flip" else self.p)
                image, told = move(image, active)
                labels += told
        inverse, told = self._drawn(PLANE, 3)
        image, labels = resampled(image, inverse), labels + told
        matrix, told = self._drawn(COLOUR, 4)
        return recoloured(image, matrix), torch.tensor(labels + told)

    def _has(self, name: str) -> bool:
        return bool(getattr(self, name))

    def _drawn(self, table: Mapping[str, tuple[int, Callable[[bool], Drawn]]], size: int) -> Drawn:
        """The product of the matrices drawn, and all labels."""
        product, labels = torch.eye(size, dtype=torch.float64), list[float]()
        for name, (_, draw) in table.items():
            if self._has(name):
                matrix, told = draw(_chance(self.p))
                product, labels = product @ matrix, labels + told
        return product, labels


def _chance(p: float) -> bool:
    return float(torch.rand(())) < p


def _uniform() -> float:
    return 2.0 * float(torch.rand(())) - 1.0


def _normal(active: bool) -> float:
    """A standard normal, or 0; drawn in either case, so that later draws stay as they are."""
    drawn = float(torch.randn(()))
    return drawn if active else 0.0


# -- whole pixels: (image, active) -> image, labels -------------------------------------------


def _flip(image: Tensor, active: bool, axis: int) -> tuple[Tensor, list[float]]:
    flips = _chance(0.5) and active
    return (image.flip(axis) if flips else image), [float(flips)]


def _quarters(image: Tensor, active: bool) -> tuple[Tensor, list[float]]:
    turns = int(torch.randint(4, ())) * active
    if image.shape[1] != image.shape[2]:
        raise ValueError(f"domain.augment: rotate_90 needs square images, not {image.shape[1:]}.")
    return image.rot90(turns, (1, 2)), [float(turns in (1, 2)), float(turns in (2, 3))]


def _whole_shift(image: Tensor, active: bool, most: float = 0.125) -> tuple[Tensor, list[float]]:
    labels = []
    for axis in (2, 1):
        size, drawn = image.shape[axis], _uniform()
        moved = round(drawn * size * most) if active else 0
        period = 2 * (size - 1)
        place = (torch.arange(size) - moved) % period
        image = image.index_select(axis, torch.minimum(place, period - place))
        labels.append(moved / (size * most))
    return image, labels


PIXELS: Mapping[str, tuple[int, Callable[[Tensor, bool], tuple[Tensor, list[float]]]]] = {
    "x_flip": (1, lambda image, active: _flip(image, active, 2)),
    "y_flip": (1, lambda image, active: _flip(image, active, 1)),
    "rotate_90": (2, _quarters),
    "shift_pixels": (2, _whole_shift),
}
"""Name -> number of labels, transform."""


# -- the plane: where a pixel of the result comes from, in half sides -------------------------


def _diagonal(*entries: float) -> Tensor:
    return torch.diag(torch.tensor(entries, dtype=torch.float64))


def _turn(angle: float) -> Tensor:
    c, s = math.cos(angle), math.sin(angle)
    return torch.tensor([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)


def _scale(active: bool) -> Drawn:
    w = _normal(active)
    s = 2.0 ** (-0.2 * w)
    return _diagonal(s, s, 1.0), [w]


def _rotate(active: bool) -> Drawn:
    angle = math.pi * _uniform() * active
    return _turn(angle), [math.cos(angle) - 1.0, math.sin(angle)]


def _stretch(active: bool) -> Drawn:
    w, angle = _normal(active), math.pi * _uniform() * _chance(0.5)
    along = torch.eye(3, dtype=torch.float64)
    if w:  # turning there and back would leave rounding errors
        s = 2.0 ** (-0.2 * w)
        along = _turn(angle) @ _diagonal(s, 1.0 / s, 1.0) @ _turn(-angle)
    return along, [w * math.cos(angle), w * math.sin(angle)]


def _shift(active: bool) -> Drawn:
    w = [_normal(active), _normal(active)]
    out = torch.eye(3, dtype=torch.float64)
    out[:2, 2] = -0.25 * torch.tensor(w)  # an eighth of the side
    return out, w


PLANE: Mapping[str, tuple[int, Callable[[bool], Drawn]]] = {
    "scale": (1, _scale),
    "rotate": (2, _rotate),
    "stretch": (2, _stretch),
    "shift": (2, _shift),
}


def resampled(image: Tensor, inverse: Tensor) -> Tensor:
    """``image`` [channels, height, width] whose point v comes from ``inverse`` v (3 x 3, from the
    centre in half sides, of an oblong image the geometric mean); untouched by the identity."""
    if torch.equal(inverse, torch.eye(3, dtype=inverse.dtype)):
        return image
    height, width = image.shape[1:]
    sides = _diagonal(width, height, math.sqrt(width * height))  # a turn is one of pixels
    theta = sides.inverse() @ inverse @ sides
    grid = F.affine_grid(theta[None, :2].to(image), [1, *image.shape], align_corners=False)
    return F.grid_sample(
        image[None], grid, mode="bicubic", padding_mode="reflection", align_corners=False
    )[0]


# -- colours: 4 x 4 matrices on (red, green, blue, 1) -----------------------------------------

_LUMA = torch.zeros(4, 4, dtype=torch.float64)
_LUMA[:3, :3] = 1.0 / 3.0  # projects on the grey axis


def _brightness(active: bool) -> Drawn:
    w = _normal(active)
    out = torch.eye(4, dtype=torch.float64)
    out[:3, 3] = 0.2 * w
    return out, [w]


def _contrast(active: bool) -> Drawn:
    w = _normal(active)
    s = 2.0 ** (0.5 * w)
    return _diagonal(s, s, s, 1.0), [w]


def _luma_flip(active: bool) -> Drawn:
    w = float(_chance(0.5) and active)
    return torch.eye(4, dtype=torch.float64) - 2.0 * w * _LUMA, [w]


def _hue(active: bool) -> Drawn:
    angle = math.pi * _uniform() * active
    c, s = math.cos(angle), math.sin(angle) / math.sqrt(3.0)
    out = c * torch.eye(4, dtype=torch.float64) + (1.0 - c) * _LUMA
    out[:3, :3] += s * torch.tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]], dtype=torch.float64)
    out[3, 3] = 1.0
    return out, [math.cos(angle) - 1.0, math.sin(angle)]


def _saturation(active: bool) -> Drawn:
    w = _normal(active)
    out = _LUMA + 2.0**w * (_diagonal(1.0, 1.0, 1.0, 0.0) - _LUMA)
    out[3, 3] = 1.0
    return out, [w]


COLOUR: Mapping[str, tuple[int, Callable[[bool], Drawn]]] = {
    "brightness": (1, _brightness),
    "contrast": (1, _contrast),
    "luma_flip": (1, _luma_flip),
    "hue": (2, _hue),
    "saturation": (1, _saturation),
}


def recoloured(image: Tensor, matrix: Tensor) -> Tensor:
    """``image`` [3 or 1, height, width] with its colours transformed; untouched by the identity.
    Of a grey image hue and saturation change nothing."""
    if torch.equal(matrix, torch.eye(4, dtype=matrix.dtype)):
        return image
    m = matrix.to(image)
    out = torch.einsum("ij,jhw->ihw", m[:3, :3], image.expand(3, -1, -1)) + m[:3, 3, None, None]
    return out[: len(image)]
