"""Features: the digits' own network, and Inception networks from files."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from torch import nn

from shared.images.domain import Images
from shared.images.features import DIGITS, choose, digits, inception


class Pooling(nn.Module):
    """Stands in for Inception: features and logits."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = x.float().flatten(2).mean(2)
        return y, y[:, :2]


class Nvidia(nn.Module):
    """The call of NVIDIA's export."""

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        y = x.float().flatten(2).mean(2)
        return y if return_features else y.softmax(1)


def scripted(module, path):
    torch.jit.script(module).save(str(path))
    return path


def test_the_shipped_network_is_small_and_knows_digits():
    assert DIGITS.stat().st_size < 200_000
    domain = Images()
    held = domain.held_out
    images, labels = domain.pictures, domain.pictures.labels
    features, logits = digits()(images[held])
    assert features.shape == (180, 64)
    assert (logits.argmax(1) == labels[held]).mean() > 0.95


def test_other_sizes_and_colours_are_refused():
    for shape in ((2, 9, 9), (2, 8, 8, 3)):
        with pytest.raises(ValueError, match="give domain.features=FILE"):
            digits()(np.zeros(shape, dtype=np.uint8))


@pytest.mark.parametrize("module", [Pooling(), Nvidia()])
def test_torchscript_with_grey_and_colour(tmp_path, module):
    features = inception(scripted(module, tmp_path / "net.pt"))
    grey = np.arange(2 * 16, dtype=np.uint8).reshape(2, 4, 4)
    found, logits = features(grey)
    assert found[:, 0].tolist() == [7.5, 23.5]
    assert logits.shape[0] == 2
    colour, _ = features(np.stack([grey, grey + 1, grey], axis=-1))
    assert colour[0].tolist() == [7.5, 8.5, 7.5]


def test_the_hash_is_checked_and_named(tmp_path):
    path = scripted(Pooling(), tmp_path / "net.pt")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert choose(str(path), digest[:10]).name == f"inception-{digest[:8]}"
    with pytest.raises(ValueError, match="does not begin with 0000"):
        choose(str(path), "0000")
    named = path.rename(tmp_path / "net-6726825d.pth")
    with pytest.raises(ValueError, match="does not begin with 6726825d"):
        inception(named)
    with pytest.raises(FileNotFoundError, match=r"missing\.pt"):
        inception(tmp_path / "missing.pt")


def test_weights_need_their_reader(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "weights.pth")
    with pytest.raises((ModuleNotFoundError, ValueError), match=r"weights\.pth"):
        inception(tmp_path / "weights.pth")


def test_a_file_judges_a_domain(tmp_path):
    path = scripted(Pooling(), tmp_path / "net.pt")
    domain = Images(features=str(path))
    images = domain.pictures
    scores = domain.metrics(list(images[:40]), list(images[40:90]))
    name = choose(str(path)).name
    assert {f"fid_{name}_vs_given50", f"inception_score_{name}"} <= scores.keys()
    assert scores[f"fid_{name}_vs_given50"].n == 40
