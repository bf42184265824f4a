"""Image data sets in files."""

from __future__ import annotations

import io
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from shared.images.data import load
from shared.images.domain import Images

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
LABELS = np.array([3, 1, 4, 1, 5, 9])


def rows():
    """As CIFAR-10 keeps them: all red values, then green, then blue."""
    return PIXELS.transpose(0, 3, 1, 2).reshape(6, -1)


@pytest.mark.parametrize("kind", ["python", "binary"])
def test_the_original_cifar10(tmp_path, kind):
    for k, part in enumerate((slice(0, 4), slice(4, 6)), start=1):
        pixels, labels = rows()[part], LABELS[part]
        if kind == "python":
            content = {b"data": pixels, b"labels": labels.tolist(), b"batch_label": b"x"}
            (tmp_path / f"data_batch_{k}").write_bytes(pickle.dumps(content, protocol=2))
        else:
            both = np.concatenate([labels[:, None].astype(np.uint8), pixels], axis=1)
            (tmp_path / f"data_batch_{k}.bin").write_bytes(both.tobytes())
    (tmp_path / "batches.meta").write_bytes(b"")
    images, labels = load(tmp_path)
    assert np.array_equal(images, PIXELS)
    assert np.array_equal(labels, LABELS)


def test_a_batch_runs_nothing(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trap"),)

    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({b"data": Evil(), b"labels": [1]}))
    with pytest.raises(ValueError, match=r"data_batch_1 is damaged.*mkdir"):
        load(tmp_path)
    assert not (tmp_path / "trap").exists()


def archive(path, images, **more):
    """Lossless pictures in the layout of a JPEG archive."""
    files = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        files.append(buffer.getvalue())
    offsets = np.cumsum([0, *map(len, files)])
    data = np.frombuffer(b"".join(files), dtype=np.uint8).copy()
    np.savez(path, **{"jpeg": data, "offsets": offsets, **more})


def test_an_archive_of_compressed_pictures(tmp_path):
    archive(tmp_path / "a.npz", PIXELS, labels=LABELS.astype(np.uint8))
    images, labels = load(tmp_path / "a.npz")
    assert np.array_equal(images, PIXELS)
    assert np.array_equal(labels, LABELS)
    assert Images(str(tmp_path / "a.npz"), validation=0.3).shape == (3, 32, 32)


def test_cifar10_as_jpeg(data_folder):
    with np.load(data_folder("cifar10/train_jpeg.npz")) as arrays:
        jpeg, offsets, labels = (arrays[k] for k in ("jpeg", "offsets", "labels"))
    with Image.open(io.BytesIO(jpeg[: offsets[1]].tobytes())) as image:
        assert (image.size, image.mode) == ((32, 32), "RGB")
    assert np.bincount(labels).shape == (10,)


@pytest.mark.parametrize("classes", [True, False])
def test_a_folder_of_pictures(tmp_path, classes):
    for k, image in enumerate(PIXELS):
        folder = tmp_path / ("ab"[k % 2] if classes else ".")
        folder.mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / f"{k}.png")
    images, labels = load(tmp_path)
    order = [0, 2, 4, 1, 3, 5] if classes else range(6)
    assert np.array_equal(images, PIXELS[list(order)])
    assert (labels.tolist() if classes else labels) == ([0, 0, 0, 1, 1, 1] if classes else None)


def test_mistakes_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        load(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"no \.png"):
        load(tmp_path)
    Image.fromarray(PIXELS[0]).save(tmp_path / "0.png")
    Image.fromarray(PIXELS[0][:16]).save(tmp_path / "1.png")
    with pytest.raises(ValueError, match=r"1\.png is \[16, 32, 3\].*one size"):
        load(tmp_path)
    (tmp_path / "1.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"1\.png is damaged"):
        load(tmp_path)
    (tmp_path / "a.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"a\.npz is damaged"):
        load(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", images=PIXELS, labels=LABELS[:2])
    with pytest.raises(ValueError, match=r"6 images, but labels of shape \(2,\)"):
        load(tmp_path / "a.npz")
    (tmp_path / "data_batch_1.bin").write_bytes(b"123")
    with pytest.raises(ValueError, match="truncated: 3 bytes"):
        load(tmp_path)


def test_a_corrupt_jpeg_is_named(tmp_path):
    archive(tmp_path / "a.npz", PIXELS)
    with np.load(tmp_path / "a.npz") as arrays:
        content = dict(arrays)
    content["jpeg"][content["offsets"][2] :][:8] = 0
    np.savez(tmp_path / "a.npz", **content)
    with pytest.raises(ValueError, match=r"image 2 is damaged"):
        load(tmp_path / "a.npz")
