"""Molecules in three dimensions."""

from molediff.geometric.convert import edm_options, edm_weights, gdm_weights, invariant_weights
from molediff.geometric.edm import (
    AtomDecoder,
    EDMSampler,
    edm_heads,
    l2_loss,
)
from molediff.geometric.egnn import EGNN, EGNNOptions, InvariantEGNN
from molediff.geometric.gdm import GDM, random_rotations
from molediff.geometric.process import fast_times, karras_heads, molecule_process
from molediff.geometric.transformer import EquivariantTransformer

__all__ = [
    "EGNN",
    "GDM",
    "AtomDecoder",
    "EDMSampler",
    "EGNNOptions",
    "EquivariantTransformer",
    "InvariantEGNN",
    "edm_heads",
    "edm_options",
    "edm_weights",
    "fast_times",
    "gdm_weights",
    "invariant_weights",
    "karras_heads",
    "l2_loss",
    "molecule_process",
    "random_rotations",
]
