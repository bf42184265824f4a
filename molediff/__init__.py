"""Diffusion models of molecules, in three dimensions and as graphs."""

from molediff.files import read, write
from molediff.geometric.metrics import evaluate
from molediff.molecules import Molecule
from shared.domains import Invalid

__all__ = ["Invalid", "Molecule", "evaluate", "read", "write"]
