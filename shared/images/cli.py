"""The ``imagediff`` command: images and the toys of the plane."""

from __future__ import annotations

from shared import cli
from shared.cli import Program, Verb
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
        "edit samples/samples.npy run=digits edit.method=sdedit edit.strength=0.4 out=edited",
        "convert ddpm-cifar10-32 out=runs/ddpm",
        "prepare celeba size=64 out=data/celeba64",
    ),
    more={
        "prepare": Verb(
            "write a data set of photographs as arrays of one size, or the latents of one",
            "shared.images.prepare:prepare",
            bare=True,
            examples=(
                "imagenet size=64 out=data/imagenet64",
                "data/imagenet64 autoencoder=runs/autoencoder",
            ),
        ),
        "edit": Verb(
            "edit images with a model: SDEdit, EGSDE, inpainting, super-resolution",
            "shared.images.editing:edit",
            bare=True,
            examples=("mine.npz run=digits edit.method=inpaint edit.keep=left out=edited",),
        ),
        "bits": Verb(
            "an upper bound of the bits per dimension of validation images",
            "shared.images.bits:verb",
            examples=("run=digits",),
        ),
        "picture": Verb(
            "a PNG of how samples come about, or of given images in a grid",
            "shared.images.editing:picture",
            bare=True,
            file=True,
            examples=("run=digits n=8 steps=10 out=trajectory.png", "samples out=grid.png"),
        ),
    },
    converters=CONVERTERS,
    reader="shared.images.convert:read",
)


def main() -> int:
    """Entry point."""
    return cli.main(PROGRAM)
