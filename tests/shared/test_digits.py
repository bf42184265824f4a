"""The image domain with the digits of scikit-learn, its network and its files."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from shared.domains import Invalid
from shared.images.domain import Images, frechet_distance
from shared.images.networks import UNet, image_denoiser
from shared.schedules import VPCosine


@pytest.fixture(scope="module")
def digits() -> Images:
    return Images()


def test_data_are_scaled_labelled_and_split(digits):
    train, validation = digits.datasets()
    assert len(train) + len(validation) == 1797
    assert len(validation) == 180
    batch = digits.collate([validation[i] for i in range(180)])
    x = batch.state["x"]
    assert x.shape == (180, 1, 8, 8)
    assert (float(x.min()), float(x.max())) == (-1.0, 1.0)
    assert np.bincount(batch.cond["label"]).min() > 8


def test_training_hides_some_labels(digits):
    train, validation = digits.datasets()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        hidden = [int(train[i]["label"]) == 10 for i in range(1000)]
    assert 0.07 < np.mean(hidden) < 0.13
    assert all(int(validation[i]["label"]) < 10 for i in range(180))


def test_decoding_inverts_the_scaling(digits):
    images = digits.pictures[:50]
    items = digits.decode({"x": digits.encode(images)}, None)
    assert all(np.array_equal(a, b) for a, b in zip(items, images, strict=True))
    broken = digits.encode(images[:2]).clone()
    broken[1, 0, 3, 3] = math.nan
    assert [isinstance(i, Invalid) for i in digits.decode({"x": broken}, None)] == [False, True]
    wild = digits.decode({"x": torch.tensor([-9.0, 9.0]).reshape(2, 1, 1, 1)}, None)
    assert [int(item[0, 0]) for item in wild] == [0, 255]


def test_templates_draw_their_own_classes(digits):
    whole = digits.template(5, range(400)).cond["label"]
    parts = digits.template(5, [3, 399]).cond["label"]
    assert parts.tolist() == [whole[3], whole[399]]
    assert np.bincount(whole, minlength=10).min() > 20
    assert digits.template(5, [0, 1], label=3).cond["label"].tolist() == [3, 3]
    assert digits.template(5, [0], label="any").cond["label"].tolist() == [10]
    for wrong in (10, -1, "three", 1.5):
        with pytest.raises(ValueError, match="is not a class"):
            digits.template(5, [0], label=wrong)
    with pytest.raises(ValueError, match="did you mean 'label'"):
        digits.template(5, [0], lable=3)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".png"])
@pytest.mark.parametrize("colour", [False, True])
def test_files_round_trip_and_grow(tmp_path, digits, suffix, colour):
    images = digits.pictures[:7]
    images = np.stack([images, images // 2, images // 3], axis=-1) if colour else images
    path = tmp_path / f"images{suffix}"
    digits.write(path, images[:3])
    digits.write(path, images[3:])
    assert np.array_equal(np.stack(list(digits.read(path))), images)
    assert np.array_equal(np.stack(list(digits.read(tmp_path))), images)


def test_bad_files_are_refused(tmp_path, digits):
    np.savez(tmp_path / "float.npz", images=np.zeros((2, 8, 8)))
    np.savez(tmp_path / "size.npz", images=np.zeros((2, 9, 8), np.uint8))
    np.savez(tmp_path / "name.npz", pictures=np.zeros((2, 8, 8), np.uint8))
    (tmp_path / "torn.npy").write_bytes(b"\x93NUMPY\x01\x00v\x00{'descr'")
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04rubbish")
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
    assert "uint8" in next(digits.read(tmp_path / "float.npz")).reason
    assert "(9, 8)" in next(digits.read(tmp_path / "size.npz")).reason
    for name in ("name.npz", "torn.npy", "torn.npz", "torn.png", "some.txt"):
        (tmp_path / "some.txt").touch()
        with pytest.raises(ValueError, match=name):
            list(digits.read(tmp_path / name))
    with pytest.raises(FileNotFoundError):
        list(digits.read(tmp_path / "absent.npy"))


def test_own_images_from_a_file(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 16, 12, 3), dtype=np.uint8)
    np.savez(tmp_path / "own.npz", images=images)
    domain = Images(str(tmp_path / "own.npz"))
    assert domain.shape == (3, 16, 12)
    assert domain.classes == 0
    assert domain.null_condition() == {}
    assert domain.template(0, [0, 1]).state["x"].shape == (2, 3, 16, 12)
    with pytest.raises(ValueError, match="no classes"):
        domain.template(0, [0], label=1)
    state = domain.collate([domain.datasets()[0][0]]).state
    first = int(np.flatnonzero(~domain.held_out)[0])
    assert np.array_equal(domain.decode(state, None)[0], images[first])
    with pytest.raises(FileNotFoundError, match="no file"):
        Images("absent.npz").statistics()


def test_a_trained_model_needs_no_data():
    domain = Images("absent.npz")
    domain.restore({"domain": "images", "shape": [1, 8, 8], "class_counts": [5, 5]})
    assert domain.template(0, [0]).state["x"].shape == (1, 1, 8, 8)
    with pytest.raises(ValueError, match="not images"):
        domain.restore({"domain": "toys"})


def test_frechet_distance_of_known_gaussians():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((100_000, 2)), rng.standard_normal((100_000, 2)) * [1.0, 3.0] + 2.0
    assert frechet_distance(a, b) == pytest.approx(8.0 + 4.0, rel=0.02)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9)


def test_metrics_prefer_digits_to_noise(digits):
    held = list(digits.pictures[digits.held_out])
    rng = np.random.default_rng(0)
    noise = list(rng.integers(0, 256, (180, 8, 8), dtype=np.uint8))
    good, bad = (digits.metrics(items)["frechet_pca32"] for items in (held, noise))
    assert good.high < bad.low / 5
    assert good.n == 180
    mixed = digits.metrics([*held, Invalid("x", "y")])
    assert mixed["valid"].value == pytest.approx(180 / 181)
    assert mixed["frechet_pca32"].value == good.value
    assert set(digits.metrics([Invalid("x", "y")])) == {"valid"}
    assert digits.metrics(held, held)["frechet_pca32"].value == pytest.approx(0.0, abs=1e-8)


def test_the_network_uses_time_and_class_and_no_condition_means_any(digits):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        network = UNet(1, (8, 16), blocks=2, classes=10).double()
        torch.nn.init.normal_(network.leave.weight)
        torch.nn.init.normal_(network.down[0].conv2.weight)
    x, code = {"x": torch.ones(2, 1, 8, 8).double()}, torch.zeros(2).double()

    def out(code=code, label=None):
        cond = None if label is None else {"label": torch.tensor([label, label])}
        return network(x, code, None, cond)["x"]

    assert out().shape == (2, 1, 8, 8)
    assert torch.equal(out(), out(label=10))
    assert not torch.allclose(out(label=1), out(label=2))
    assert not torch.allclose(out(), out(code=code + 1))


def test_sides_that_cannot_be_halved_are_refused(digits):
    with pytest.raises(ValueError, match="divisible by 16"):
        image_denoiser(digits, VPCosine(), widths=(8, 8, 8, 8, 8))
