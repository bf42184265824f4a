"""The noising process of molecules in 3D, and the heads of its fields.

Two or three fields share one schedule: ``positions`` on the subspace of zero centre of mass,
``types`` (one-hot times a feature scale) and, optionally, ``charges`` (atomic number or formal
charge times a scale).
"""

from __future__ import annotations

from shared.denoisers import Head
from shared.geometry import CentredPoints, Points
from shared.losses import Native, NormalLogSNR
from shared.predictions import KarrasPreconditioned
from shared.process import Field, Process
from shared.schedules import Polynomial, Schedule, VariancePreserving

POSITION_STD = 1.398
"""Standard deviation of a centred coordinate over QM9, Angstrom."""


def molecule_process(schedule: Schedule | None = None, *, charges: bool = False) -> Process:
    """Positions, types and optionally charges under one schedule, EDM's polynomial by default."""
    schedule = schedule or Polynomial()
    # samplers of variance-preserving molecules start from unit normals, as published
    std = 1.0 if isinstance(schedule, VariancePreserving) else None
    names = ["positions", "types", *(["charges"] if charges else [])]
    geometries = {"positions": CentredPoints()}
    return Process({name: Field(schedule, geometries.get(name, Points()), std) for name in names})


def karras_heads(
    types: int,
    *,
    scale: float = 0.25,
    position_std: float = POSITION_STD,
    charges: bool = False,
) -> dict[str, Head]:
    """Preconditioned data prediction for positions, a classifier for types.

    Args:
        types: number of elements. scale: value of a set entry of ``types``.
        position_std: standard deviation of a coordinate of the data, in model units.
        charges: a head for formal charges too, of which most are zero.
    """
    heads = {
        "positions": Head(KarrasPreconditioned(position_std), Native()),
        "types": Head(
            KarrasPreconditioned(scale * types**-0.5), Native(), weight=0.5, categories=scale
        ),
    }
    return heads | ({"charges": Head(KarrasPreconditioned(0.05), Native())} if charges else {})


def fast_times() -> NormalLogSNR:
    """Training times that dwell where bonds form: log(alpha^2 / sigma^2) ~ N(1.5, 2.2^2), cut to
    [-11, 11.4]; half of it is the log-SNR of this library."""
    return NormalLogSNR(mean=0.75, std=1.1, low=-5.5, high=5.7)


def energy_times() -> NormalLogSNR:
    """Training times of property networks: half log-SNR ~ N(2, 1.3^2). Below about 1 the elements
    (one-hot rows of length 1/4) drown in the noise, and with them every property."""
    return NormalLogSNR(mean=2.0, std=1.3, low=-3.0, high=5.7)
