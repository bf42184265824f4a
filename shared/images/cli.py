"""The ``imagediff`` command: images and the toys of the plane."""

from __future__ import annotations

from shared import cli
from shared.cli import Program
from shared.images.convert import CONVERTERS

PROGRAM = Program(
    name="imagediff",
    title="Diffusion models of images, and of toy distributions in the plane.",
    packages=("shared.images.", "shared.toys."),
    default="digits",
    examples=(
        "train experiment=digits out=runs/digits",
        "train experiment=toys out=runs/toys",
        "sample run=runs/digits n=100 solver=dpmpp_2m steps=50 seed=0 out=samples",
        "sample run=runs/digits request.label=3",
        "evaluate samples",
        "convert ddpm-cifar10-32 out=runs/ddpm",
    ),
    converters=CONVERTERS,
    reader="shared.images.convert:read",
)


def main() -> int:
    """Entry point."""
    return cli.main(PROGRAM)
