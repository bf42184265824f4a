"""Diffusion models of point clouds: completion of partial scans."""

from pathlib import Path

from pointdiff.clouds import Cloud
from pointdiff.completion import load
from pointdiff.files import read, read_one, write, write_one
from pointdiff.metrics import evaluate
from pointdiff.scanning import Scanner
from shared.domains import Invalid
from shared.runs import register_pretrained

register_pretrained(Path(__file__).parent / "pretrained")

__all__ = [
    "Cloud", "Invalid", "Scanner", "evaluate", "load", "read", "read_one", "write", "write_one",
]  # fmt: skip
