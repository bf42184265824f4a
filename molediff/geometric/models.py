"""Denoisers of 3D molecules, built for a domain: what the configurations of group ``model``
name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from molediff.geometric.edm import edm_heads
from molediff.geometric.egnn import EGNN, EGNNOptions
from molediff.geometric.gdm import GDM
from molediff.geometric.process import fast_times, karras_heads, molecule_process
from molediff.geometric.transformer import EquivariantTransformer
from shared.denoisers import Denoiser, TimeCode
from shared.losses import UniformTime
from shared.schedules import Schedule

if TYPE_CHECKING:
    from molediff.geometric.domain import Molecules


def _features(domain: Molecules) -> dict[str, int]:
    return {"types": len(domain.elements)} | ({"charges": 1} if domain.charges else {})


def transformer(domain: Molecules, schedule: Schedule, **options: Any) -> Denoiser:
    """The equivariant transformer with preconditioned data prediction and a classifier for the
    elements; ``options`` as in :class:`EquivariantTransformer`."""
    std = domain.position_std
    network = EquivariantTransformer(_features(domain), angstrom=std, **options)
    heads = karras_heads(
        len(domain.elements),
        scale=domain.scale,
        position_std=std,
        charges=domain.charges is not None,
    )
    process = molecule_process(schedule, charges=domain.charges is not None)
    return Denoiser(network, process, heads, times=fast_times())


def egnn(domain: Molecules, schedule: Schedule, **options: Any) -> Denoiser:
    """EDM as published: EGNN, noise prediction, uniform times; ``options`` as in
    :class:`EGNNOptions`."""
    network = EGNN(_features(domain), options=EGNNOptions(**options))
    return _published(network, domain, schedule)


def gdm(domain: Molecules, schedule: Schedule, **options: Any) -> Denoiser:
    """GDM, EDM's baseline that is not equivariant; ``augment=True`` turns training molecules."""
    augment = options.pop("augment", True)
    network = GDM(_features(domain), augment=augment, options=EGNNOptions(**options))
    return _published(network, domain, schedule)


def tensor_products(domain: Molecules, schedule: Schedule, **options: Any) -> Denoiser:
    """Messages by tensor products of spherical harmonics (needs e3nn)."""
    from molediff.geometric.e3nn_network import TensorProductNetwork

    return _published(TensorProductNetwork(_features(domain), **options), domain, schedule)


def _published(network: Any, domain: Molecules, schedule: Schedule) -> Denoiser:
    return Denoiser(
        network,
        molecule_process(schedule, charges=domain.charges is not None),
        edm_heads(len(domain.elements), charges=domain.charges is not None),
        TimeCode("time"),
        UniformTime(),
    )
