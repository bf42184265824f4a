"""The ``pointdiff`` command."""

from __future__ import annotations

from shared import cli
from shared.cli import Program

PROGRAM = Program(
    name="pointdiff", title="Diffusion models of point clouds.", packages=("pointdiff.",)
)


def main() -> int:
    """Entry point."""
    return cli.main(PROGRAM)
