"""Bits per dimension of the shipped model."""

from __future__ import annotations

import pytest

import shared.images  # noqa: F401 (registers its pretrained models)
from shared.cli import main
from shared.images.bits import bits
from shared.images.cli import PROGRAM
from shared.models import load
from shared.toys import Toys


def test_the_bound_beats_eight_bits_and_repeats(capsys):
    model = load("digits")
    found = bits(model, 16, 8)
    assert found.n == 16
    assert 0.0 < found.value < 8.0  # uniform noise has 8
    assert bits(model, 16, 8).value == found.value
    assert main(PROGRAM, ["bits", "run=digits", "n=4", "evaluations=2"]) == 0
    assert "bits per dimension" in capsys.readouterr().out


def test_only_images_have_pixels():
    model = load("digits")
    other = type(model)(model.denoiser, Toys(), model.run, model.checkpoint)
    with pytest.raises(ValueError, match="no images"):
        bits(other, 1, 1)
