"""Denoisers of 3D molecules, built for a domain: what the configurations of group ``model``
name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from molediff.geometric.closed_shell import ClosedShell
from molediff.geometric.edm import edm_heads
from molediff.geometric.egnn import EGNN, EGNNOptions, InvariantEGNN
from molediff.geometric.gdm import GDM
from molediff.geometric.process import (
    energy_times,
    fast_times,
    karras_heads,
    molecule_process,
)
from molediff.geometric.properties import (
    InvariantTransformer,
    NoNoise,
    Pooled,
    PropertyModel,
)
from molediff.geometric.transformer import EquivariantTransformer
from shared.denoisers import Denoiser, Head, TimeCode
from shared.losses import UniformTime
from shared.schedules import Schedule

if TYPE_CHECKING:
    from molediff.geometric.domain import Molecules


def _features(domain: Molecules) -> dict[str, int]:
    return {"types": len(domain.elements)} | ({"charges": 1} if domain.charges else {})


def transformer(domain: Molecules, schedule: Schedule, **options: Any) -> Denoiser:
    """The equivariant transformer with preconditioned data prediction and a classifier for the
    elements, which keeps to closed shells where all training molecules do; ``options`` as in
    :class:`EquivariantTransformer`."""
    network = EquivariantTransformer(
        _features(domain),
        angstrom=domain.position_std,
        context=len(domain.properties),
        **options,
    )
    process = molecule_process(schedule, charges=domain.charges is not None)
    parts = (network, process, _karras_heads(domain))
    if domain.closed_shell:
        return ClosedShell(*parts, times=fast_times(), atomic_numbers=domain.elements)
    return Denoiser(*parts, times=fast_times())


def property_transformer(
    domain: Molecules,
    schedule: Schedule,
    noisy: bool = True,
    loss: str = "absolute",
    **options: Any,
) -> PropertyModel:
    """Predicts ``domain.properties`` with the trunk of :func:`transformer`, at every noise level
    or, for ``noisy=False``, of clean molecules."""
    _need_properties(domain)
    network = InvariantTransformer(
        _features(domain),
        angstrom=domain.position_std,
        outputs=len(domain.properties),
        **options,
    )
    return _property_model(network, domain, schedule, noisy, loss)


def property_egnn(
    domain: Molecules,
    schedule: Schedule,
    noisy: bool = True,
    loss: str = "absolute",
    **options: Any,
) -> PropertyModel:
    """The same with the network of EEGSDE and of EDM's classifier; ``options`` as in
    :class:`EGNNOptions`."""
    _need_properties(domain)
    network = InvariantEGNN(
        _features(domain),
        outputs=len(domain.properties),
        timed=noisy,
        options=EGNNOptions(**options),
    )
    return _property_model(Pooled(network), domain, schedule, noisy, loss)


def _property_model(
    network: Any, domain: Molecules, schedule: Schedule, noisy: bool, loss: str
) -> PropertyModel:
    return PropertyModel(
        network,
        molecule_process(schedule, charges=domain.charges is not None),
        _karras_heads(domain),
        domain.properties,
        energy_times() if noisy else NoNoise(),
        loss,
    )


def _need_properties(domain: Molecules) -> None:
    if not domain.properties:
        raise ValueError(
            "domain.properties is empty: name the columns that the model is to predict, such as "
            "domain.properties=[gap,mu]."
        )


def _karras_heads(domain: Molecules) -> dict[str, Head]:
    return karras_heads(
        len(domain.elements),
        scale=domain.scale,
        position_std=domain.position_std,
        charges=domain.charges is not None,
    )


def egnn(domain: Molecules, schedule: Schedule, **options: Any) -> Denoiser:
    """EDM as published: EGNN, noise prediction, uniform times; ``options`` as in
    :class:`EGNNOptions`."""
    network = EGNN(
        _features(domain), context=len(domain.properties), options=EGNNOptions(**options)
    )
    return _published(network, domain, schedule)


def gdm(domain: Molecules, schedule: Schedule, **options: Any) -> Denoiser:
    """GDM, EDM's baseline that is not equivariant; ``augment=True`` turns training molecules."""
    augment = options.pop("augment", True)
    network = GDM(
        _features(domain),
        context=len(domain.properties),
        augment=augment,
        options=EGNNOptions(**options),
    )
    return _published(network, domain, schedule)


def tensor_products(domain: Molecules, schedule: Schedule, **options: Any) -> Denoiser:
    """Messages by tensor products of spherical harmonics (needs e3nn)."""
    from molediff.geometric.e3nn_network import TensorProductNetwork

    network = TensorProductNetwork(_features(domain), context=len(domain.properties), **options)
    return _published(network, domain, schedule)


def _published(network: Any, domain: Molecules, schedule: Schedule) -> Denoiser:
    return Denoiser(
        network,
        molecule_process(schedule, charges=domain.charges is not None),
        edm_heads(len(domain.elements), charges=domain.charges is not None),
        TimeCode("time"),
        UniformTime(),
    )
