"""Features: the digits' own network, and Inception networks from files."""

from __future__ import annotations

import hashlib
import os
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from shared.cli import main
from shared.images.cli import PROGRAM
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


class Reader(nn.Module):
    """Stands in for torch-fidelity, which unpickles the file that it is given."""

    def __init__(self, name, features_list, path):
        super().__init__()
        assert features_list == ["2048", "logits_unbiased"]
        self.weight = torch.load(path, weights_only=False)["weight"]

    def forward(self, x):
        found = x.float().flatten(2).mean(2) * self.weight
        return found, found[:, :2]


@pytest.fixture
def reader(monkeypatch):
    module = types.SimpleNamespace(FeatureExtractorInceptionV3=Reader)
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.usefixtures("reader")
def test_weights_by_a_stand_in_for_their_reader(tmp_path, suffix):
    path, state = tmp_path / f"weights.{suffix}", {"weight": torch.tensor([1.0, 2.0, 3.0])}
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    features = choose(str(path), digest)
    found, logits = features(np.full((2, 4, 4), 5, dtype=np.uint8))
    assert features.name == f"inception-{digest[:8]}"
    assert found.tolist() == [[5.0, 10.0, 15.0]] * 2
    assert logits.tolist() == [[5.0, 10.0]] * 2
    with pytest.raises(ValueError, match="does not begin with abcd"):
        choose(str(path), "abcd")


@pytest.mark.usefixtures("reader")
def test_weights_run_nothing(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trap"),)

    (tmp_path / "weights.pth").write_bytes(pickle.dumps({"weight": Evil()}, protocol=2))
    torch.save({"weight": Evil()}, tmp_path / "zipped.pth")
    for name in ("weights.pth", "zipped.pth"):
        with pytest.raises(ValueError, match=rf"{name} is no Inception"):
            inception(tmp_path / name)
    assert not (tmp_path / "trap").exists()


def test_weights_need_their_reader(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "weights.pth")
    with pytest.raises((ModuleNotFoundError, ValueError), match=r"weights\.pth"):
        inception(tmp_path / "weights.pth")


def test_weights_of_the_published_shape(tmp_path, monkeypatch):
    """With random numbers in place of the published ones."""
    reader = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    network = reader.FeatureExtractorInceptionV3
    with monkeypatch.context() as patch, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        patch.setattr(reader, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(network, "load_state_dict", lambda *_: None)
        state = network("inception-v3-compat", ["2048"]).state_dict()
    torch.save(state, tmp_path / "weights.pth")
    pictures = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    found, logits = inception(tmp_path / "weights.pth")(pictures)
    assert found.shape == (2, 2048)
    assert logits.shape == (2, 1008)
    assert np.abs(found[0] - found[1]).max() > 0


def test_a_file_judges_a_domain(tmp_path):
    path = scripted(Pooling(), tmp_path / "net.pt")
    domain = Images(features=str(path))
    images = domain.pictures
    scores = domain.metrics(list(images[:40]), list(images[40:90]))
    name = choose(str(path)).name
    assert {f"fid_{name}_vs_given50", f"inception_score_{name}"} <= scores.keys()
    assert scores[f"fid_{name}_vs_given50"].n == 40


def test_a_file_judges_on_the_command_line(tmp_path, capsys):
    path = scripted(Pooling(), tmp_path / "net.pt")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", images=images)
    np.savez(tmp_path / "made.npz", images=images[:30] // 2)
    words = ["evaluate", str(tmp_path / "made.npz"), "domain=images"]
    words += [f"domain.data={tmp_path / 'data.npz'}", f"domain.features={path}"]
    assert main(PROGRAM, [*words, f"domain.features_sha256={digest[:12]}"]) == 0
    assert f"fid_inception-{digest[:8]}_vs_train54" in capsys.readouterr().out
    assert main(PROGRAM, [*words, "domain.features_sha256=abc123"]) == 2
    assert "does not begin with abc123" in capsys.readouterr().err
