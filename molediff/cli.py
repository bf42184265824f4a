"""The ``molediff`` command."""

from __future__ import annotations

from shared import cli
from shared.cli import Program

PROGRAM = Program(name="molediff", title="Diffusion models of molecules.", packages=("molediff.",))


def main() -> int:
    """Entry point."""
    return cli.main(PROGRAM)
