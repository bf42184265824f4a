"""Diffusion models of molecules, in three dimensions and as graphs."""

from pathlib import Path

from molediff.files import read, write
from molediff.geometric.metrics import evaluate
from molediff.models import load
from molediff.molecules import Molecule
from shared.domains import Invalid
from shared.runs import register_pretrained

register_pretrained(Path(__file__).parent / "pretrained")

__all__ = ["Invalid", "Molecule", "evaluate", "load", "read", "write"]
